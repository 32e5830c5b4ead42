// Values at given columns of every row, and back.
//
//   cols_gather_{bf16,f16,f32}(x, index, rows, k, cols, out)
//   cols_scatter_{bf16,f16,f32}_{bf16,f16,f32}(x, index, rows, k, cols, out)
//
// gather: out[r, j] = x[r, index[r, j]], 0 where the index is -1; x: (rows, cols), index and out: (rows, k).
// scatter: out[r, index[r, j]] += x[r, j], nothing where it is -1; the types are x's and out's. Of choices of one column the
// first makes the sum, in f32, so that it is rounded once.

#include "common/dtype.cuh"

namespace fsmoe {

template <typename T>
__device__ __forceinline__ void cols_gather(const T* __restrict__ x, const int* __restrict__ index, index_t rows, int k,
                                            index_t cols, T* __restrict__ out) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * k; i += step) {
    const index_t column = index[i];
    out[i] = column >= 0 && column < cols ? x[i / k * cols + column] : from_f32<T>(0.0f);
  }
}

template <typename X, typename O>
__device__ __forceinline__ void cols_scatter(const X* __restrict__ x, const int* __restrict__ index, index_t rows,
                                             int k, index_t cols, O* __restrict__ out) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * k; i += step) {
    const index_t row = i / k;
    const int column = index[i];
    bool first = column >= 0 && column < cols;
    for (index_t before = row * k; before < i; ++before) first = first && index[before] != column;
    if (!first) continue;
    O& target = out[row * cols + column];
    float sum = to_f32(target);
    for (index_t n = i; n < (row + 1) * k; ++n) {
      if (index[n] == column) sum += to_f32(x[n]);
    }
    target = from_f32<O>(sum);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_COLS_SCATTER(from, X, to, O)                                                                   \
  extern "C" __global__ void cols_scatter_##from##_##to(const X* x, const int* index, fsmoe::index_t rows, int k, \
                                                        fsmoe::index_t cols, O* out) {                       \
    fsmoe::cols_scatter(x, index, rows, k, cols, out);                                                       \
  }
#define FSMOE_COLS(suffix, T)                                                                                   \
  extern "C" __global__ void cols_gather_##suffix(const T* x, const int* index, fsmoe::index_t rows, int k,     \
                                                  fsmoe::index_t cols, T* out) {                                \
    fsmoe::cols_gather(x, index, rows, k, cols, out);                                                           \
  }                                                                                                             \
  FSMOE_COLS_SCATTER(suffix, T, bf16, fsmoe::bf16)                                                              \
  FSMOE_COLS_SCATTER(suffix, T, f16, fsmoe::f16)                                                                \
  FSMOE_COLS_SCATTER(suffix, T, f32, fsmoe::f32)

FSMOE_FOR_EACH_DTYPE(FSMOE_COLS)
