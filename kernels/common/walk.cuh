// The order in which a kernel visits tensors of one shape and several layouts: rows along the innermost dimension,
// numbered by the others.
#pragma once

#include "common/dtype.cuh"

namespace fsmoe {

// What tensors of rank 6 have besides the innermost dimension.
constexpr int max_lead = 5;

// Sizes and, for each of N tensors, strides of the dimensions that number the rows, outermost first; `rank` of them.
template <int N>
struct Walk {
  index_t rank;
  index_t size[max_lead];
  index_t stride[N][max_lead];
};

// A quotient by a divisor that is seldom large: 64-bit division takes several times as long as 32-bit.
__device__ __forceinline__ index_t divide(index_t a, index_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Where row number `row` begins in each tensor.
template <int N>
struct Offsets {
  index_t at[N];
};

template <int N>
__device__ __forceinline__ Offsets<N> row_offsets(const Walk<N>& walk, index_t row) {
  Offsets<N> offsets = {};
#pragma unroll
  for (int d = max_lead - 1; d >= 0; --d) {
    if (d >= walk.rank) continue;
    // The outermost dimension needs no division: what is left is its index.
    const index_t rest = d == 0 ? 0 : divide(row, walk.size[d]);
    const index_t index = d == 0 ? row : row - rest * walk.size[d];
#pragma unroll
    for (int n = 0; n < N; ++n) offsets.at[n] += index * walk.stride[n][d];
    row = rest;
  }
  return offsets;
}

}  // namespace fsmoe
