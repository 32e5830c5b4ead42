// Causal attention in f32, forward and backward, by plain multiply-adds: exact to f32's rounding, which tensor cores' operands
// are not. The same walks over tiles as in attention_forward.cu and attention_backward.cu; shapes and contracts are theirs.
//
//   attention_plain_forward_f32_{64,128,256}(q, k, v, out, lse, seq, heads, kv_heads, dim)
//   attention_plain_queries_f32_{…}(q, k, v, lse, delta, d_out, dq, seq, heads, kv_heads, dim)
//   attention_plain_keys_f32_{…}(q, k, v, lse, delta, d_out, dk, dv, seq, heads, kv_heads, dim)
//
// 256 threads, 16 by 16: thread (ty, tx) has rows ty, ty + 16, … and columns tx, tx + 16, … of every product.

#include "model/attention.cuh"

namespace fsmoe::attention {

constexpr int side = 16;
constexpr int plain_threads = side * side;

// Rows of a tile, of queries and of keys alike: what fits into shared memory.
template <int Width>
constexpr int tile_rows = Width <= 64 ? 64 : 32;

// One more than the width: threads that read a column of 16 rows meet 16 banks.
template <int Width>
constexpr int plain_stride = Width + 1;

template <int Rows, int Width>
__device__ __forceinline__ void load_plain(float* to, const float* from, index_t row, int first, int size, int dim) {
#pragma unroll 4
  for (int i = threadIdx.x; i < Rows * Width; i += plain_threads) {
    const int r = i / Width;
    const int col = i % Width;
    to[r * plain_stride<Width> + col] = first + r < size && col < dim ? from[(first + r) * row + col] : 0.0f;
  }
}

// c (Rows, Rows) = a·bᵀ for tiles a and b.
template <int Rows, int Width>
__device__ __forceinline__ void plain_nt(float (&c)[Rows / side][Rows / side], const float* a, const float* b) {
  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
#pragma unroll
    for (int j = 0; j < Rows / side; ++j) c[i][j] = 0.0f;
  }
#pragma unroll 4
  for (int k = 0; k < Width; ++k) {
    float left[Rows / side], right[Rows / side];
#pragma unroll
    for (int i = 0; i < Rows / side; ++i) left[i] = a[(ty + i * side) * plain_stride<Width> + k];
#pragma unroll
    for (int j = 0; j < Rows / side; ++j) right[j] = b[(tx + j * side) * plain_stride<Width> + k];
#pragma unroll
    for (int i = 0; i < Rows / side; ++i) {
#pragma unroll
      for (int j = 0; j < Rows / side; ++j) c[i][j] = fmaf(left[i], right[j], c[i][j]);
    }
  }
}

// c (Rows, Width) += w·b for w (Rows, Rows) in shared memory and a tile b.
template <int Rows, int Width>
__device__ __forceinline__ void plain_nn(float (&c)[Rows / side][Width / side], const float* w, const float* b) {
  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
#pragma unroll 4
  for (int k = 0; k < Rows; ++k) {
    float left[Rows / side];
#pragma unroll
    for (int i = 0; i < Rows / side; ++i) left[i] = w[(ty + i * side) * plain_stride<Rows> + k];
#pragma unroll
    for (int j = 0; j < Width / side; ++j) {
      const float right = b[k * plain_stride<Width> + tx + j * side];
#pragma unroll
      for (int i = 0; i < Rows / side; ++i) c[i][j] = fmaf(left[i], right, c[i][j]);
    }
  }
}

template <int Rows>
__device__ __forceinline__ void put_square(float* w, const float (&c)[Rows / side][Rows / side]) {
  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
#pragma unroll
    for (int j = 0; j < Rows / side; ++j) w[(ty + i * side) * plain_stride<Rows> + tx + j * side] = c[i][j];
  }
}

template <int Rows, int Width>
__device__ __forceinline__ void store_plain(float* to, const float (&c)[Rows / side][Width / side],
                                            const float (&factor)[Rows / side], index_t row, int first, int size,
                                            int dim) {
  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
    const int r = first + ty + i * side;
#pragma unroll
    for (int j = 0; j < Width / side; ++j) {
      const int col = tx + j * side;
      if (r < size && col < dim) to[r * row + col] = c[i][j] * factor[i];
    }
  }
}

