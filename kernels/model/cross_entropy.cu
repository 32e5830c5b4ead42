// Cross-entropy of logits, fused with the softmax: nothing of the logits' size is stored but their gradient.
//
//   cross_entropy_forward_{bf16,f16,f32}(logits, targets, loss, lse, rows, cols, team)
//       lse[n] = log Σ_v exp(logits[n,v]), loss[n] = lse[n] − logits[n, targets[n]]
//   cross_entropy_backward_{…}(logits, targets, lse, d_loss, d_logits, rows, cols)
//       d_logits[n,v] = d_loss[n]·(exp(logits[n,v] − lse[n]) − [v = targets[n]])
//
// logits, d_logits: (rows, cols); targets: i32; the rest f32. d_logits may be logits. A target outside 0..cols gives a loss of
// NaN and reads nothing. `team` is the number of threads of a row in the forward, 32 or the whole block; the backward's grid is
// (blocks for rows, parts of a row). One pass over the logits each, bound by memory: 1 value moved per logit forward, 2 backward.
// Rows that do not begin on 16-byte boundaries (50,257 columns) are read in vectors all the same, from their first boundary on.

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace fsmoe::cross_entropy {

// exp, for logits of type T.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  return is_narrow<T> ? __expf(x) : expf(x);
}

// A sum of exponentials in f32: sum·exp(peak).
struct Total {
  float peak, sum;
};

__device__ __forceinline__ Total merged(Total a, Total b) {
  const float peak = fmaxf(a.peak, b.peak);
  return {peak, a.sum * expf(a.peak - peak) + b.sum * expf(b.peak - peak)};
}

template <typename T, int N>
__device__ __forceinline__ void add(Total& total, const Lanes<N>& lanes) {
  float peak = total.peak;
#pragma unroll
  for (int j = 0; j < N; ++j) peak = fmaxf(peak, lanes[j]);
  if (peak > total.peak) {
    total.sum *= expf(total.peak - peak);
    total.peak = peak;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) total.sum += exponential<T>(lanes[j] - peak);
}

// Elements of a row before its first 16-byte boundary.
template <typename T>
__device__ __forceinline__ int before_boundary(const T* row, int cols) {
  const int left = static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  return left < cols ? left : cols;
}

template <typename T>
__device__ __forceinline__ void forward(const T* __restrict__ logits, const int* __restrict__ targets,
                                        float* __restrict__ loss, float* __restrict__ lse, index_t rows, int cols,
                                        int team) {
  constexpr int N = vector_width<T>;
  __shared__ Total totals[warp_size];
  const int teams = blockDim.x / team;
  const int thread = threadIdx.x % team;
  const index_t step = static_cast<index_t>(gridDim.x) * teams;
  for (index_t base = static_cast<index_t>(blockIdx.x) * teams; base < rows; base += step) {
    const index_t row = base + threadIdx.x / team;
    const bool active = row < rows;
    const T* const from = logits + (active ? row : 0) * cols;
    const int head = before_boundary(from, cols);
    const int vectors = (cols - head) / N;
    Total total = {Max::identity, 0.0f};
    // The ragged ends: at most N − 1 elements each.
    if (thread < head) add<T>(total, load<1>(from + thread));
    const int tail = head + vectors * N + thread;
    if (thread < N && tail < cols) add<T>(total, load<1>(from + tail));
    const T* const middle = from + head;
#pragma unroll 4
    for (int i = thread; i < vectors; i += team) add<T>(total, load<N>(middle + i * N));

#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
      const Total other = {__shfl_xor_sync(full_warp, total.peak, offset), __shfl_xor_sync(full_warp, total.sum, offset)};
      total = merged(total, other);
    }
    if (team > warp_size) {
      if (threadIdx.x % warp_size == 0) totals[threadIdx.x / warp_size] = total;
      __syncthreads();
      total = totals[0];
      for (int w = 1; w < team / warp_size; ++w) total = merged(total, totals[w]);
      __syncthreads();
    }
    if (active && thread == 0) {
      const int target = targets[row];
      const float all = total.peak + logf(total.sum);
      lse[row] = all;
      loss[row] = target >= 0 && target < cols ? all - to_f32(from[target]) : NAN;
    }
  }
}

template <typename T>
__device__ __forceinline__ void backward(const T* logits, const int* __restrict__ targets,
                                         const float* __restrict__ lse, const float* __restrict__ d_loss, T* d_logits,
                                         index_t rows, int cols) {
  constexpr int N = vector_width<T>;
  const int thread = blockIdx.y * blockDim.x + threadIdx.x;
  const int threads = gridDim.y * blockDim.x;
  for (index_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const from = logits + row * cols;
    T* const to = d_logits + row * cols;
    const int target = targets[row];
    const float all = lse[row];
    const float factor = d_loss[row];
    const auto value = [&](float x, int col) {
      const float chance = exponential<T>(x - all);
      return factor * (col == target ? chance - 1.0f : chance);
    };
    const int head = before_boundary(from, cols);
    // Both in step with 16-byte boundaries, or neither.
    const bool vector = reinterpret_cast<uintptr_t>(from) % 16 == reinterpret_cast<uintptr_t>(to) % 16;
    const int vectors = vector ? (cols - head) / N : 0;
    for (int i = thread; i < vectors; i += threads) {
      const int col = head + i * N;
      Lanes<N> lanes = load<N>(from + col);
#pragma unroll
      for (int j = 0; j < N; ++j) lanes[j] = value(lanes[j], col + j);
      store<N>(to + col, lanes);
    }
    // What is left: before the vectors and after them, or all of it.
    const int left = cols - vectors * N;
    for (int i = thread; i < left; i += threads) {
      const int col = i < head ? i : i + vectors * N;
      to[col] = from_f32<T>(value(to_f32(from[col]), col));
    }
  }
}

}  // namespace fsmoe::cross_entropy

#define FSMOE_CROSS_ENTROPY(suffix, T)                                                                             \
  extern "C" __global__ void cross_entropy_forward_##suffix(const T* logits, const int* targets, float* loss,      \
                                                            float* lse, fsmoe::index_t rows, int cols, int team) { \
    fsmoe::cross_entropy::forward(logits, targets, loss, lse, rows, cols, team);                                   \
  }                                                                                                                \
  extern "C" __global__ void cross_entropy_backward_##suffix(const T* logits, const int* targets,                  \
                                                             const float* lse, const float* d_loss, T* d_logits,   \
                                                             fsmoe::index_t rows, int cols) {                      \
    fsmoe::cross_entropy::backward(logits, targets, lse, d_loss, d_logits, rows, cols);                            \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_CROSS_ENTROPY)
