// The sum of squares of up to 128 tensors' elements, in f32 and one order: what a gradient norm is the root of.
//
//   sum_squares_many_{bf16,f16,f32}(table, count, partial)     partial[b] = block b's sum
//   sum_squares_add_f32(partial, n, sum)                       sum[0] += Σ partial; one block of 1,024 threads
//
// Bound by memory, 1 value read per element. A block of 256 threads takes 16,384 elements of one tensor. The table is a kernel
// parameter, as adamw.cu's.

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace fsmoe::sum_squares {

constexpr int most_tensors = 128;
constexpr int block_elements = 16384;

struct Table {
  const void* data[most_tensors];
  index_t size[most_tensors];
  index_t first_block[most_tensors];  // of the launch, that takes this tensor
};

template <int N, typename T>
__device__ __forceinline__ float squares(const T* __restrict__ x, int n) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x * N; i < n; i += blockDim.x * N) {
    const Lanes<N> lanes = load<N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += lanes[j] * lanes[j];
  }
  return sum;
}

template <typename T>
__device__ __forceinline__ void many(const Table& table, int count, float* __restrict__ partial) {
  constexpr int N = vector_width<T>;
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const index_t first = (blockIdx.x - table.first_block[low]) * block_elements;
  const index_t left = table.size[low] - first;
  const int n = left < block_elements ? static_cast<int>(left) : block_elements;
  const T* const x = static_cast<const T*>(table.data[low]) + first;
  const int whole = rows_are_aligned(x, 0) ? n / N * N : 0;
  const float sum = squares<N>(x, whole) + squares<1>(x + whole, n - whole);
  const float total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace fsmoe::sum_squares

#define FSMOE_SUM_SQUARES(suffix, T)                                                                               \
  extern "C" __global__ void sum_squares_many_##suffix(const __grid_constant__ fsmoe::sum_squares::Table table,    \
                                                       int count, float* partial) {                                \
    fsmoe::sum_squares::many<T>(table, count, partial);                                                            \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_SUM_SQUARES)

extern "C" __global__ void __launch_bounds__(1024) sum_squares_add_f32(const float* partial, fsmoe::index_t n, float* sum) {
  float own = 0.0f;
  for (fsmoe::index_t i = threadIdx.x; i < n; i += blockDim.x) own += partial[i];
  const float total = fsmoe::block_sum(own);
  if (threadIdx.x == 0) *sum += total;
}
