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
template <typename Body>
__device__ __forceinline__ void for_each_element(index_t n, Body body) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) body(i);
}

struct Choices {
  const int *experts, *slots;
  index_t choices, k, per_group;
  int *index, *row_token, *row_weight;

  // Writes every choice's row, and the choice in its row's place; start(g, e) is the first row.
  template <typename Start>
  __device__ __forceinline__ void place(index_t rows, Start start) const {
    for_each_element(choices, [&](index_t i) {
      const int slot = slots[i];
      const index_t row = slot < 0 ? -1 : start(divide(i, per_group), experts[i]) + slot;
      index[i] = static_cast<int>(row);
      if (row < 0 || row >= rows || row_token == nullptr) return;
      row_token[row] = static_cast<int>(divide(i, k));
      row_weight[row] = static_cast<int>(i);
    });
  }

  __device__ __forceinline__ void clear(index_t row) const {
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

__device__ __forceinline__ void index_blocks(const Choices& to, const int* __restrict__ loads,
                                             const int* __restrict__ offsets, const int* __restrict__ starts,
                                             index_t groups, int num_experts, int capacity, index_t align,
                                             index_t rows) {
  to.place(rows, [&](index_t g, int e) { return static_cast<index_t>(starts[g * num_experts + e]); });
  for_each_element(num_experts * align, [&](index_t i) {
    const index_t e = divide(i, align);
    const index_t last = (groups - 1) * num_experts + e;
    const index_t row = starts[last] + min(loads[last], capacity) + (i - e * align);
    if (row < offsets[e + 1] && row < rows) to.clear(row);
  });
  const index_t end = offsets[num_experts];
  for_each_element(rows - end, [&](index_t i) { to.clear(end + i); });
}

__device__ __forceinline__ void index_padded(const Choices& to, const int* __restrict__ loads, index_t groups,
                                             int num_experts, index_t capacity, index_t rows) {
  to.place(rows, [&](index_t g, int e) { return (e * groups + g) * capacity; });
  if (to.row_token == nullptr) return;
  for_each_element(rows, [&](index_t row) {
    const index_t part = divide(row, capacity);
    const index_t e = divide(part, groups);
    if (row - part * capacity >= loads[(part - e * groups) * num_experts + e]) to.clear(row);
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

extern "C" __global__ void index_padded(const int* experts, const int* slots, const int* loads, fsmoe::index_t choices,
                                        fsmoe::index_t k, fsmoe::index_t per_group, fsmoe::index_t groups,
                                        int num_experts, fsmoe::index_t capacity, fsmoe::index_t rows, int* index,
                                        int* row_token, int* row_weight) {
  const fsmoe::Choices to{experts, slots, choices, k, per_group, index, row_token, row_weight};
  fsmoe::index_padded(to, loads, groups, num_experts, capacity, rows);
}

extern "C" __global__ void __launch_bounds__(1024)
    index_layout(const int* loads, fsmoe::index_t groups, int num_experts, int capacity, int align, int* offsets,
                 int* starts) {
  fsmoe::index_layout(loads, groups, num_experts, capacity, align, offsets, starts);
}

extern "C" __global__ void index_blocks(const int* experts, const int* slots, const int* loads, int* offsets, int* starts,
                                        int own, fsmoe::index_t choices, fsmoe::index_t k, fsmoe::index_t per_group,
                                        fsmoe::index_t groups, int num_experts, int capacity, fsmoe::index_t align,
                                        fsmoe::index_t rows, int* index, int* row_token, int* row_weight) {
  if (own != 0) fsmoe::index_own_layout(loads, groups, num_experts, capacity, align, offsets, starts);
  const fsmoe::Choices to{experts, slots, choices, k, per_group, index, row_token, row_weight};
  fsmoe::index_blocks(to, loads, offsets, starts, groups, num_experts, capacity, align, rows);
}

extern "C" __global__ void index_scalars(const float* values, const int* index, unsigned count, fsmoe::index_t n,
                                         float* out) {
  fsmoe::index_scalars(values, index, count, n, out);
}

extern "C" __global__ void index_iota(fsmoe::index_t n, int* out) {
  fsmoe::for_each_element(n, [&](fsmoe::index_t i) { out[i] = static_cast<int>(i); });
}
