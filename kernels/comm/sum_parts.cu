// out = the sum of parts, added in their order: what a rank makes of the others' data in a reduce-scatter or an all-reduce.
//
//   sum_parts_{bf16,f16,f32,f64}(parts, count, n, out)
//
// parts: the addresses of `count` contiguous tensors of n elements, by value, room for 64; the sum is in f32, rounded once, of
// f64, which statistics are, in f64. out may be one of the parts. In vectors of 16 bytes where all addresses are multiples of it.
//
// Launch with any number of blocks of 1,024 threads, which step over the elements by the grid. A thread has eight loads under way
// at a time, as in copy_many.

#include "comm/stretch.cuh"

namespace fsmoe {

constexpr int sum_threads = 1024;
// Vectors of a thread, and parts, that are under way at a time.
constexpr int sum_vectors_at_once = 2;
constexpr int sum_parts_at_once = 4;

// Vectors of 16 bytes, as many as n elements have whole.
template <typename T>
__device__ __forceinline__ void sum_vectors(const Parts& parts, index_t count, index_t n, T* out) {
  constexpr int width = vector_width<T>;
  const index_t step = static_cast<index_t>(gridDim.x) * sum_threads;
  const index_t vectors = n / width;
  index_t v = static_cast<index_t>(blockIdx.x) * sum_threads + threadIdx.x;
  for (; v < vectors; v += sum_vectors_at_once * step) {
    Lanes<width> sums[sum_vectors_at_once];
#pragma unroll
    for (int i = 0; i < sum_vectors_at_once; ++i) {
#pragma unroll
      // Whatever is added to it stays what it is, a zero with a sign too.
      for (int j = 0; j < width; ++j) sums[i][j] = -0.0f;
    }
    for (index_t p = 0; p < count; p += sum_parts_at_once) {
      // As they lie in memory: widened, they would not fit into registers.
      uint4 raw[sum_parts_at_once][sum_vectors_at_once];
#pragma unroll
      for (int q = 0; q < sum_parts_at_once; ++q) {
#pragma unroll
        for (int i = 0; i < sum_vectors_at_once; ++i) {
          const index_t at = v + i * step;
          if (p + q < count && at < vectors) raw[q][i] = static_cast<const uint4*>(parts.of[p + q])[at];
        }
      }
#pragma unroll
      for (int q = 0; q < sum_parts_at_once; ++q) {
        if (p + q >= count) break;
#pragma unroll
        for (int i = 0; i < sum_vectors_at_once; ++i) {
          const T* elements = reinterpret_cast<const T*>(&raw[q][i]);
#pragma unroll
          for (int j = 0; j < width; ++j) sums[i][j] += to_f32(elements[j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < sum_vectors_at_once; ++i) {
      if (v + i * step < vectors) store<width>(out + (v + i * step) * width, sums[i]);
    }
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
    sum_vectors<T>(parts, count, n, out);
  }
  const index_t step = static_cast<index_t>(gridDim.x) * sum_threads;
  for (index_t i = whole + static_cast<index_t>(blockIdx.x) * sum_threads + threadIdx.x; i < n; i += step) {
    float sum = to_f32(static_cast<const T*>(parts.of[0])[i]);
    for (index_t p = 1; p < count; ++p) sum += to_f32(static_cast<const T*>(parts.of[p])[i]);
    out[i] = from_f32<T>(sum);
  }
}

}  // namespace fsmoe

#define FSMOE_SUM_PARTS(suffix, type)                                                                       \
  extern "C" __global__ void __launch_bounds__(1024)                                                         \
      sum_parts_##suffix(const fsmoe::Parts parts, fsmoe::index_t count, fsmoe::index_t n, type* out) {     \
    fsmoe::sum_parts<type>(parts, count, n, out);                                                           \
  }
FSMOE_FOR_EACH_DTYPE(FSMOE_SUM_PARTS)

extern "C" __global__ void __launch_bounds__(1024)
    sum_parts_f64(const fsmoe::Parts parts, fsmoe::index_t count, fsmoe::index_t n, double* out) {
  const fsmoe::index_t step = static_cast<fsmoe::index_t>(gridDim.x) * blockDim.x;
  for (fsmoe::index_t i = static_cast<fsmoe::index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    double sum = 0.0;
    for (fsmoe::index_t p = 0; p < count; ++p) sum += static_cast<const double*>(parts.of[p])[i];
    out[i] = sum;
  }
}
