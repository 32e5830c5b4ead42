// LayerNorm and RMSNorm, forward and backward: one code, RMSNorm being LayerNorm with mean 0 and no bias.
//
// A row belongs to a team of threads, one or more warps of a block. A row of up to four vectors per thread (two in the
// backward) is read once and stays in registers; wider ones are read again.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace fsmoe::norm {

// Threads of a block at most: more would not leave the registers that a row is held in.
constexpr int most_threads = 512;

// The team of this thread: `size` threads, a multiple of 32 that divides the block.
struct Team {
  int size;
  __device__ __forceinline__ int index() const { return threadIdx.x / size; }
  __device__ __forceinline__ int thread() const { return threadIdx.x % size; }
  __device__ __forceinline__ int count() const { return blockDim.x / size; }
};

// Sums K values over every team of the block; all threads of the block take part.
template <int K>
__device__ __forceinline__ void team_sum(float (&x)[K], Team team) {
  __shared__ float partial[K][warp_size];
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(x[k]);
  if (team.size == warp_size) return;
  if (threadIdx.x % warp_size == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) partial[k][threadIdx.x / warp_size] = x[k];
  }
  __syncthreads();
  const int warps = team.size / warp_size;
  const int first = team.index() * warps;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k] = 0.0f;
    for (int w = 0; w < warps; ++w) x[k] += partial[k][first + w];
  }
  // The next sum must not overwrite what a slow warp has still to read.
  __syncthreads();
}

// A row's elements as its team's thread sees them: vectors of N from `thread` on, in steps of the team.
template <int N, typename Body>
__device__ __forceinline__ void for_row(int cols, Team team, Body body) {
  for (int col = team.thread() * N; col < cols; col += team.size * N) body(col);
}

// ----------------------------------------------------------------------------
// Forward

// N divides cols. With Held above 0 the row has at most Held vectors per thread.
template <bool Centred, int N, int Held, typename T>
__device__ __forceinline__ void forward_in(const T* __restrict__ x, const T* __restrict__ gain,
                                           const T* __restrict__ bias, T* __restrict__ y, float* __restrict__ mean,
                                           float* __restrict__ rstd, index_t rows, int cols, float eps, Team team) {
  const index_t step = static_cast<index_t>(gridDim.x) * team.count();
  // Teams of a block go through the loop together: they meet at barriers.
  for (index_t base = static_cast<index_t>(blockIdx.x) * team.count(); base < rows; base += step) {
    const index_t row = base + team.index();
    const bool active = row < rows;
    const T* const from = x + (active ? row : 0) * cols;
    Lanes<N> held[Held > 0 ? Held : 1];
    const auto each = [&](auto body) {
      if constexpr (Held > 0) {
#pragma unroll
        for (int i = 0; i < Held; ++i) {
          const int col = (team.thread() + i * team.size) * N;
          if (col < cols) body(col, held[i]);
        }
      } else {
        for_row<N>(cols, team, [&](int col) {
          Lanes<N> lanes = load<N>(from + col);
          body(col, lanes);
        });
      }
    };
    if constexpr (Held > 0) {
#pragma unroll
      for (int i = 0; i < Held; ++i) {
        const int col = (team.thread() + i * team.size) * N;
        if (col < cols) held[i] = load<N>(from + col);
      }
    }
    float centre = 0.0f;
    if constexpr (Centred) {
      float sum[1] = {0.0f};
      each([&](int, const Lanes<N>& lanes) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum[0] += lanes[j];
      });
      team_sum(sum, team);
      centre = sum[0] / static_cast<float>(cols);
    }
    float square[1] = {0.0f};
    each([&](int, const Lanes<N>& lanes) {
#pragma unroll
      for (int j = 0; j < N; ++j) square[0] += (lanes[j] - centre) * (lanes[j] - centre);
    });
    team_sum(square, team);
    const float scale = 1.0f / sqrtf(square[0] / static_cast<float>(cols) + eps);
    if (!active) continue;
    if (team.thread() == 0) {
      if constexpr (Centred) mean[row] = centre;
      rstd[row] = scale;
    }
    each([&](int col, const Lanes<N>& lanes) {
      const Lanes<N> g = load<N>(gain + col);
      Lanes<N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = (lanes[j] - centre) * scale * g[j];
      if constexpr (Centred) {
        const Lanes<N> b = load<N>(bias + col);
#pragma unroll
        for (int j = 0; j < N; ++j) out[j] += b[j];
      }
      store<N>(y + row * cols + col, out);
    });
  }
}

