// Causal attention in 16-bit types, backward: the probabilities are computed again from q, k and lse. Three kernels, so that
// every sum is one block's own and runs in one order (no atomics; it costs 7 products where 5 would do with them):
//
//   attention_backward_delta_{bf16,f16,f32}(out, d_out, delta, tokens, seq, heads, dim)
//       delta = Σ_D d_out·out, f32 (B, Hq, L): what the softmax's backward subtracts. Eight threads a row, 256 a block.
//   attention_backward_queries_{bf16,f16}_{32,64,128,256}(q, k, v, lse, delta, d_out, dq, seq, heads, kv_heads, dim)
//       dq. A block takes some queries of one head and walks over the keys they see. 128 threads.
//   attention_backward_keys_{…}(q, k, v, lse, delta, d_out, dk, dv, seq, heads, kv_heads, dim)
//       dk and dv. A block takes some keys of one head and walks over the queries that see them, of all the query heads that
//       share the key head. 128 threads, 256 at width 256.
//
// With P = exp(S − lse): dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP − delta), dQ = dS·K/√D, dK = dSᵀ·Q/√D. Shapes, the number in the
// name, and alignment as in attention_forward.cu.

#include "common/vector.cuh"
#include "model/attention.cuh"

namespace fsmoe::attention {

// ----------------------------------------------------------------------------
// delta

template <int N, typename T>
__device__ __forceinline__ float partial_dot(const T* a, const T* b, int dim, int part, int parts) {
  float sum = 0.0f;
  for (int i = part * N; i < dim; i += parts * N) {
    const Lanes<N> x = load<N>(a + i), y = load<N>(b + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += x[j] * y[j];
  }
  return sum;
}

template <typename T>
__device__ __forceinline__ void delta_rows(const T* __restrict__ out, const T* __restrict__ d_out,
                                           float* __restrict__ delta, index_t tokens, int seq, int heads, int dim) {
  constexpr int Parts = 8;
  constexpr int N = vector_width<T>;
  const bool aligned = dim % N == 0 && rows_are_aligned(out, dim) && rows_are_aligned(d_out, dim);
  const index_t rows = tokens * heads;
  const int part = threadIdx.x % Parts;
  const index_t step = static_cast<index_t>(gridDim.x) * (blockDim.x / Parts);
  // All eight threads of a row, and so whole warps' worth of rows, go through the loop together.
  const index_t block = static_cast<index_t>(blockIdx.x) * (blockDim.x / Parts);
  for (index_t base = block; base < rows; base += step) {
    const index_t row = base + threadIdx.x / Parts;
    float sum = 0.0f;
    if (row < rows) {
      const T* a = out + row * dim;
      const T* b = d_out + row * dim;
      sum = aligned ? partial_dot<N>(a, b, dim, part, Parts) : partial_dot<1>(a, b, dim, part, Parts);
    }
#pragma unroll
    for (int offset = Parts / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (part == 0 && row < rows) {
      const index_t token = row / heads;
      const index_t head = row - token * heads;
      const index_t batch = token / seq;
      delta[(batch * heads + head) * seq + (token - batch * seq)] = sum;
    }
  }
}

// ----------------------------------------------------------------------------
// dq

template <int Width>
struct Queries {
  static constexpr int M = 1;  // 16-row tiles of queries per warp
  static constexpr int Warps = 4;
  static constexpr int Keys = Width <= 64 ? 64 : 32;  // per step
  static constexpr bool Keep = Width <= 64;           // whether q and d_out stay in registers
};

template <int Width, typename T>
__device__ __forceinline__ void queries_backward(const T* __restrict__ q, const T* __restrict__ k,
                                                 const T* __restrict__ v, const float* __restrict__ lse,
                                                 const float* __restrict__ delta, const T* __restrict__ d_out,
                                                 T* __restrict__ dq, Sizes sizes) {
  constexpr int M = Queries<Width>::M;
  constexpr int Warps = Queries<Width>::Warps;
  constexpr int Keys = Queries<Width>::Keys;
  constexpr bool Keep = Queries<Width>::Keep;
  constexpr int Rows = 16 * M * Warps;
  constexpr int Threads = Warps * warp_lanes;
  constexpr int Tile = Keys * stride<Width>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const o_tile = q_tile + Rows * stride<Width>;
  T* const k_tiles = o_tile + Rows * stride<Width>;
  T* const v_tiles = k_tiles + 2 * Tile;

  const int lane = threadIdx.x % warp_lanes;
  const int warp = threadIdx.x / warp_lanes;
  const int tiles = (sizes.seq + Rows - 1) / Rows;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Rows;
  const index_t batch = blockIdx.x / tiles / sizes.heads;
  const int head = blockIdx.x / tiles % sizes.heads;
  const int kv_head = head / (sizes.heads / sizes.kv_heads);
  const bool pieces = in_pieces(sizes.dim, q, k, v, d_out, dq);
  const index_t q_at = batch * sizes.seq * sizes.q_row() + head * sizes.dim;
  const index_t kv_at = batch * sizes.seq * sizes.kv_row() + kv_head * sizes.dim;
  const index_t row_at = (batch * sizes.heads + head) * sizes.seq;

  const auto load_keys = [&](int step) {
    const int at = step % 2 * Tile;
    load_tile<Keys, Width, Threads>(k_tiles + at, k + kv_at, sizes.kv_row(), step * Keys, sizes.seq, sizes.dim, pieces);
    load_tile<Keys, Width, Threads>(v_tiles + at, v + kv_at, sizes.kv_row(), step * Keys, sizes.seq, sizes.dim, pieces);
    ptx::cp_async_commit();
  };
  load_tile<Rows, Width, Threads>(q_tile, q + q_at, sizes.q_row(), first, sizes.seq, sizes.dim, pieces);
  load_tile<Rows, Width, Threads>(o_tile, d_out + q_at, sizes.q_row(), first, sizes.seq, sizes.dim, pieces);
  load_keys(0);

  T* const own_q = q_tile + warp * 16 * M * stride<Width>;
  const T* const own_o = o_tile + warp * 16 * M * stride<Width>;
  const int own = first + warp * 16 * M;
  uint32_t kept_q[Keep ? M : 1][Width / 16][4];
  uint32_t kept_o[Keep ? M : 1][Width / 16][4];
  float grad[M][Width / 8][4];
  clear(grad);
  const float scale = rsqrtf(static_cast<float>(sizes.dim));
  const float scale_log2 = scale * log2_e;
  float base[M][2], shift[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = own + m * 16 + half * 8 + lane / 4;
      const bool inside = query < sizes.seq;
      base[m][half] = inside ? lse[row_at + query] * log2_e : INFINITY;
      shift[m][half] = inside ? delta[row_at + query] : 0.0f;
    }
  }

  const int seen = min(first + Rows, sizes.seq);
  const int steps = (seen + Keys - 1) / Keys;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) load_keys(step + 1);
    if constexpr (Keep) {
      if (step == 0) {
        load_lefts<M, Width>(kept_q, own_q);
        load_lefts<M, Width>(kept_o, own_o);
      }
    }
    const int key = step * Keys;
    if (key > own + 16 * M - 1) continue;

    const T* const k_tile = k_tiles + step % 2 * Tile;
    const T* const v_tile = v_tiles + step % 2 * Tile;
    float p[M][Keys / 8][4], ds[M][Keys / 8][4];
    clear(p);
    clear(ds);
    if constexpr (Keep) {
      product_nt<M, Keys / 8, Width>(p, kept_q, k_tile);
      product_nt<M, Keys / 8, Width>(ds, kept_o, v_tile);
    } else {
      product_nt<M, Keys / 8, Width>(p, static_cast<const T*>(own_q), k_tile);
      product_nt<M, Keys / 8, Width>(ds, own_o, v_tile);
    }
    const bool masked = key + Keys - 1 > own;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = own + m * 16 + i / 2 * 8 + lane / 4;
          const bool hidden = masked && key + n * 8 + lane % 4 * 2 + i % 2 > query;
          const float chance = ptx::exp2_approx(p[m][n][i] * scale_log2 - base[m][i / 2]);
          ds[m][n][i] = hidden ? 0.0f : chance * (ds[m][n][i] - shift[m][i / 2]);
        }
      }
    }
    product_nn<M, Width / 8, Keys / 8, Width>(grad, ds, k_tile);
  }

  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) factor[m][0] = factor[m][1] = scale;
  __syncwarp();
  put_rows<M, Width / 8, Width>(own_q, grad, factor);
  __syncwarp();
  store_rows<16 * M, Width>(dq + q_at, own_q, sizes.q_row(), own, sizes.seq, sizes.dim, pieces);
}

