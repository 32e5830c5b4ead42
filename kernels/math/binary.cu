// out[i] = a[i] + b[i mod width], or the product: b is a's shape or its last dimensions, repeated.
//
//   binary_add_{bf16,f16,f32}(a, b, out, rows, width)        a, out: (rows, width), b: (width)
//   binary_mul_{...}(a, b, out, rows, width)
//
// out may be a; b is apart from out.

#include "common/vector.cuh"
#include "common/walk.cuh"

namespace fsmoe {

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Multiply {
  __device__ __forceinline__ float operator()(float a, float b) const { return a * b; }
};

template <typename Op, typename T>
__device__ __forceinline__ void binary(const T* a, const T* __restrict__ b, T* out, index_t rows, index_t width) {
  constexpr int N = vector_width<T>;
  const Op op;
  const bool vectors = is_aligned(a) && is_aligned(out);
  if (vectors && is_aligned(b) && (width % N == 0 || rows == 1)) {
    for_each_vector<N>(rows, width, [&](index_t row, index_t col, int count) {
      const index_t at = row * width + col;
      if (count == N) {
        Lanes<N> lanes = load<N>(a + at);
        const Lanes<N> other = load<N>(b + col);
#pragma unroll
        for (int i = 0; i < N; ++i) lanes[i] = op(lanes[i], other[i]);
        store<N>(out + at, lanes);
      } else {
#pragma unroll 1
        for (int i = 0; i < count; ++i) out[at + i] = from_f32<T>(op(to_f32(a[at + i]), to_f32(b[col + i])));
      }
    });
  } else if (vectors) {
    // Rows of b end inside vectors; a and out are taken as one stretch all the same.
    for_each_vector<N>(1, rows * width, [&](index_t, index_t at, int count) {
      index_t col = at - divide(at, width) * width;
      if (count == N) {
        Lanes<N> lanes = load<N>(a + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          lanes[i] = op(lanes[i], to_f32(b[col]));
          if (++col == width) col = 0;
        }
        store<N>(out + at, lanes);
      } else {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          out[at + i] = from_f32<T>(op(to_f32(a[at + i]), to_f32(b[col])));
          if (++col == width) col = 0;
        }
      }
    });
  } else {
    for_each_vector<1>(rows, width, [&](index_t row, index_t col, int) {
      const index_t at = row * width + col;
      out[at] = from_f32<T>(op(to_f32(a[at]), to_f32(b[col])));
    });
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_BINARY(suffix, T)                                                                               \
  extern "C" __global__ void binary_add_##suffix(const T* a, const T* b, T* out, fsmoe::index_t rows,         \
                                                 fsmoe::index_t width) {                                      \
    fsmoe::binary<fsmoe::Add>(a, b, out, rows, width);                                                        \
  }                                                                                                           \
  extern "C" __global__ void binary_mul_##suffix(const T* a, const T* b, T* out, fsmoe::index_t rows,         \
                                                 fsmoe::index_t width) {                                      \
    fsmoe::binary<fsmoe::Multiply>(a, b, out, rows, width);                                                   \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_BINARY)
