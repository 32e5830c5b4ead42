// Tokens choose experts: from logits to experts, weights, and what the losses and the slots are made of, in one pass; and
// the gradient of the logits, in one pass.
//
//   choose_forward_{softmax,sigmoid}_v{1,2,4,8,16,32}(logits, bias, tokens, experts, k, groups, kept, normalise, scale,
//                                                     eps, tile, tiles, chosen, weights, best, counts, columns, sums,
//                                                     ticket)
//   choose_backward_v{...}_{bf16,f16,f32}(logits, chosen, d_weights, fraction, d_balance, d_z, rows, experts, k,
//                                         sigmoid, normalise, scale, eps, d_logits)
//
// Forward. logits: (G * tokens, experts) f32, experts up to 32 times the number in the name, k up to 32. A block of 512
// threads takes a tile of `tile` consecutive tokens of one group, a warp one token after another; block g * tiles + b has
// tile b of group g. A token's scores are the softmax of its logits, or their sigmoids; it takes the k experts with the
// largest logits or, with a bias or with kept < groups, the largest score + bias. Written:
//   chosen (T, k) i32, weights (T, k) f32: scale * score, or the share of it in the sum of the k; best (T) f32 or null: the
//   score of the first choice;
//   counts (G, k, tiles, experts) u32: how many of the tile's j-th choices are of an expert;
//   columns (G * tiles, experts) f32: the tile's sums of probabilities (scores over their sum);
//   sums (2, G * tiles) f32: the tile's sums of entropy, and of the squared log-sum-exp (softmax);
//   ticket (1) u32: 0, for `slots_scan`, which makes losses and slots of all this.
// Dynamic shared memory: 4 * experts * (k + 16) bytes.
//
// Backward. d_logits, of any of the three types, is the gradient through the weights (d_weights (T, k)), the balance loss
// (d_balance (1), fraction (experts)) and the z-loss (d_z (1), or null). A warp takes a row; any number of blocks.
//
// What bounds the forward is instructions: about 300 per token and warp at E = 128, k = 8, a fifth of them shuffles and
// warp-wide reductions. The backward reads and writes the logits once.

#include "gate/row.cuh"

namespace fsmoe {

constexpr int choose_warps = 16;

// A quotient whose last bits do not matter: the division that rounds correctly is a branch and ten instructions.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

__device__ __forceinline__ float logistic(float x) { return quotient(1.0f, 1.0f + expf(-x)); }

// A row's unnormalised scores: e^(x - max), or sigmoids; and their sum. Columns beyond the end have logit -inf, so score 0.
template <int V>
struct Scores {
  float value[V];
  float max;  // of the logits, for a softmax
  float sum;

  __device__ __forceinline__ Scores(const float (&x)[V], bool sigmoid) : Scores(x, sigmoid, largest(x, sigmoid)) {}

  // Where the largest logit is known.
  __device__ __forceinline__ Scores(const float (&x)[V], bool sigmoid, float largest) : max(largest) {
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      value[i] = one(x[i], sigmoid);
      part += value[i];
    }
    sum = warp_sum(part);
  }

  static __device__ __forceinline__ float largest(const float (&x)[V], bool sigmoid) {
    if (sigmoid) return 0.0f;
    float most = x[0];
#pragma unroll
    for (int i = 1; i < V; ++i) most = fmaxf(most, x[i]);
    return warp_max(most);
  }

  // The unnormalised score of a logit of this row. The fast exponential is off by the more the smaller its result is beside
  // the largest score, which is 1.
  __device__ __forceinline__ float one(float x, bool sigmoid) const { return sigmoid ? logistic(x) : __expf(x - max); }
};

// ----------------------------------------------------------------------------
// Forward