template <bool Centred, typename T>
__device__ __forceinline__ void forward(const T* x, const T* gain, const T* bias, T* y, float* mean, float* rstd,
                                        index_t rows, int cols, float eps, int team_size) {
  constexpr int N = vector_width<T>;
  const Team team{team_size};
  const bool aligned = rows_are_aligned(x, cols) && rows_are_aligned(y, cols) && rows_are_aligned(gain, cols) &&
                       (!Centred || rows_are_aligned(bias, cols));
  if (aligned && cols <= 4 * N * team_size) {
    forward_in<Centred, N, 4>(x, gain, bias, y, mean, rstd, rows, cols, eps, team);
  } else if (aligned) {
    forward_in<Centred, N, 0>(x, gain, bias, y, mean, rstd, rows, cols, eps, team);
  } else {
    forward_in<Centred, 1, 0>(x, gain, bias, y, mean, rstd, rows, cols, eps, team);
  }
}

// ----------------------------------------------------------------------------
// Backward. With hat = (x − mean)·rstd and d = dy·gain, averages over the row:
//
//   dx = rstd·(d − avg(d) − hat·avg(d·hat))      (RMSNorm: without avg(d))
//   d_gain += Σ_rows dy·hat,  d_bias += Σ_rows dy
//
// A block sums its rows' share of d_gain and d_bias and writes it to its row of `partial`, (blocks, 2·cols) f32 (RMSNorm:
// (blocks, cols)); `add_partials` then adds the blocks' rows in order. A block takes the rows blockIdx.x, + gridDim.x, … of
// groups of one row per team, so what each sum adds, and when, depends on the sizes alone.

template <bool Centred, int N, int Held, typename T>
__device__ __forceinline__ void backward_in(const T* __restrict__ x, const T* __restrict__ gain,
                                            const float* __restrict__ mean, const float* __restrict__ rstd,
                                            const T* __restrict__ dy, T* __restrict__ dx, float* __restrict__ partial,
                                            index_t rows, int cols, Team team) {
  extern __shared__ float sums[];  // one team's sums; where the block is one team, none
  float* const out = partial + static_cast<index_t>(blockIdx.x) * cols * (Centred ? 2 : 1);
  Lanes<N> gain_sum[Held > 0 ? Held : 1], bias_sum[Held > 0 && Centred ? Held : 1];
  if constexpr (Held > 0) {
#pragma unroll
    for (int i = 0; i < Held; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        gain_sum[i][j] = 0.0f;
        if constexpr (Centred) bias_sum[i][j] = 0.0f;
      }
    }
  } else {
    for_row<N>(cols, team, [&](int col) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        out[col + j] = 0.0f;
        if constexpr (Centred) out[cols + col + j] = 0.0f;
      }
    });
  }
  const index_t step = static_cast<index_t>(gridDim.x) * team.count();
  for (index_t base = static_cast<index_t>(blockIdx.x) * team.count(); base < rows; base += step) {
    const index_t row = base + team.index();
    const bool active = row < rows;
    const index_t at = (active ? row : 0) * cols;
    const float centre = Centred ? mean[active ? row : 0] : 0.0f;
    const float scale = rstd[active ? row : 0];
    Lanes<N> hats[Held > 0 ? Held : 1], grads[Held > 0 ? Held : 1];
    const auto hat_of = [&](int col) {
      Lanes<N> lanes = load<N>(x + at + col);
#pragma unroll
      for (int j = 0; j < N; ++j) lanes[j] = (lanes[j] - centre) * scale;
      return lanes;
    };
    const auto each = [&](auto body) {
      if constexpr (Held > 0) {
#pragma unroll
        for (int i = 0; i < Held; ++i) {
          const int col = (team.thread() + i * team.size) * N;
          if (col < cols) body(i, col, hats[i], grads[i]);
        }
      } else {
        for_row<N>(cols, team, [&](int col) { body(0, col, hat_of(col), load<N>(dy + at + col)); });
      }
    };
    if constexpr (Held > 0) {
#pragma unroll
      for (int i = 0; i < Held; ++i) {
        const int col = (team.thread() + i * team.size) * N;
        if (col < cols) {
          grads[i] = load<N>(dy + at + col);
          hats[i] = hat_of(col);
        }
      }
    }
    // Σ d·hat and, for LayerNorm, Σ d.
    float sums_of_row[Centred ? 2 : 1] = {};
    each([&](int, int col, const Lanes<N>& hat, const Lanes<N>& grad) {
      const Lanes<N> g = load<N>(gain + col);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sums_of_row[0] += grad[j] * g[j] * hat[j];
        if constexpr (Centred) sums_of_row[1] += grad[j] * g[j];
      }
    });
    team_sum(sums_of_row, team);
    const float inner = sums_of_row[0] / static_cast<float>(cols);
    const float flat = Centred ? sums_of_row[Centred ? 1 : 0] / static_cast<float>(cols) : 0.0f;
    if (!active) continue;
    each([&](int i, int col, const Lanes<N>& hat, const Lanes<N>& grad) {
      const Lanes<N> g = load<N>(gain + col);
      Lanes<N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        result[j] = scale * (grad[j] * g[j] - flat - hat[j] * inner);
        if constexpr (Held > 0) {
          gain_sum[i][j] += grad[j] * hat[j];
          if constexpr (Centred) bias_sum[i][j] += grad[j];
        } else {
          out[col + j] += grad[j] * hat[j];
          if constexpr (Centred) out[cols + col + j] += grad[j];
        }
      }
      store<N>(dx + at + col, result);
    });
  }
  if constexpr (Held > 0) {
    // One team after the other adds to the block's sums, the last writes them.
    for (int turn = 0; turn < team.count(); ++turn) {
      if (team.index() == turn) {
#pragma unroll
        for (int i = 0; i < Held; ++i) {
          const int col = (team.thread() + i * team.size) * N;
          if (col >= cols) continue;
#pragma unroll
          for (int j = 0; j < N; ++j) {
            float* const to = turn + 1 == team.count() ? out : sums;
            to[col + j] = gain_sum[i][j] + (turn > 0 ? sums[col + j] : 0.0f);
            if constexpr (Centred) to[cols + col + j] = bias_sum[i][j] + (turn > 0 ? sums[cols + col + j] : 0.0f);
          }
        }
      }
      __syncthreads();
    }
  }
}

