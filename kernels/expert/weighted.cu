// The backward of an activation whose result was multiplied by a weight per row, given dy, the gradient of the product
// over the weight: with w the row's weight and f the activation,
//
//   weighted_gelu_backward_{bf16,f16,f32}(x, dy, weights, dx, act, d_weights, rows, cols)        f = GELU, erf
//   weighted_gelu_tanh_backward_{...}(the same)                                                  f = GELU, tanh
//     dx = w dy f'(x), act = w f(x), d_weights[r] = sum over the row of dy f(x)
//   weighted_swiglu_backward_{...}(gate, up, dy, weights, d_gate, d_up, act, d_weights, rows, cols)
//     the same with f = silu(gate) * up
//
// All (rows, cols), contiguous; weights and d_weights (rows), f32, both null where w is 1. Bound by memory: 4 and 6 values
// moved per element. A warp takes a row, or a block a long one; sums have one order.

#include "common/rows.cuh"
#include "expert/activation.cuh"

namespace fsmoe {

template <typename Gelu, typename T>
__device__ __forceinline__ void weighted_gelu(const T* __restrict__ x, const T* __restrict__ dy,
                                              const float* __restrict__ weights, T* __restrict__ dx,
                                              T* __restrict__ act, float* __restrict__ d_weights, index_t rows,
                                              index_t cols) {
  with_rows<vector_width<T>>(cols, [&](auto row_kind, auto count) {
    using Row = decltype(row_kind);
    constexpr int N = decltype(count)::value;
    for (index_t row = Row::first(); row < rows; row += Row::step()) {
      const float w = weights == nullptr ? 1.0f : weights[row];
      float sum = 0.0f;
      for_each_in_row<Row, N>(cols, [&](index_t col) {
        const index_t at = row * cols + col;
        Lanes<N> value = load<N>(x + at);
        Lanes<N> grad = load<N>(dy + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const ValueAndDerivative f = Gelu::both(value[i]);
          sum += grad[i] * f.value;
          value[i] = w * f.value;
          grad[i] = w * grad[i] * f.derivative;
        }
        store<N>(act + at, value);
        store<N>(dx + at, grad);
      });
      if (d_weights != nullptr) {
        sum = Row::sum(sum);
        if (Row::lane() == 0) d_weights[row] = sum;
      }
    }
  });
}

template <typename T>
__device__ __forceinline__ void weighted_swiglu(const T* __restrict__ gate, const T* __restrict__ up,
                                                const T* __restrict__ dy, const float* __restrict__ weights,
                                                T* __restrict__ d_gate, T* __restrict__ d_up, T* __restrict__ act,
                                                float* __restrict__ d_weights, index_t rows, index_t cols) {
  with_rows<vector_width<T>>(cols, [&](auto row_kind, auto count) {
    using Row = decltype(row_kind);
    constexpr int N = decltype(count)::value;
    for (index_t row = Row::first(); row < rows; row += Row::step()) {
      const float w = weights == nullptr ? 1.0f : weights[row];
      float sum = 0.0f;
      for_each_in_row<Row, N>(cols, [&](index_t col) {
        const index_t at = row * cols + col;
        Lanes<N> gates = load<N>(gate + at);
        Lanes<N> ups = load<N>(up + at);
        Lanes<N> grads = load<N>(dy + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const Swiglu f = swiglu<T>(gates[i], ups[i]);
          const float grad = w * grads[i];
          sum += grads[i] * f.value;
          gates[i] = grad * f.by_gate;
          ups[i] = grad * f.by_up;
          grads[i] = w * f.value;
        }
        store<N>(d_gate + at, gates);
        store<N>(d_up + at, ups);
        store<N>(act + at, grads);
      });
      if (d_weights != nullptr) {
        sum = Row::sum(sum);
        if (Row::lane() == 0) d_weights[row] = sum;
      }
    }
  });
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_WEIGHTED_GELU(NAME, FORM, suffix, T)                                                                \
  extern "C" __global__ void NAME##_backward_##suffix(const T* x, const T* dy, const float* weights, T* dx,       \
                                                      T* act, float* d_weights, fsmoe::index_t rows,              \
                                                      fsmoe::index_t cols) {                                      \
    fsmoe::weighted_gelu<fsmoe::FORM<T>>(x, dy, weights, dx, act, d_weights, rows, cols);                         \
  }
#define FSMOE_WEIGHTED(suffix, T)                                                                                 \
  FSMOE_WEIGHTED_GELU(weighted_gelu, GeluErf, suffix, T)                                                          \
  FSMOE_WEIGHTED_GELU(weighted_gelu_tanh, GeluTanh, suffix, T)                                                    \
  extern "C" __global__ void weighted_swiglu_backward_##suffix(                                                   \
      const T* gate, const T* up, const T* dy, const float* weights, T* d_gate, T* d_up, T* act,                  \
      float* d_weights, fsmoe::index_t rows, fsmoe::index_t cols) {                                               \
    fsmoe::weighted_swiglu(gate, up, dy, weights, d_gate, d_up, act, d_weights, rows, cols);                      \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_WEIGHTED)
