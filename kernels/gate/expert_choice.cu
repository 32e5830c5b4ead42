// Experts choose tokens: of every group's tokens, each expert's `capacity` most probable, descending, ties to the lowest
// token; and the backward.
//
//   expert_choice_keys(probs, tokens, experts, keys)
//   expert_choice_select(keys, probs, tokens, per_group, experts, groups, capacity, keys_shared, lists_shared, lists,
//                        chosen, weights)
//   expert_choice_backward(chosen, d_weights, width, choices, experts, d_probs)
//
// keys: probs (tokens, experts) f32 as sort keys (experts, tokens): every expert's lie together. Blocks of 32 x 8 threads, one
// per 32 tokens (x) and 32 experts (y).
//
// select: a block of 1024 threads per expert and group, expert by expert. chosen (experts, G * capacity) i32, weights f32.
// First a radix select in three steps (11, 11 and 10 bits) finds the capacity-th largest key, then the tokens above it and
// the first of those equal to it are listed in order, then the list is sorted, stably, by key. The group's keys are kept in
// shared memory if keys_shared, and the lists (2 keys and 2 tokens per place) if lists_shared, else in `lists`
// (blocks, 4, capacity) i32. Dynamic shared memory: 32 KiB, + 4 * per_group with keys_shared, + 16 * capacity with
// lists_shared.
//
// backward: d_probs[chosen[e, s], e] += d_weights[e, s], elementwise over `choices` = experts * width; an expert names a
// token at most once.

#include "gate/row.cuh"
#include "order/radix.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Keys, transposed through shared memory so that reads and writes are both contiguous

__device__ __forceinline__ void expert_choice_keys(const float* __restrict__ probs, index_t tokens, int experts,
                                                   unsigned* __restrict__ keys) {
  __shared__ unsigned tile[32][33];
  const index_t first_token = static_cast<index_t>(blockIdx.x) * 32;
  const int first_expert = blockIdx.y * 32;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
    const index_t t = first_token + y + i;
    const int e = first_expert + x;
    if (t < tokens && e < experts) tile[y + i][x] = sort_key(probs[t * experts + e]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
    const index_t t = first_token + x;
    const int e = first_expert + y + i;
    if (t < tokens && e < experts) keys[e * tokens + t] = tile[x][y + i];
  }
}

// ----------------------------------------------------------------------------
// Selection

constexpr int select_threads = 1024;
constexpr int select_warps = select_threads / warp_size;
constexpr int select_bins = 2 * select_threads;

// Calls body(i, key) for this thread's of n keys, of which it has eight in flight.
template <typename Body>
__device__ __forceinline__ void for_each_key(const unsigned* keys, index_t n, Body body) {
  constexpr int in_flight = 8;
  for (index_t from = threadIdx.x; from < n; from += in_flight * select_threads) {
    unsigned key[in_flight];
#pragma unroll
    for (int u = 0; u < in_flight; ++u) key[u] = keys[min(from + u * select_threads, n - 1)];
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      if (from + u * select_threads < n) body(from + u * select_threads, key[u]);
    }
  }
}

// Calls body(at + lane, key) for all lanes of this warp's strip at a time, with key 0 beyond its end; four in flight.
template <typename Body>
__device__ __forceinline__ void for_each_in_strip(const unsigned* keys, const Strip& strip, int lane, Body body) {
  constexpr int in_flight = 4;
  for (index_t at = strip.from + lane; at - lane < strip.to; at += in_flight * warp_size) {
    unsigned key[in_flight];
#pragma unroll
    for (int u = 0; u < in_flight; ++u) key[u] = keys[min(at + u * warp_size, strip.to - 1)];
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      body(at + u * warp_size, at + u * warp_size < strip.to ? key[u] : 0u);
    }
  }
}

// The `wanted`-th largest of n keys, and how many of the keys equal to it are among the `wanted` largest.
struct Threshold {
  unsigned key, equals;
};

__device__ __forceinline__ Threshold find_threshold(const unsigned* keys, index_t n, unsigned wanted, unsigned* bins) {
  __shared__ unsigned found[2];
  Threshold threshold{0, wanted};
  unsigned mask = 0;
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int shift = step == 0 ? 21 : step == 1 ? 10 : 0;
    const unsigned width = step == 2 ? 1024 : 2048;
    for (int i = threadIdx.x; i < select_bins; i += select_threads) bins[i] = 0;
    __syncthreads();
    // Only keys that share the bits found so far are still of interest.
    for_each_key(keys, n, [&](index_t, unsigned key) {
      if ((key & mask) == threshold.key) atomicAdd(&bins[key >> shift & (width - 1)], 1u);
    });
    __syncthreads();
    // Each thread has two bins, from the last down.
    const unsigned high = select_bins - 1 - 2 * threadIdx.x;
    const unsigned in_high = bins[high], in_low = bins[high - 1];
    unsigned all;
    const unsigned before = block_exclusive_sum(in_high + in_low, all);
    if (before < threshold.equals && threshold.equals <= before + in_high + in_low) {
      const bool is_high = threshold.equals <= before + in_high;
      found[0] = is_high ? high : high - 1;
      found[1] = threshold.equals - before - (is_high ? 0 : in_high);
    }
    __syncthreads();
    threshold = {threshold.key | found[0] << shift, found[1]};
    mask |= (width - 1) << shift;
    __syncthreads();
  }
  return threshold;
}

