// Dispatch: every token's row to the rows of its choices.
//
//   dispatch_rows_{bf16,f16,f32}(x, index, tokens, k, cols, row_token, limit, rows, token_blocks, dst)
//
// dst[index[t, j]] = x[t] for every choice whose index is not -1, and zeros in the rows whose row_token is -1, below
// limit[0] where there is a limit. x: (tokens, cols), index: (tokens, k) i32, dst: (rows, cols), row_token: (rows) i32,
// limit: (1) i32 or null. The first `token_blocks` blocks of the grid have the tokens, the others the empty rows.
//
// Bound by memory, and a token is read once: a gather by row would read it k times, and k rows of one token lie too far
// apart for a cache to keep it.

#include "order/rows.cuh"

namespace fsmoe {

template <typename T, int N>
__device__ __forceinline__ void dispatch_rows_in(const T* __restrict__ x, const int* __restrict__ index, index_t tokens,
                                                 int k, index_t cols, const int* __restrict__ row_token,
                                                 index_t written, index_t rows, index_t token_blocks,
                                                 T* __restrict__ dst) {
  if (blockIdx.x >= token_blocks) {
    const index_t warps = blockDim.x / warp_size;
    clear_empty_rows<N>(row_token, written, cols, dst, (blockIdx.x - token_blocks) * warps + threadIdx.x / warp_size,
                        (gridDim.x - token_blocks) * warps);
    return;
  }
  constexpr int in_flight = 8;
  const index_t vectors = (cols + N - 1) / N;
  const index_t step = token_blocks * blockDim.x;
  const index_t step_rows = step / vectors;
  const index_t step_vectors = step - step_rows * vectors;
  const index_t first = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  index_t token = first / vectors;
  index_t vector = first - token * vectors;
  while (token < tokens) {
    const index_t col = vector * N;
    const int* const to = index + token * k;
    const Packed<N, T> data = load_packed<N>(x + token * cols + col);
    for (int j = 0; j < k; j += in_flight) {
      // All numbers first, for none of them to wait for a store.
      int row[in_flight];
#pragma unroll
      for (int u = 0; u < in_flight; ++u) row[u] = to[min(j + u, k - 1)];
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        if (j + u < k && row[u] >= 0 && row[u] < rows) store_packed(dst + row[u] * cols + col, data);
      }
    }
    token += step_rows;
    vector += step_vectors;
    if (vector >= vectors) {
      vector -= vectors;
      ++token;
    }
  }
}

template <typename T>
__device__ __forceinline__ void dispatch_rows(const T* x, const int* index, index_t tokens, int k, index_t cols,
                                              const int* row_token, const int* limit, index_t rows,
                                              index_t token_blocks, T* dst) {
  const index_t written = row_limit(limit, rows);
  if (rows_are_aligned(x, cols) && rows_are_aligned(dst, cols)) {
    dispatch_rows_in<T, vector_width<T>>(x, index, tokens, k, cols, row_token, written, rows, token_blocks, dst);
  } else {
    dispatch_rows_in<T, 1>(x, index, tokens, k, cols, row_token, written, rows, token_blocks, dst);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_DISPATCH_ROWS(suffix, T)                                                                                \
  extern "C" __global__ void __launch_bounds__(256) dispatch_rows_##suffix(                                           \
      const T* x, const int* index, fsmoe::index_t tokens, int k, fsmoe::index_t cols, const int* row_token,          \
      const int* limit, fsmoe::index_t rows, fsmoe::index_t token_blocks, T* dst) {                                   \
    fsmoe::dispatch_rows(x, index, tokens, k, cols, row_token, limit, rows, token_blocks, dst);                       \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_DISPATCH_ROWS)
