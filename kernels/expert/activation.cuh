// The activations of the expert FFNs as functions of one value, in f32, for results that are stored as T: what the
// elementwise kernels and the matrix products that end in an activation share.
#pragma once

#include "common/math.cuh"

namespace fsmoe {

struct ValueAndDerivative {
  float value, derivative;
};

// ----------------------------------------------------------------------------
// GELU's two forms.

template <typename T>
struct GeluErf {
  static constexpr float inv_sqrt_2 = 0.70710678118654752f;
  static constexpr float inv_sqrt_2pi = 0.39894228040143268f;

  __device__ __forceinline__ static float value(float x) { return both(x).value; }
  __device__ __forceinline__ static float derivative(float x) { return both(x).derivative; }
  __device__ __forceinline__ static ValueAndDerivative both(float x) {
    if constexpr (is_narrow<T>) {
      // Phi by the exponential that the density needs anyway: Abramowitz and Stegun, 7.1.26, erfc(z) = (a1 t + ... + a5
      // t^5) exp(-z^2) with t = 1 / (1 + p z), wrong by at most 1.5e-7, at z = |x| / sqrt(2). A third of erff's work.
      const float bell = fast_exp2(-0.5f * log2_e * x * x);
      const float t = fast_reciprocal(1.0f + 0.3275911f * inv_sqrt_2 * fabsf(x));
      const float series =
          t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
      const float tail = series * bell;
      const float below = x < 0.0f ? tail : 1.0f - tail;
      return {x * below, below + x * (inv_sqrt_2pi * bell)};
    } else {
      // Not 0.5 + 0.5 erf(...), whose digits cancel for x far below zero.
      const float below = 0.5f * erfcf(-x * inv_sqrt_2);
      return {x * below, below + x * inv_sqrt_2pi * expf(-0.5f * x * x)};
    }
  }
};

// (1 + tanh(u)) / 2 is sigmoid(2u): one exponential, and none of the cancellation near -1.
template <typename T>
struct GeluTanh {
  static constexpr float two_sqrt_2_over_pi = 1.59576912160573071f;
  static constexpr float cubic = 0.044715f;

  __device__ __forceinline__ static float value(float x) { return x * cdf(x, x * x); }
  __device__ __forceinline__ static float derivative(float x) { return both(x).derivative; }
  __device__ __forceinline__ static ValueAndDerivative both(float x) {
    const float square = x * x;
    const float s = cdf(x, square);
    const float value = x * s;
    const float slope = two_sqrt_2_over_pi + 3.0f * cubic * two_sqrt_2_over_pi * square;
    return {value, s + value * slope * (1.0f - s)};
  }

 private:
  __device__ __forceinline__ static float cdf(float x, float square) {
    if constexpr (is_narrow<T>) {
      // -2u in powers of two, its constants in one: every instruction counts where this ends a matrix product.
      constexpr float linear = -log2_e * two_sqrt_2_over_pi;
      return fast_reciprocal(1.0f + fast_exp2(x * (linear + linear * cubic * square)));
    } else {
      return sigmoid<T>(two_sqrt_2_over_pi * x * (1.0f + cubic * square));
    }
  }
};

// ----------------------------------------------------------------------------
// SwiGLU, silu(gate) * up with silu(z) = z * s(z) and s the sigmoid, and its derivatives by gate, up * s * (1 + gate *
// (1 - s)) = up * s + silu(gate) * up * (1 - s), and by up, silu(gate). What is not used costs nothing.

struct Swiglu {
  float value, by_gate, by_up;
};

template <typename T>
__device__ __forceinline__ Swiglu swiglu(float gate, float up) {
  const float s = sigmoid<T>(gate);
  const float silu = gate * s;
  const float value = silu * up;
  return {value, up * s + value * (1.0f - s), silu};
}

}  // namespace fsmoe
