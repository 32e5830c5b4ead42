// SwiGLU kernels that are wrong on purpose: what `--against` must catch. The forward leaves a row's last element out when
// there is an odd number of them; the backward forgets a term.

#include <cuda_bf16.h>

using index_t = long long;
using bf16 = __nv_bfloat16;

extern "C" __global__ void swiglu_forward_bf16(const bf16* gate, index_t gate_stride, const bf16* up, index_t up_stride,
                                               bf16* out, index_t out_stride, index_t rows, index_t cols) {
  const index_t width = cols / 2 * 2;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * width; i += step) {
    const index_t row = i / width, col = i % width;
    const float g = __bfloat162float(gate[row * gate_stride + col]);
    const float u = __bfloat162float(up[row * up_stride + col]);
    out[row * out_stride + col] = __float2bfloat16_rn(g / (1.0f + __expf(-g)) * u);
  }
}

extern "C" __global__ void swiglu_backward_bf16(const bf16* dout, index_t dout_stride, const bf16* gate,
                                                index_t gate_stride, const bf16* up, index_t up_stride, bf16* dgate,
                                                index_t dgate_stride, bf16* dup, index_t dup_stride, index_t rows,
                                                index_t cols) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * cols; i += step) {
    const index_t row = i / cols, col = i % cols;
    const float d = __bfloat162float(dout[row * dout_stride + col]);
    const float g = __bfloat162float(gate[row * gate_stride + col]);
    const float u = __bfloat162float(up[row * up_stride + col]);
    const float s = 1.0f / (1.0f + __expf(-g));
    dgate[row * dgate_stride + col] = __float2bfloat16_rn(d * u * s);
    dup[row * dup_stride + col] = __float2bfloat16_rn(d * g * s);
  }
}
