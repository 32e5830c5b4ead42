// Stable counting sort by one byte of a 32-bit key, the step of a radix sort from the lowest byte up, by one block.
//
// Warps take consecutive strips of the data. First each counts the bytes in its strip; then every byte's places are dealt
// out to the warps in order; last, each warp goes through its strip again and knows for every element how many of its byte
// came before.
#pragma once

#include "common/scan.cuh"

namespace fsmoe {

constexpr int radix_digits = 256;

__device__ __forceinline__ int radix_digit(unsigned key, int shift) { return key >> shift & (radix_digits - 1); }

// The elements of a warp's strip, whole warps' widths but for the end: [from, to) of n.
struct Strip {
  index_t from, to;
  __device__ __forceinline__ explicit Strip(index_t n) {
    const index_t warps = blockDim.x / warp_size;
    const index_t length = (n + warps * warp_size - 1) / (warps * warp_size) * warp_size;
    from = min(threadIdx.x / warp_size * length, n);
    to = min(from + length, n);
  }
};

// histogram (warps, 256) in shared memory: how often every digit is in the strip of each warp. key_at(i) is element i's.
template <typename KeyAt>
__device__ __forceinline__ void radix_count(unsigned* histogram, index_t n, int shift, KeyAt key_at) {
  unsigned* const own = histogram + threadIdx.x / warp_size * radix_digits;
  const int lane = threadIdx.x % warp_size;
  for (int d = lane; d < radix_digits; d += warp_size) own[d] = 0;
  __syncwarp();
  const Strip strip(n);
  for (index_t i = strip.from + lane; i < strip.to; i += warp_size) atomicAdd(&own[radix_digit(key_at(i), shift)], 1u);
  __syncthreads();
}

// How often the digit `threadIdx.x`, below 256, is in all strips.
__device__ __forceinline__ unsigned radix_total(const unsigned* histogram) {
  unsigned total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / warp_size); ++w) total += histogram[w * radix_digits + threadIdx.x];
  return total;
}

// Turns the histogram into the first place of every warp's every digit, the block's own first place of digit
// `threadIdx.x` being `start`.
__device__ __forceinline__ void radix_places(unsigned* histogram, unsigned start) {
  if (threadIdx.x < radix_digits) {
    for (int w = 0; w < static_cast<int>(blockDim.x / warp_size); ++w) {
      const unsigned count = histogram[w * radix_digits + threadIdx.x];
      histogram[w * radix_digits + threadIdx.x] = start;
      start += count;
    }
  }
  __syncthreads();
}

// Calls move(i, key, place) for every element.
template <typename KeyAt, typename Move>
__device__ __forceinline__ void radix_move(unsigned* histogram, index_t n, int shift, KeyAt key_at, Move move) {
  unsigned* const own = histogram + threadIdx.x / warp_size * radix_digits;
  const int lane = threadIdx.x % warp_size;
  const unsigned below = (1u << lane) - 1;
  const Strip strip(n);
  for (index_t at = strip.from; at < strip.to; at += warp_size) {
    const index_t i = at + lane;
    const bool inside = i < strip.to;
    const unsigned key = inside ? key_at(i) : 0;
    // Beyond the end: a digit that there is not.
    const int digit = inside ? radix_digit(key, shift) : radix_digits;
    const unsigned same = __match_any_sync(full_warp, digit);
    unsigned place = 0;
    if (inside) place = own[digit] + __popc(same & below);
    __syncwarp();
    if (inside && (same & below) == 0) own[digit] += __popc(same);
    __syncwarp();
    if (inside) move(i, key, place);
  }
  __syncthreads();
}

}  // namespace fsmoe
