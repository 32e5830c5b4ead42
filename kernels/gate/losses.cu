// The losses and the entropy of a gate apart from its choice, for gates in which tokens do not choose.
//
//   losses_columns(probs, tokens, experts, tile, columns, ticket)
//   losses_z(logits, tokens, experts, tile, lse, sums)
//   losses_entropy(probs, tokens, experts, tile, sums)
//   losses_mean(sums, tiles, tokens, out)
//   losses_balance_backward(fraction, d_loss, tokens, experts, d_probs)
//   losses_z_backward(logits, lse, d_loss, tokens, experts, d_logits)
//
// Matrices: (tokens, experts) f32, of any width. A block takes a tile of `tile` consecutive tokens:
//   columns: columns (tiles, experts), the tile's sums of every column, and ticket (1) = 0, both for `slots_scan`;
//   z: lse[t] = the log-sum-exp of a row, sums (tiles): the tile's sums of lse^2; entropy: the tile's sums of the entropy
//   of rows normalised to sum one. A row is read from memory once; what comes again comes from the first cache.
// mean: out[0] = the sum of `sums` over tokens, one block. The backwards add, elementwise:
//   d_probs += d_loss[0] * experts * fraction[e] / tokens
//   d_logits += d_loss[0] * 2 * lse[t] / tokens * exp(logits - lse[t])

#include "common/reduce.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Sums of columns. Threads stand in `lines` lines of `width`, a power of two; a line takes every lines-th token.

__device__ __forceinline__ void losses_columns(const float* __restrict__ probs, index_t tokens, int experts, int tile,
                                               float* __restrict__ columns, unsigned* __restrict__ ticket) {
  __shared__ float partial[256];
  if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
  const index_t first = static_cast<index_t>(blockIdx.x) * tile;
  const index_t end = min(first + tile, tokens);
  int width = 256;
  while (width / 2 >= experts) width /= 2;
  const int lines = 256 / width;
  const int line = threadIdx.x / width;
  for (int from = 0; from < experts; from += width) {
    const int e = from + threadIdx.x % width;
    float sum = 0.0f;
    if (e < experts) {
#pragma unroll 8
      for (index_t t = first + line; t < end; t += lines) sum += probs[t * experts + e];
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (line == 0 && e < experts) {
      for (int l = 1; l < lines; ++l) sum += partial[l * width + threadIdx.x];
      columns[blockIdx.x * static_cast<index_t>(experts) + e] = sum;
    }
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------
// Values of rows, a warp to a row: value(row) is summed over the tile.

template <typename Value>
__device__ __forceinline__ void sum_rows_of_tile(index_t tokens, int tile, float* __restrict__ sums, Value value) {
  __shared__ float warp_sums[warp_size];
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  const index_t first = static_cast<index_t>(blockIdx.x) * tile;
  const index_t end = min(first + tile, tokens);
  float sum = 0.0f;
  for (index_t t = first + warp; t < end; t += warps) sum += value(t, lane);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < warps; ++w) sum += warp_sums[w];
    sums[blockIdx.x] = sum;
  }
}

__device__ __forceinline__ void losses_z(const float* __restrict__ logits, index_t tokens, int experts, int tile,
                                         float* __restrict__ lse, float* __restrict__ sums) {
  sum_rows_of_tile(tokens, tile, sums, [&](index_t t, int lane) {
    const float* row = logits + t * experts;
    float most = -INFINITY;
    for (int e = lane; e < experts; e += warp_size) most = fmaxf(most, row[e]);
    most = warp_max(most);
    float sum = 0.0f;
    for (int e = lane; e < experts; e += warp_size) sum += expf(row[e] - most);
    const float value = most + logf(warp_sum(sum));
    if (lane == 0) lse[t] = value;
    return value * value;
  });
}

__device__ __forceinline__ void losses_entropy(const float* __restrict__ probs, index_t tokens, int experts, int tile,
                                               float* __restrict__ sums) {
  sum_rows_of_tile(tokens, tile, sums, [&](index_t t, int lane) {
    const float* row = probs + t * experts;
    float sum = 0.0f;
    for (int e = lane; e < experts; e += warp_size) sum += row[e];
    sum = warp_sum(sum);
    float entropy = 0.0f;
    for (int e = lane; e < experts; e += warp_size) {
      // p ln p goes to 0 with p; a row of zeros counts as certain.
      if (row[e] != 0.0f) {
        const float p = row[e] / sum;
        entropy -= p * logf(p);
      }
    }
    return warp_sum(entropy);
  });
}

__device__ __forceinline__ void losses_mean(const float* __restrict__ sums, index_t tiles, index_t tokens,
                                            float* __restrict__ out) {
  float sum = 0.0f;
  for (index_t t = threadIdx.x; t < tiles; t += blockDim.x) sum += sums[t];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[0] = sum / static_cast<float>(tokens);
}

// ----------------------------------------------------------------------------
// Backward

__device__ __forceinline__ void losses_balance_backward(const float* __restrict__ fraction,
                                                        const float* __restrict__ d_loss, index_t tokens, int experts,
                                                        float* __restrict__ d_probs) {
  const float scale = d_loss[0] * static_cast<float>(experts) / static_cast<float>(tokens);
  const index_t n = tokens * experts;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    d_probs[i] += scale * fraction[i % experts];
  }
}

__device__ __forceinline__ void losses_z_backward(const float* __restrict__ logits, const float* __restrict__ lse,
                                                  const float* __restrict__ d_loss, index_t tokens, int experts,
                                                  float* __restrict__ d_logits) {
  const float scale = d_loss[0] * 2.0f / static_cast<float>(tokens);
  const index_t n = tokens * experts;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const float sum = lse[i / experts];
    d_logits[i] += scale * sum * expf(logits[i] - sum);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

extern "C" __global__ void __launch_bounds__(256)
    losses_columns(const float* probs, fsmoe::index_t tokens, int experts, int tile, float* columns, unsigned* ticket) {
  fsmoe::losses_columns(probs, tokens, experts, tile, columns, ticket);
}

extern "C" __global__ void losses_z(const float* logits, fsmoe::index_t tokens, int experts, int tile, float* lse,
                                    float* sums) {
  fsmoe::losses_z(logits, tokens, experts, tile, lse, sums);
}

extern "C" __global__ void losses_entropy(const float* probs, fsmoe::index_t tokens, int experts, int tile,
                                          float* sums) {
  fsmoe::losses_entropy(probs, tokens, experts, tile, sums);
}

extern "C" __global__ void losses_mean(const float* sums, fsmoe::index_t tiles, fsmoe::index_t tokens, float* out) {
  fsmoe::losses_mean(sums, tiles, tokens, out);
}

extern "C" __global__ void losses_balance_backward(const float* fraction, const float* d_loss, fsmoe::index_t tokens,
                                                   int experts, float* d_probs) {
  fsmoe::losses_balance_backward(fraction, d_loss, tokens, experts, d_probs);
}

extern "C" __global__ void losses_z_backward(const float* logits, const float* lse, const float* d_loss,
                                             fsmoe::index_t tokens, int experts, float* d_logits) {
  fsmoe::losses_z_backward(logits, lse, d_loss, tokens, experts, d_logits);
}
