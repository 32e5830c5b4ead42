// DeepSeek-V3's selection bias ("Auxiliary-loss-free load balancing", DeepSeek-AI 2024): after a step every expert's moves
// against its load.
//
//   bias_update(bias, loads, groups, experts, gamma)
//
// bias[e] += gamma * sign(mean load - load of e); bias: (experts) f32, loads: (groups, experts) i32, summed over groups. One
// block. In whole numbers: an exact mean leaves the bias alone.

#include "common/dtype.cuh"

extern "C" __global__ void bias_update(float* bias, const int* loads, fsmoe::index_t groups, fsmoe::index_t experts,
                                       float gamma) {
  // Counted modulo 2^64, which the signs of less do not mind.
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  long long sum = 0;
  for (fsmoe::index_t i = threadIdx.x; i < groups * experts; i += blockDim.x) sum += loads[i];
  atomicAdd(&total, static_cast<unsigned long long>(sum));
  __syncthreads();
  for (fsmoe::index_t e = threadIdx.x; e < experts; e += blockDim.x) {
    long long load = 0;
    for (fsmoe::index_t g = 0; g < groups; ++g) load += loads[g * experts + e];
    const long long gap = static_cast<long long>(total) - load * experts;
    if (gap > 0) bias[e] += gamma;
    if (gap < 0) bias[e] -= gamma;
  }
}
