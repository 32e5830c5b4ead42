// Copies from global to shared memory that run while the thread goes on (sm_80 and later).
#pragma once

#include "ptx/mma.cuh"

namespace fsmoe::ptx {

// Starts copying 16 bytes, both addresses 16-byte aligned; of the source only the first `bytes` (0 or 16) are read, the
// rest of the target becomes zero.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most `Pending` of this thread's groups are still under way. Other threads see what was copied after a
// barrier.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace fsmoe::ptx
