// GELU (Hendrycks and Gimpel, 2016), y = x * Phi(x) with Phi the normal distribution function, elementwise over n values.
//
//   gelu_forward_{bf16,f16,f32}(x, y, n)             Phi(x) = (1 + erf(x / sqrt(2))) / 2
//   gelu_backward_{...}(dy, x, dx, n)                dx = dy * (Phi(x) + x * phi(x))
//   gelu_tanh_forward_{...}(x, y, n)                 Phi(x) ~ (1 + tanh(u)) / 2, u = sqrt(2/pi) * (x + 0.044715 x^3):
//   gelu_tanh_backward_{...}(dy, x, dx, n)           GPT-2's form, which Hugging Face calls gelu_new
//
// Bound by memory: 2 values moved per result forward, 3 backward. Any n and any alignment; 16-byte aligned buffers are
// moved in 16-byte vectors. The output overlaps no input, except that dx may be dy.

#include "common/vector.cuh"
#include "expert/activation.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Forward: y = f(x)

template <typename Gelu, int N, typename T>
__device__ __forceinline__ void gelu_forward_in(const T* __restrict__ x, T* __restrict__ y, index_t n) {
  for_each_vector<N>(1, n, [&](index_t, index_t at, int count) {
    if (count == N) {
      Lanes<N> lanes = load<N>(x + at);
#pragma unroll
      for (int i = 0; i < N; ++i) lanes[i] = Gelu::value(lanes[i]);
      store<N>(y + at, lanes);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) y[at + i] = from_f32<T>(Gelu::value(to_f32(x[at + i])));
    }
  });
}

template <typename Gelu, typename T>
__device__ __forceinline__ void gelu_forward(const T* x, T* y, index_t n) {
  if (rows_are_aligned(x, 0) && rows_are_aligned(y, 0)) {
    gelu_forward_in<Gelu, vector_width<T>>(x, y, n);
  } else {
    gelu_forward_in<Gelu, 1>(x, y, n);
  }
}

// ----------------------------------------------------------------------------
// Backward: dx = dy * f'(x)

template <typename Gelu, int N, typename T>
__device__ __forceinline__ void gelu_backward_in(const T* dy, const T* __restrict__ x, T* dx, index_t n) {
  for_each_vector<N>(1, n, [&](index_t, index_t at, int count) {
    if (count == N) {
      const Lanes<N> grad = load<N>(dy + at);
      Lanes<N> lanes = load<N>(x + at);
#pragma unroll
      for (int i = 0; i < N; ++i) lanes[i] = grad[i] * Gelu::derivative(lanes[i]);
      store<N>(dx + at, lanes);
    } else {
#pragma unroll 1
      for (index_t i = at; i < at + count; ++i) {
        dx[i] = from_f32<T>(to_f32(dy[i]) * Gelu::derivative(to_f32(x[i])));
      }
    }
  });
}

template <typename Gelu, typename T>
__device__ __forceinline__ void gelu_backward(const T* dy, const T* x, T* dx, index_t n) {
  if (rows_are_aligned(dy, 0) && rows_are_aligned(x, 0) && rows_are_aligned(dx, 0)) {
    gelu_backward_in<Gelu, vector_width<T>>(dy, x, dx, n);
  } else {
    gelu_backward_in<Gelu, 1>(dy, x, dx, n);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_GELU(NAME, FORM, suffix, T)                                                                          \
  extern "C" __global__ void NAME##_forward_##suffix(const T* x, T* y, fsmoe::index_t n) {                         \
    fsmoe::gelu_forward<fsmoe::FORM<T>>(x, y, n);                                                                  \
  }                                                                                                                \
  extern "C" __global__ void NAME##_backward_##suffix(const T* dy, const T* x, T* dx, fsmoe::index_t n) {          \
    fsmoe::gelu_backward<fsmoe::FORM<T>>(dy, x, dx, n);                                                            \
  }
#define FSMOE_GELU_BOTH(suffix, T)          \
  FSMOE_GELU(gelu, GeluErf, suffix, T)      \
  FSMOE_GELU(gelu_tanh, GeluTanh, suffix, T)

FSMOE_FOR_EACH_DTYPE(FSMOE_GELU_BOTH)
