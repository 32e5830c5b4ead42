// Combine: every token the weighted sum of its rows; and the gradients of rows and weights.
//
//   combine_rows_forward_u{1,2,4}_{bf16,f16,f32}(rows, index, offsets, weights, count, tokens, k, cols, out)
//   combine_rows_backward_{bf16,f16,f32}(dy, rows, row_token, row_weight, weights, tokens, weight_count, count, cols,
//                                        d_rows, d_weights)
//   combine_rows_clear(d_weights, n)
//   combine_rows_choices_u{1,2,4,8}_{bf16,f16,f32}(dy, rows, index, weights, tokens, k, cols, row_token, limit, count,
//                                                  clear_blocks, d_rows, d_weights)
//
// forward: out[t] = sum of weights[n] * rows[index[n]] for n, ascending, in offsets[t]..offsets[t + 1], or, without offsets
// (null), in t * k..(t + 1) * k; index -1 adds nothing, without weights (null) each is 1. rows: (count, cols), weights f32,
// out: (tokens, cols), the sum in f32. A warp has 512 bytes of a token, or 1,024, and as many rows of it in flight as the
// name says.
//
// backward, a warp per row r: d_rows[r] = weights[n] * dy[t], d_weights[n] = dy[t] . rows[r] with t = row_token[r] and
// n = row_weight[r]; zeros where t is -1. d_weights of no row must have been cleared.
//
// choices, the same for token choice, where token t has the rows index[t, 0..k]: a warp per token reads dy[t] once for all
// its rows, as many of them in flight as the name says, and writes d_weights[t, j], 0 where the index is -1. Rows whose
// row_token is -1 get zeros, below limit[0] where there is a limit, from the first `clear_blocks` blocks.
//
// Bound by memory: every row is read or written once.

#include "order/rows.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Forward

template <typename T, int N, int U>
__device__ __forceinline__ void combine_forward_in(const T* __restrict__ rows, const int* __restrict__ index,
                                                   const int* __restrict__ offsets, const float* __restrict__ weights,
                                                   index_t count, index_t tokens, int k, int cols,
                                                   T* __restrict__ out) {
  // With two rows of a token, two vectors of each are no faster: there are enough warps.
  constexpr int C = U == 2 ? 1 : 2;
  for_each_segment<N, C>(tokens, cols, 0, [&](index_t token, int col) {
    index_t n = token * k;
    index_t end = n + k;
    if (offsets != nullptr) {
      n = offsets[token];
      end = offsets[token + 1];
    }
    Lanes<N> sum[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[c][i] = 0.0f;
    }
    if (count == 0) end = n;
    for (; n < end; n += U) {
      int row[U];
      float weight[U];
      Packed<N, T> data[U][C];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const index_t at = min(n + u, end - 1);
        row[u] = index[at];
        weight[u] = weights != nullptr ? weights[at] : 1.0f;
        if (n + u >= end || row[u] >= count) row[u] = -1;
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const T* const from = rows + static_cast<index_t>(max(row[u], 0)) * cols;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          data[u][c] = load_packed<N>(from + min(col + c * warp_size * N, cols - N));
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        // The weight of a dropped choice may be anything.
        weight[u] = row[u] >= 0 ? weight[u] : 0.0f;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          keep_if(row[u] >= 0, data[u][c]);
#pragma unroll
          for (int i = 0; i < N; ++i) sum[c][i] += weight[u] * data[u][c][i];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int at = col + c * warp_size * N;
      if (at < cols) store<N>(out + token * cols + at, sum[c]);
    }
  });
}

template <typename T, int U>
__device__ __forceinline__ void combine_forward(const T* rows, const int* index, const int* offsets,
                                                const float* weights, index_t count, index_t tokens, int k,
                                                index_t cols, T* out) {
  // With whole rows aligned no vector is ragged.
  if (rows_are_aligned(rows, cols) && rows_are_aligned(out, cols)) {
    combine_forward_in<T, vector_width<T>, U>(rows, index, offsets, weights, count, tokens, k, static_cast<int>(cols), out);
  } else {
    combine_forward_in<T, 1, U>(rows, index, offsets, weights, count, tokens, k, static_cast<int>(cols), out);
  }
}

// ----------------------------------------------------------------------------
// Backward, by rows

