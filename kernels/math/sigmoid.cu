// The logistic function and its gradient, elementwise over n values.
//
//   sigmoid_forward_{bf16,f16,f32}(x, y, n)            y = 1 / (1 + exp(-x))
//   sigmoid_backward_{...}(y, dy, dx, n)               dx = dy * y * (1 - y)

#include "common/math.cuh"
#include "common/vector.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Forward

template <int N, typename T>
__device__ __forceinline__ void sigmoid_forward_in(const T* __restrict__ x, T* __restrict__ y, index_t n) {
  for_each_vector<N>(1, n, [&](index_t, index_t at, int count) {
    if (count == N) {
      Lanes<N> lanes = load<N>(x + at);
#pragma unroll
      for (int i = 0; i < N; ++i) lanes[i] = sigmoid<T>(lanes[i]);
      store<N>(y + at, lanes);
    } else {
#pragma unroll 1
      for (index_t i = at; i < at + count; ++i) y[i] = from_f32<T>(sigmoid<T>(to_f32(x[i])));
    }
  });
}

template <typename T>
__device__ __forceinline__ void sigmoid_forward(const T* x, T* y, index_t n) {
  if (is_aligned(x) && is_aligned(y)) {
    sigmoid_forward_in<vector_width<T>>(x, y, n);
  } else {
    sigmoid_forward_in<1>(x, y, n);
  }
}

// ----------------------------------------------------------------------------
// Backward

template <int N, typename T>
__device__ __forceinline__ void sigmoid_backward_in(const T* __restrict__ y, const T* __restrict__ dy,
                                                    T* __restrict__ dx, index_t n) {
  for_each_vector<N>(1, n, [&](index_t, index_t at, int count) {
    if (count == N) {
      const Lanes<N> out = load<N>(y + at);
      Lanes<N> grad = load<N>(dy + at);
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] *= out[i] * (1.0f - out[i]);
      store<N>(dx + at, grad);
    } else {
#pragma unroll 1
      for (index_t i = at; i < at + count; ++i) {
        const float out = to_f32(y[i]);
        dx[i] = from_f32<T>(to_f32(dy[i]) * (out * (1.0f - out)));
      }
    }
  });
}

template <typename T>
__device__ __forceinline__ void sigmoid_backward(const T* y, const T* dy, T* dx, index_t n) {
  if (is_aligned(y) && is_aligned(dy) && is_aligned(dx)) {
    sigmoid_backward_in<vector_width<T>>(y, dy, dx, n);
  } else {
    sigmoid_backward_in<1>(y, dy, dx, n);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_SIGMOID(suffix, T)                                                                                   \
  extern "C" __global__ void sigmoid_forward_##suffix(const T* x, T* y, fsmoe::index_t n) {                        \
    fsmoe::sigmoid_forward(x, y, n);                                                                               \
  }                                                                                                                \
  extern "C" __global__ void sigmoid_backward_##suffix(const T* y, const T* dy, T* dx, fsmoe::index_t n) {         \
    fsmoe::sigmoid_backward(y, dy, dx, n);                                                                         \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_SIGMOID)
