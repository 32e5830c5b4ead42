// Stable radix sort of G groups of n 32-bit keys, all blocks together: one pass per byte, from the lowest up.
//
//   sort_keys_descending(values, n, keys)          keys that put f32 values in descending order, NaN last
//   sort_keys_index(index, n, none, keys)          i32 indices as keys, those outside 0..none as `none`
//   sort_count(keys, n, shift, tile, tiles, counts)
//   sort_move(keys, values, counts, totals, n, shift, tile, tiles, keys_out, values_out)
//   sort_bounds(keys, n, count, offsets)
//
// A pass by the byte at `shift` is: count, which writes counts (G, tiles, 256) u32; `slots_scan` of them, as of 256 experts
// and `tiles` rows, with totals (G, 256) for loads; and move, which puts keys (G, n) and values (G, n) i32 in their places.
// Without values (null) they are the elements' own numbers, 0 to G * n; keys_out may be null. Block g * tiles + b has the b-th
// `tile` elements of group g; 256 threads.
//
// bounds: offsets (count + 1) i32: where, in n sorted keys, those of 0, 1, ... begin.

#include "gate/row.cuh"
#include "order/radix.cuh"

namespace fsmoe {

constexpr int sort_threads = 256;

struct SortTile {
  index_t group, first;
  int b, count;
  __device__ __forceinline__ SortTile(index_t n, int tile, int tiles) {
    group = blockIdx.x / tiles;
    b = blockIdx.x % tiles;
    const index_t in_group = static_cast<index_t>(b) * tile;
    first = group * n + in_group;
    count = static_cast<int>(min(static_cast<index_t>(tile), n - in_group));
  }
};

__device__ __forceinline__ void sort_count(const unsigned* __restrict__ keys, index_t n, int shift, int tile, int tiles,
                                           unsigned* __restrict__ counts) {
  __shared__ unsigned histogram[sort_threads / warp_size * radix_digits];
  const SortTile t(n, tile, tiles);
  radix_count(histogram, t.count, shift, [&](index_t i) { return keys[t.first + i]; });
  counts[(t.group * tiles + t.b) * radix_digits + threadIdx.x] = radix_total(histogram);
}

__device__ __forceinline__ void sort_move(const unsigned* __restrict__ keys, const int* __restrict__ values,
                                          const unsigned* __restrict__ counts, const unsigned* __restrict__ totals,
                                          index_t n, int shift, int tile, int tiles, unsigned* __restrict__ keys_out,
                                          int* __restrict__ values_out) {
  __shared__ unsigned histogram[sort_threads / warp_size * radix_digits];
  const SortTile t(n, tile, tiles);
  const auto key_at = [&](index_t i) { return keys[t.first + i]; };
  radix_count(histogram, t.count, shift, key_at);
  unsigned all;
  const unsigned start = block_exclusive_sum(totals[t.group * radix_digits + threadIdx.x], all);
  radix_places(histogram, start + counts[(t.group * tiles + t.b) * radix_digits + threadIdx.x]);
  radix_move(histogram, t.count, shift, key_at, [&](index_t i, unsigned key, unsigned place) {
    const index_t to = t.group * n + place;
    if (keys_out != nullptr) keys_out[to] = key;
    values_out[to] = values == nullptr ? static_cast<int>(t.first + i) : values[t.first + i];
  });
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

extern "C" __global__ void sort_keys_descending(const float* values, fsmoe::index_t n, unsigned* keys) {
  const fsmoe::index_t step = static_cast<fsmoe::index_t>(gridDim.x) * blockDim.x;
  for (fsmoe::index_t i = static_cast<fsmoe::index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    keys[i] = ~fsmoe::sort_key(values[i]);
  }
}

extern "C" __global__ void sort_keys_index(const int* index, fsmoe::index_t n, unsigned none, unsigned* keys) {
  const fsmoe::index_t step = static_cast<fsmoe::index_t>(gridDim.x) * blockDim.x;
  for (fsmoe::index_t i = static_cast<fsmoe::index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    keys[i] = min(static_cast<unsigned>(index[i]), none);
  }
}

extern "C" __global__ void __launch_bounds__(256)
    sort_count(const unsigned* keys, fsmoe::index_t n, int shift, int tile, int tiles, unsigned* counts) {
  fsmoe::sort_count(keys, n, shift, tile, tiles, counts);
}

extern "C" __global__ void __launch_bounds__(256)
    sort_move(const unsigned* keys, const int* values, const unsigned* counts, const unsigned* totals,
              fsmoe::index_t n, int shift, int tile, int tiles, unsigned* keys_out, int* values_out) {
  fsmoe::sort_move(keys, values, counts, totals, n, shift, tile, tiles, keys_out, values_out);
}

extern "C" __global__ void sort_bounds(const unsigned* keys, fsmoe::index_t n, fsmoe::index_t count, int* offsets) {
  const fsmoe::index_t step = static_cast<fsmoe::index_t>(gridDim.x) * blockDim.x;
  for (fsmoe::index_t i = static_cast<fsmoe::index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i <= count; i += step) {
    // The number of keys below i.
    fsmoe::index_t low = 0, high = n;
    while (low < high) {
      const fsmoe::index_t middle = (low + high) / 2;
      if (keys[middle] < static_cast<unsigned>(i)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    offsets[i] = static_cast<int>(low);
  }
}
