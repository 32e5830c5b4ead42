// out[n] += sum over r of x[r][n], x: (rows, cols), in two stages of fixed order.
//
//   sum_rows_partial_{bf16,f16,f32}(x, rows, cols, chunk, across, partial)
//       grid (column tiles, chunks of `chunk` rows), 256 threads as `across` columns' vectors by 256 / across rows, a power
//       of two; partial: (chunks, cols) f32. A vector is 16 bytes where that many elements divide cols, else one element.
//   sum_rows_finish_{bf16,f16,f32}(partial, chunks, cols, out)
//       a block per 32 columns, a warp for every so many chunks

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace fsmoe {

constexpr int sum_threads = 256;

template <int N, typename T>
__device__ __forceinline__ void sum_rows_partial_in(const T* __restrict__ x, index_t rows, index_t cols, index_t chunk,
                                                    int across, float* __restrict__ partial) {
  __shared__ float staged[N][sum_threads];
  const bool aligned = is_aligned(x);
  const int down = sum_threads / across;
  const int y = threadIdx.x / across;
  const index_t col = (static_cast<index_t>(blockIdx.x) * across + threadIdx.x % across) * N;
  const index_t begin = static_cast<index_t>(blockIdx.y) * chunk;
  const index_t end = begin + chunk < rows ? begin + chunk : rows;
  Lanes<N> sum = {};
  if (col < cols) {
    const T* from = x + col;
    index_t row = begin + y;
    // Four rows in flight.
    for (; row + 3 * down < end; row += 4 * down) {
      const Lanes<N> a = load_either<N>(from + row * cols, aligned);
      const Lanes<N> b = load_either<N>(from + (row + down) * cols, aligned);
      const Lanes<N> c = load_either<N>(from + (row + 2 * down) * cols, aligned);
      const Lanes<N> d = load_either<N>(from + (row + 3 * down) * cols, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += (a[i] + b[i]) + (c[i] + d[i]);
    }
    for (; row < end; row += down) {
      const Lanes<N> a = load_either<N>(from + row * cols, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += a[i];
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) staged[i][threadIdx.x] = sum[i];
  for (int half = down / 2; half > 0; half /= 2) {
    __syncthreads();
    if (y < half) {
#pragma unroll
      for (int i = 0; i < N; ++i) staged[i][threadIdx.x] += staged[i][threadIdx.x + half * across];
    }
  }
  if (y == 0 && col < cols) {
    // Thread x wrote these itself last.
    float* to = partial + blockIdx.y * cols + col;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = staged[i][threadIdx.x];
  }
}

template <typename T>
__device__ __forceinline__ void sum_rows_partial(const T* x, index_t rows, index_t cols, index_t chunk, int across,
                                                 float* partial) {
  if (cols % vector_width<T> == 0) {
    sum_rows_partial_in<vector_width<T>>(x, rows, cols, chunk, across, partial);
  } else {
    sum_rows_partial_in<1>(x, rows, cols, chunk, across, partial);
  }
}

template <typename O>
__device__ __forceinline__ void sum_rows_finish(const float* __restrict__ partial, index_t chunks, index_t cols,
                                                O* __restrict__ out) {
  __shared__ float staged[warp_size][warp_size];
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  const index_t col = static_cast<index_t>(blockIdx.x) * warp_size + lane;
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 4
    for (index_t chunk = warp; chunk < chunks; chunk += warps) sum += partial[chunk * cols + col];
  }
  staged[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < cols) {
    for (int other = 1; other < warps; ++other) sum += staged[other][lane];
    out[col] = from_f32<O>(to_f32(out[col]) + sum);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_SUM_ROWS(suffix, T)                                                                                   \
  extern "C" __global__ void sum_rows_partial_##suffix(const T* x, fsmoe::index_t rows, fsmoe::index_t cols,        \
                                                       fsmoe::index_t chunk, int across, float* partial) {          \
    fsmoe::sum_rows_partial(x, rows, cols, chunk, across, partial);                                                 \
  }                                                                                                                 \
  extern "C" __global__ void sum_rows_finish_##suffix(const float* partial, fsmoe::index_t chunks,                  \
                                                      fsmoe::index_t cols, T* out) {                                \
    fsmoe::sum_rows_finish(partial, chunks, cols, out);                                                             \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_SUM_ROWS)
