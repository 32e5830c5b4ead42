// L2 normalisation of the rows of (rows, cols), and its gradient.
//
//   normalise_l2_forward_{bf16,f16,f32}(x, eps, y, norm, rows, cols)     norm[r] = max(|x[r]|, eps), y[r] = x[r] / norm[r]
//   normalise_l2_backward_{...}(y, norm, eps, dy, dx, rows, cols)        dx[r] = (dy[r] - y[r] * sum(y[r] * dy[r])) / norm[r],
//                                                                        or dy[r] / eps where the norm is eps
//
// norm: f32, one per row.

#include "common/rows.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Forward

template <typename Row, int N, typename T>
__device__ __forceinline__ void normalise_l2_forward_in(const T* __restrict__ x, float eps, T* __restrict__ y,
                                                        float* __restrict__ norm, index_t rows, index_t cols) {
  const bool aligned = is_aligned(x) && is_aligned(y);
  for (index_t row = Row::first(); row < rows; row += Row::step()) {
    const index_t at = row * cols;
    float square = 0.0f;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      const Lanes<N> lanes = load_either<N>(x + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) square += lanes[i] * lanes[i];
    });
    const float length = fmaxf(sqrtf(Row::sum(square)), eps);
    if (Row::lane() == 0) norm[row] = length;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      Lanes<N> lanes = load_either<N>(x + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) lanes[i] /= length;
      store_either<N>(y + at + col, lanes, aligned);
    });
  }
}

// ----------------------------------------------------------------------------
// Backward

template <typename Row, int N, typename T>
__device__ __forceinline__ void normalise_l2_backward_in(const T* __restrict__ y, const float* __restrict__ norm,
                                                         float eps, const T* __restrict__ dy, T* __restrict__ dx,
                                                         index_t rows, index_t cols) {
  const bool aligned = is_aligned(y) && is_aligned(dy) && is_aligned(dx);
  for (index_t row = Row::first(); row < rows; row += Row::step()) {
    const index_t at = row * cols;
    const float length = norm[row];
    float inner = 0.0f;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      const Lanes<N> out = load_either<N>(y + at + col, aligned);
      const Lanes<N> grad = load_either<N>(dy + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) inner += out[i] * grad[i];
    });
    inner = Row::sum(inner);
    // At the floor the norm is a constant.
    if (!(length > eps)) inner = 0.0f;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      const Lanes<N> out = load_either<N>(y + at + col, aligned);
      Lanes<N> grad = load_either<N>(dy + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] = (grad[i] - out[i] * inner) / length;
      store_either<N>(dx + at + col, grad, aligned);
    });
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_NORMALISE_L2(suffix, T)                                                                             \
  extern "C" __global__ void normalise_l2_forward_##suffix(const T* x, float eps, T* y, float* norm,              \
                                                           fsmoe::index_t rows, fsmoe::index_t cols) {            \
    fsmoe::with_rows<fsmoe::vector_width<T>>(cols, [&](auto row, auto count) {                                    \
      fsmoe::normalise_l2_forward_in<decltype(row), decltype(count)::value>(x, eps, y, norm, rows, cols);         \
    });                                                                                                           \
  }                                                                                                               \
  extern "C" __global__ void normalise_l2_backward_##suffix(const T* y, const float* norm, float eps,             \
                                                            const T* dy, T* dx, fsmoe::index_t rows,              \
                                                            fsmoe::index_t cols) {                                \
    fsmoe::with_rows<fsmoe::vector_width<T>>(cols, [&](auto row, auto count) {                                    \
      fsmoe::normalise_l2_backward_in<decltype(row), decltype(count)::value>(y, norm, eps, dy, dx, rows, cols);   \
    });                                                                                                           \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_NORMALISE_L2)