template <int V, bool sigmoid>
__device__ __forceinline__ void choose_forward(
    const float* __restrict__ logits, const float* __restrict__ bias, index_t tokens, int experts, int k, int groups, int kept, bool normalise, float scale, float eps, int tile, int tiles, int* __restrict__ chosen,
    float* __restrict__ weights, float* __restrict__ best, unsigned* __restrict__ counts, float* __restrict__ columns,
    float* __restrict__ sums, unsigned* __restrict__ ticket) {
  extern __shared__ unsigned choose_memory[];
  __shared__ float warp_sums[2][choose_warps];
  unsigned* const histogram = choose_memory;                                     // (k, experts)
  float* const scratch = reinterpret_cast<float*>(choose_memory + k * experts);  // (16, experts)

  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const index_t group = blockIdx.x / tiles;
  const index_t in_group = static_cast<index_t>(blockIdx.x % tiles) * tile;
  const index_t first = group * tokens + in_group;
  const int count = static_cast<int>(min(static_cast<index_t>(tile), tokens - in_group));
  const bool packs = rows_in_packs<V>(logits, experts);
  const bool plain = bias == nullptr && kept >= groups;

  for (int i = threadIdx.x; i < k * experts; i += blockDim.x) histogram[i] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
  __syncthreads();

  float column_sums[V] = {};
  float entropy = 0.0f, squares = 0.0f;
  // A row is loaded while the one before is worked on, where there are registers for two.
  constexpr bool ahead = V <= 8;
  float next[V] = {};
  if (ahead && warp < count) load_row<V>(logits + (first + warp) * experts, experts, packs, lane, -INFINITY, next);
  for (int r = warp; r < count; r += choose_warps) {
    const index_t token = first + r;
    float x[V];
    if constexpr (ahead) {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = next[i];
      if (r + choose_warps < count) {
        load_row<V>(logits + (token + choose_warps) * experts, experts, packs, lane, -INFINITY, next);
      }
    } else {
      load_row<V>(logits + token * experts, experts, packs, lane, -INFINITY, x);
    }

    // What is compared: softmax and sigmoid keep the order of logits, and the logits no two that differ make equal. Lane j
    // gets the j-th choice and its key.
    unsigned keys[V];
    int mine = 0;
    unsigned own = 0, most = 0;
    const auto select = [&] {
      take_largest<V>(keys, lane, k, [&](int j, int column, unsigned key) {
        if (lane == j) mine = column, own = key;
        if (j == 0) most = key;
      });
    };
    if (plain) {
#pragma unroll
      for (int i = 0; i < V; ++i) keys[i] = Row<V>::column(i, lane) < experts ? sort_key(x[i]) : 0;
      select();
    }

    // The first choice's logit is the largest.
    const Scores<V> scores(x, sigmoid, plain && !sigmoid ? key_value(most) : Scores<V>::largest(x, sigmoid));
    // A row of sigmoids that have all gone to 0 has probabilities 0.
    const float total = sigmoid ? scores.sum + eps : scores.sum;
    const float inverse = quotient(1.0f, total);
    float logs = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float score = scores.value[i];
      column_sums[i] += score * inverse;
      // p ln p goes to 0 with p.
      const float log = sigmoid ? __logf(score) : x[i] - scores.max;
      logs += score == 0.0f ? 0.0f : score * log;
    }
    // Every lane has its own columns' part: they are added up at the end.
    const float log_sum = __logf(scores.sum);
    if (scores.sum != 0.0f) entropy += (lane == 0 ? log_sum : 0.0f) - logs * quotient(1.0f, scores.sum);
    const float lse = scores.max + log_sum;
    squares += lse * lse;

    float score = 0.0f;
    if (plain) {
      score = lane < k ? scores.one(key_value(own), sigmoid) : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int column = Row<V>::column(i, lane);
        x[i] = sigmoid ? scores.value[i] : scores.value[i] * inverse;
        if (bias != nullptr && column < experts) x[i] += bias[column];
        keys[i] = column < experts ? sort_key(x[i]) : 0;
      }
      if (kept < groups) keep_groups<V>(x, keys, experts, groups, kept, lane, scratch + warp * experts);
      select();
      // The key is of another value than the logit, and the register that has that is another lane's.
      if (lane < k) score = scores.one(logits[token * experts + mine], sigmoid);
    }
    if (!sigmoid) score *= inverse;
    const float factor = normalise ? quotient(scale, warp_sum(score) + eps) : scale;
    if (lane < k) {
      chosen[token * k + lane] = mine;
      weights[token * k + lane] = score * factor;
      atomicAdd(&histogram[lane * experts + mine], 1u);
    }
    if (best != nullptr && lane == 0) best[token] = score;
  }

  // The warps' sums, in the order of the warps.
  entropy = warp_sum(entropy);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int column = Row<V>::column(i, lane);
    if (column < experts) scratch[warp * experts + column] = column_sums[i];
  }
  if (lane == 0) {
    warp_sums[0][warp] = entropy;
    warp_sums[1][warp] = squares;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < choose_warps; ++w) sum += scratch[w * experts + e];
    columns[static_cast<index_t>(blockIdx.x) * experts + e] = sum;
  }
  if (threadIdx.x < 2) {
    float sum = 0.0f;
    for (int w = 0; w < choose_warps; ++w) sum += warp_sums[threadIdx.x][w];
    sums[threadIdx.x * static_cast<index_t>(gridDim.x) + blockIdx.x] = sum;
  }
  for (int i = threadIdx.x; i < k * experts; i += blockDim.x) {
    const int j = i / experts;
    counts[((group * k + j) * tiles + blockIdx.x % tiles) * experts + (i - j * experts)] = histogram[i];
  }
}

