// Softmax over the rows of (rows, cols), and its gradient.
//
//   softmax_forward_{T}_{O}(x, y, rows, cols)          y[r] = exp(x[r] - max) / sum; O is T or f32
//   softmax_backward_{T}(y, dy, dx, rows, cols)        dx[r] = y[r] * (dy[r] - sum(dy[r] * y[r]))
//
// The maximum and the sum come from one pass (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018);
// the second pass finds the row in a cache. Outputs share no memory with inputs.

#include "common/math.cuh"
#include "common/rows.cuh"

namespace fsmoe {

// exp(x), for results that are stored as O.
template <typename O>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (is_narrow<O>) {
    return fast_exp2(log2_e * x);
  } else {
    return expf(x);
  }
}

// ----------------------------------------------------------------------------
// Forward

template <typename Row, int N, typename T, typename O>
__device__ __forceinline__ void softmax_forward_in(const T* __restrict__ x, O* __restrict__ y, index_t rows,
                                                   index_t cols) {
  const bool aligned = is_aligned(x) && is_aligned(y);
  for (index_t row = Row::first(); row < rows; row += Row::step()) {
    const T* from = x + row * cols;
    O* to = y + row * cols;
    float most = Max::identity;
    float total = 0.0f;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      const Lanes<N> lanes = load_either<N>(from + col, aligned);
      float larger = most;
#pragma unroll
      for (int i = 0; i < N; ++i) larger = fmaxf(larger, lanes[i]);
      total *= exponential<O>(most - larger);
#pragma unroll
      for (int i = 0; i < N; ++i) total += exponential<O>(lanes[i] - larger);
      most = larger;
    });
    const float row_most = Row::max(most);
    const float scale = 1.0f / Row::sum(total * exponential<O>(most - row_most));
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      Lanes<N> lanes = load_either<N>(from + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) lanes[i] = exponential<O>(lanes[i] - row_most) * scale;
      store_either<N>(to + col, lanes, aligned);
    });
  }
}

// ----------------------------------------------------------------------------
// Backward

template <typename Row, int N, typename T>
__device__ __forceinline__ void softmax_backward_in(const T* __restrict__ y, const T* __restrict__ dy,
                                                    T* __restrict__ dx, index_t rows, index_t cols) {
  const bool aligned = is_aligned(y) && is_aligned(dy) && is_aligned(dx);
  for (index_t row = Row::first(); row < rows; row += Row::step()) {
    const index_t at = row * cols;
    float inner = 0.0f;
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      const Lanes<N> out = load_either<N>(y + at + col, aligned);
      const Lanes<N> grad = load_either<N>(dy + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) inner += out[i] * grad[i];
    });
    inner = Row::sum(inner);
    for_each_in_row<Row, N>(cols, [&](index_t col) {
      Lanes<N> out = load_either<N>(y + at + col, aligned);
      const Lanes<N> grad = load_either<N>(dy + at + col, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] *= grad[i] - inner;
      store_either<N>(dx + at + col, out, aligned);
    });
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_SOFTMAX_FORWARD(t, T, o, O)                                                                            \
  extern "C" __global__ void softmax_forward_##t##_##o(const T* x, O* y, fsmoe::index_t rows, fsmoe::index_t cols) { \
    fsmoe::with_rows<fsmoe::vector_width<T>>(cols, [&](auto row, auto count) {                                       \
      fsmoe::softmax_forward_in<decltype(row), decltype(count)::value>(x, y, rows, cols);                            \
    });                                                                                                              \
  }
#define FSMOE_SOFTMAX_BACKWARD(t, T)                                                                            \
  extern "C" __global__ void softmax_backward_##t(const T* y, const T* dy, T* dx, fsmoe::index_t rows,          \
                                                  fsmoe::index_t cols) {                                        \
    fsmoe::with_rows<fsmoe::vector_width<T>>(cols, [&](auto row, auto count) {                                  \
      fsmoe::softmax_backward_in<decltype(row), decltype(count)::value>(y, dy, dx, rows, cols);                 \
    });                                                                                                         \
  }

FSMOE_SOFTMAX_FORWARD(bf16, fsmoe::bf16, bf16, fsmoe::bf16)
FSMOE_SOFTMAX_FORWARD(bf16, fsmoe::bf16, f32, fsmoe::f32)
FSMOE_SOFTMAX_FORWARD(f16, fsmoe::f16, f16, fsmoe::f16)
FSMOE_SOFTMAX_FORWARD(f16, fsmoe::f16, f32, fsmoe::f32)
FSMOE_SOFTMAX_FORWARD(f32, fsmoe::f32, f32, fsmoe::f32)

FSMOE_FOR_EACH_DTYPE(FSMOE_SOFTMAX_BACKWARD)