template <typename T, int N>
__device__ __forceinline__ void combine_backward_in(const T* __restrict__ dy, const T* __restrict__ rows,
                                                    const int* __restrict__ row_token,
                                                    const int* __restrict__ row_weight,
                                                    const float* __restrict__ weights, index_t tokens,
                                                    index_t weight_count, index_t count, index_t cols,
                                                    T* __restrict__ d_rows, float* __restrict__ d_weights) {
  constexpr int in_flight = 4;
  const index_t last = cols - N;
  const int lane = threadIdx.x % warp_size;
  const int warps = blockDim.x / warp_size;
  for (index_t row = static_cast<index_t>(blockIdx.x) * warps + threadIdx.x / warp_size; row < count;
       row += static_cast<index_t>(gridDim.x) * warps) {
    const int token = row_token[row];
    const int n = row_weight[row];
    const bool taken = token >= 0 && token < tokens && n >= 0 && n < weight_count;
    const float weight = taken ? weights[n] : 0.0f;
    const T* const from = dy + (taken ? token : 0) * cols;
    float dot = 0.0f;
    for (index_t col = static_cast<index_t>(lane) * N; col < cols; col += in_flight * warp_size * N) {
      Packed<N, T> d[in_flight], y[in_flight];
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        const index_t at = col + u * warp_size * N;
        d[u] = load_packed<N>(from + min(at, last));
        y[u] = load_packed<N>(rows + row * cols + min(at, last));
      }
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        const index_t at = col + u * warp_size * N;
        keep_if(taken && at < cols, d[u]);
        keep_if(taken && at < cols, y[u]);
        Lanes<N> gradient;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          dot += d[u][i] * y[u][i];
          gradient[i] = weight * d[u][i];
        }
        if (at < cols) store<N>(d_rows + row * cols + at, gradient);
      }
    }
    dot = warp_sum(dot);
    if (taken && lane == 0) d_weights[n] = dot;
  }
}

template <typename T>
__device__ __forceinline__ void combine_backward(const T* dy, const T* rows, const int* row_token,
                                                 const int* row_weight, const float* weights, index_t tokens,
                                                 index_t weight_count, index_t count, index_t cols, T* d_rows,
                                                 float* d_weights) {
  if (rows_are_aligned(dy, cols) && rows_are_aligned(rows, cols) && rows_are_aligned(d_rows, cols)) {
    combine_backward_in<T, vector_width<T>>(dy, rows, row_token, row_weight, weights, tokens, weight_count, count, cols,
                                            d_rows, d_weights);
  } else {
    combine_backward_in<T, 1>(dy, rows, row_token, row_weight, weights, tokens, weight_count, count, cols, d_rows,
                              d_weights);
  }
}

// ----------------------------------------------------------------------------
// Backward, by tokens

template <typename T, int N, int U>
__device__ __forceinline__ void combine_choices_in(const T* __restrict__ dy, const T* __restrict__ rows,
                                                   const int* __restrict__ index, const float* __restrict__ weights,
                                                   index_t tokens, int k, index_t cols,
                                                   const int* __restrict__ row_token, index_t written, index_t count,
                                                   index_t clear_blocks, T* __restrict__ d_rows,
                                                   float* __restrict__ d_weights) {
  const int lane = threadIdx.x % warp_size;
  const index_t warps = blockDim.x / warp_size;
  if (blockIdx.x < clear_blocks) {
    clear_empty_rows<N>(row_token, written, cols, d_rows, blockIdx.x, clear_blocks);
    return;
  }
  for (index_t token = (blockIdx.x - clear_blocks) * warps + threadIdx.x / warp_size; token < tokens;
       token += (gridDim.x - clear_blocks) * warps) {
    for (int j = 0; j < k; j += U) {
      int row[U];
      float weight[U], dot[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const index_t at = token * k + min(j + u, k - 1);
        row[u] = index[at];
        weight[u] = weights[at];
        if (j + u >= k || row[u] >= count) row[u] = -1;
        dot[u] = 0.0f;
      }
      for (index_t col = static_cast<index_t>(lane) * N; col < cols; col += warp_size * N) {
        Packed<N, T> data[U];
        const Lanes<N> d = load<N>(dy + token * cols + col);
#pragma unroll
        for (int u = 0; u < U; ++u) data[u] = load_packed<N>(rows + max(row[u], 0) * cols + col);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          keep_if(row[u] >= 0, data[u]);
          Lanes<N> gradient;
#pragma unroll
          for (int i = 0; i < N; ++i) {
            dot[u] += d[i] * data[u][i];
            gradient[i] = weight[u] * d[i];
          }
          if (row[u] >= 0) store<N>(d_rows + row[u] * cols + col, gradient);
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        dot[u] = warp_sum(dot[u]);
        if (lane == 0 && j + u < k) d_weights[token * k + j + u] = dot[u];
      }
    }
  }
}

