// An alternative to fsmoe's SwiGLU kernels for bf16, written against the contract in docs/kernels.md:
//
//   fsmoe bench kernels swiglu --against examples/kernels/swiglu.cu
//   fsmoe bench kernels swiglu_backward --against examples/kernels/swiglu.cu
//
// It moves two elements at a time, where ours moves eight, and asks for nothing but CUDA's own headers. Whatever it does
// not have, f16 and f32 here, stays ours.

#include <cuda_bf16.h>

#include <cstdint>

using index_t = long long;
using bf16 = __nv_bfloat16;

// Whether all rows begin on the boundary of a pair.
__device__ bool pairs(const void* data, index_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 4 == 0 && stride % 2 == 0;
}

// out = silu(gate) * up over (rows, cols), each tensor with a row stride of its own.
extern "C" __global__ void swiglu_forward_bf16(const bf16* gate, index_t gate_stride, const bf16* up, index_t up_stride,
                                               bf16* out, index_t out_stride, index_t rows, index_t cols) {
  const bool paired =
      pairs(gate, gate_stride) && pairs(up, up_stride) && pairs(out, out_stride) && cols % 2 == 0;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  const index_t first = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const index_t width = paired ? cols / 2 : cols;
  // Grids are sized for 16-byte vectors: a thread has several items.
  for (index_t item = first; item < rows * width; item += step) {
    const index_t row = item / width, col = item - row * width;
    if (paired) {
      const float2 g = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(gate + row * gate_stride)[col]);
      const float2 u = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(up + row * up_stride)[col]);
      const float2 y = {g.x / (1.0f + __expf(-g.x)) * u.x, g.y / (1.0f + __expf(-g.y)) * u.y};
      reinterpret_cast<__nv_bfloat162*>(out + row * out_stride)[col] = __float22bfloat162_rn(y);
    } else {
      const float g = __bfloat162float(gate[row * gate_stride + col]);
      const float u = __bfloat162float(up[row * up_stride + col]);
      out[row * out_stride + col] = __float2bfloat16_rn(g / (1.0f + __expf(-g)) * u);
    }
  }
}

// With s = sigmoid(gate): dup = dout * gate * s, dgate = dout * up * s * (1 + gate * (1 - s)).
extern "C" __global__ void swiglu_backward_bf16(const bf16* dout, index_t dout_stride, const bf16* gate,
                                                index_t gate_stride, const bf16* up, index_t up_stride, bf16* dgate,
                                                index_t dgate_stride, bf16* dup, index_t dup_stride, index_t rows,
                                                index_t cols) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  const index_t first = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (index_t item = first; item < rows * cols; item += step) {
    const index_t row = item / cols, col = item - row * cols;
    const float d = __bfloat162float(dout[row * dout_stride + col]);
    const float g = __bfloat162float(gate[row * gate_stride + col]);
    const float u = __bfloat162float(up[row * up_stride + col]);
    const float s = 1.0f / (1.0f + __expf(-g));
    dgate[row * dgate_stride + col] = __float2bfloat16_rn(d * u * s * (1.0f + g * (1.0f - s)));
    dup[row * dup_stride + col] = __float2bfloat16_rn(d * g * s);
  }
}
