// What the kernels that move rows share: a walk over (row, vector) that keeps several in flight, the weighted sum of rows,
// zeros for empty rows.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace fsmoe {

// Walks (rows, vectors) with the grid's threads as for_each_vector does, but U items at a time: calls
// body(row[U], vector[U], count), items 0..count of which are there.
template <int U, typename Body>
__device__ __forceinline__ void for_each_batch(index_t rows, index_t vectors, Body body) {
  if (vectors == 0) return;
  const index_t first = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  const index_t step_rows = step / vectors;
  const index_t step_vectors = step - step_rows * vectors;
  index_t row = first / vectors;
  index_t vector = first - row * vectors;
  while (row < rows) {
    index_t r[U], v[U];
    int count = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      r[u] = row;
      v[u] = vector;
      count += row < rows;
      row += step_rows;
      vector += step_vectors;
      if (vector >= vectors) {
        vector -= vectors;
        ++row;
      }
    }
    body(r, v, count);
  }
}

// N elements as they lie in memory: they stay packed while loads are in flight, which takes half the registers, or fewer, and
// keeps the compiler from waiting for one load before it issues the next.
template <int N, typename T>
struct alignas(N * sizeof(T)) Packed {
  T v[N];
  __device__ __forceinline__ float operator[](int i) const { return to_f32(v[i]); }
};

template <int N, typename T>
__device__ __forceinline__ Packed<N, T> load_packed(const T* from) {
  static_assert(N == 1 || N == vector_width<T>, "a load is one element or 16 bytes");
  Packed<N, T> packed;
  if constexpr (N == 1) {
    packed.v[0] = *from;
  } else {
    *reinterpret_cast<uint4*>(&packed) = *reinterpret_cast<const uint4*>(from);
  }
  return packed;
}

template <int N, typename T>
__device__ __forceinline__ void store_packed(T* to, const Packed<N, T>& packed) {
  if constexpr (N == 1) {
    *to = packed.v[0];
  } else {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&packed);
  }
}

// `packed` if it is `there`, else zeros. Loads of what may not be there go to an address that is good in any case and are
// corrected so: a predicate per load in flight would be more than the hardware has.
template <int N, typename T>
__device__ __forceinline__ void keep_if(bool there, Packed<N, T>& packed) {
  if constexpr (N == 1) {
    if (!there) packed.v[0] = from_f32<T>(0.0f);
  } else {
    uint4& raw = *reinterpret_cast<uint4*>(&packed);
    raw.x = there ? raw.x : 0;
    raw.y = there ? raw.y : 0;
    raw.z = there ? raw.z : 0;
    raw.w = there ? raw.w : 0;
  }
}

// The end of the rows that are to be written.
__device__ __forceinline__ index_t row_limit(const int* limit, index_t rows) {
  return limit == nullptr ? rows : min(static_cast<index_t>(*limit), rows);
}

// Writes zeros to the rows that have no token, as block `block` of `blocks`: one looks at 32 rows at a time, of which its
// warps take the empty ones in turn. N elements are stored at once.
//
// Empty rows lie side by side, so a warp that had 32 of them to itself would still be writing when all others are done; and
// these blocks come first in their grids, for the same reason.
template <int N, typename T>
__device__ __forceinline__ void clear_empty_rows(const int* __restrict__ row_token, index_t rows, index_t cols,
                                                 T* __restrict__ out, index_t block, index_t blocks) {
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  Lanes<N> zeros;
#pragma unroll
  for (int i = 0; i < N; ++i) zeros[i] = 0.0f;
  for (index_t from = block * warp_size; from < rows; from += blocks * warp_size) {
    unsigned empty = __ballot_sync(full_warp, from + lane < rows && row_token[from + lane] < 0);
    for (int n = 0; empty != 0; ++n) {
      T* const row = out + (from + __ffs(empty) - 1) * cols;
      empty &= empty - 1;
      if (n % warps != warp) continue;
      index_t col = static_cast<index_t>(lane) * N;
      for (; col + N <= cols; col += warp_size * N) store<N>(row + col, zeros);
      for (; col < cols; ++col) row[col] = from_f32<T>(0.0f);
    }
  }
}

// Walks (rows, segments of cols) by warps, from the grid's block `first` on: calls body(row, col) with the warp's row and the
// lane's first column; a segment has C vectors of N elements for each lane, warp_size * N columns apart. A warp has one row,
// so what it must know of it is read once. Segments are numbered in 32 bits: no memory has more.
template <int N, int C, typename Body>
__device__ __forceinline__ void for_each_segment(index_t rows, int cols, unsigned first, Body body) {
  constexpr unsigned width = C * warp_size * N;
  const unsigned segments = (cols + width - 1) / width;
  const unsigned warps = blockDim.x / warp_size;
  const unsigned items = static_cast<unsigned>(rows) * segments;
  for (unsigned item = (blockIdx.x - first) * warps + threadIdx.x / warp_size; item < items;
       item += (gridDim.x - first) * warps) {
    const unsigned row = item / segments;
    body(static_cast<index_t>(row), static_cast<int>((item - row * segments) * width + threadIdx.x % warp_size * N));
  }
}

}  // namespace fsmoe
