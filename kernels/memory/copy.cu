// dst = src, converted, between any layouts of one shape.
//
//   copy_rows_{S}_{D}(src, dst, walk, rows, cols)                  rows without gaps on both sides, in 16-byte vectors where
//                                                                  all of them are aligned
//   copy_any_{S}_{D}(src, src_step, dst, dst_step, walk, rows, cols)  any strides, element by element along dst
//   copy_tiles_{b16,b32,b64}(src, src_stride, dst, dst_stride, walk, batches, rows, cols)
//                                                                  a transposition: dst (rows, cols) has unit stride along
//                                                                  cols, src along rows; through shared memory, so that
//                                                                  both sides are accessed in whole sectors
//
// S and D: b16, b32 or b64 twice for a copy of bits (any type of that size), or two different of bf16, f16, f32, f64. The
// walk holds the dimensions besides cols (besides rows and cols for the transposition); its first strides are src's.
// f64 becomes a 16-bit type by way of f32, as on the host.

#include "common/vector.cuh"
#include "common/walk.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Conversions

template <typename D, typename S>
__device__ __forceinline__ D convert(S x) {
  if constexpr (sizeof(S) == 8) {
    return from_f32<D>(static_cast<float>(x));
  } else if constexpr (sizeof(D) == 8) {
    return static_cast<D>(to_f32(x));
  } else {
    return from_f32<D>(to_f32(x));
  }
}
template <>
__device__ __forceinline__ uint16_t convert<uint16_t, uint16_t>(uint16_t x) {
  return x;
}
template <>
__device__ __forceinline__ uint32_t convert<uint32_t, uint32_t>(uint32_t x) {
  return x;
}
template <>
__device__ __forceinline__ uint64_t convert<uint64_t, uint64_t>(uint64_t x) {
  return x;
}