__device__ __forceinline__ void expert_choice_select(const unsigned* __restrict__ all_keys,
                                                     const float* __restrict__ probs, index_t tokens, index_t per_group,
                                                     int experts, int groups, int capacity, bool keys_shared,
                                                     bool lists_shared, unsigned* all_lists, int* __restrict__ chosen,
                                                     float* __restrict__ weights) {
  extern __shared__ unsigned select_memory[];
  __shared__ unsigned counts[2][select_warps];
  const int expert = blockIdx.x / groups;
  const index_t first = blockIdx.x % groups * per_group;
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const unsigned below = (1u << lane) - 1;

  unsigned* const histogram = select_memory;  // (32, 256); the bins of the selection before
  unsigned* more = select_memory + select_warps * radix_digits;
  const unsigned* keys = all_keys + expert * tokens + first;
  if (keys_shared) {
    for_each_key(keys, per_group, [&](index_t i, unsigned key) { more[i] = key; });
    keys = more;
    more += per_group;
    __syncthreads();
  }
  unsigned* const lists = lists_shared ? more : all_lists + static_cast<index_t>(blockIdx.x) * 4 * capacity;
  unsigned* list_keys = lists;
  unsigned* list_tokens = lists + capacity;
  unsigned* other_keys = lists + 2 * static_cast<index_t>(capacity);
  unsigned* other_tokens = lists + 3 * static_cast<index_t>(capacity);

  const Threshold threshold = find_threshold(keys, per_group, capacity, histogram);

  // How many of each warp's strip are above the threshold, and at it.
  const Strip strip(per_group);
  unsigned above = 0, equal = 0;
  // No threshold is 0, so what lies beyond the strip's end is below it.
  for_each_in_strip(keys, strip, lane, [&](index_t, unsigned key) {
    above += __popc(__ballot_sync(full_warp, key > threshold.key));
    equal += __popc(__ballot_sync(full_warp, key == threshold.key));
  });
  if (lane == 0) {
    counts[0][warp] = above;
    counts[1][warp] = equal;
  }
  __syncthreads();
  above = equal = 0;
  for (int w = 0; w < warp; ++w) {
    above += counts[0][w];
    equal += counts[1][w];
  }
  for_each_in_strip(keys, strip, lane, [&](index_t i, unsigned key) {
    const unsigned are_above = __ballot_sync(full_warp, key > threshold.key);
    const unsigned are_equal = __ballot_sync(full_warp, key == threshold.key);
    const unsigned equal_before = equal + __popc(are_equal & below);
    if (key > threshold.key || (key == threshold.key && equal_before < threshold.equals)) {
      const unsigned place = above + __popc(are_above & below) + min(equal_before, threshold.equals);
      // Ascending by these is descending by key.
      list_keys[place] = ~key;
      list_tokens[place] = static_cast<unsigned>(i);
    }
    above += __popc(are_above);
    equal += __popc(are_equal);
  });
  __syncthreads();

  for (int shift = 0; shift < 32; shift += 8) {
    const auto key_at = [&](index_t i) { return list_keys[i]; };
    radix_count(histogram, capacity, shift, key_at);
    const unsigned total = threadIdx.x < radix_digits ? radix_total(histogram) : 0;
    // Where all have one digit, they are in order.
    if (__syncthreads_or(total == static_cast<unsigned>(capacity))) continue;
    unsigned all;
    const unsigned start = block_exclusive_sum(total, all);
    radix_places(histogram, start);
    radix_move(histogram, capacity, shift, key_at, [&](index_t i, unsigned key, unsigned place) {
      other_keys[place] = key;
      other_tokens[place] = list_tokens[i];
    });
    unsigned* swap = list_keys;
    list_keys = other_keys;
    other_keys = swap;
    swap = list_tokens;
    list_tokens = other_tokens;
    other_tokens = swap;
  }

  const index_t out = static_cast<index_t>(blockIdx.x) * capacity;
  for (int i = threadIdx.x; i < capacity; i += select_threads) {
    const index_t token = first + list_tokens[i];
    chosen[out + i] = static_cast<int>(token);
    weights[out + i] = probs[token * experts + expert];
  }
}

// ----------------------------------------------------------------------------
// Backward

__device__ __forceinline__ void expert_choice_backward(const int* __restrict__ chosen,
                                                       const float* __restrict__ d_weights, index_t width,
                                                       index_t choices, int experts, float* __restrict__ d_probs) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < choices; i += step) {
    if (chosen[i] >= 0) d_probs[chosen[i] * static_cast<index_t>(experts) + i / width] += d_weights[i];
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

extern "C" __global__ void __launch_bounds__(256)
    expert_choice_keys(const float* probs, fsmoe::index_t tokens, int experts, unsigned* keys) {
  fsmoe::expert_choice_keys(probs, tokens, experts, keys);
}

extern "C" __global__ void __launch_bounds__(1024)
    expert_choice_select(const unsigned* keys, const float* probs, fsmoe::index_t tokens, fsmoe::index_t per_group,
                         int experts, int groups, int capacity, int keys_shared, int lists_shared, unsigned* lists,
                         int* chosen, float* weights) {
  fsmoe::expert_choice_select(keys, probs, tokens, per_group, experts, groups, capacity, keys_shared != 0,
                              lists_shared != 0, lists, chosen, weights);
}

extern "C" __global__ void expert_choice_backward(const int* chosen, const float* d_weights, fsmoe::index_t width,
                                                  fsmoe::index_t choices, int experts, float* d_probs) {
  fsmoe::expert_choice_backward(chosen, d_weights, width, choices, experts, d_probs);
}
