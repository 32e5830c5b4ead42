// Exclusive sums of unsigned integers over a warp and over a block.
#pragma once

#include "common/reduce.cuh"

namespace fsmoe {

// The sum over the warp's lanes below this one; all 32 must take part.
__device__ __forceinline__ unsigned warp_exclusive_sum(unsigned x) {
  const int lane = threadIdx.x % warp_size;
  unsigned sum = x;
#pragma unroll
  for (int offset = 1; offset < warp_size; offset *= 2) {
    const unsigned below = __shfl_up_sync(full_warp, sum, offset);
    if (lane >= offset) sum += below;
  }
  return sum - x;
}

// The sum over the block's threads below this one, blockDim.x a multiple of 32 and at most 1024; `total` is that over all
// of them. All threads must take part.
__device__ __forceinline__ unsigned block_exclusive_sum(unsigned x, unsigned& total) {
  __shared__ unsigned sums[warp_size];
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const unsigned before = warp_exclusive_sum(x);
  if (lane == warp_size - 1) sums[warp] = before + x;
  __syncthreads();
  const unsigned own = lane < static_cast<int>(blockDim.x / warp_size) ? sums[lane] : 0;
  const unsigned warps_before = warp_exclusive_sum(own);
  total = __shfl_sync(full_warp, warps_before + own, warp_size - 1);
  // A second scan must not overwrite what a slow warp has still to read.
  __syncthreads();
  return __shfl_sync(full_warp, warps_before, warp) + before;
}

}  // namespace fsmoe
