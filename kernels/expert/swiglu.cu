// SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020): out = silu(gate) * up, silu(z) = z * sigmoid(z), elementwise
// over (rows, cols).
//
//   swiglu_forward_{bf16,f16,f32}(gate, gate_stride, up, up_stride, out, out_stride, rows, cols)
//   swiglu_backward_{...}(dout, dout_stride, gate, gate_stride, up, up_stride,
//                         dgate, dgate_stride, dup, dup_stride, rows, cols)
//
// Every tensor is row-major with a row stride of its own, in elements, at least cols: gate and up may be the two halves
// of one (rows, 2H) buffer, as one GEMM leaves them, and dgate and dup the halves of its gradient.
//
// Bound by memory: 3 values moved per result forward, 5 per pair of results backward. Any size and any alignment; where
// every row of every tensor starts on a 16-byte boundary they are moved in 16-byte vectors. No output may overlap another
// tensor's elements (the halves of one buffer do not).

#include "common/vector.cuh"
#include "expert/activation.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Forward

template <int N, typename T>
__device__ __forceinline__ void swiglu_forward_in(const T* __restrict__ gate, index_t gate_stride,
                                                  const T* __restrict__ up, index_t up_stride, T* __restrict__ out,
                                                  index_t out_stride, index_t rows, index_t cols) {
  for_each_vector<N>(rows, cols, [&](index_t row, index_t col, int count) {
    const T* g = gate + row * gate_stride + col;
    const T* u = up + row * up_stride + col;
    T* o = out + row * out_stride + col;
    if (count == N) {
      const Lanes<N> gates = load<N>(g);
      Lanes<N> lanes = load<N>(u);
#pragma unroll
      for (int i = 0; i < N; ++i) lanes[i] = swiglu<T>(gates[i], lanes[i]).value;
      store<N>(o, lanes);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) o[i] = from_f32<T>(swiglu<T>(to_f32(g[i]), to_f32(u[i])).value);
    }
  });
}

template <typename T>
__device__ __forceinline__ void swiglu_forward(const T* gate, index_t gate_stride, const T* up, index_t up_stride,
                                               T* out, index_t out_stride, index_t rows, index_t cols) {
  if (rows_are_aligned(gate, gate_stride) && rows_are_aligned(up, up_stride) && rows_are_aligned(out, out_stride)) {
    swiglu_forward_in<vector_width<T>>(gate, gate_stride, up, up_stride, out, out_stride, rows, cols);
  } else {
    swiglu_forward_in<1>(gate, gate_stride, up, up_stride, out, out_stride, rows, cols);
  }
}

// ----------------------------------------------------------------------------
// Backward: dgate = dout * d out / d gate, dup = dout * d out / d up

template <int N, typename T>
__device__ __forceinline__ void swiglu_backward_in(const T* __restrict__ dout, index_t dout_stride,
                                                   const T* __restrict__ gate, index_t gate_stride,
                                                   const T* __restrict__ up, index_t up_stride, T* __restrict__ dgate,
                                                   index_t dgate_stride, T* __restrict__ dup, index_t dup_stride,
                                                   index_t rows, index_t cols) {
  for_each_vector<N>(rows, cols, [&](index_t row, index_t col, int count) {
    const T* d = dout + row * dout_stride + col;
    const T* g = gate + row * gate_stride + col;
    const T* u = up + row * up_stride + col;
    T* dg = dgate + row * dgate_stride + col;
    T* du = dup + row * dup_stride + col;
    if (count == N) {
      const Lanes<N> grads = load<N>(d);
      Lanes<N> gates = load<N>(g);
      Lanes<N> ups = load<N>(u);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Swiglu at = swiglu<T>(gates[i], ups[i]);
        gates[i] = grads[i] * at.by_gate;
        ups[i] = grads[i] * at.by_up;
      }
      store<N>(dg, gates);
      store<N>(du, ups);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const float grad = to_f32(d[i]);
        const Swiglu at = swiglu<T>(to_f32(g[i]), to_f32(u[i]));
        dg[i] = from_f32<T>(grad * at.by_gate);
        du[i] = from_f32<T>(grad * at.by_up);
      }
    }
  });
}

template <typename T>
__device__ __forceinline__ void swiglu_backward(const T* dout, index_t dout_stride, const T* gate, index_t gate_stride,
                                                const T* up, index_t up_stride, T* dgate, index_t dgate_stride, T* dup,
                                                index_t dup_stride, index_t rows, index_t cols) {
  const bool aligned = rows_are_aligned(dout, dout_stride) && rows_are_aligned(gate, gate_stride) &&
                       rows_are_aligned(up, up_stride) && rows_are_aligned(dgate, dgate_stride) &&
                       rows_are_aligned(dup, dup_stride);
  if (aligned) {
    swiglu_backward_in<vector_width<T>>(dout, dout_stride, gate, gate_stride, up, up_stride, dgate, dgate_stride, dup,
                                        dup_stride, rows, cols);
  } else {
    swiglu_backward_in<1>(dout, dout_stride, gate, gate_stride, up, up_stride, dgate, dgate_stride, dup, dup_stride,
                          rows, cols);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_SWIGLU(suffix, T)                                                                                    \
  extern "C" __global__ void swiglu_forward_##suffix(                                                              \
      const T* gate, fsmoe::index_t gate_stride, const T* up, fsmoe::index_t up_stride, T* out,                    \
      fsmoe::index_t out_stride, fsmoe::index_t rows, fsmoe::index_t cols) {                                       \
    fsmoe::swiglu_forward(gate, gate_stride, up, up_stride, out, out_stride, rows, cols);                          \
  }                                                                                                                \
  extern "C" __global__ void swiglu_backward_##suffix(                                                             \
      const T* dout, fsmoe::index_t dout_stride, const T* gate, fsmoe::index_t gate_stride, const T* up,           \
      fsmoe::index_t up_stride, T* dgate, fsmoe::index_t dgate_stride, T* dup, fsmoe::index_t dup_stride,          \
      fsmoe::index_t rows, fsmoe::index_t cols) {                                                                  \
    fsmoe::swiglu_backward(dout, dout_stride, gate, gate_stride, up, up_stride, dgate, dgate_stride, dup,          \
                           dup_stride, rows, cols);                                                                \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_SWIGLU)
