// y = alpha * x + beta * y, over n elements.
//
//   axpby_{X}_{Y}(alpha, x, beta, y, n)        X, Y: each of bf16, f16, f32
//
// With beta 0, y is not read. x and y share no memory.

#include "common/vector.cuh"

namespace fsmoe {

template <int N, bool reads, typename X, typename Y>
__device__ __forceinline__ void axpby_in(float alpha, const X* __restrict__ x, float beta, Y* __restrict__ y,
                                         index_t n) {
  for_each_vector<N>(1, n, [&](index_t, index_t at, int count) {
    if (count == N) {
      Lanes<N> lanes = load<N>(x + at);
      if constexpr (reads) {
        const Lanes<N> old = load<N>(y + at);
#pragma unroll
        for (int i = 0; i < N; ++i) lanes[i] = alpha * lanes[i] + beta * old[i];
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) lanes[i] *= alpha;
      }
      store<N>(y + at, lanes);
    } else {
#pragma unroll 1
      for (index_t i = at; i < at + count; ++i) {
        const float scaled = alpha * to_f32(x[i]);
        y[i] = from_f32<Y>(reads ? scaled + beta * to_f32(y[i]) : scaled);
      }
    }
  });
}

template <typename X, typename Y>
__device__ __forceinline__ void axpby(float alpha, const X* x, float beta, Y* y, index_t n) {
  // As many elements as make 16 bytes of the narrower type.
  constexpr int N = vector_width<X> > vector_width<Y> ? vector_width<X> : vector_width<Y>;
  if (is_aligned(x) && is_aligned(y)) {
    if (beta == 0.0f) {
      axpby_in<N, false>(alpha, x, beta, y, n);
    } else {
      axpby_in<N, true>(alpha, x, beta, y, n);
    }
  } else if (beta == 0.0f) {
    axpby_in<1, false>(alpha, x, beta, y, n);
  } else {
    axpby_in<1, true>(alpha, x, beta, y, n);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_AXPBY(sx, X, sy, Y)                                                                                     \
  extern "C" __global__ void axpby_##sx##_##sy(float alpha, const X* x, float beta, Y* y, fsmoe::index_t n) {         \
    fsmoe::axpby(alpha, x, beta, y, n);                                                                               \
  }
#define FSMOE_AXPBY_FROM(sx, X)                \
  FSMOE_AXPBY(sx, X, bf16, fsmoe::bf16)        \
  FSMOE_AXPBY(sx, X, f16, fsmoe::f16)          \
  FSMOE_AXPBY(sx, X, f32, fsmoe::f32)

FSMOE_FOR_EACH_DTYPE(FSMOE_AXPBY_FROM)