// ----------------------------------------------------------------------------
// Backward

template <int V, typename T>
__device__ __forceinline__ void choose_backward(const float* __restrict__ logits, const int* __restrict__ chosen,
                                                const float* __restrict__ d_weights, const float* __restrict__ fraction,
                                                const float* __restrict__ d_balance, const float* __restrict__ d_z,
                                                index_t rows, int experts, int k, bool sigmoid, bool normalise,
                                                float scale, float eps, T* __restrict__ d_logits) {
  const int lane = threadIdx.x % warp_size;
  const int warps = blockDim.x / warp_size;
  const bool packs = rows_in_packs<V>(logits, experts);
  constexpr int pack = Row<V>::pack;
  const bool out_packs = experts % pack == 0 && reinterpret_cast<uintptr_t>(d_logits) % (pack * sizeof(T)) == 0;

  // The gradient of every token's probabilities by the balance loss.
  float balance[V];
  const float per_token = d_balance[0] * static_cast<float>(experts) / static_cast<float>(rows);
  load_row<V>(fraction, experts, rows_in_packs<V>(fraction, experts), lane, 0.0f, balance);
#pragma unroll
  for (int i = 0; i < V; ++i) balance[i] *= per_token;
  const float z = d_z == nullptr ? 0.0f : 2.0f * d_z[0] / static_cast<float>(rows);

  for (index_t row = static_cast<index_t>(blockIdx.x) * warps + threadIdx.x / warp_size; row < rows;
       row += static_cast<index_t>(gridDim.x) * warps) {
    float x[V];
    load_row<V>(logits + row * experts, experts, packs, lane, -INFINITY, x);
    int mine = 0;
    float weight_grad = 0.0f, logit = 0.0f;
    if (lane < k) {
      mine = chosen[row * k + lane];
      weight_grad = d_weights[row * k + lane];
      logit = logits[row * experts + mine];
    }
    const Scores<V> scores(x, sigmoid);
    const float inverse = quotient(1.0f, sigmoid ? scores.sum + eps : scores.sum);

    // Lane j: the chosen score and its gradient. A weight is scale * score / total: with a sum of k scores for a total,
    // every score has a part in every weight.
    float score = 0.0f;
    if (lane < k) score = sigmoid ? scores.one(logit, true) : scores.one(logit, false) * inverse;
    float d_score = scale * weight_grad;
    if (normalise) {
      const float total = warp_sum(score) + eps;
      const float share = quotient(1.0f, total);
      d_score = (d_score - warp_sum(weight_grad * score) * (scale * share)) * share;
    }
    if (lane >= k) d_score = 0.0f;

    // Through the probabilities p: d_x = p (d_p - sum d_p p).
    float inner = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) inner += balance[i] * scores.value[i];
    float chosen_part = 0.0f;
    if (!sigmoid) chosen_part = d_score * score;
    inner = warp_sum(inner * inverse + chosen_part);
    float common = -inner;
    if (!sigmoid) common += z * (scores.max + logf(scores.sum));

    float d[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      // With sigmoids, p is a score over their sum, and the chosen scores' gradients come in below.
      d[i] = (balance[i] + common) * (sigmoid ? inverse : scores.value[i] * inverse);
    }
    for (int j = 0; j < k; ++j) {
      const int column = __shfl_sync(full_warp, mine, j);
      const float grad = __shfl_sync(full_warp, sigmoid ? d_score : chosen_part, j);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (Row<V>::column(i, lane) == column) d[i] += grad;
      }
    }
    if (sigmoid) {
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] *= scores.value[i] * (1.0f - scores.value[i]);
    }

    T* const out = d_logits + row * experts;
    if (out_packs) {
#pragma unroll
      for (int i = 0; i < V; i += pack) {
        const int column = Row<V>::column(i, lane);
        struct alignas(pack * sizeof(T)) Pack {
          T v[pack];
        } packed;
#pragma unroll
        for (int n = 0; n < pack; ++n) packed.v[n] = from_f32<T>(d[i + n]);
        if (column < experts) *reinterpret_cast<Pack*>(out + column) = packed;
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int column = Row<V>::column(i, lane);
        if (column < experts) out[column] = from_f32<T>(d[i]);
      }
    }
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_CHOOSE_FORWARD_OF(V, score, is_sigmoid)                                                                 \
  extern "C" __global__ void __launch_bounds__(512, V <= 8 ? 2 : 1) choose_forward_##score##_v##V(                    \
      const float* logits, const float* bias, fsmoe::index_t tokens, int experts, int k, int groups, int kept,        \
      int normalise, float scale, float eps, int tile, int tiles, int* chosen, float* weights, float* best,           \
      unsigned* counts, float* columns, float* sums, unsigned* ticket) {                                              \
    fsmoe::choose_forward<V, is_sigmoid>(logits, bias, tokens, experts, k, groups, kept, normalise, scale, eps, tile, \
                                         tiles, chosen, weights, best, counts, columns, sums, ticket);                \
  }
