// Operations on the rows of a contiguous matrix that need sums over a row: a warp takes a row, or a block where rows are
// long. Which of them, and which elements a thread takes, depends on the width alone, so sums have one order.
//
// Launch with 256 threads: rows / 8 blocks for widths up to `warp_row_limit`, a block per row for wider ones, or fewer.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace fsmoe {

constexpr index_t warp_row_limit = 1024;

// The threads that share a row.
struct WarpRow {
  __device__ __forceinline__ static index_t first() {
    return static_cast<index_t>(blockIdx.x) * (blockDim.x / warp_size) + threadIdx.x / warp_size;
  }
  __device__ __forceinline__ static index_t step() {
    return static_cast<index_t>(gridDim.x) * (blockDim.x / warp_size);
  }
  __device__ __forceinline__ static int lane() { return threadIdx.x % warp_size; }
  __device__ __forceinline__ static int lanes() { return warp_size; }
  __device__ __forceinline__ static float sum(float x) { return warp_sum(x); }
  __device__ __forceinline__ static float max(float x) { return warp_max(x); }
};

struct BlockRow {
  __device__ __forceinline__ static index_t first() { return blockIdx.x; }
  __device__ __forceinline__ static index_t step() { return gridDim.x; }
  __device__ __forceinline__ static int lane() { return threadIdx.x; }
  __device__ __forceinline__ static int lanes() { return blockDim.x; }
  __device__ __forceinline__ static float sum(float x) { return block_sum(x); }
  __device__ __forceinline__ static float max(float x) { return block_max(x); }
};

// Calls body(col) for this thread's vectors of N elements of a row; N divides cols.
template <typename Row, int N, typename Body>
__device__ __forceinline__ void for_each_in_row(index_t cols, Body body) {
  for (index_t col = static_cast<index_t>(Row::lane()) * N; col < cols; col += static_cast<index_t>(Row::lanes()) * N) {
    body(col);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(row, count) with the kind of row and the elements of a vector that `cols` asks for: V, or 1 where V does not
// divide it.
template <int V, typename Body>
__device__ __forceinline__ void with_rows(index_t cols, Body body) {
  if (cols <= warp_row_limit) {
    if (cols % V == 0) {
      body(WarpRow{}, Count<V>{});
    } else {
      body(WarpRow{}, Count<1>{});
    }
  } else {
    if (cols % V == 0) {
      body(BlockRow{}, Count<V>{});
    } else {
      body(BlockRow{}, Count<1>{});
    }
  }
}

}  // namespace fsmoe
