// The activations of expert FFNs as functions of one value in f32, for whoever fuses them with what moves the values:
// the elementwise kernels beside this file, the epilogues of matrix products. T is what results are stored as; 16 bits
// hide the approximations that are made for them.
#pragma once

#include "common/math.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// GELU, x * Phi(x) with Phi the normal distribution function (Hendrycks and Gimpel, 2016).

template <typename T>
struct GeluErf {
  __device__ __forceinline__ static float value(float x) { return x * cdf(x); }
  __device__ __forceinline__ static float derivative(float x) {
    constexpr float inv_sqrt_2pi = 0.39894228040143268f;
    const float square = x * x;
    const float density = is_narrow<T> ? exp2_approx(-0.5f * log2_e * square) : expf(-0.5f * square);
    return cdf(x) + x * (inv_sqrt_2pi * density);
  }

  // For 16-bit results, Phi(x) = 1 / (1 + exp(-x q(x^2))): two transcendental instructions and a cubic's worth of others
  // where erff takes some thirty, more than memory leaves time for. q is the polynomial of degree 4 for which the largest
  // error of x * Phi(x), relative to its value, is least where that is above 1e-4: 5e-4, an eighth of bf16's spacing and
  // one unit in the last place of f16. Its highest coefficient being positive, it goes on to the right limits beyond.
  __device__ __forceinline__ static float cdf(float x) {
    if constexpr (is_narrow<T>) {
      const float t = x * x;
      float q = 3.57494626e-7f * -log2_e;
      q = fmaf(q, t, -6.59643643e-6f * -log2_e);
      q = fmaf(q, t, -7.66021071e-4f * -log2_e);
      q = fmaf(q, t, 7.47316134e-2f * -log2_e);
      q = fmaf(q, t, 1.59393767f * -log2_e);
      return reciprocal_approx(1.0f + exp2_approx(x * q));
    } else {
      constexpr float inv_sqrt_2 = 0.70710678118654752f;
      return 0.5f + 0.5f * erff(x * inv_sqrt_2);
    }
  }
};

// The tanh form, Phi(x) ~ (1 + tanh(u)) / 2 with u = sqrt(2/pi) * (x + 0.044715 x^3), GPT-2's, which Hugging Face calls
// gelu_new. (1 + tanh(u)) / 2 is sigmoid(2u): one exponential, and none of the cancellation near -1.
template <typename T>
struct GeluTanh {
  static constexpr float two_sqrt_2_over_pi = 1.59576912160573071f;
  static constexpr float cubic = 0.044715f;

  __device__ __forceinline__ static float value(float x) { return x * cdf(x); }
  __device__ __forceinline__ static float derivative(float x) {
    const float s = cdf(x);
    const float du = two_sqrt_2_over_pi * (1.0f + 3.0f * cubic * x * x);
    // Far from zero s (1 - s) is 0 and du may be infinite.
    const float bump = s * (1.0f - s);
    return bump == 0.0f ? s : s + x * bump * du;
  }
  __device__ __forceinline__ static float cdf(float x) {
    return sigmoid<T>(two_sqrt_2_over_pi * x * (1.0f + cubic * x * x));
  }
};

// ----------------------------------------------------------------------------
// SwiGLU, silu(gate) * up with silu(z) = z * sigmoid(z) (Shazeer, "GLU Variants Improve Transformer", 2020).

template <typename T>
__device__ __forceinline__ float silu(float z) {
  return z * sigmoid<T>(z);
}

template <typename T>
__device__ __forceinline__ float swiglu_value(float gate, float up) {
  return silu<T>(gate) * up;
}

struct GateUp {
  float gate, up;
};

// The gradients of both, given that of the result: with s = sigmoid(gate), d_up = dout * gate * s,
// d_gate = dout * up * s * (1 + gate * (1 - s)).
template <typename T>
__device__ __forceinline__ GateUp swiglu_gradient(float dout, float gate, float up) {
  const float s = sigmoid<T>(gate);
  return {dout * up * s * (1.0f + gate * (1.0f - s)), dout * gate * s};
}

}  // namespace fsmoe
