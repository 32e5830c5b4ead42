// RMSNorm (Zhang and Sennrich, 2019) over rows of `cols` elements: y = x·rstd·gain, rstd = 1 / √(mean(x²) + eps).
//
//   rms_norm_forward_{bf16,f16,f32}(x, gain, y, rstd, rows, cols, eps, team)
//   rms_norm_backward_{…}(x, gain, rstd, dy, dx, partial, rows, cols, team)
//   rms_norm_gains_{…}(partial, blocks, cols, d_gain)                 d_gain += …
//
// As layer_norm.cu, with `partial` (blocks, cols) and cols floats of shared memory.

#include "model/norm.cuh"

#define FSMOE_RMS_NORM(suffix, T)                                                                                  \
  extern "C" __global__ void __launch_bounds__(fsmoe::norm::most_threads) rms_norm_forward_##suffix(               \
      const T* x, const T* gain, T* y, float* rstd, fsmoe::index_t rows, int cols, float eps, int team) {          \
    const T* const none = nullptr;                                                                                 \
    fsmoe::norm::forward<false>(x, gain, none, y, nullptr, rstd, rows, cols, eps, team);                           \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(fsmoe::norm::most_threads) rms_norm_backward_##suffix(              \
      const T* x, const T* gain, const float* rstd, const T* dy, T* dx, float* partial, fsmoe::index_t rows,       \
      int cols, int team) {                                                                                        \
    fsmoe::norm::backward<false>(x, gain, nullptr, rstd, dy, dx, partial, rows, cols, team);                       \
  }                                                                                                                \
  extern "C" __global__ void rms_norm_gains_##suffix(const float* partial, int blocks, int cols, T* d_gain) {      \
    T* const none = nullptr;                                                                                       \
    fsmoe::norm::add_partials(partial, blocks, cols, d_gain, none);                                                \
  }

FSMOE_FOR_EACH_DTYPE(FSMOE_RMS_NORM)
