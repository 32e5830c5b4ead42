// Philox4x32-10, the counter-based random number generator of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers:
// As Easy as 1, 2, 3" (SC 2011): 128 random bits as a function of a 128-bit counter and a 64-bit key, with no state.
// A number thus depends on what it is for (seed, purpose, step, token), not on the thread or the rank that draws it.
//
// It gives the paper's known answers (the Random123 library's kat_vectors; kernels/common/selftest.cu checks them):
//
//   counter 00000000 00000000 00000000 00000000  key 00000000 00000000  ->  6627e8d5 e169c58d bc57ac4c 9b00dbd8
//   counter ffffffff ffffffff ffffffff ffffffff  key ffffffff ffffffff  ->  408f276d 41c83b0e a20bc7c6 6d5451fd
//   counter 243f6a88 85a308d3 13198a2e 03707344  key a4093822 299f31d0  ->  d16cfe09 94fdcceb 5001e420 24126ea1
#pragma once

#include <cstdint>

namespace fsmoe {

struct Philox4x32 {
  uint32_t word[4];
};

// Ten rounds over `counter`; the key is (key0, key1).
__host__ __device__ __forceinline__ Philox4x32 philox4x32_10(Philox4x32 counter, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * counter.word[0];
    const uint64_t b = 0xCD9E8D57ull * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
    // Weyl sequences: the golden ratio and sqrt(3) - 1, as fractions of 2^32.
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 24 of a word's bits as a float in [0, 1): every value is exact, and 1 cannot occur.
__host__ __device__ __forceinline__ float philox_uniform(uint32_t word) {
  return static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
}

}  // namespace fsmoe
