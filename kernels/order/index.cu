// Where rows go: from choices to row numbers, and the inverse.
//
//   index_rows(experts, slots, starts, choices, per_group, num_experts, index)
//   index_none(a, b, n)                                            a[i] = b[i] = -1
//   index_invert(index, choices, k, rows, row_choice, row_token)
//   index_padded(experts, slots, loads, choices, k, per_group, groups, num_experts, capacity, rows,
//                index, row_token, row_weight)
//   index_layout(loads, groups, num_experts, capacity, align, offsets, starts)
//   index_blocks(experts, slots, loads, offsets, starts, own, choices, k, per_group, groups, num_experts, capacity, align,
//                rows, index, row_token, row_weight)
//   index_scalars(values, index, count, n, out)
//   index_iota(n, out)
//
// experts, slots, index: (T, k) i32, choices = T * k; per_group: the choices of one of the `groups` routing groups;
// row_choice = row_weight, row_token: (rows) i32.
//
// rows: index = starts[g, e] + slot, -1 where the slot is -1. invert: row_choice[index[i]] = i, row_token[...] = i / k, on
// arrays that `none` has filled. padded: both at once for rows of C per expert and group, (e * groups + g) * C + slot, with
// -1 in rows from a load on. layout, one block of 1024: each expert's rows, of all groups, from offsets[e] (num_experts + 1)
// on, a multiple of `align`; a group's from starts[g, e] on. blocks: index and inverse for that layout, -1 in padding and from
// offsets[num_experts] on; with `own`, every block makes the layout for itself, in num_experts * (groups + 1) + 1 words of
// dynamic shared memory, and the first writes it, where these are too few to be worth a launch. In both a slot below min(load, C) is taken by a choice and none other: the rows that get -1 are no
// other's to write.
//
// scalars: out[i] = values[index[i]], 0 where the index is outside 0..count. iota: out[i] = i.

#include "common/scan.cuh"
#include "common/walk.cuh"

namespace fsmoe {

// The elements 0..n that this thread has, over the grid.
template <typename I = index_t, typename Body>
__device__ __forceinline__ void for_each_element(I n, Body body) {
  const I step = static_cast<I>(gridDim.x) * blockDim.x;
  for (I i = static_cast<I>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) body(i);
}

// Choices and rows are numbered in 31 bits: so are the divisions.
struct Choices {
  const int *experts, *slots;
  unsigned choices, k, per_group;
  int *index, *row_token, *row_weight;

  __device__ __forceinline__ Choices(const int* experts, const int* slots, index_t choices, index_t k, index_t per_group,
                                     int* index, int* row_token, int* row_weight)
      : experts(experts), slots(slots), choices(choices), k(k), per_group(per_group), index(index), row_token(row_token),
        row_weight(row_weight) {}

  // Writes every choice's row, and the choice in its row's place; start(g, e) is the first row.
  template <typename Start>
  __device__ __forceinline__ void place(int rows, Start start) const {
    for_each_element<unsigned>(choices, [&](unsigned i) {
      const int slot = slots[i];
      const int expert = experts[i];
      const int row = slot < 0 ? -1 : start(i / per_group, expert) + slot;
      index[i] = row;
      if (row < 0 || row >= rows) return;
      row_token[row] = static_cast<int>(i / k);
      row_weight[row] = static_cast<int>(i);
    });
  }

  __device__ __forceinline__ void clear(int row) const {
    row_token[row] = -1;
    row_weight[row] = -1;
  }
};

__device__ __forceinline__ void index_layout(const int* __restrict__ loads, index_t groups, int num_experts,
                                             int capacity, unsigned align, int* __restrict__ offsets,
                                             int* __restrict__ starts) {
  unsigned done = 0;
  for (int from = 0; from < num_experts; from += blockDim.x) {
    const int e = from + threadIdx.x;
    unsigned rows = 0;
    if (e < num_experts) {
      for (index_t g = 0; g < groups; ++g) rows += min(loads[g * num_experts + e], capacity);
    }
    unsigned total;
    unsigned start = done + block_exclusive_sum((rows + align - 1) / align * align, total);
    done += total;
    if (e < num_experts) {
      offsets[e] = static_cast<int>(start);
      for (index_t g = 0; g < groups; ++g) {
        starts[g * num_experts + e] = static_cast<int>(start);
        start += min(loads[g * num_experts + e], capacity);
      }
    }
  }
  if (threadIdx.x == 0) offsets[num_experts] = static_cast<int>(done);
}

// The layout in shared memory, by every block; the first writes it to where the pointers have pointed.
__device__ __forceinline__ void index_own_layout(const int* loads, index_t groups, int num_experts, int capacity,
                                                 unsigned align, int*& offsets, int*& starts) {
  extern __shared__ int index_memory[];
  int* const own_starts = index_memory + num_experts + 1;
  index_layout(loads, groups, num_experts, capacity, align, index_memory, own_starts);
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i <= num_experts; i += blockDim.x) offsets[i] = index_memory[i];
    for (int i = threadIdx.x; i < groups * num_experts; i += blockDim.x) starts[i] = own_starts[i];
  }
  offsets = index_memory;
  starts = own_starts;
}

