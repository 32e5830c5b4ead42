// Clusters of thread blocks, and how registers move between the warpgroups of a block (sm_90a).
#pragma once

#include <cstdint>

// Fixes a kernel's cluster size; other targets than sm_90 know no clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FSMOE_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define FSMOE_CLUSTER(blocks)
#endif

namespace fsmoe::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; what was written before is seen after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// True in one thread of the warp, all of whose threads call it. To the compiler the code that depends on it is one thread's:
// the copy engine's operands are then taken as they are, where under a condition like threadIdx.x == 0 each copy is wrapped
// in a loop over the warp's possibly different ones.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// Registers per thread, for the calling warpgroup from here on: a multiple of 8.
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

}  // namespace fsmoe::ptx
