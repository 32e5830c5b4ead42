// Rotary position embedding (Su et al., 2021), half-split: elements i and i + D/2 of a head turn together by
// position·theta^(−2i/D).
//
//   rope_rotate_{bf16,f16,f32}(x, y, tokens, seq, heads, dim, first, log2_theta, sign)
//
// x, y: (tokens, heads, dim), tokens a multiple of seq, dim even; the position of token n is first + n mod seq. sign 1 turns
// forward, −1 back, which is the backward. y may be x: a thread reads both halves before it writes them.
//
// Bound by memory, 2 values moved per element. Angles are computed in f64, since positions times frequencies pass what f32
// can tell apart modulo 2π; a thread uses each for several heads, so this stays hidden behind the memory.

#include "common/vector.cuh"

namespace fsmoe::rope {

// Heads that a thread turns by the angles it has computed.
constexpr int heads_each = 8;

template <int N, typename T>
__device__ __forceinline__ void rotate_in(const T* x, T* y, index_t tokens, int seq, int heads, int dim, int first,
                                          double log2_theta, float sign) {
  const int half = dim / 2;
  const int per_head = half / N;
  const int chunks = (heads + heads_each - 1) / heads_each;
  const index_t items = tokens * chunks * per_head;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t item = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += step) {
    const index_t rest = item / per_head;
    const int i = static_cast<int>(item - rest * per_head) * N;
    const index_t token = rest / chunks;
    const int head = static_cast<int>(rest - token * chunks) * heads_each;
    const double position = static_cast<double>(first + token % seq);
    float sines[N], cosines[N];
#pragma unroll 1
    for (int j = 0; j < N; ++j) {
      double s, c;
      sincos(position * exp2(-2.0 * (i + j) / dim * log2_theta), &s, &c);
      // Not indexed by j in registers: a loop that is not unrolled would put the arrays into memory.
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n == j) {
          sines[n] = sign * static_cast<float>(s);
          cosines[n] = static_cast<float>(c);
        }
      }
    }
    const int last = min(head + heads_each, heads);
#pragma unroll 4
    for (int h = head; h < last; ++h) {
      const index_t at = (token * heads + h) * dim + i;
      Lanes<N> a = load<N>(x + at), b = load<N>(x + at + half);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float u = a[n], v = b[n];
        a[n] = u * cosines[n] - v * sines[n];
        b[n] = v * cosines[n] + u * sines[n];
      }
      store<N>(y + at, a);
      store<N>(y + at + half, b);
    }
  }
}

template <typename T>
__device__ __forceinline__ void rotate(const T* x, T* y, index_t tokens, int seq, int heads, int dim, int first,
                                       double log2_theta, float sign) {
  constexpr int N = vector_width<T>;
  if (dim / 2 % N == 0 && rows_are_aligned(x, dim) && rows_are_aligned(y, dim)) {
    rotate_in<N>(x, y, tokens, seq, heads, dim, first, log2_theta, sign);
  } else {
    rotate_in<1>(x, y, tokens, seq, heads, dim, first, log2_theta, sign);
  }
}

}  // namespace fsmoe::rope

#define FSMOE_ROPE(suffix, T)                                                                                      \
  extern "C" __global__ void rope_rotate_##suffix(const T* x, T* y, fsmoe::index_t tokens, int seq, int heads,     \
                                                  int dim, int first, double log2_theta, float sign) {             \
    fsmoe::rope::rotate(x, y, tokens, seq, heads, dim, first, log2_theta, sign);                                   \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_ROPE)
