// Sums of rows by number: the backward of a gather.
//
//   scatter_rows_{bf16_bf16,bf16_f32,f16_f16,f16_f32,f32_f32}(src, list, offsets, rows, cols, dst)
//
// dst[r] += the sum of src[list[n]] for n in offsets[r]..offsets[r + 1], in that order, in f32, rounded once; rows that no
// entry names are left alone. src: (., cols), dst: (rows, cols), of the types in the name, list i32, offsets (rows + 1) i32.
// A warp has up to 32 vectors of a row of dst, four rows of src in flight.

#include "order/rows.cuh"

namespace fsmoe {

template <int N, typename S, typename D>
__device__ __forceinline__ void scatter_rows_in(const S* __restrict__ src, const int* __restrict__ list,
                                                const int* __restrict__ offsets, index_t rows, index_t cols,
                                                D* __restrict__ dst) {
  constexpr int in_flight = 4;
  const int lane = threadIdx.x % warp_size;
  const index_t warps = static_cast<index_t>(gridDim.x) * (blockDim.x / warp_size);
  const index_t parts = (cols + warp_size * N - 1) / (warp_size * N);
  for (index_t part = static_cast<index_t>(blockIdx.x) * (blockDim.x / warp_size) + threadIdx.x / warp_size;
       part < rows * parts; part += warps) {
    const index_t row = part / parts;
    const index_t from = offsets[row], to = offsets[row + 1];
    const index_t col = ((part - row * parts) * warp_size + lane) * N;
    if (from == to || col >= cols) continue;
    Lanes<N> sum = load<N>(dst + row * cols + col);
    for (index_t n = from; n < to; n += in_flight) {
      Packed<N, S> data[in_flight];
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        data[u] = load_packed<N>(src + list[min(n + u, to - 1)] * cols + col);
      }
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        keep_if(n + u < to, data[u]);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += data[u][i];
      }
    }
    store<N>(dst + row * cols + col, sum);
  }
}

template <typename S, typename D>
__device__ __forceinline__ void scatter_rows(const S* src, const int* list, const int* offsets, index_t rows,
                                             index_t cols, D* dst) {
  // 16 bytes of the narrower type, which is src's, are a whole number of vectors of dst's.
  constexpr int width = vector_width<S>;
  if (rows_are_aligned(src, cols) && cols % width == 0 && reinterpret_cast<uintptr_t>(dst) % 16 == 0) {
    scatter_rows_in<width>(src, list, offsets, rows, cols, dst);
  } else {
    scatter_rows_in<1>(src, list, offsets, rows, cols, dst);
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_SCATTER_ROWS(from, S, to, D)                                                            \
  extern "C" __global__ void __launch_bounds__(256, 4) scatter_rows_##from##_##to(                    \
      const S* src, const int* list, const int* offsets, fsmoe::index_t rows, fsmoe::index_t cols, D* dst) { \
    fsmoe::scatter_rows(src, list, offsets, rows, cols, dst);                                         \
  }

FSMOE_SCATTER_ROWS(bf16, fsmoe::bf16, bf16, fsmoe::bf16)
FSMOE_SCATTER_ROWS(bf16, fsmoe::bf16, f32, float)
FSMOE_SCATTER_ROWS(f16, fsmoe::f16, f16, fsmoe::f16)
FSMOE_SCATTER_ROWS(f16, fsmoe::f16, f32, float)
FSMOE_SCATTER_ROWS(f32, float, f32, float)
