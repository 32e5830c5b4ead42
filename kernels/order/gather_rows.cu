// Rows by number.
//
//   gather_rows_{16,4,2}(src, index, limit, count, rows, units, dst)
//
// dst[n] = src[index[n]], zeros where the index is outside 0..count; src: (count, .), dst: (rows, .), a row being `units`
// units of the bytes in the name, to which both are aligned. limit: (1) i32 or null: rows from limit[0] on are left alone.
//
// Bound by memory. A thread has four units in flight, and neighbouring threads neighbouring units, across rows too.

#include "order/rows.cuh"

namespace fsmoe {

template <typename Unit>
__device__ __forceinline__ void gather_rows(const Unit* __restrict__ src, const int* __restrict__ index,
                                            const int* __restrict__ limit, index_t count, index_t rows, index_t units,
                                            Unit* __restrict__ dst) {
  constexpr int in_flight = 4;
  for_each_batch<in_flight>(row_limit(limit, rows), units, [&](auto& row, auto& unit, int items) {
    int from[in_flight];
    Unit data[in_flight];
#pragma unroll
    for (int u = 0; u < in_flight; ++u) from[u] = u < items ? index[row[u]] : -1;
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      data[u] = Unit{};
      if (from[u] >= 0 && from[u] < count) data[u] = src[from[u] * units + unit[u]];
    }
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      if (u < items) dst[row[u] * units + unit[u]] = data[u];
    }
  });
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

#define FSMOE_GATHER_ROWS(bytes, Unit)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 5)                                                                 \
      gather_rows_##bytes(const Unit* src, const int* index, const int* limit, fsmoe::index_t count,                   \
                          fsmoe::index_t rows, fsmoe::index_t units, Unit* dst) {                                      \
    fsmoe::gather_rows<Unit>(src, index, limit, count, rows, units, dst);                                              \
  }

FSMOE_GATHER_ROWS(16, uint4)
FSMOE_GATHER_ROWS(4, uint32_t)
FSMOE_GATHER_ROWS(2, uint16_t)
