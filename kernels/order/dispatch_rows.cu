// Dispatch: every token's row to the rows of its choices.
//
//   dispatch_rows_{bf16,f16,f32}(x, index, tokens, k, cols, row_token, limit, rows, clear_blocks, dst)
//
// dst[index[t, j]] = x[t] for every choice whose index is not -1, and zeros in the rows whose row_token is -1, below
// limit[0] where there is a limit. x: (tokens, cols), index: (tokens, k) i32, dst: (rows, cols), row_token: (rows) i32,
// limit: (1) i32 or null. The first `clear_blocks` blocks of the grid have the empty rows, the others the tokens.
//
// Bound by memory, and a token is read once: a gather by row would read it k times, and k rows of one token lie too far
// apart for a cache to keep it. A warp has two vectors of 16 bytes per lane of one token, and its rows' numbers.

#include "order/rows.cuh"

namespace fsmoe {

template <typename T, int N>
__device__ __forceinline__ void dispatch_rows_in(const T* __restrict__ x, const int* __restrict__ index, index_t tokens,
                                                 int k, int cols, const int* __restrict__ row_token,
                                                 index_t written, index_t rows, index_t clear_blocks,
                                                 T* __restrict__ dst) {
  if (blockIdx.x < clear_blocks) {
    clear_empty_rows<N>(row_token, written, cols, dst, blockIdx.x, clear_blocks);
    return;
  }
  constexpr int in_flight = 2;
  const int lane = threadIdx.x % warp_size;
  for_each_segment<N, in_flight>(tokens, cols, clear_blocks, [&](index_t token, int col) {
    Packed<N, T> data[in_flight];
    const T* const from_row = x + token * cols;
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      data[u] = load_packed<N>(from_row + min(col + u * warp_size * N, cols - N));
    }
    for (int from = 0; from < k; from += warp_size) {
      const int mine = from + lane < k ? index[token * k + from + lane] : -1;
      for (int j = 0; j < min(k - from, warp_size); ++j) {
        const int row = __shfl_sync(full_warp, mine, j);
        if (row < 0 || row >= rows) continue;
        T* const to = dst + static_cast<index_t>(row) * cols;
#pragma unroll
        for (int u = 0; u < in_flight; ++u) {
          const int at = col + u * warp_size * N;
          if (at < cols) store_packed(to + at, data[u]);
        }
      }
    }
  });
}

template <typename T>
__device__ __forceinline__ void dispatch_rows(const T* x, const int* index, index_t tokens, int k, index_t cols,
                                              const int* row_token, const int* limit, index_t rows,
                                              index_t clear_blocks, T* dst) {
  const index_t written = row_limit(limit, rows);
  if (rows_are_aligned(x, cols) && rows_are_aligned(dst, cols)) {
    dispatch_rows_in<T, vector_width<T>>(x, index, tokens, k, static_cast<int>(cols), row_token, written, rows, clear_blocks, dst);
  } else {
    dispatch_rows_in<T, 1>(x, index, tokens, k, static_cast<int>(cols), row_token, written, rows, clear_blocks, dst);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_DISPATCH_ROWS(suffix, T)                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 8) dispatch_rows_##suffix(                                           \
      const T* x, const int* index, fsmoe::index_t tokens, int k, fsmoe::index_t cols, const int* row_token,          \
      const int* limit, fsmoe::index_t rows, fsmoe::index_t clear_blocks, T* dst) {                                   \
    fsmoe::dispatch_rows(x, index, tokens, k, cols, row_token, limit, rows, clear_blocks, dst);                       \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_DISPATCH_ROWS)
