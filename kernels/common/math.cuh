// Functions that activations and gates share.
#pragma once

#include "common/dtype.cuh"

namespace fsmoe {

// The hardware's 2^x and 1 / x, one instruction each: correct to about 2 units in the last place, denormals taken as zero.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float log2_e = 1.44269504088896341f;

// 1 / (1 + exp(-x)), for results that are stored as T. Far below zero exp overflows to infinity and the quotient is the
// zero that it should be.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (is_narrow<T>) {
    return fast_reciprocal(1.0f + fast_exp2(-log2_e * x));
  } else {
    return 1.0f / (1.0f + expf(-x));
  }
}

}  // namespace fsmoe
