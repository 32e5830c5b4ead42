// Copies between pairs of stretches of memory, all in one launch: what a rank takes from the others of its node, where
// ranks share a GPU.
//
//   copy_many(stretches, count)
//
// stretches: `count` of {from, to, bytes}, by value, room for 64; none overlaps another. A stretch whose addresses are both multiples of 16 is copied in vectors of 16 bytes, otherwise byte by byte
// with what is left over.
//
// Launch with any number of blocks of 512 threads: a block takes every gridDim.x-th part of 32 KiB, so as many blocks as
// the launch has are all that the copies take of the GPU.

#include "comm/stretch.cuh"

namespace fsmoe {

constexpr int copy_part = 32768;
constexpr int copy_in_flight = 4;

// Bytes [begin, end) of a stretch.
__device__ __forceinline__ void copy_stretch(const uint8_t* from, uint8_t* to, index_t begin, index_t end) {
  const bool wide = (reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to)) % 16 == 0;
  index_t done = begin;
  if (wide) {
    // `begin` is a multiple of a part, so of a vector.
    const index_t vectors = (end - begin) / 16;
    const uint4* source = reinterpret_cast<const uint4*>(from + begin);
    uint4* target = reinterpret_cast<uint4*>(to + begin);
    index_t at = threadIdx.x;
    for (; at + (copy_in_flight - 1) * blockDim.x < vectors; at += copy_in_flight * blockDim.x) {
      uint4 data[copy_in_flight];
#pragma unroll
      for (int i = 0; i < copy_in_flight; ++i) data[i] = source[at + i * blockDim.x];
#pragma unroll
      for (int i = 0; i < copy_in_flight; ++i) target[at + i * blockDim.x] = data[i];
    }
    for (; at < vectors; at += blockDim.x) target[at] = source[at];
    done += vectors * 16;
  }
  for (index_t at = done + threadIdx.x; at < end; at += blockDim.x) to[at] = from[at];
}

}  // namespace fsmoe

extern "C" __global__ void __launch_bounds__(512)
    copy_many(const fsmoe::Stretches stretches, fsmoe::index_t count) {
  using namespace fsmoe;
  // Parts are counted stretch by stretch: each has ceil(bytes / part) of them.
  index_t parts_before = 0;
  for (index_t s = 0; s < count; ++s) {
    const Stretch stretch = stretches.of[s];
    const index_t parts = (stretch.bytes + copy_part - 1) / copy_part;
    // The first part of this stretch that is this block's.
    index_t part = (blockIdx.x + gridDim.x - parts_before % gridDim.x) % gridDim.x;
    for (; part < parts; part += gridDim.x) {
      const index_t begin = part * copy_part;
      copy_stretch(stretch.from, stretch.to, begin, min(begin + copy_part, stretch.bytes));
    }
    parts_before += parts;
  }
}
