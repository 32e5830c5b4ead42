// What forward and backward of attention in 16-bit types share: tiles of a head in shared memory, and the two matrix
// products on them. A warp owns whole rows of a product, so that the product's result, still in registers, is the next
// one's left operand and nothing passes between warps.
#pragma once

#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"

namespace fsmoe::attention {

constexpr float log2_e = 1.44269504088896341f;
constexpr int warp_lanes = 32;

// q and out are (B·L, Hq·D), k and v (B·L, Hkv·D), all row-major; lse and delta (B, Hq, L).
struct Sizes {
  int seq;       // L
  int heads;     // Hq
  int kv_heads;  // Hkv
  int dim;       // D
  __device__ __forceinline__ index_t q_row() const { return static_cast<index_t>(heads) * dim; }
  __device__ __forceinline__ index_t kv_row() const { return static_cast<index_t>(kv_heads) * dim; }
};

// Elements from one row of a tile to the next: 16 bytes more than the row, so that eight rows' 16-byte pieces, which
// ldmatrix reads at once, lie in different banks.
template <int Width>
constexpr int stride = Width + 8;

// Two values, rounded, in one register: the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Whether every head's rows begin on 16-byte boundaries and hold whole 16-byte pieces.
template <typename T, typename... Ts>
__device__ __forceinline__ bool in_pieces(int dim, const T* first, const Ts*... rest) {
  return dim % 8 == 0 && ((reinterpret_cast<uintptr_t>(first) % 16 == 0) && ... &&
                          (reinterpret_cast<uintptr_t>(rest) % 16 == 0));
}

// Rows first..first + Rows of a head, which begins at `from` and has `size` rows of `dim` elements, into a tile; what lies
// outside is zero. In pieces the copy is asynchronous: the caller commits and waits.
template <int Rows, int Width, int Threads, typename T>
__device__ __forceinline__ void load_tile(T* to, const T* from, index_t row, int first, int size, int dim, bool pieces) {
  constexpr int per_row = Width / 8;
#pragma unroll
  for (int i = threadIdx.x; i < Rows * per_row; i += Threads) {
    const int r = i / per_row;
    const int col = i % per_row * 8;
    T* target = to + r * stride<Width> + col;
    const int left = first + r < size ? dim - col : 0;
    const T* source = left > 0 ? from + (first + r) * row + col : from;
    if (pieces) {
      ptx::cp_async_16(target, source, left > 0 ? 16 : 0);
    } else {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) target[j] = j < left ? source[j] : from_f32<T>(0.0f);
    }
  }
}

// A warp's own rows of a tile, written by itself, to a head's rows from `first` on.
template <int Rows, int Width, typename T>
__device__ __forceinline__ void store_rows(T* to, const T* tile, index_t row, int first, int size, int dim, bool pieces) {
  constexpr int per_row = Width / 8;
  const int lane = threadIdx.x % warp_lanes;
#pragma unroll
  for (int i = lane; i < Rows * per_row; i += warp_lanes) {
    const int r = i / per_row;
    const int col = i % per_row * 8;
    const T* source = tile + r * stride<Width> + col;
    const int left = first + r < size ? dim - col : 0;
    if (left <= 0) continue;
    T* target = to + (first + r) * row + col;
    if (pieces) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else {
#pragma unroll 1
      for (int j = 0; j < 8 && j < left; ++j) target[j] = source[j];
    }
  }
}

// The left operand's 16 rows and 16 columns at `tile`.
template <int Width, typename T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile) {
  const int lane = threadIdx.x % warp_lanes;
  ptx::ldmatrix_x4(a, tile + lane % 16 * stride<Width> + lane / 16 * 8);
}

// c (16·M, 8·N) += a·bᵀ: a the warp's rows of a tile (16·M, Width), b a tile (8·N, Width), N even.
template <int M, int N, int Width, typename T>
__device__ __forceinline__ void product_nt(float (&c)[M][N][4], const T* a, const T* b) {
  const int lane = threadIdx.x % warp_lanes;
  b += (lane % 8 + lane / 16 * 8) * stride<Width> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < Width; k += 16) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_left<Width>(left[m], a + m * 16 * stride<Width> + k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b + n * 8 * stride<Width> + k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(c[m][n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same with a in registers.
template <int M, int N, int Width, typename T>
__device__ __forceinline__ void product_nt(float (&c)[M][N][4], const uint32_t (&a)[M][Width / 16][4], const T* b) {
  const int lane = threadIdx.x % warp_lanes;
  b += (lane % 8 + lane / 16 * 8) * stride<Width> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < Width; k += 16) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b + n * 8 * stride<Width> + k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(c[m][n], a[m][k / 16], right[0], right[1]);
        ptx::mma_m16n8k16<T>(c[m][n + 1], a[m][k / 16], right[2], right[3]);
      }
    }
  }
}

template <int M, int Width, typename T>
__device__ __forceinline__ void load_lefts(uint32_t (&a)[M][Width / 16][4], const T* tile) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int k = 0; k < Width / 16; ++k) load_left<Width>(a[m][k], tile + m * 16 * stride<Width> + k * 16);
  }
}

// c (16·M, 8·N) += p·b: p (16·M, 8·K) in registers as product_nt leaves it, rounded here, K even; b a tile (8·K, Width) of
// which 8·N columns from the given address on are used.
template <int M, int N, int K, int Width, typename T>
__device__ __forceinline__ void product_nn(float (&c)[M][N][4], const float (&p)[M][K][4], const T* b) {
  const int lane = threadIdx.x % warp_lanes;
  b += lane % 16 * stride<Width> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < K; k += 2) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      left[m][0] = pack<T>(p[m][k][0], p[m][k][1]);
      left[m][1] = pack<T>(p[m][k][2], p[m][k][3]);
      left[m][2] = pack<T>(p[m][k + 1][0], p[m][k + 1][1]);
      left[m][3] = pack<T>(p[m][k + 1][2], p[m][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, b + k * 8 * stride<Width> + n * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(c[m][n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The warp's rows (16·M, 8·N), each times factor[m][half], rounded into a tile of its own from the given address on.
template <int M, int N, int Width, typename T>
__device__ __forceinline__ void put_rows(T* tile, const float (&c)[M][N][4], const float (&factor)[M][2]) {
  const int lane = threadIdx.x % warp_lanes;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* row = tile + (m * 16 + half * 8 + lane / 4) * stride<Width> + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        *reinterpret_cast<uint32_t*>(row + n * 8) =
            pack<T>(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
      }
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
    }
  }
}

}  // namespace fsmoe::attention
