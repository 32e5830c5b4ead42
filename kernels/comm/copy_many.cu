// Copies between pairs of stretches of memory, all in one launch: what a rank takes from the others of its node, where
// ranks share a GPU.
//
//   copy_many(stretches, count)
//
// stretches: `count` of {from, to, bytes}, by value, room for 64; none overlaps another. A stretch whose addresses are both
// multiples of 16 is copied in vectors of 16 bytes, otherwise byte by byte with what is left over.
//
// Launch with any number of blocks of 1,024 threads: a block takes every gridDim.x-th part of 128 KiB, so as many blocks as
// the launch has are all that the copies take of the GPU. A block has a whole part under way at a time: where what computes
// beside it leaves few multiprocessors, few blocks have to move much.

#include "comm/stretch.cuh"

namespace fsmoe {

constexpr int copy_threads = 1024;
constexpr int copy_in_flight = 8;
constexpr int copy_part = copy_threads * copy_in_flight * 16;

// Bytes [begin, end) of a stretch, at most a part.
__device__ __forceinline__ void copy_part_of(const uint8_t* from, uint8_t* to, index_t begin, index_t end) {
  const bool wide = (reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to)) % 16 == 0;
  index_t done = begin;
  if (wide) {
    // `begin` is a multiple of a part, so of a vector.
    const int vectors = static_cast<int>((end - begin) / 16);
    const uint4* source = reinterpret_cast<const uint4*>(from + begin);
    uint4* target = reinterpret_cast<uint4*>(to + begin);
    uint4 data[copy_in_flight];
#pragma unroll
    for (int i = 0; i < copy_in_flight; ++i) {
      const int at = threadIdx.x + i * copy_threads;
      if (at < vectors) data[i] = source[at];
    }
#pragma unroll
    for (int i = 0; i < copy_in_flight; ++i) {
      const int at = threadIdx.x + i * copy_threads;
      if (at < vectors) target[at] = data[i];
    }
    done += static_cast<index_t>(vectors) * 16;
  }
  for (index_t at = done + threadIdx.x; at < end; at += copy_threads) to[at] = from[at];
}

}  // namespace fsmoe

extern "C" __global__ void __launch_bounds__(1024)
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
      copy_part_of(stretch.from, stretch.to, begin, min(begin + copy_part, stretch.bytes));
    }
    parts_before += parts;
  }
}
