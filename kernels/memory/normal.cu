// Standard normal deviates by Box and Muller (1958) from the counter-based generator: out[i] is number first + i of the
// stream that (key0, key1, tag0, tag1) addresses, whatever the grid.
//
//   normal_{bf16,f16,f32}(out, n, first, key, tag)     key = key0 | key1 << 32, tag = tag0 | tag1 << 32
//
// Deviates 2p and 2p + 1 come from block p of 128 bits: two uniform numbers of 53 bits. Computed in f64, as on the host,
// so that both give the same f32 but for the last bit of a library function: initial parameters do not depend on the
// device. Bound by arithmetic, a few picoseconds per deviate.

#include "common/philox.cuh"
#include "common/vector.cuh"

namespace fsmoe {

// 53 bits as a number in [0, 1).
__device__ __forceinline__ double uniform_53(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<double>(bits >> 11) * (1.0 / 9007199254740992.0);
}

template <typename T>
__device__ __forceinline__ void normal(T* __restrict__ out, index_t n, uint64_t first, uint64_t key, uint64_t tag) {
  const index_t thread = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  // Where the first deviate is the second of its pair, the first thread writes one only.
  const index_t odd = static_cast<index_t>(first % 2);
  for (index_t i = thread; 2 * i - odd < n; i += step) {
    const uint64_t pair = first / 2 + static_cast<uint64_t>(i);
    const Philox4x32 bits =
        philox4x32_10({{static_cast<uint32_t>(pair), static_cast<uint32_t>(pair >> 32), static_cast<uint32_t>(tag),
                        static_cast<uint32_t>(tag >> 32)}},
                      static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
    // 1 - u lies in (0, 1]: its logarithm is finite.
    const double radius = sqrt(-2.0 * log(1.0 - uniform_53(bits.word[0], bits.word[1])));
    double sine, cosine;
    sincospi(2.0 * uniform_53(bits.word[2], bits.word[3]), &sine, &cosine);
    const index_t at = 2 * i - odd;
    if (at >= 0) out[at] = from_f32<T>(static_cast<float>(radius * cosine));
    if (at + 1 < n) out[at + 1] = from_f32<T>(static_cast<float>(radius * sine));
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_NORMAL(suffix, T)                                                                                   \
  extern "C" __global__ void normal_##suffix(T* out, fsmoe::index_t n, uint64_t first, uint64_t key, uint64_t tag) { \
    fsmoe::normal(out, n, first, key, tag);                                                                       \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_NORMAL)