template <typename T, int U>
__device__ __forceinline__ void combine_choices(const T* dy, const T* rows, const int* index, const float* weights,
                                                index_t tokens, int k, index_t cols, const int* row_token,
                                                const int* limit, index_t count, index_t clear_blocks, T* d_rows,
                                                float* d_weights) {
  const index_t written = row_limit(limit, count);
  if (rows_are_aligned(dy, cols) && rows_are_aligned(rows, cols) && rows_are_aligned(d_rows, cols)) {
    combine_choices_in<T, vector_width<T>, U>(dy, rows, index, weights, tokens, k, cols, row_token, written, count,
                                              clear_blocks, d_rows, d_weights);
  } else {
    combine_choices_in<T, 1, U>(dy, rows, index, weights, tokens, k, cols, row_token, written, count, clear_blocks,
                                d_rows, d_weights);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_COMBINE_FORWARD(U, suffix, T)                                                                           \
  extern "C" __global__ void __launch_bounds__(256, U == 2 ? 8 : 4) combine_rows_forward_u##U##_##suffix(             \
      const T* rows, const int* index, const int* offsets, const float* weights, fsmoe::index_t count,                \
      fsmoe::index_t tokens, int k, fsmoe::index_t cols, T* out) {                                                    \
    fsmoe::combine_forward<T, U>(rows, index, offsets, weights, count, tokens, k, cols, out);                         \
  }
#define FSMOE_COMBINE_CHOICES(U, suffix, T)                                                                           \
  extern "C" __global__ void __launch_bounds__(128, U == 8 ? 4 : 6) combine_rows_choices_u##U##_##suffix(              \
      const T* dy, const T* rows, const int* index, const float* weights, fsmoe::index_t tokens, int k,               \
      fsmoe::index_t cols, const int* row_token, const int* limit, fsmoe::index_t count, fsmoe::index_t clear_blocks, \
      T* d_rows, float* d_weights) {                                                                                  \
    fsmoe::combine_choices<T, U>(dy, rows, index, weights, tokens, k, cols, row_token, limit, count, clear_blocks,    \
                                 d_rows, d_weights);                                                                  \
  }
#define FSMOE_COMBINE(suffix, T)                                                                                       \
  FSMOE_COMBINE_FORWARD(1, suffix, T)                                                                                  \
  FSMOE_COMBINE_FORWARD(2, suffix, T)                                                                                  \
  FSMOE_COMBINE_FORWARD(4, suffix, T)                                                                                  \
  FSMOE_COMBINE_CHOICES(1, suffix, T)                                                                                  \
  FSMOE_COMBINE_CHOICES(2, suffix, T)                                                                                  \
  FSMOE_COMBINE_CHOICES(4, suffix, T)                                                                                  \
  FSMOE_COMBINE_CHOICES(8, suffix, T)                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 3) combine_rows_backward_##suffix(                                 \
      const T* dy, const T* rows, const int* row_token, const int* row_weight, const float* weights,                   \
      fsmoe::index_t tokens, fsmoe::index_t weight_count, fsmoe::index_t count, fsmoe::index_t cols, T* d_rows,        \
      float* d_weights) {                                                                                              \
    fsmoe::combine_backward(dy, rows, row_token, row_weight, weights, tokens, weight_count, count, cols, d_rows,       \
                            d_weights);                                                                                \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_COMBINE)

extern "C" __global__ void combine_rows_clear(float* d_weights, fsmoe::index_t n) {
  fsmoe::for_each_vector<1>(1, n, [&](fsmoe::index_t, fsmoe::index_t i, int) { d_weights[i] = 0.0f; });
}
