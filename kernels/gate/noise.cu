// Noisy top-k gating (Shazeer et al., "Outrageously Large Neural Networks", 2017), and X-MoE's learned scale.
//
//   noise_forward(clean, raw, noise, n, out)      out = clean + noise * softplus(raw); out may be clean
//   noise_backward(raw, noise, d_out, n, d_raw)   d_raw = d_out * noise * sigmoid(raw)
//   noise_scale(x, max, n, y)                     y = min(e^x, max)
//   noise_scale_backward(y, max, dy, n, dx)       dx = dy * y where y < max, else 0
//
// All f32, elementwise, n elements; the noise in vectors of four where all addresses allow it.

#include "common/vector.cuh"

namespace fsmoe {

template <typename... P>
__device__ __forceinline__ bool all_aligned(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// Calls body(i, count) with runs of `count` elements, N of them but for a ragged end, over the grid.
template <int N, typename Body>
__device__ __forceinline__ void for_each_run(index_t n, Body body) {
  for_each_vector<N>(1, n, [&](index_t, index_t i, int count) { body(i, count); });
}

// ln(1 + e^x) without overflow.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

template <int N>
__device__ __forceinline__ void noise_forward_in(const float* clean, const float* raw, const float* noise, index_t n,
                                                 float* out) {
  for_each_run<N>(n, [&](index_t i, int count) {
    if (count == N) {
      const Lanes<N> r = load<N>(raw + i), z = load<N>(noise + i);
      Lanes<N> o = load<N>(clean + i);
#pragma unroll
      for (int v = 0; v < N; ++v) o[v] += z[v] * softplus(r[v]);
      store<N>(out + i, o);
    } else {
      for (int v = 0; v < count; ++v) out[i + v] = clean[i + v] + noise[i + v] * softplus(raw[i + v]);
    }
  });
}

__device__ __forceinline__ float noise_gradient(float d_out, float noise, float raw) {
  return d_out * noise / (1.0f + expf(-raw));
}

template <int N>
__device__ __forceinline__ void noise_backward_in(const float* __restrict__ raw, const float* __restrict__ noise,
                                                  const float* __restrict__ d_out, index_t n,
                                                  float* __restrict__ d_raw) {
  for_each_run<N>(n, [&](index_t i, int count) {
    if (count == N) {
      const Lanes<N> r = load<N>(raw + i), z = load<N>(noise + i);
      Lanes<N> d = load<N>(d_out + i);
#pragma unroll
      for (int v = 0; v < N; ++v) d[v] = noise_gradient(d[v], z[v], r[v]);
      store<N>(d_raw + i, d);
    } else {
      for (int v = 0; v < count; ++v) d_raw[i + v] = noise_gradient(d_out[i + v], noise[i + v], raw[i + v]);
    }
  });
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

extern "C" __global__ void noise_forward(const float* clean, const float* raw, const float* noise, fsmoe::index_t n,
                                         float* out) {
  if (fsmoe::all_aligned(clean, raw, noise, out)) {
    fsmoe::noise_forward_in<4>(clean, raw, noise, n, out);
  } else {
    fsmoe::noise_forward_in<1>(clean, raw, noise, n, out);
  }
}

extern "C" __global__ void noise_backward(const float* raw, const float* noise, const float* d_out, fsmoe::index_t n,
                                          float* d_raw) {
  if (fsmoe::all_aligned(raw, noise, d_out, d_raw)) {
    fsmoe::noise_backward_in<4>(raw, noise, d_out, n, d_raw);
  } else {
    fsmoe::noise_backward_in<1>(raw, noise, d_out, n, d_raw);
  }
}

extern "C" __global__ void noise_scale(const float* x, float max, fsmoe::index_t n, float* y) {
  fsmoe::for_each_run<1>(n, [&](fsmoe::index_t i, int) { y[i] = fminf(expf(x[i]), max); });
}

extern "C" __global__ void noise_scale_backward(const float* y, float max, const float* dy, fsmoe::index_t n,
                                                float* dx) {
  fsmoe::for_each_run<1>(n, [&](fsmoe::index_t i, int) { dx[i] = y[i] < max ? dy[i] * y[i] : 0.0f; });
}
