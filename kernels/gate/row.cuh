// A row of a gate's matrix over the lanes of one warp, in registers: up to 1,024 values, of which a lane holds V. Selection
// of the largest of them, by keys whose unsigned order is the order of the floats.
#pragma once

#include <climits>

#include "common/reduce.cuh"

namespace fsmoe {

// Which column a lane's value i is: packs of up to four neighbours, so that a lane's loads are up to 16 bytes wide and a
// warp's are contiguous. Within a lane columns ascend with i.
template <int V>
struct Row {
  static constexpr int pack = V < 4 ? V : 4;
  static __device__ __forceinline__ int column(int i, int lane) {
    return i / pack * (warp_size * pack) + lane * pack + i % pack;
  }
  // The lane that holds a column.
  static __device__ __forceinline__ int lane_of(int column) { return column / pack % warp_size; }
};

// Whether rows of `cols` floats from `data` on can be moved in packs.
template <int V>
__device__ __forceinline__ bool rows_in_packs(const float* data, int cols) {
  return cols % Row<V>::pack == 0 && reinterpret_cast<uintptr_t>(data) % (Row<V>::pack * sizeof(float)) == 0;
}

// The row's values, `outside` beyond its end.
template <int V>
__device__ __forceinline__ void load_row(const float* __restrict__ row, int cols, bool packs, int lane, float outside,
                                         float (&x)[V]) {
  constexpr int pack = Row<V>::pack;
  if (packs) {
#pragma unroll
    for (int i = 0; i < V; i += pack) {
      const int column = Row<V>::column(i, lane);
      const bool inside = column < cols;
      if constexpr (pack == 4) {
        const float4 v = inside ? *reinterpret_cast<const float4*>(row + column)
                                : make_float4(outside, outside, outside, outside);
        x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
      } else if constexpr (pack == 2) {
        const float2 v = inside ? *reinterpret_cast<const float2*>(row + column) : make_float2(outside, outside);
        x[i] = v.x, x[i + 1] = v.y;
      } else {
        x[i] = inside ? row[column] : outside;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int column = Row<V>::column(i, lane);
      x[i] = column < cols ? row[column] : outside;
    }
  }
}

// Floats as unsigned integers of the same order: NaN before all values (a diverged gate still chooses), -0 as 0. No float
// has key 0, which stands for "none".
__device__ __forceinline__ unsigned sort_key(float x) {
  const int bits = __float_as_int(x == 0.0f ? 0.0f : x);
  // Negative floats have all bits turned, others the sign.
  const unsigned key = static_cast<unsigned>(bits) ^ (static_cast<unsigned>(bits >> 31) | 0x80000000u);
  return x != x ? 1u : key;
}

// The float of a key; that of "none" and of NaN is a NaN.
__device__ __forceinline__ float key_value(unsigned key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Calls taken(j, column, key) for the `count` largest keys of a row, descending, of equals the lowest column first; every
// lane gets every call. The keys are used up. At least `count` of them must not be 0.
template <int V, typename Taken>
__device__ __forceinline__ void take_largest(unsigned (&keys)[V], int lane, int count, Taken taken) {
  if constexpr (V <= 4) {
    // Few enough to be sorted: then a lane's largest is its first, and the next moves up. Only neighbours change places, and
    // equals never do, so that of these the lowest column stays in front.
    unsigned columns[V];
#pragma unroll
    for (int i = 0; i < V; ++i) columns[i] = Row<V>::column(i, lane);
#pragma unroll
    for (int end = V - 1; end > 0; --end) {
#pragma unroll
      for (int i = 0; i < end; ++i) {
        const bool swap = keys[i] < keys[i + 1];
        const unsigned key = keys[i], column = columns[i];
        keys[i] = swap ? keys[i + 1] : key;
        columns[i] = swap ? columns[i + 1] : column;
        keys[i + 1] = swap ? key : keys[i + 1];
        columns[i + 1] = swap ? column : columns[i + 1];
      }
    }
    for (int j = 0; j < count; ++j) {
      const unsigned most = __reduce_max_sync(full_warp, keys[0]);
      const unsigned column = __reduce_min_sync(full_warp, keys[0] == most ? columns[0] : UINT_MAX);
      const bool own = columns[0] == column;
#pragma unroll
      for (int i = 0; i + 1 < V; ++i) {
        keys[i] = own ? keys[i + 1] : keys[i];
        columns[i] = own ? columns[i + 1] : columns[i];
      }
      keys[V - 1] = own ? 0 : keys[V - 1];
      taken(j, static_cast<int>(column), most);
    }
  } else {
    for (int j = 0; j < count; ++j) {
      unsigned best = keys[0];
      unsigned at = Row<V>::column(0, lane);
#pragma unroll
      for (int i = 1; i < V; ++i) {
        if (keys[i] > best) {
          best = keys[i];
          at = Row<V>::column(i, lane);
        }
      }
      const unsigned most = __reduce_max_sync(full_warp, best);
      const unsigned column = __reduce_min_sync(full_warp, best == most ? at : UINT_MAX);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (static_cast<unsigned>(Row<V>::column(i, lane)) == column) keys[i] = 0;
      }
      taken(j, static_cast<int>(column), most);
    }
  }
}

// Node-limited selection: sets the keys of columns outside the `kept` best of `groups` equal groups to 0, a group's rank
// being the sum of its two largest values. `x` are the row's values, `memory` holds `cols` words of the warp's own.
template <int V>
__device__ __forceinline__ void keep_groups(const float (&x)[V], unsigned (&keys)[V], int cols, int groups, int kept,
                                            int lane, float* memory) {
  const int size = cols / groups;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int column = Row<V>::column(i, lane);
    if (column < cols) memory[column] = x[i];
  }
  __syncwarp();
  // Groups are laid over the lanes as columns are.
  unsigned ranks[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int group = Row<V>::column(i, lane);
    ranks[i] = 0;
    if (group < groups) {
      unsigned first = 0, second = 0;
      for (int n = 0; n < size; ++n) {
        const unsigned key = sort_key(memory[group * size + n]);
        second = max(second, min(first, key));
        first = max(first, key);
      }
      ranks[i] = sort_key(size > 1 ? key_value(first) + key_value(second) : key_value(first));
    }
  }
  __syncwarp();
  unsigned* flags = reinterpret_cast<unsigned*>(memory);
  for (int group = lane; group < groups; group += warp_size) flags[group] = 0;
  __syncwarp();
  take_largest<V>(ranks, lane, kept, [&](int, int group, unsigned) {
    if (lane == 0) flags[group] = 1;
  });
  __syncwarp();
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int column = Row<V>::column(i, lane);
    if (column < cols && flags[column / size] == 0) keys[i] = 0;
  }
  // The next row's values must not overtake a lane that still reads flags.
  __syncwarp();
}

}  // namespace fsmoe

// Instantiates MACRO(V) for the numbers of values a lane holds: rows of up to 32, 64, 128, 256, 512 and 1,024 columns.
#define FSMOE_FOR_EACH_ROW(MACRO) MACRO(1) MACRO(2) MACRO(4) MACRO(8) MACRO(16) MACRO(32)
