// The bulk tensor copy engine (sm_90): one thread moves a box of a tensor into shared memory, and a barrier counts the
// bytes as they land. What of a box lies outside the tensor is read as zeros, and counts.
#pragma once

#include <cstdint>

namespace fsmoe::ptx {

// A CUtensorMap, which the host encodes; a kernel takes it as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

__device__ __forceinline__ void tma_prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Orders what this thread has read from and written to shared memory before what the copy engine does there when told so
// afterwards: without it, results written over a box in place came out wrong.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box at (x, y, z), x the contiguous dimension, to `to`.
__device__ __forceinline__ void tma_load(const TensorMap& map, uint32_t barrier, uint32_t to, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// As tma_load, to the same place, and counted by the barrier at the same place, in every block of the cluster whose bit
// is set in `blocks`: read from L2 once.
__device__ __forceinline__ void tma_load_multicast(const TensorMap& map, uint32_t barrier, uint32_t to, int x, int y,
                                                   int z, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5}], [%2], %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

}  // namespace fsmoe::ptx
