// Warpgroup matrix products (sm_90a): D[64, N] += A[64, 16] * B[16, N], bf16 operands in shared memory, f32 sums in the
// registers of the warpgroup's 128 threads. The instructions run on their own; the registers of D must not be touched
// between wgmma_fence and the wgmma_wait that covers them.
//
// A thread of lane l in warp w holds of D, for every column group j of 8, at d[4*j + 2*h + c]: row 16*w + 8*h + l/4,
// column 8*j + 2*(l%4) + c.
#pragma once

#include <cstdint>

namespace fsmoe::ptx {

// Which of an operand's dimensions is contiguous in memory: the one summed over, or its own.
enum class Major { K, MN };

// Where an operand's tile lies in shared memory, for tiles that the copy engine wrote with the 128-byte swizzle in boxes
// 64 elements (128 bytes) wide and, for Major::MN, 64 deep. The 8-row groups of a box are 1024 bytes apart; boxes side
// by side along an MN-major operand's own dimension 8192.
template <Major major>
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t leading = major == Major::K ? 1 : 8192 >> 4;
  constexpr uint64_t stride = 1024 >> 4;
  constexpr uint64_t swizzle_128_bytes = 1;
  return (swizzle_128_bytes << 62) | (stride << 32) | (leading << 16) | ((address & 0x3ffff) >> 4);
}

// What a descriptor moves by for the next 16 of the dimension that is summed over: 32 bytes along a row, or two 8-row
// groups.
template <Major major>
constexpr uint64_t wgmma_step = major == Major::K ? 32 >> 4 : 2048 >> 4;

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `Pending` of the committed groups are still running.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// An inline instruction's text is a literal, so each width needs its own: these are the lists of its registers.
#define FSMOE_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FSMOE_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FSMOE_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FSMOE_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FSMOE_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FSMOE_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FSMOE_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FSMOE_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FSMOE_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FSMOE_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FSMOE_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FSMOE_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FSMOE_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FSMOE_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FSMOE_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FSMOE_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FSMOE_D(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

template <int N>
struct Wgmma;

// D += A * B
#define FSMOE_WGMMA(n, a, b, a_major, b_major, registers, ...)                                                  \
  template <>                                                                                                         \
  struct Wgmma<n> {                                                                                                   \
    template <Major A, Major B>                                                                                       \
    __device__ __forceinline__ static void run(float (&d)[n / 2], uint64_t at_a, uint64_t at_b) {         \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, " a ", " b              \
                   ", 1, 1, 1, " a_major ", " b_major ";"                                                              \
                   : __VA_ARGS__                                                                                      \
                   : "l"(at_a), "l"(at_b), "n"(A == Major::MN ? 1 : 0), "n"(B == Major::MN ? 1 : 0));    \
    }                                                                                                                 \
  };

FSMOE_WGMMA(128, "%64", "%65", "%66", "%67",
            FSMOE_R0 ", " FSMOE_R1 ", " FSMOE_R2 ", " FSMOE_R3 ", " FSMOE_R4 ", " FSMOE_R5 ", " FSMOE_R6 ", " FSMOE_R7,
            FSMOE_D(0), FSMOE_D(8), FSMOE_D(16), FSMOE_D(24), FSMOE_D(32), FSMOE_D(40), FSMOE_D(48), FSMOE_D(56))
FSMOE_WGMMA(192, "%96", "%97", "%98", "%99",
            FSMOE_R0 ", " FSMOE_R1 ", " FSMOE_R2 ", " FSMOE_R3 ", " FSMOE_R4 ", " FSMOE_R5 ", " FSMOE_R6 ", " FSMOE_R7 ", " FSMOE_R8 ", " FSMOE_R9 ", " FSMOE_R10 ", " FSMOE_R11,
            FSMOE_D(0), FSMOE_D(8), FSMOE_D(16), FSMOE_D(24), FSMOE_D(32), FSMOE_D(40), FSMOE_D(48), FSMOE_D(56), FSMOE_D(64), FSMOE_D(72), FSMOE_D(80), FSMOE_D(88))
FSMOE_WGMMA(208, "%104", "%105", "%106", "%107",
            FSMOE_R0 ", " FSMOE_R1 ", " FSMOE_R2 ", " FSMOE_R3 ", " FSMOE_R4 ", " FSMOE_R5 ", " FSMOE_R6 ", " FSMOE_R7 ", " FSMOE_R8 ", " FSMOE_R9 ", " FSMOE_R10 ", " FSMOE_R11 ", " FSMOE_R12,
            FSMOE_D(0), FSMOE_D(8), FSMOE_D(16), FSMOE_D(24), FSMOE_D(32), FSMOE_D(40), FSMOE_D(48), FSMOE_D(56), FSMOE_D(64), FSMOE_D(72), FSMOE_D(80), FSMOE_D(88), FSMOE_D(96))
FSMOE_WGMMA(256, "%128", "%129", "%130", "%131",
            FSMOE_R0 ", " FSMOE_R1 ", " FSMOE_R2 ", " FSMOE_R3 ", " FSMOE_R4 ", " FSMOE_R5 ", " FSMOE_R6 ", " FSMOE_R7 ", " FSMOE_R8 ", " FSMOE_R9 ", " FSMOE_R10 ", " FSMOE_R11 ", " FSMOE_R12 ", " FSMOE_R13 ", " FSMOE_R14 ", " FSMOE_R15,
            FSMOE_D(0), FSMOE_D(8), FSMOE_D(16), FSMOE_D(24), FSMOE_D(32), FSMOE_D(40), FSMOE_D(48), FSMOE_D(56), FSMOE_D(64), FSMOE_D(72), FSMOE_D(80), FSMOE_D(88), FSMOE_D(96), FSMOE_D(104), FSMOE_D(112), FSMOE_D(120))

#undef FSMOE_WGMMA
#undef FSMOE_D
#undef FSMOE_R0
#undef FSMOE_R1
#undef FSMOE_R2
#undef FSMOE_R3
#undef FSMOE_R4
#undef FSMOE_R5
#undef FSMOE_R6
#undef FSMOE_R7
#undef FSMOE_R8
#undef FSMOE_R9
#undef FSMOE_R10
#undef FSMOE_R11
#undef FSMOE_R12
#undef FSMOE_R13
#undef FSMOE_R14
#undef FSMOE_R15

}  // namespace fsmoe::ptx
