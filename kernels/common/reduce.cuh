// Sums and maxima over a warp and over a block. The tree's shape is fixed, so the same inputs give the same bits; the
// result reaches every thread.
#pragma once

#include "common/dtype.cuh"

namespace fsmoe {

constexpr int warp_size = 32;
constexpr unsigned full_warp = 0xffffffffu;

struct Sum {
  static constexpr float identity = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
  // What no finite value is below; written as its bits' decimal, which needs no header.
  static constexpr float identity = -3.402823466e+38f;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over the warp's 32 lanes, all of which must take part. The butterfly adds the same pairs on every lane, in either
// order, and addition commutes: all lanes end with the same bits.
template <typename Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(full_warp, x, offset));
  return x;
}

// Over the block's threads, blockDim.x a multiple of 32 and at most 1024, all of which must take part.
template <typename Op>
__device__ __forceinline__ float block_reduce(float x, Op op) {
  __shared__ float partial[warp_size];
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  x = warp_reduce(x, op);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = warp_reduce(lane < warps ? partial[lane] : Op::identity, op);
  // A second reduction must not overwrite what a slow warp has still to read.
  __syncthreads();
  return x;
}

__device__ __forceinline__ float warp_sum(float x) { return warp_reduce(x, Sum{}); }
__device__ __forceinline__ float warp_max(float x) { return warp_reduce(x, Max{}); }
__device__ __forceinline__ float block_sum(float x) { return block_reduce(x, Sum{}); }
__device__ __forceinline__ float block_max(float x) { return block_reduce(x, Max{}); }

}  // namespace fsmoe