#define FSMOE_CHOOSE_FORWARD(V)               \
  FSMOE_CHOOSE_FORWARD_OF(V, softmax, false)  \
  FSMOE_CHOOSE_FORWARD_OF(V, sigmoid, true)

FSMOE_FOR_EACH_ROW(FSMOE_CHOOSE_FORWARD)

#define FSMOE_CHOOSE_BACKWARD_OF(V, suffix, T)                                                                       \
  extern "C" __global__ void __launch_bounds__(256) choose_backward_v##V##_##suffix(                                 \
      const float* logits, const int* chosen, const float* d_weights, const float* fraction, const float* d_balance, \
      const float* d_z, fsmoe::index_t rows, int experts, int k, int sigmoid, int normalise, float scale, float eps, \
      T* d_logits) {                                                                                                 \
    fsmoe::choose_backward<V, T>(logits, chosen, d_weights, fraction, d_balance, d_z, rows, experts, k, sigmoid,     \
                                 normalise, scale, eps, d_logits);                                                   \
  }
#define FSMOE_CHOOSE_BACKWARD(V)                    \
  FSMOE_CHOOSE_BACKWARD_OF(V, bf16, fsmoe::bf16)    \
  FSMOE_CHOOSE_BACKWARD_OF(V, f16, fsmoe::f16)      \
  FSMOE_CHOOSE_BACKWARD_OF(V, f32, fsmoe::f32)

FSMOE_FOR_EACH_ROW(FSMOE_CHOOSE_BACKWARD)
