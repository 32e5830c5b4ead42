// LayerNorm (Ba, Kiros and Hinton, 2016) over rows of `cols` elements: y = (x − mean)·rstd·gain + bias,
// rstd = 1 / √(var + eps) with the biased variance.
//
//   layer_norm_forward_{bf16,f16,f32}(x, gain, bias, y, mean, rstd, rows, cols, eps, team)
//   layer_norm_backward_{…}(x, gain, mean, rstd, dy, dx, partial, rows, cols, team)
//   layer_norm_gains_{…}(partial, blocks, cols, d_gain, d_bias)       d_gain += …, d_bias += …: see norm.cuh
//
// mean and rstd (rows) and partial (blocks, 2·cols) are f32. `team` is the number of threads of a row, a multiple of 32 that
// divides the block; in the backward, where the block has several teams, 2·cols floats of shared memory, and the grid is the
// number of blocks that `partial` has rows. Bound by memory: 2 values moved per element forward, 3 backward.

#include "model/norm.cuh"

#define FSMOE_LAYER_NORM(suffix, T)                                                                                \
  extern "C" __global__ void __launch_bounds__(fsmoe::norm::most_threads) layer_norm_forward_##suffix(             \
      const T* x, const T* gain, const T* bias, T* y, float* mean, float* rstd, fsmoe::index_t rows, int cols,     \
      float eps, int team) {                                                                                       \
    fsmoe::norm::forward<true>(x, gain, bias, y, mean, rstd, rows, cols, eps, team);                               \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(fsmoe::norm::most_threads) layer_norm_backward_##suffix(            \
      const T* x, const T* gain, const float* mean, const float* rstd, const T* dy, T* dx, float* partial,         \
      fsmoe::index_t rows, int cols, int team) {                                                                   \
    fsmoe::norm::backward<true>(x, gain, mean, rstd, dy, dx, partial, rows, cols, team);                           \
  }                                                                                                                \
  extern "C" __global__ void layer_norm_gains_##suffix(const float* partial, int blocks, int cols, T* d_gain,      \
                                                       T* d_bias) {                                                \
    fsmoe::norm::add_partials(partial, blocks, cols, d_gain, d_bias);                                              \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_LAYER_NORM)
