// 16-byte vector loads and stores, the widest a thread has, and a walk over the vectors of a strided matrix.
#pragma once

#include "common/dtype.cuh"

namespace fsmoe {

// Elements of T in 16 bytes: 8 of a 16-bit type, 4 of f32.
template <typename T>
constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

// N elements in registers, widened to f32.
template <int N>
struct Lanes {
  float v[N];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

// Loads N elements: a single one, or 16-byte transactions of `vector_width` each (`from` must then be 16-byte aligned).
// Two of them let types of different widths take the same number of elements.
template <int N, typename T>
__device__ __forceinline__ Lanes<N> load(const T* from) {
  constexpr int width = vector_width<T>;
  static_assert(N == 1 || N % width == 0, "a load is one element or a multiple of 16 bytes");
  Lanes<N> lanes;
  if constexpr (N == 1) {
    lanes[0] = to_f32(*from);
  } else {
#pragma unroll
    for (int at = 0; at < N; at += width) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from + at);
      const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int i = 0; i < width; ++i) lanes[at + i] = to_f32(elements[i]);
    }
  }
  return lanes;
}

// Stores N elements, rounded to T; the same rule for `to`.
template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Lanes<N>& lanes) {
  constexpr int width = vector_width<T>;
  static_assert(N == 1 || N % width == 0, "a store is one element or a multiple of 16 bytes");
  if constexpr (N == 1) {
    *to = from_f32<T>(lanes[0]);
  } else {
#pragma unroll
    for (int at = 0; at < N; at += width) {
      uint4 raw;
      T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
      for (int i = 0; i < width; ++i) elements[i] = from_f32<T>(lanes[at + i]);
      *reinterpret_cast<uint4*>(to + at) = raw;
    }
  }
}

// As `load` and `store`, one element at a time unless `aligned`: what sums must take the same elements in the same order
// wherever they lie.
template <int N, typename T>
__device__ __forceinline__ Lanes<N> load_either(const T* from, bool aligned) {
  if (aligned) return load<N>(from);
  Lanes<N> lanes;
#pragma unroll
  for (int i = 0; i < N; ++i) lanes[i] = to_f32(from[i]);
  return lanes;
}

template <int N, typename T>
__device__ __forceinline__ void store_either(T* to, const Lanes<N>& lanes, bool aligned) {
  if (aligned) {
    store<N>(to, lanes);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from_f32<T>(lanes[i]);
  }
}

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Whether every row of a matrix starts on a 16-byte boundary.
template <typename T>
__device__ __forceinline__ bool rows_are_aligned(const T* data, index_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % vector_width<T> == 0;
}

// The grid-stride walk over a (rows, cols) matrix in vectors of N elements, a row's last vector perhaps ragged: calls
// body(row, col, count) with count elements to do from col on, N of them except at a ragged end.
//
// Consecutive threads get consecutive vectors, across the ends of rows too, so no thread idles on narrow rows. The two
// divisions this takes are done once per thread; a step then moves (row, col) by constants.
template <int N, typename Body>
__device__ __forceinline__ void for_each_vector(index_t rows, index_t cols, Body body) {
  const index_t per_row = (cols + N - 1) / N;
  const index_t first = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  if (per_row == 0) return;
  const index_t step_rows = step / per_row;
  const index_t step_vectors = step - step_rows * per_row;
  index_t row = first / per_row;
  index_t vector = first - row * per_row;
  while (row < rows) {
    const index_t col = vector * N;
    const index_t left = cols - col;
    body(row, col, left < N ? static_cast<int>(left) : N);
    row += step_rows;
    vector += step_vectors;
    if (vector >= per_row) {
      vector -= per_row;
      ++row;
    }
  }
}

}  // namespace fsmoe
