// Element types of the kernels. Every kernel stores bf16, f16 or f32 and computes in f32: a 16-bit value is widened when
// it is loaded and rounded once, to nearest even, when it is stored.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fsmoe {

using bf16 = __nv_bfloat16;
using f16 = __half;
using f32 = float;

// Tensors pass 2^31 elements (32768 tokens x 8 choices x 14336 wide is 3.8e9): sizes and strides are 64-bit throughout.
using index_t = int64_t;

__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_f32(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(f32 x) { return x; }

template <typename T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_f32<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ f32 from_f32<f32>(float x) {
  return x;
}

// Whether T's own rounding hides the last bits of an f32 result, so that the hardware's approximate exp and division
// (a few units in the last place of f32) are exact enough.
template <typename T>
constexpr bool is_narrow = sizeof(T) < sizeof(float);

}  // namespace fsmoe

// Instantiates MACRO(suffix, type) for the three element types: the suffix ends an entry point's name.
#define FSMOE_FOR_EACH_DTYPE(MACRO) \
  MACRO(bf16, fsmoe::bf16)          \
  MACRO(f16, fsmoe::f16)            \
  MACRO(f32, fsmoe::f32)
