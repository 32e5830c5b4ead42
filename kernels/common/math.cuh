// Functions that activations and gates share.
#pragma once

#include "common/dtype.cuh"

namespace fsmoe {

// 1 / (1 + exp(-x)), for results that are stored as T. Far below zero exp overflows to infinity and the quotient is the
// zero that it should be.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (is_narrow<T>) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  } else {
    return 1.0f / (1.0f + expf(-x));
  }
}

}  // namespace fsmoe
