// out = the sum of parts, added in their order: what a rank makes of the others' data in a reduce-scatter or an all-reduce.
//
//   sum_parts_{bf16,f16,f32,f64}(parts, count, n, out)
//
// parts: the addresses of `count` contiguous tensors of n elements, by value, room for 64; the sum is in f32, rounded once, of
// f64, which statistics are, in f64. out may be one of the parts. In vectors of 16 bytes where all addresses are multiples of it.
//
// Launch with any number of blocks of 512 threads, which step over the elements by the grid.

#include "comm/stretch.cuh"

namespace fsmoe {

template <typename T, int N>
__device__ __forceinline__ void sum_vectors(const Parts& parts, index_t count, index_t first, index_t n, T* out) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t v = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; first + v * N < n; v += step) {
    const index_t at = first + v * N;
    Lanes<N> sum = load<N>(static_cast<const T*>(parts.of[0]) + at);
    for (index_t p = 1; p < count; ++p) {
      const Lanes<N> part = load<N>(static_cast<const T*>(parts.of[p]) + at);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += part[i];
    }
    store<N>(out + at, sum);
  }
}

template <typename T>
__device__ __forceinline__ void sum_parts(const Parts& parts, index_t count, index_t n, T* out) {
  constexpr int width = vector_width<T>;
  uint64_t addresses = reinterpret_cast<uint64_t>(out);
  for (index_t p = 0; p < count; ++p) addresses |= reinterpret_cast<uint64_t>(parts.of[p]);
  index_t whole = 0;
  if (addresses % 16 == 0) {
    whole = n / width * width;
    sum_vectors<T, width>(parts, count, 0, whole, out);
  }
  sum_vectors<T, 1>(parts, count, whole, n, out);
}

}  // namespace fsmoe

#define FSMOE_SUM_PARTS(suffix, type)                                                                       \
  extern "C" __global__ void __launch_bounds__(512)                                                         \
      sum_parts_##suffix(const fsmoe::Parts parts, fsmoe::index_t count, fsmoe::index_t n, type* out) {     \
    fsmoe::sum_parts<type>(parts, count, n, out);                                                           \
  }
FSMOE_FOR_EACH_DTYPE(FSMOE_SUM_PARTS)

extern "C" __global__ void __launch_bounds__(512)
    sum_parts_f64(const fsmoe::Parts parts, fsmoe::index_t count, fsmoe::index_t n, double* out) {
  const fsmoe::index_t step = static_cast<fsmoe::index_t>(gridDim.x) * blockDim.x;
  for (fsmoe::index_t i = static_cast<fsmoe::index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    double sum = 0.0;
    for (fsmoe::index_t p = 0; p < count; ++p) sum += static_cast<const double*>(parts.of[p])[i];
    out[i] = sum;
  }
}
