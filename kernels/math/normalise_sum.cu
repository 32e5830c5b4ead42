// L1 normalisation of non-negative rows of (rows, cols), and its gradient.
//
//   normalise_sum_forward_{bf16,f16,f32}(x, scale, eps, y, rows, cols)        y[r] = scale * x[r] / S, S = sum(x[r]) + eps
//   normalise_sum_backward_{...}(x, y, scale, eps, dy, dx, rows, cols)        dx[r] = (scale * dy[r] - sum(dy[r] * y[r])) / S

#include "common/rows.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Forward

template <typename Row, int N, typename T>
__device__ __forceinline__ void normalise_sum_forward_in(const T* __restrict__ x, float scale, float eps,
                                                         T* __restrict__ y, index_t rows, index_t cols) {
  const bool aligned = is_aligned(x) && is_aligned(y);
  for (index_t row = Row::first(); row < rows; row += Row::step()) {
    const index_t at = row * cols;
    float total = 0.0f;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      const Lanes<N> lanes = load_either<N>(x + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) total += lanes[i];
    });
    const float factor = scale / (Row::sum(total) + eps);
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      Lanes<N> lanes = load_either<N>(x + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) lanes[i] *= factor;
      store_either<N>(y + at + col, lanes, aligned);
    });
  }
}

// ----------------------------------------------------------------------------
// Backward

template <typename Row, int N, typename T>
__device__ __forceinline__ void normalise_sum_backward_in(const T* __restrict__ x, const T* __restrict__ y, float scale,
                                                          float eps, const T* __restrict__ dy, T* __restrict__ dx,
                                                          index_t rows, index_t cols) {
  const bool aligned = is_aligned(x) && is_aligned(y) && is_aligned(dy) && is_aligned(dx);
  for (index_t row = Row::first(); row < rows; row += Row::step()) {
    const index_t at = row * cols;
    float total = 0.0f;
    float inner = 0.0f;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      const Lanes<N> in = load_either<N>(x + at + col, aligned);
      const Lanes<N> out = load_either<N>(y + at + col, aligned);
      const Lanes<N> grad = load_either<N>(dy + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total += in[i];
        inner += out[i] * grad[i];
      }
    });
    total = Row::sum(total) + eps;
    inner = Row::sum(inner);
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      Lanes<N> grad = load_either<N>(dy + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] = (scale * grad[i] - inner) / total;
      store_either<N>(dx + at + col, grad, aligned);
    });
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_NORMALISE_SUM(suffix, T)                                                                             \
  extern "C" __global__ void normalise_sum_forward_##suffix(const T* x, float scale, float eps, T* y,              \
                                                            fsmoe::index_t rows, fsmoe::index_t cols) {            \
    fsmoe::with_rows<fsmoe::vector_width<T>>(cols, [&](auto row, auto count) {                                     \
      fsmoe::normalise_sum_forward_in<decltype(row), decltype(count)::value>(x, scale, eps, y, rows, cols);        \
    });                                                                                                            \
  }                                                                                                                \
  extern "C" __global__ void normalise_sum_backward_##suffix(const T* x, const T* y, float scale, float eps,       \
                                                             const T* dy, T* dx, fsmoe::index_t rows,              \
                                                             fsmoe::index_t cols) {                                \
    fsmoe::with_rows<fsmoe::vector_width<T>>(cols, [&](auto row, auto count) {                                     \
      fsmoe::normalise_sum_backward_in<decltype(row), decltype(count)::value>(x, y, scale, eps, dy, dx, rows, cols); \
    });                                                                                                            \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_NORMALISE_SUM)
