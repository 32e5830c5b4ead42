// dst = value, any layout, element by element along dst; the value is given as the element's bits, in the low ones.
//
//   fill_{b16,b32,b64}(dst, step, walk, rows, cols, bits)          walk: the dimensions besides cols

#include "common/vector.cuh"
#include "common/walk.cuh"

namespace fsmoe {

template <typename T>
__device__ __forceinline__ void fill(T* __restrict__ dst, index_t step, const Walk<1>& walk, index_t rows, index_t cols,
                                     T bits) {
  for_each_vector<1>(rows, cols, [&](index_t row, index_t col, int) {
    dst[row_offsets(walk, row).at[0] + col * step] = bits;
  });
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_FILL(t, T)                                                                                             \
  extern "C" __global__ void fill_##t(T* dst, fsmoe::index_t step, const fsmoe::Walk<1> walk, fsmoe::index_t rows,   \
                                      fsmoe::index_t cols, uint64_t bits) {                                          \
    fsmoe::fill(dst, step, walk, rows, cols, static_cast<T>(bits));                                                  \
  }

FSMOE_FILL(b16, uint16_t)
FSMOE_FILL(b32, uint32_t)
FSMOE_FILL(b64, uint64_t)