template <int Rows, int Width>
__device__ __forceinline__ void clear_plain(float (&c)[Rows / side][Width / side]) {
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
#pragma unroll
    for (int j = 0; j < Width / side; ++j) c[i][j] = 0.0f;
  }
}

// Over the 16 threads that have a row's columns.
template <typename Op>
__device__ __forceinline__ float over_columns(float x, Op op) {
#pragma unroll
  for (int offset = side / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// ----------------------------------------------------------------------------
// Forward

template <int Width>
__device__ __forceinline__ void plain_forward(const float* __restrict__ q, const float* __restrict__ k,
                                              const float* __restrict__ v, float* __restrict__ out,
                                              float* __restrict__ lse, Sizes sizes) {
  constexpr int Rows = tile_rows<Width>;
  constexpr int Tile = Rows * plain_stride<Width>;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const q_tile = reinterpret_cast<float*>(shared);
  float* const k_tile = q_tile + Tile;
  float* const v_tile = k_tile + Tile;
  float* const square = v_tile + Tile;

  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
  const int tiles = (sizes.seq + Rows - 1) / Rows;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Rows;
  const index_t batch = blockIdx.x / tiles / sizes.heads;
  const int head = blockIdx.x / tiles % sizes.heads;
  const int kv_head = head / (sizes.heads / sizes.kv_heads);
  const index_t q_at = batch * sizes.seq * sizes.q_row() + head * sizes.dim;
  const index_t kv_at = batch * sizes.seq * sizes.kv_row() + kv_head * sizes.dim;
  const float scale = 1.0f / sqrtf(static_cast<float>(sizes.dim));

  load_plain<Rows, Width>(q_tile, q + q_at, sizes.q_row(), first, sizes.seq, sizes.dim);
  float mixed[Rows / side][Width / side];
  clear_plain<Rows, Width>(mixed);
  float most[Rows / side], total[Rows / side];
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
    most[i] = -INFINITY;
    total[i] = 0.0f;
  }
  const int seen = min(first + Rows, sizes.seq);
  for (int key = 0; key < seen; key += Rows) {
    __syncthreads();
    load_plain<Rows, Width>(k_tile, k + kv_at, sizes.kv_row(), key, sizes.seq, sizes.dim);
    load_plain<Rows, Width>(v_tile, v + kv_at, sizes.kv_row(), key, sizes.seq, sizes.dim);
    __syncthreads();
    float scores[Rows / side][Rows / side];
    plain_nt<Rows, Width>(scores, q_tile, k_tile);
#pragma unroll
    for (int i = 0; i < Rows / side; ++i) {
      const int query = first + ty + i * side;
      float peak = most[i];
#pragma unroll
      for (int j = 0; j < Rows / side; ++j) {
        scores[i][j] = key + tx + j * side > query ? -INFINITY : scores[i][j] * scale;
        peak = fmaxf(peak, scores[i][j]);
      }
      peak = over_columns(peak, [](float a, float b) { return fmaxf(a, b); });
      const float keep = expf(most[i] - peak);
      most[i] = peak;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < Rows / side; ++j) {
        scores[i][j] = expf(scores[i][j] - peak);
        sum += scores[i][j];
      }
      total[i] = total[i] * keep + sum;
#pragma unroll
      for (int j = 0; j < Width / side; ++j) mixed[i][j] *= keep;
    }
    put_square<Rows>(square, scores);
    __syncthreads();
    plain_nn<Rows, Width>(mixed, square, v_tile);
  }
  float factor[Rows / side];
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
    const float sum = over_columns(total[i], [](float a, float b) { return a + b; });
    factor[i] = 1.0f / sum;
    const int query = first + ty + i * side;
    if (tx == 0 && query < sizes.seq) lse[(batch * sizes.heads + head) * sizes.seq + query] = most[i] + logf(sum);
  }
  store_plain<Rows, Width>(out + q_at, mixed, factor, sizes.q_row(), first, sizes.seq, sizes.dim);
}

// ----------------------------------------------------------------------------
// dq

