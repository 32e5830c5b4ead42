// SwiGLU kernels that are right wherever a grid of the contract's size covers everything in one pass, and wrong beyond it, on
// purpose: they lack the loop in steps of the grid. What `--against` must catch on the shape it times.

#include <cuda_bf16.h>

using index_t = long long;
using bf16 = __nv_bfloat16;

// Grids are sized for 16-byte vectors, or for elements where rows do not allow those: eight elements a thread are enough.
constexpr int per_thread = 8;

__device__ index_t first_item() {
  return (static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x) * per_thread;
}

extern "C" __global__ void swiglu_forward_bf16(const bf16* gate, index_t gate_stride, const bf16* up, index_t up_stride,
                                               bf16* out, index_t out_stride, index_t rows, index_t cols) {
  for (index_t i = first_item(), end = i + per_thread; i < end && i < rows * cols; ++i) {
    const index_t row = i / cols, col = i % cols;
    const float g = __bfloat162float(gate[row * gate_stride + col]);
    const float u = __bfloat162float(up[row * up_stride + col]);
    out[row * out_stride + col] = __float2bfloat16_rn(g / (1.0f + __expf(-g)) * u);
  }
}

extern "C" __global__ void swiglu_backward_bf16(const bf16* dout, index_t dout_stride, const bf16* gate,
                                                index_t gate_stride, const bf16* up, index_t up_stride, bf16* dgate,
                                                index_t dgate_stride, bf16* dup, index_t dup_stride, index_t rows,
                                                index_t cols) {
  for (index_t i = first_item(), end = i + per_thread; i < end && i < rows * cols; ++i) {
    const index_t row = i / cols, col = i % cols;
    const float d = __bfloat162float(dout[row * dout_stride + col]);
    const float g = __bfloat162float(gate[row * gate_stride + col]);
    const float u = __bfloat162float(up[row * up_stride + col]);
    const float s = 1.0f / (1.0f + __expf(-g));
    dgate[row * dgate_stride + col] = __float2bfloat16_rn(d * u * s * (1.0f + g * (1.0f - s)));
    dup[row * dup_stride + col] = __float2bfloat16_rn(d * g * s);
  }
}
