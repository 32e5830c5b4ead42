// out[0] += sum(a[i] * b[i]), in two stages of fixed order: which elements a thread adds up depends on n and the grid,
// which the caller derives from n.
//
//   dot_partial_{bf16,f16,f32}(a, b, n, partial)       block i writes partial[i]; 256 threads
//   dot_finish(partial, count, out)                    one block of 1024 threads

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace fsmoe {

// N elements from `at` on, zeros past the end.
template <int N, typename T>
__device__ __forceinline__ Lanes<N> load_padded(const T* from, index_t at, index_t n, bool aligned) {
  if (at + N <= n) return load_either<N>(from + at, aligned);
  Lanes<N> lanes;
#pragma unroll
  for (int i = 0; i < N; ++i) lanes[i] = at + i < n ? to_f32(from[at + i]) : 0.0f;
  return lanes;
}

template <typename T>
__device__ __forceinline__ void dot_partial(const T* __restrict__ a, const T* __restrict__ b, index_t n,
                                            float* __restrict__ partial) {
  constexpr int N = vector_width<T>;
  const bool aligned = is_aligned(a) && is_aligned(b);
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x * N;
  // A sum per position in the vector: short chains of additions, and independent ones.
  Lanes<N> sums = {};
  const index_t first = (static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (a == b) {
    // A norm: what is read once need not be read twice.
#pragma unroll 4
    for (index_t at = first; at < n; at += step) {
      const Lanes<N> x = load_padded<N>(a, at, n, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += x[i] * x[i];
    }
  } else {
#pragma unroll 2
    for (index_t at = first; at < n; at += step) {
      const Lanes<N> x = load_padded<N>(a, at, n, aligned);
      const Lanes<N> y = load_padded<N>(b, at, n, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += x[i] * y[i];
    }
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) total += sums[i];
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_DOT(suffix, T)                                                                                       \
  extern "C" __global__ void dot_partial_##suffix(const T* a, const T* b, fsmoe::index_t n, float* partial) {      \
    fsmoe::dot_partial(a, b, n, partial);                                                                          \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_DOT)

extern "C" __global__ void dot_finish(const float* partial, fsmoe::index_t count, float* out) {
  float total = 0.0f;
  for (fsmoe::index_t i = threadIdx.x; i < count; i += blockDim.x) total += partial[i];
  total = fsmoe::block_sum(total);
  if (threadIdx.x == 0) out[0] += total;
}