// ----------------------------------------------------------------------------
// dk and dv: everything transposed, so that a warp owns keys

template <int Width>
struct Keys {
  // Warps that share their keys and halve the width of dk and dv between them: at 256 one warp has not the registers.
  static constexpr int Sharing = Width <= 128 ? 1 : 2;
  static constexpr int Warps = 4 * Sharing;
  static constexpr int Queries = Width <= 64 ? 64 : 32;  // per step
};

template <int Width, typename T>
__device__ __forceinline__ void keys_backward(const T* __restrict__ q, const T* __restrict__ k,
                                              const T* __restrict__ v, const float* __restrict__ lse,
                                              const float* __restrict__ delta, const T* __restrict__ d_out,
                                              T* __restrict__ dk, T* __restrict__ dv, Sizes sizes) {
  constexpr int Sharing = Keys<Width>::Sharing;
  constexpr int Warps = Keys<Width>::Warps;
  constexpr int Queries = Keys<Width>::Queries;
  constexpr int Rows = 16 * Warps / Sharing;
  constexpr int Threads = Warps * warp_lanes;
  constexpr int Tile = Queries * stride<Width>;
  constexpr int Part = Width / Sharing;  // columns of dk and dv that a warp sums
  extern __shared__ __align__(16) unsigned char shared[];
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + Rows * stride<Width>;
  T* const q_tiles = v_tile + Rows * stride<Width>;
  T* const o_tiles = q_tiles + 2 * Tile;
  float* const bases = reinterpret_cast<float*>(o_tiles + 2 * Tile);
  float* const shifts = bases + 2 * Queries;

  const int lane = threadIdx.x % warp_lanes;
  const int warp = threadIdx.x / warp_lanes / Sharing;
  const int part = threadIdx.x / warp_lanes % Sharing * Part;
  const int tiles = (sizes.seq + Rows - 1) / Rows;
  // The first keys are seen by the most queries.
  const int first = static_cast<int>(blockIdx.x % tiles) * Rows;
  const index_t batch = blockIdx.x / tiles / sizes.kv_heads;
  const int kv_head = blockIdx.x / tiles % sizes.kv_heads;
  const int group = sizes.heads / sizes.kv_heads;
  const bool pieces = in_pieces(sizes.dim, q, k, v, d_out, dk, dv);
  const index_t q_at = batch * sizes.seq * sizes.q_row() + static_cast<index_t>(kv_head) * group * sizes.dim;
  const index_t kv_at = batch * sizes.seq * sizes.kv_row() + kv_head * sizes.dim;
  const index_t row_at = (batch * sizes.heads + static_cast<index_t>(kv_head) * group) * sizes.seq;

  // The steps of one query head: from the tile in which the block's first key's own query lies.
  const int begin = first / Queries;
  const int per_head = (sizes.seq + Queries - 1) / Queries - begin;
  const int steps = per_head * group;
  const auto load_queries = [&](int step) {
    const int head = step / per_head;
    const int query = (begin + step % per_head) * Queries;
    const int at = step % 2 * Tile;
    const index_t from = q_at + head * sizes.dim;
    load_tile<Queries, Width, Threads>(q_tiles + at, q + from, sizes.q_row(), query, sizes.seq, sizes.dim, pieces);
    load_tile<Queries, Width, Threads>(o_tiles + at, d_out + from, sizes.q_row(), query, sizes.seq, sizes.dim, pieces);
    ptx::cp_async_commit();
    if (threadIdx.x < Queries) {
      const int row = query + static_cast<int>(threadIdx.x);
      const bool inside = row < sizes.seq;
      const index_t from_row = row_at + static_cast<index_t>(head) * sizes.seq + row;
      bases[step % 2 * Queries + threadIdx.x] = inside ? lse[from_row] * log2_e : INFINITY;
      shifts[step % 2 * Queries + threadIdx.x] = inside ? delta[from_row] : 0.0f;
    }
  };
  load_tile<Rows, Width, Threads>(k_tile, k + kv_at, sizes.kv_row(), first, sizes.seq, sizes.dim, pieces);
  load_tile<Rows, Width, Threads>(v_tile, v + kv_at, sizes.kv_row(), first, sizes.seq, sizes.dim, pieces);
  load_queries(0);

  const T* const own_k = k_tile + warp * 16 * stride<Width>;
  const T* const own_v = v_tile + warp * 16 * stride<Width>;
  const int own = first + warp * 16;
  float k_grad[1][Part / 8][4], v_grad[1][Part / 8][4];
  clear(k_grad);
  clear(v_grad);
  const float scale = rsqrtf(static_cast<float>(sizes.dim));
  const float scale_log2 = scale * log2_e;

  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) load_queries(step + 1);
    const int query = (begin + step % per_head) * Queries;
    if (query + Queries - 1 < own) continue;  // all of them come before the warp's keys

    const T* const q_tile = q_tiles + step % 2 * Tile;
    const T* const o_tile = o_tiles + step % 2 * Tile;
    const float* const base = bases + step % 2 * Queries;
    const float* const shift = shifts + step % 2 * Queries;
    float p[1][Queries / 8][4];
    clear(p);
    product_nt<1, Queries / 8, Width>(p, own_k, q_tile);
    const bool masked = query < own + 15;