template <int Width>
__device__ __forceinline__ void plain_queries(const float* __restrict__ q, const float* __restrict__ k,
                                              const float* __restrict__ v, const float* __restrict__ lse,
                                              const float* __restrict__ delta, const float* __restrict__ d_out,
                                              float* __restrict__ dq, Sizes sizes) {
  constexpr int Rows = tile_rows<Width>;
  constexpr int Tile = Rows * plain_stride<Width>;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const q_tile = reinterpret_cast<float*>(shared);
  float* const o_tile = q_tile + Tile;
  float* const k_tile = o_tile + Tile;
  float* const v_tile = k_tile + Tile;
  float* const square = v_tile + Tile;

  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
  const int tiles = (sizes.seq + Rows - 1) / Rows;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Rows;
  const index_t batch = blockIdx.x / tiles / sizes.heads;
  const int head = blockIdx.x / tiles % sizes.heads;
  const int kv_head = head / (sizes.heads / sizes.kv_heads);
  const index_t q_at = batch * sizes.seq * sizes.q_row() + head * sizes.dim;
  const index_t kv_at = batch * sizes.seq * sizes.kv_row() + kv_head * sizes.dim;
  const index_t row_at = (batch * sizes.heads + head) * sizes.seq;
  const float scale = 1.0f / sqrtf(static_cast<float>(sizes.dim));

  load_plain<Rows, Width>(q_tile, q + q_at, sizes.q_row(), first, sizes.seq, sizes.dim);
  load_plain<Rows, Width>(o_tile, d_out + q_at, sizes.q_row(), first, sizes.seq, sizes.dim);
  float grad[Rows / side][Width / side];
  clear_plain<Rows, Width>(grad);
  float base[Rows / side], shift[Rows / side], factor[Rows / side];
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
    const int query = first + ty + i * side;
    base[i] = query < sizes.seq ? lse[row_at + query] : INFINITY;
    shift[i] = query < sizes.seq ? delta[row_at + query] : 0.0f;
    factor[i] = scale;
  }
  const int seen = min(first + Rows, sizes.seq);
  for (int key = 0; key < seen; key += Rows) {
    __syncthreads();
    load_plain<Rows, Width>(k_tile, k + kv_at, sizes.kv_row(), key, sizes.seq, sizes.dim);
    load_plain<Rows, Width>(v_tile, v + kv_at, sizes.kv_row(), key, sizes.seq, sizes.dim);
    __syncthreads();
    float p[Rows / side][Rows / side], ds[Rows / side][Rows / side];
    plain_nt<Rows, Width>(p, q_tile, k_tile);
    plain_nt<Rows, Width>(ds, o_tile, v_tile);
#pragma unroll
    for (int i = 0; i < Rows / side; ++i) {
#pragma unroll
      for (int j = 0; j < Rows / side; ++j) {
        const bool hidden = key + tx + j * side > first + ty + i * side;
        ds[i][j] = hidden ? 0.0f : expf(p[i][j] * scale - base[i]) * (ds[i][j] - shift[i]);
      }
    }
    put_square<Rows>(square, ds);
    __syncthreads();
    plain_nn<Rows, Width>(grad, square, k_tile);
  }
  store_plain<Rows, Width>(dq + q_at, grad, factor, sizes.q_row(), first, sizes.seq, sizes.dim);
}

// ----------------------------------------------------------------------------
// dk and dv