// N elements, moved in 16-byte accesses.
template <typename T, int N>
struct alignas(16) Pack {
  static_assert(N * sizeof(T) % 16 == 0, "a pack is a multiple of 16 bytes");
  T v[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  Pack<T, N> pack;
  uint4* words = reinterpret_cast<uint4*>(&pack);
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  const uint4* words = reinterpret_cast<const uint4*>(&pack);
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
}

// ----------------------------------------------------------------------------
// Rows

template <int N, typename S, typename D>
__device__ __forceinline__ void copy_rows_in(const S* __restrict__ src, D* __restrict__ dst, const Walk<2>& walk,
                                             index_t rows, index_t cols) {
  for_each_vector<N>(rows, cols, [&](index_t row, index_t col, int count) {
    const Offsets<2> at = row_offsets(walk, row);
    const S* from = src + at.at[0] + col;
    D* to = dst + at.at[1] + col;
    if (N > 1 && count == N) {
      if constexpr (N > 1) {
        const Pack<S, N> in = load_pack<S, N>(from);
        Pack<D, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out.v[i] = convert<D>(in.v[i]);
        store_pack(to, out);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) to[i] = convert<D>(from[i]);
    }
  });
}

template <typename S, typename D>
__device__ __forceinline__ void copy_rows(const S* src, D* dst, const Walk<2>& walk, index_t rows, index_t cols) {
  // As many elements as make 16 bytes of the narrower type.
  constexpr int N = 16 / static_cast<int>(sizeof(S) < sizeof(D) ? sizeof(S) : sizeof(D));
  bool aligned = reinterpret_cast<uintptr_t>(src) % 16 == 0 && reinterpret_cast<uintptr_t>(dst) % 16 == 0;
#pragma unroll
  for (int d = 0; d < max_lead; ++d) {
    if (d >= walk.rank) continue;
    aligned = aligned && walk.stride[0][d] * sizeof(S) % 16 == 0 && walk.stride[1][d] * sizeof(D) % 16 == 0;
  }
  if (aligned) {
    copy_rows_in<N>(src, dst, walk, rows, cols);
  } else {
    copy_rows_in<1>(src, dst, walk, rows, cols);
  }
}

// ----------------------------------------------------------------------------
// Any layouts

template <typename S, typename D>
__device__ __forceinline__ void copy_any(const S* __restrict__ src, index_t src_step, D* __restrict__ dst,
                                         index_t dst_step, const Walk<2>& walk, index_t rows, index_t cols) {
  for_each_vector<1>(rows, cols, [&](index_t row, index_t col, int) {
    const Offsets<2> at = row_offsets(walk, row);
    dst[at.at[1] + col * dst_step] = convert<D>(src[at.at[0] + col * src_step]);
  });
}

// ----------------------------------------------------------------------------
// Transposition by tiles of 32 x 32; blocks of 32 x 8 threads, given as 256. Tiles are numbered across batches.

constexpr int tile = 32;
constexpr int tile_rows = 8;

template <typename T>
__device__ __forceinline__ void copy_tiles(const T* __restrict__ src, index_t src_stride, T* __restrict__ dst,
                                           index_t dst_stride, const Walk<2>& walk, index_t batches, index_t rows,
                                           index_t cols) {
  // One column more than a tile has, so that a column's elements lie in different banks.
  __shared__ T staged[tile][tile + 1];
  const int x = threadIdx.x % tile;
  const int y = threadIdx.x / tile;
  const index_t down = (rows + tile - 1) / tile;
  const index_t across = (cols + tile - 1) / tile;
  const index_t tiles = batches * down * across;
  for (index_t number = blockIdx.x; number < tiles; number += gridDim.x) {
    const index_t strip = divide(number, across);
    const index_t batch = divide(strip, down);
    const index_t row0 = (strip - batch * down) * tile;
    const index_t col0 = (number - strip * across) * tile;
    const Offsets<2> at = row_offsets(walk, batch);
    // src has unit stride along rows: consecutive threads read consecutive rows of one column.
#pragma unroll
    for (int i = 0; i < tile; i += tile_rows) {
      const index_t row = row0 + x;
      const index_t col = col0 + y + i;
      if (row < rows && col < cols) staged[y + i][x] = src[at.at[0] + col * src_stride + row];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < tile; i += tile_rows) {
      const index_t row = row0 + y + i;
      const index_t col = col0 + x;
      if (row < rows && col < cols) dst[at.at[1] + row * dst_stride + col] = staged[x][y + i];
    }
    __syncthreads();
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_COPY(s, S, d, D)                                                                                          \
  extern "C" __global__ void copy_rows_##s##_##d(const S* src, D* dst, const fsmoe::Walk<2> walk, fsmoe::index_t rows,  \
                                                 fsmoe::index_t cols) {                                                 \
    fsmoe::copy_rows(src, dst, walk, rows, cols);                                                                       \
  }                                                                                                                     \
  extern "C" __global__ void copy_any_##s##_##d(const S* src, fsmoe::index_t src_step, D* dst, fsmoe::index_t dst_step, \
                                                const fsmoe::Walk<2> walk, fsmoe::index_t rows, fsmoe::index_t cols) {  \
    fsmoe::copy_any(src, src_step, dst, dst_step, walk, rows, cols);                                                    \
  }

#define FSMOE_COPY_TILES(t, T)                                                                                       \
  extern "C" __global__ void copy_tiles_##t(const T* src, fsmoe::index_t src_stride, T* dst,                         \
                                            fsmoe::index_t dst_stride, const fsmoe::Walk<2> walk,                    \
                                            fsmoe::index_t batches, fsmoe::index_t rows, fsmoe::index_t cols) {      \
    fsmoe::copy_tiles(src, src_stride, dst, dst_stride, walk, batches, rows, cols);                                  \
  }

FSMOE_COPY(b16, uint16_t, b16, uint16_t)
FSMOE_COPY(b32, uint32_t, b32, uint32_t)
FSMOE_COPY(b64, uint64_t, b64, uint64_t)

FSMOE_COPY(bf16, fsmoe::bf16, f16, fsmoe::f16)
FSMOE_COPY(bf16, fsmoe::bf16, f32, fsmoe::f32)
FSMOE_COPY(bf16, fsmoe::bf16, f64, double)
FSMOE_COPY(f16, fsmoe::f16, bf16, fsmoe::bf16)
FSMOE_COPY(f16, fsmoe::f16, f32, fsmoe::f32)
FSMOE_COPY(f16, fsmoe::f16, f64, double)
FSMOE_COPY(f32, fsmoe::f32, bf16, fsmoe::bf16)
FSMOE_COPY(f32, fsmoe::f32, f16, fsmoe::f16)
FSMOE_COPY(f32, fsmoe::f32, f64, double)
FSMOE_COPY(f64, double, bf16, fsmoe::bf16)
FSMOE_COPY(f64, double, f16, fsmoe::f16)
FSMOE_COPY(f64, double, f32, fsmoe::f32)

FSMOE_COPY_TILES(b16, uint16_t)
FSMOE_COPY_TILES(b32, uint32_t)
FSMOE_COPY_TILES(b64, uint64_t)