#pragma unroll
    for (int n = 0; n < Queries / 8; ++n) {
      const int col = n * 8 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool hidden = masked && query + col + i % 2 < own + i / 2 * 8 + lane / 4;
        const float chance = ptx::exp2_approx(p[0][n][i] * scale_log2 - base[col + i % 2]);
        p[0][n][i] = hidden ? 0.0f : chance;
      }
    }
    product_nn<1, Part / 8, Queries / 8, Width>(v_grad, p, o_tile + part);
    float ds[1][Queries / 8][4];
    clear(ds);
    product_nt<1, Queries / 8, Width>(ds, own_v, o_tile);
#pragma unroll
    for (int n = 0; n < Queries / 8; ++n) {
      const int col = n * 8 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - shift[col + i % 2]);
    }
    product_nn<1, Part / 8, Queries / 8, Width>(k_grad, ds, q_tile + part);
  }

  // The tiles of keys and values give their place to the results; warps that share rows have all read them.
  if constexpr (Sharing > 1) __syncthreads();
  const float plain[1][2] = {{1.0f, 1.0f}};
  const float scaled[1][2] = {{scale, scale}};
  __syncwarp();
  put_rows<1, Part / 8, Width>(k_tile + warp * 16 * stride<Width> + part, k_grad, scaled);
  put_rows<1, Part / 8, Width>(v_tile + warp * 16 * stride<Width> + part, v_grad, plain);
  if constexpr (Sharing > 1) {
    __syncthreads();
    if (part == 0) {
      store_rows<16, Width>(dk + kv_at, own_k, sizes.kv_row(), own, sizes.seq, sizes.dim, pieces);
    } else {
      store_rows<16, Width>(dv + kv_at, own_v, sizes.kv_row(), own, sizes.seq, sizes.dim, pieces);
    }
  } else {
    __syncwarp();
    store_rows<16, Width>(dk + kv_at, own_k, sizes.kv_row(), own, sizes.seq, sizes.dim, pieces);
    store_rows<16, Width>(dv + kv_at, own_v, sizes.kv_row(), own, sizes.seq, sizes.dim, pieces);
  }
}

}  // namespace fsmoe::attention

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_DELTA(suffix, T)                                                                                     \
  extern "C" __global__ void attention_backward_delta_##suffix(const T* out, const T* d_out, float* delta,         \
                                                               fsmoe::index_t tokens, int seq, int heads,          \
                                                               int dim) {                                          \
    fsmoe::attention::delta_rows(out, d_out, delta, tokens, seq, heads, dim);                                      \
  }
