// What tells that the embedded kernels work on a GPU: small kernels with answers known in advance, run by
// `fsmoe doctor` before it calls a GPU usable.

#include "common/philox.cuh"
#include "common/reduce.cuh"

// ----------------------------------------------------------------------------
// Philox: block i of 128 bits is out[4*i .. 4*i+4], of the counter in counters[4*i ..] and the key in keys[2*i ..].

extern "C" __global__ void selftest_philox(const uint32_t* counters, const uint32_t* keys, uint32_t* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t* c = counters + 4 * i;
  const fsmoe::Philox4x32 bits = fsmoe::philox4x32_10({{c[0], c[1], c[2], c[3]}}, keys[2 * i], keys[2 * i + 1]);
  for (int word = 0; word < 4; ++word) out[4 * i + word] = bits.word[word];
}

// ----------------------------------------------------------------------------
// Reductions, by one block: every thread t writes the sum and the maximum of in[0 .. blockDim.x] to out[2*t], out[2*t+1],
// so that the answer is seen to reach all of them.

extern "C" __global__ void selftest_reduce(const float* in, float* out) {
  const float x = in[threadIdx.x];
  out[2 * threadIdx.x] = fsmoe::block_sum(x);
  out[2 * threadIdx.x + 1] = fsmoe::block_max(x);
}
