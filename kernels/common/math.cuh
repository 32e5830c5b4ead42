// Functions that activations and gates share.
#pragma once

#include "common/dtype.cuh"

namespace fsmoe {

// One instruction each, a few units in the last place of f32 off, results below the normal range flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float log2_e = 1.44269504088896341f;

// exp(x), for results that are stored as T.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (is_narrow<T>) {
    return exp2_approx(log2_e * x);
  } else {
    return expf(x);
  }
}

// 1 / (1 + exp(-x)), for results that are stored as T. Far below zero exp overflows to infinity and the quotient is the
// zero that it should be.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (is_narrow<T>) {
    return reciprocal_approx(1.0f + exp2_approx(-log2_e * x));
  } else {
    return 1.0f / (1.0f + expf(-x));
  }
}

}  // namespace fsmoe