FSMOE_FOR_EACH_DTYPE(FSMOE_DELTA)

#define FSMOE_ATTENTION(suffix, T, Width)                                                                          \
  extern "C" __global__ void __launch_bounds__(128) attention_backward_queries_##suffix##_##Width(                 \
      const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_out, T* dq, int seq,    \
      int heads, int kv_heads, int dim) {                                                                          \
    fsmoe::attention::queries_backward<Width>(q, k, v, lse, delta, d_out, dq, {seq, heads, kv_heads, dim});        \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(fsmoe::attention::Keys<Width>::Warps * 32)                          \
      attention_backward_keys_##suffix##_##Width(const T* q, const T* k, const T* v, const float* lse,             \
                                                 const float* delta, const T* d_out, T* dk, T* dv, int seq,        \
                                                 int heads, int kv_heads, int dim) {                               \
    fsmoe::attention::keys_backward<Width>(q, k, v, lse, delta, d_out, dk, dv, {seq, heads, kv_heads, dim});       \
  }
#define FSMOE_ATTENTION_BOTH(Width)             \
  FSMOE_ATTENTION(bf16, fsmoe::bf16, Width)     \
  FSMOE_ATTENTION(f16, fsmoe::f16, Width)

FSMOE_ATTENTION_BOTH(32)
FSMOE_ATTENTION_BOTH(64)
FSMOE_ATTENTION_BOTH(128)
FSMOE_ATTENTION_BOTH(256)