__device__ __forceinline__ void index_blocks(const Choices& to, const int* __restrict__ loads, const int* offsets,
                                             const int* starts, int groups, int num_experts, int capacity,
                                             unsigned align, int rows) {
  to.place(rows, [&](int g, int e) { return starts[g * num_experts + e]; });
  for_each_element<unsigned>(num_experts * align, [&](unsigned i) {
    const int e = static_cast<int>(i / align);
    const int last = (groups - 1) * num_experts + e;
    const int row = starts[last] + min(loads[last], capacity) + static_cast<int>(i - e * align);
    if (row < offsets[e + 1] && row < rows) to.clear(row);
  });
  const int end = offsets[num_experts];
  for_each_element<unsigned>(max(rows - end, 0), [&](unsigned i) { to.clear(end + static_cast<int>(i)); });
}

__device__ __forceinline__ void index_padded(const Choices& to, const int* __restrict__ loads, int groups,
                                             int num_experts, int capacity, int rows) {
  to.place(rows, [&](int g, int e) { return (e * groups + g) * capacity; });
  for_each_element<unsigned>(rows, [&](unsigned row) {
    const unsigned part = row / capacity;
    const int e = static_cast<int>(part / groups);
    const int slot = static_cast<int>(row - part * capacity);
    if (slot >= loads[(part - e * groups) * num_experts + e]) to.clear(static_cast<int>(row));
  });
}

__device__ __forceinline__ void index_scalars(const float* __restrict__ values, const int* __restrict__ index,
                                              unsigned count, index_t n, float* __restrict__ out) {
  const auto one = [&](int i) { return static_cast<unsigned>(i) < count ? values[i] : 0.0f; };
  index_t done = 0;
  if (reinterpret_cast<uintptr_t>(index) % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for_each_element(n / 4, [&](index_t i) {
      const int4 at = reinterpret_cast<const int4*>(index)[i];
      reinterpret_cast<float4*>(out)[i] = make_float4(one(at.x), one(at.y), one(at.z), one(at.w));
    });
    done = n / 4 * 4;
  }
  for_each_element(n - done, [&](index_t i) { out[done + i] = one(index[done + i]); });
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

extern "C" __global__ void index_rows(const int* experts, const int* slots, const int* starts, fsmoe::index_t choices,
                                      fsmoe::index_t per_group, int num_experts, int* index) {
  fsmoe::for_each_element(choices, [&](fsmoe::index_t i) {
    index[i] = slots[i] < 0 ? -1 : starts[fsmoe::divide(i, per_group) * num_experts + experts[i]] + slots[i];
  });
}

extern "C" __global__ void index_none(int* a, int* b, fsmoe::index_t n) {
  fsmoe::for_each_element(n, [&](fsmoe::index_t i) { a[i] = b[i] = -1; });
}

extern "C" __global__ void index_invert(const int* index, fsmoe::index_t choices, fsmoe::index_t k,
                                        fsmoe::index_t rows, int* row_choice, int* row_token) {
  fsmoe::for_each_element(choices, [&](fsmoe::index_t i) {
    const int row = index[i];
    if (row < 0 || row >= rows) return;
    row_choice[row] = static_cast<int>(i);
    row_token[row] = static_cast<int>(fsmoe::divide(i, k));
  });
}

extern "C" __global__ void __launch_bounds__(256, 8)
    index_padded(const int* experts, const int* slots, const int* loads, fsmoe::index_t choices,
                                        fsmoe::index_t k, fsmoe::index_t per_group, fsmoe::index_t groups,
                                        int num_experts, fsmoe::index_t capacity, fsmoe::index_t rows, int* index,
                                        int* row_token, int* row_weight) {
  const fsmoe::Choices to(experts, slots, choices, k, per_group, index, row_token, row_weight);
  fsmoe::index_padded(to, loads, static_cast<int>(groups), num_experts, static_cast<int>(capacity), static_cast<int>(rows));
}

extern "C" __global__ void __launch_bounds__(1024)
    index_layout(const int* loads, fsmoe::index_t groups, int num_experts, int capacity, int align, int* offsets,
                 int* starts) {
  fsmoe::index_layout(loads, groups, num_experts, capacity, align, offsets, starts);
}

extern "C" __global__ void __launch_bounds__(256, 8)
    index_blocks(const int* experts, const int* slots, const int* loads, int* offsets, int* starts,
                                        int own, fsmoe::index_t choices, fsmoe::index_t k, fsmoe::index_t per_group,
                                        fsmoe::index_t groups, int num_experts, int capacity, fsmoe::index_t align,
                                        fsmoe::index_t rows, int* index, int* row_token, int* row_weight) {
  if (own != 0) fsmoe::index_own_layout(loads, groups, num_experts, capacity, align, offsets, starts);
  const fsmoe::Choices to(experts, slots, choices, k, per_group, index, row_token, row_weight);
  fsmoe::index_blocks(to, loads, offsets, starts, static_cast<int>(groups), num_experts, capacity,
                      static_cast<unsigned>(align), static_cast<int>(rows));
}

extern "C" __global__ void index_scalars(const float* values, const int* index, unsigned count, fsmoe::index_t n,
                                         float* out) {
  fsmoe::index_scalars(values, index, count, n, out);
}

extern "C" __global__ void index_iota(fsmoe::index_t n, int* out) {
  fsmoe::for_each_element(n, [&](fsmoe::index_t i) { out[i] = static_cast<int>(i); });
}
