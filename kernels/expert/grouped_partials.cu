// The gradient of every row's combine weight: what the column tiles of a backward with an activation found, added up.
//
//   grouped_partials_sum(offsets, experts, partial, tiles, out, rows)     partial (tiles, rows), out (rows), f32
//
// Always in the order of the tiles, so the same bits every time. Rows past the experts' get zero. Bound by memory, a value
// read per tile and row.

#include "common/dtype.cuh"

extern "C" __global__ void grouped_partials_sum(const int* offsets, int experts, const float* partial, int tiles,
                                                float* out, int rows) {
  const int used = offsets[experts];
  for (int row = blockIdx.x * blockDim.x + threadIdx.x; row < rows; row += gridDim.x * blockDim.x) {
    float sum = 0.0f;
    if (row < used) {
      for (int tile = 0; tile < tiles; ++tile) sum += partial[static_cast<fsmoe::index_t>(tile) * rows + row];
    }
    out[row] = sum;
  }
}
