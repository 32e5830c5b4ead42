// Causal attention in 16-bit types, forward: FlashAttention-2 (Dao, 2023). A block takes some queries of one head and walks
// over the keys they may see, keeping each row's running maximum and sum: no L x L matrix is ever stored.
//
//   attention_forward_{bf16,f16}_{32,64,128,256}(q, k, v, out, lse, seq, heads, kv_heads, dim)
//
// out = softmax(q kᵀ / √D, masked) v and lse, the log-sum-exp of each row of scores. q, out: (B·L, Hq·D), k, v: (B·L, Hkv·D),
// lse: (B, Hq, L) f32. The number in the name is the tile's width, the least that is at least D; a narrower head is padded with
// zeros in shared memory. Any L and any alignment; heads of a multiple of 8 on 16-byte boundaries are copied asynchronously.
//
// 4·L²·D/2 FLOPs per head; bytes are negligible beside them. The grid is one block per query tile and query head of a
// sequence, 128 threads.

#include "model/attention.cuh"

namespace fsmoe::attention {

constexpr int forward_warps = 4;

// M: 16-row tiles of queries per warp; Keys: keys per step; Keep: whether the queries stay in registers.
template <int Width>
struct Forward {
  static constexpr int M = Width <= 128 ? 2 : 1;
  static constexpr int Keys = Width <= 64 ? 64 : 32;
  static constexpr bool Keep = Width <= 64;
};

template <int Width, typename T>
__device__ __forceinline__ void forward(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                        T* __restrict__ out, float* __restrict__ lse, Sizes sizes) {
  constexpr int M = Forward<Width>::M;
  constexpr int Keys = Forward<Width>::Keys;
  constexpr bool Keep = Forward<Width>::Keep;
  constexpr int Queries = 16 * M * forward_warps;
  constexpr int Threads = forward_warps * warp_lanes;
  constexpr int Tile = Keys * stride<Width>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const k_tiles = q_tile + Queries * stride<Width>;
  T* const v_tiles = k_tiles + 2 * Tile;

  const int lane = threadIdx.x % warp_lanes;
  const int warp = threadIdx.x / warp_lanes;
  const int tiles = (sizes.seq + Queries - 1) / Queries;
  // The last queries see the most keys and come first, so that no long block begins when the others end.
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Queries;
  const index_t batch = blockIdx.x / tiles / sizes.heads;
  const int head = blockIdx.x / tiles % sizes.heads;
  const int kv_head = head / (sizes.heads / sizes.kv_heads);
  const bool pieces = in_pieces(sizes.dim, q, k, v, out);
  q += batch * sizes.seq * sizes.q_row() + head * sizes.dim;
  out += batch * sizes.seq * sizes.q_row() + head * sizes.dim;
  k += batch * sizes.seq * sizes.kv_row() + kv_head * sizes.dim;
  v += batch * sizes.seq * sizes.kv_row() + kv_head * sizes.dim;
  lse += (batch * sizes.heads + head) * sizes.seq;

  const auto load_keys = [&](int step) {
    const int at = step % 2 * Tile;
    load_tile<Keys, Width, Threads>(k_tiles + at, k, sizes.kv_row(), step * Keys, sizes.seq, sizes.dim, pieces);
    load_tile<Keys, Width, Threads>(v_tiles + at, v, sizes.kv_row(), step * Keys, sizes.seq, sizes.dim, pieces);
    ptx::cp_async_commit();
  };
  load_tile<Queries, Width, Threads>(q_tile, q, sizes.q_row(), first, sizes.seq, sizes.dim, pieces);
  load_keys(0);

  const T* const own_q = q_tile + warp * 16 * M * stride<Width>;
  const int own = first + warp * 16 * M;  // the warp's first query
  uint32_t kept[Keep ? M : 1][Width / 16][4];
  float mixed[M][Width / 8][4];
  float most[M][2], total[M][2];
  clear(mixed);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    most[m][0] = most[m][1] = -INFINITY;
    total[m][0] = total[m][1] = 0.0f;
  }
  const float scale = rsqrtf(static_cast<float>(sizes.dim));
  const float scale_log2 = scale * log2_e;

  const int seen = min(first + Queries, sizes.seq);
  const int steps = (seen + Keys - 1) / Keys;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    // After this barrier the step's tiles are there, and nobody reads those of the step before any more.
    __syncthreads();
    if (step + 1 < steps) load_keys(step + 1);
    if constexpr (Keep) {
      if (step == 0) load_lefts<M, Width>(kept, own_q);
    }
    const int key = step * Keys;
    if (key > own + 16 * M - 1) continue;  // all of it lies after the warp's queries

    float scores[M][Keys / 8][4];
    clear(scores);
    if constexpr (Keep) {
      product_nt<M, Keys / 8, Width>(scores, kept, k_tiles + step % 2 * Tile);
    } else {
      product_nt<M, Keys / 8, Width>(scores, own_q, k_tiles + step % 2 * Tile);
    }
    const bool masked = key + Keys - 1 > own;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = own + m * 16 + half * 8 + lane / 4;
        float peak = most[m][half];
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[m][n][2 * half + i];
            if (masked && key + n * 8 + lane % 4 * 2 + i > query) score = -INFINITY;
            peak = fmaxf(peak, score);
          }
        }
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
        // Every query sees key 0, so the peak is finite from the first step on (unless a score is not).
        const float keep = ptx::exp2_approx((most[m][half] - peak) * scale_log2);
        const float base = peak * scale_log2;
        most[m][half] = peak;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[m][n][2 * half + i];
            score = ptx::exp2_approx(score * scale_log2 - base);
            sum += score;
          }
        }
        total[m][half] = total[m][half] * keep + sum;
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) {
          mixed[m][n][2 * half] *= keep;
          mixed[m][n][2 * half + 1] *= keep;
        }
      }
    }
    product_nn<M, Width / 8, Keys / 8, Width>(mixed, scores, v_tiles + step % 2 * Tile);
  }

  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = total[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      factor[m][half] = 1.0f / sum;
      const int query = own + m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && query < sizes.seq) lse[query] = most[m][half] * scale + logf(sum);
    }
  }
  // The warp's rows of the queries' tile are read by no other warp.
  T* const rows = q_tile + warp * 16 * M * stride<Width>;
  __syncwarp();
  put_rows<M, Width / 8, Width>(rows, mixed, factor);
  __syncwarp();
  store_rows<16 * M, Width>(out, rows, sizes.q_row(), own, sizes.seq, sizes.dim, pieces);
}

}  // namespace fsmoe::attention

#define FSMOE_ATTENTION(suffix, T, Width)                                                                          \
  extern "C" __global__ void __launch_bounds__(128) attention_forward_##suffix##_##Width(                          \
      const T* q, const T* k, const T* v, T* out, float* lse, int seq, int heads, int kv_heads, int dim) {         \
    fsmoe::attention::forward<Width>(q, k, v, out, lse, {seq, heads, kv_heads, dim});                              \
  }
#define FSMOE_ATTENTION_BOTH(Width)             \
  FSMOE_ATTENTION(bf16, fsmoe::bf16, Width)     \
  FSMOE_ATTENTION(f16, fsmoe::f16, Width)

FSMOE_ATTENTION_BOTH(32)
FSMOE_ATTENTION_BOTH(64)
FSMOE_ATTENTION_BOTH(128)
FSMOE_ATTENTION_BOTH(256)
