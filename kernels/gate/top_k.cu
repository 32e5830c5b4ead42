// The k largest of every row of scores, descending, ties to the lowest column.
//
//   top_k_v{1,2,4,8,16,32}(scores, bias, experts, rows, cols, k, groups, kept)
//
// scores: (rows, cols) f32, cols up to 32 times the number in the name; bias: (cols) f32, added for the comparison, or
// null; experts: (rows, k) i32, k up to 32. With kept < groups a row takes only columns of its `kept` best groups. Dynamic
// shared memory: 4 * cols bytes per warp with groups, none without. A warp takes a row; any number of blocks.

#include "gate/row.cuh"

namespace fsmoe {

template <int V>
__device__ __forceinline__ void top_k(const float* __restrict__ scores, const float* __restrict__ bias,
                                      int* __restrict__ experts, index_t rows, int cols, int k, int groups, int kept) {
  extern __shared__ float top_k_memory[];
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  const bool packs = rows_in_packs<V>(scores, cols);
  for (index_t row = static_cast<index_t>(blockIdx.x) * warps + warp; row < rows;
       row += static_cast<index_t>(gridDim.x) * warps) {
    float x[V];
    load_row<V>(scores + row * cols, cols, packs, lane, 0.0f, x);
    unsigned keys[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int column = Row<V>::column(i, lane);
      if (bias != nullptr && column < cols) x[i] += bias[column];
      keys[i] = column < cols ? sort_key(x[i]) : 0;
    }
    if (kept < groups) keep_groups<V>(x, keys, cols, groups, kept, lane, top_k_memory + warp * cols);
    int mine = 0;
    take_largest<V>(keys, lane, k, [&](int j, int column, unsigned) {
      if (lane == j) mine = column;
    });
    if (lane < k) experts[row * k + lane] = mine;
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_TOP_K(V)                                                                                             \
  extern "C" __global__ void top_k_v##V(const float* scores, const float* bias, int* experts, fsmoe::index_t rows, \
                                        int cols, int k, int groups, int kept) {                                   \
    fsmoe::top_k<V>(scores, bias, experts, rows, cols, k, groups, kept);                                           \
  }

FSMOE_FOR_EACH_ROW(FSMOE_TOP_K)