template <int Width>
__device__ __forceinline__ void plain_keys(const float* __restrict__ q, const float* __restrict__ k,
                                           const float* __restrict__ v, const float* __restrict__ lse,
                                           const float* __restrict__ delta, const float* __restrict__ d_out,
                                           float* __restrict__ dk, float* __restrict__ dv, Sizes sizes) {
  constexpr int Rows = tile_rows<Width>;
  constexpr int Tile = Rows * plain_stride<Width>;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const k_tile = reinterpret_cast<float*>(shared);
  float* const v_tile = k_tile + Tile;
  float* const q_tile = v_tile + Tile;
  float* const o_tile = q_tile + Tile;
  float* const square = o_tile + Tile;

  const int tx = threadIdx.x % side, ty = threadIdx.x / side;
  const int tiles = (sizes.seq + Rows - 1) / Rows;
  const int first = static_cast<int>(blockIdx.x % tiles) * Rows;
  const index_t batch = blockIdx.x / tiles / sizes.kv_heads;
  const int kv_head = blockIdx.x / tiles % sizes.kv_heads;
  const int group = sizes.heads / sizes.kv_heads;
  const index_t kv_at = batch * sizes.seq * sizes.kv_row() + kv_head * sizes.dim;
  const float scale = 1.0f / sqrtf(static_cast<float>(sizes.dim));

  load_plain<Rows, Width>(k_tile, k + kv_at, sizes.kv_row(), first, sizes.seq, sizes.dim);
  load_plain<Rows, Width>(v_tile, v + kv_at, sizes.kv_row(), first, sizes.seq, sizes.dim);
  float k_grad[Rows / side][Width / side], v_grad[Rows / side][Width / side];
  clear_plain<Rows, Width>(k_grad);
  clear_plain<Rows, Width>(v_grad);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const index_t q_at = batch * sizes.seq * sizes.q_row() + head * sizes.dim;
    const index_t row_at = (batch * sizes.heads + head) * sizes.seq;
    for (int query = first; query < sizes.seq; query += Rows) {
      __syncthreads();
      load_plain<Rows, Width>(q_tile, q + q_at, sizes.q_row(), query, sizes.seq, sizes.dim);
      load_plain<Rows, Width>(o_tile, d_out + q_at, sizes.q_row(), query, sizes.seq, sizes.dim);
      __syncthreads();
      // Rows are keys, columns queries.
      float p[Rows / side][Rows / side], ds[Rows / side][Rows / side];
      plain_nt<Rows, Width>(p, k_tile, q_tile);
      plain_nt<Rows, Width>(ds, v_tile, o_tile);
#pragma unroll
      for (int j = 0; j < Rows / side; ++j) {
        const int at = query + tx + j * side;
        const float base = at < sizes.seq ? lse[row_at + at] : INFINITY;
        const float shift = at < sizes.seq ? delta[row_at + at] : 0.0f;
#pragma unroll
        for (int i = 0; i < Rows / side; ++i) {
          const bool hidden = first + ty + i * side > at;
          p[i][j] = hidden ? 0.0f : expf(p[i][j] * scale - base);
          ds[i][j] = p[i][j] * (ds[i][j] - shift);
        }
      }
      put_square<Rows>(square, p);
      __syncthreads();
      plain_nn<Rows, Width>(v_grad, square, o_tile);
      __syncthreads();
      put_square<Rows>(square, ds);
      __syncthreads();
      plain_nn<Rows, Width>(k_grad, square, q_tile);
    }
  }
  float plain[Rows / side], scaled[Rows / side];
#pragma unroll
  for (int i = 0; i < Rows / side; ++i) {
    plain[i] = 1.0f;
    scaled[i] = scale;
  }
  store_plain<Rows, Width>(dk + kv_at, k_grad, scaled, sizes.kv_row(), first, sizes.seq, sizes.dim);
  store_plain<Rows, Width>(dv + kv_at, v_grad, plain, sizes.kv_row(), first, sizes.seq, sizes.dim);
}

}  // namespace fsmoe::attention

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_ATTENTION(Width)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256) attention_plain_forward_f32_##Width(                           \
      const float* q, const float* k, const float* v, float* out, float* lse, int seq, int heads, int kv_heads,    \
      int dim) {                                                                                                   \
    fsmoe::attention::plain_forward<Width>(q, k, v, out, lse, {seq, heads, kv_heads, dim});                        \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) attention_plain_queries_f32_##Width(                           \
      const float* q, const float* k, const float* v, const float* lse, const float* delta, const float* d_out,    \
      float* dq, int seq, int heads, int kv_heads, int dim) {                                                      \
    fsmoe::attention::plain_queries<Width>(q, k, v, lse, delta, d_out, dq, {seq, heads, kv_heads, dim});           \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) attention_plain_keys_f32_##Width(                              \
      const float* q, const float* k, const float* v, const float* lse, const float* delta, const float* d_out,    \
      float* dk, float* dv, int seq, int heads, int kv_heads, int dim) {                                           \
    fsmoe::attention::plain_keys<Width>(q, k, v, lse, delta, d_out, dk, dv, {seq, heads, kv_heads, dim});          \
  }

FSMOE_ATTENTION(64)
FSMOE_ATTENTION(128)
FSMOE_ATTENTION(256)