// A row that does not fit into registers (2 vectors a thread, or 8 elements where it is not aligned) takes a block of one
// team: there the sums lie in `partial` itself, which teams must not share.
template <bool Centred, typename T>
__device__ __forceinline__ void backward(const T* x, const T* gain, const float* mean, const float* rstd, const T* dy,
                                         T* dx, float* partial, index_t rows, int cols, int team_size) {
  constexpr int N = vector_width<T>;
  const Team team{team_size};
  const bool aligned = rows_are_aligned(x, cols) && rows_are_aligned(dy, cols) && rows_are_aligned(dx, cols) &&
                       rows_are_aligned(gain, cols);
  if (aligned && cols <= 2 * N * team_size) {
    backward_in<Centred, N, 2>(x, gain, mean, rstd, dy, dx, partial, rows, cols, team);
  } else if (cols <= 8 * team_size) {
    backward_in<Centred, 1, 8>(x, gain, mean, rstd, dy, dx, partial, rows, cols, team);
  } else {
    backward_in<Centred, 1, 0>(x, gain, mean, rstd, dy, dx, partial, rows, cols, team);
  }
}

// d_gain += the sums of partial's first `cols` columns, d_bias (if there is one) += those of the next. 32 columns a block,
// 256 threads: eight threads a column, each every eighth row.
template <typename T>
__device__ __forceinline__ void add_partials(const float* __restrict__ partial, int blocks, int cols,
                                             T* __restrict__ d_gain, T* __restrict__ d_bias) {
  constexpr int Columns = 32;
  constexpr int Rows = 8;
  __shared__ float parts[Rows][Columns];
  const int width = d_bias ? 2 * cols : cols;
  const int col = blockIdx.x * Columns + threadIdx.x % Columns;
  const int part = threadIdx.x / Columns;
  float sum = 0.0f;
  if (col < width) {
#pragma unroll 4
    for (int row = part; row < blocks; row += Rows) sum += partial[static_cast<index_t>(row) * width + col];
  }
  parts[part][threadIdx.x % Columns] = sum;
  __syncthreads();
  if (part != 0 || col >= width) return;
#pragma unroll
  for (int i = 1; i < Rows; ++i) sum += parts[i][threadIdx.x];
  T* const to = col < cols ? d_gain + col : d_bias + (col - cols);
  *to = from_f32<T>(to_f32(*to) + sum);
}

}  // namespace fsmoe::norm
