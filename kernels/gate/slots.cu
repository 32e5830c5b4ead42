// Slots: the place of every choice among its group's choices of the same expert, where all tokens' first choices come
// before all second choices, and so on, each in the order of tokens or in a given one. And what comes out of the same
// counts: loads, the balance loss, and the means of what tiles have summed.
//
//   slots_count(experts, order, tokens, num_experts, k, tile, tiles, counts)
//   slots_scan(counts, rows, first_rows, num_experts, groups, loads, firsts, columns, column_sums, sums, all_tiles,
//              tokens, first_only, balance, fraction, z, entropy, ticket)
//   slots_assign(experts, order, counts, tokens, num_experts, k, tile, tiles, capacity, slots)
//
// Tokens are cut into G * tiles tiles of up to `tile` consecutive places, none across groups of `tokens` tokens; order:
// (G * tokens) i32 or null, the token in every place.
//
// count: counts (G, k, tiles, num_experts) u32, a block per tile, 4 * k * num_experts bytes of dynamic shared memory.
// `choose_forward` writes the same.
//
// scan: turns counts, seen as (G, rows, num_experts) with rows = k * tiles, into their exclusive sums over rows, in place:
// the slot that a tile's first choice of an expert gets. loads (G, num_experts) i32: the totals. 1024 threads; a block per
// 8 experts and group, group by group. With a ticket, which must be 0, the last block to finish goes on to the losses, for
// which firsts (G, num_experts) u32 and column_sums (num_experts) f32 are room to work:
//   fraction[e] = (first choices, or all, of e) / tokens, balance[0] = num_experts * sum over e of
//   fraction[e] * (sum of `columns` (all_tiles, num_experts) over tiles) / tokens;
//   entropy[0] and z[0] (or null): the means over tokens of sums[0] and sums[1], (2, all_tiles).
//
// assign: slots (T, k) i32, -1 from `capacity` on. A block per tile, a warp per choice; dynamic shared memory:
// 4 * k * (num_experts + 256) bytes.
//
// Sums of floats are made in an order that depends on the sizes alone; counts are integers, whose order does not matter.

#include "common/reduce.cuh"
#include "common/scan.cuh"

namespace fsmoe {

// ----------------------------------------------------------------------------
// Counts of a tile

__device__ __forceinline__ void slots_count(const int* __restrict__ experts, const int* __restrict__ order,
                                            index_t tokens, int num_experts, int k, int tile, int tiles,
                                            unsigned* __restrict__ counts) {
  extern __shared__ unsigned slots_memory[];
  const index_t group = blockIdx.x / tiles;
  const int b = blockIdx.x % tiles;
  const index_t in_group = static_cast<index_t>(b) * tile;
  const index_t first = group * tokens + in_group;
  const index_t count = min(static_cast<index_t>(tile), tokens - in_group) * k;
  for (int i = threadIdx.x; i < k * num_experts; i += blockDim.x) slots_memory[i] = 0;
  __syncthreads();
  for (index_t i = threadIdx.x; i < count; i += blockDim.x) {
    const index_t place = i / k;
    const int j = static_cast<int>(i - place * k);
    const index_t token = order == nullptr ? first + place : order[first + place];
    const unsigned expert = experts[token * k + j];
    if (expert < static_cast<unsigned>(num_experts)) atomicAdd(&slots_memory[j * num_experts + expert], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < k * num_experts; i += blockDim.x) {
    const int j = i / num_experts;
    counts[((group * k + j) * tiles + b) * num_experts + (i - j * num_experts)] = slots_memory[i];
  }
}

// ----------------------------------------------------------------------------
// Sums over tiles

constexpr int scan_columns = 8;
constexpr int scan_strips = 1024 / scan_columns;
constexpr int strips_per_lane = scan_strips / warp_size;
// Rows that a thread keeps: of a strip that is no longer, the counts are read once.
constexpr int scan_batch = 16;

struct Losses {
  unsigned* firsts;
  const float* columns;
  float* column_sums;
  const float* sums;
  index_t tiles;
  index_t tokens;
  bool first_only;
  float *balance, *fraction, *z, *entropy;
  unsigned* ticket;
};

// What the last block does: everything that needs all of the others.
__device__ __forceinline__ void settle_losses(const Losses& losses, const int* loads, int num_experts, index_t groups) {
  const float tokens = static_cast<float>(losses.tokens);
  // Both before the first sum over the block, which nothing is read across.
  float entropy = 0.0f, squares = 0.0f;
  for (index_t t = threadIdx.x; t < losses.tiles && losses.entropy != nullptr; t += blockDim.x) {
    entropy += losses.sums[t];
    squares += losses.sums[losses.tiles + t];
  }
  float part = 0.0f;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    index_t choices = 0;
    for (index_t g = 0; g < groups; ++g) {
      // Other blocks have written these: the nearest cache must not be asked.
      choices += losses.first_only ? static_cast<index_t>(__ldcg(losses.firsts + g * num_experts + e))
                                   : static_cast<index_t>(__ldcg(loads + g * num_experts + e));
    }
    const float fraction = static_cast<float>(choices) / tokens;
    losses.fraction[e] = fraction;
    part += __ldcg(losses.column_sums + e) / tokens * fraction;
  }
  part = block_sum(part);
  if (threadIdx.x == 0) losses.balance[0] = static_cast<float>(num_experts) * part;
  if (losses.entropy == nullptr) return;
  entropy = block_sum(entropy);
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  losses.entropy[0] = entropy / tokens;
  if (losses.z != nullptr) losses.z[0] = squares / tokens;
}

__device__ __forceinline__ void slots_scan(unsigned* __restrict__ counts, index_t rows, index_t first_rows,
                                           int num_experts, index_t groups, int* __restrict__ loads,
                                           const Losses& losses) {
  __shared__ unsigned strips[scan_columns][scan_strips + 1];
  __shared__ float float_strips[scan_columns][scan_strips + 1];
  __shared__ bool last;
  const int per_group = (num_experts + scan_columns - 1) / scan_columns;
  const index_t group = blockIdx.x / per_group;
  const int column = threadIdx.x % scan_columns;
  const int strip = threadIdx.x / scan_columns;
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const int expert = blockIdx.x % per_group * scan_columns + column;
  const bool inside = expert < num_experts;
  // One address for the block, and 32 bits from there: addresses of 16 rows would not fit in the registers.
  unsigned* const mine = counts + group * rows * num_experts;
  const auto at = [&](index_t row) { return static_cast<unsigned>(row) * num_experts + expert; };

  // Each thread sums a strip of consecutive rows, a warp then the strips of a column.
  const index_t length = (rows + scan_strips - 1) / scan_strips;
  const index_t from = min(strip * length, rows);
  const index_t to = inside ? min(from + length, rows) : from;
  // All at once: a load may not pass a store that could be to its address, so one by one each would wait for memory.
  unsigned batch[scan_batch];
  const auto load = [&](index_t row) {
#pragma unroll
    for (int i = 0; i < scan_batch; ++i) batch[i] = row + i < to ? mine[at(row + i)] : 0;
  };
  unsigned sum = 0;
  for (index_t row = from; row < to; row += scan_batch) {
    load(row);
#pragma unroll
    for (int i = 0; i < scan_batch; ++i) sum += batch[i];
  }
  strips[column][strip] = sum;
  float float_sum = 0.0f;
  if (losses.ticket != nullptr && group == 0 && inside) {
#pragma unroll 4
    for (index_t t = strip; t < losses.tiles; t += scan_strips) float_sum += losses.columns[t * num_experts + expert];
  }
  float_strips[column][strip] = float_sum;
  __syncthreads();
  if (warp < scan_columns) {
    unsigned own[strips_per_lane];
    unsigned total = 0;
    float float_total = 0.0f;
#pragma unroll
    for (int i = 0; i < strips_per_lane; ++i) {
      own[i] = strips[warp][lane * strips_per_lane + i];
      total += own[i];
      float_total += float_strips[warp][lane * strips_per_lane + i];
    }
    unsigned before = warp_exclusive_sum(total);
    const int of = blockIdx.x % per_group * scan_columns + warp;
    if (lane == warp_size - 1 && of < num_experts) loads[group * num_experts + of] = static_cast<int>(before + total);
#pragma unroll
    for (int i = 0; i < strips_per_lane; ++i) {
      strips[warp][lane * strips_per_lane + i] = before;
      before += own[i];
    }
    if (losses.ticket != nullptr) {
      // before is now what has been counted up to this lane's end: the last lane's is the total.
      if (first_rows == rows && lane == warp_size - 1 && of < num_experts) losses.firsts[group * num_experts + of] = before;
      float_total = warp_sum(float_total);
      if (group == 0 && lane == 0 && of < num_experts) losses.column_sums[of] = float_total;
    }
  }
  __syncthreads();
  unsigned before = strips[column][strip];
  for (index_t row = from; row < to; row += scan_batch) {
    if (length > scan_batch) load(row);
#pragma unroll
    for (int i = 0; i < scan_batch; ++i) {
      if (row + i == first_rows && row + i < to && losses.ticket != nullptr) {
        losses.firsts[group * num_experts + expert] = before;
      }
      if (row + i < to) mine[at(row + i)] = before;
      before += batch[i];
    }
  }

  if (losses.ticket == nullptr) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(losses.ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  settle_losses(losses, loads, num_experts, groups);
}

// ----------------------------------------------------------------------------
// Slots of a tile

// Places that are worked on at a time.
constexpr int slots_chunk = 256;

__device__ __forceinline__ void slots_assign(const int* __restrict__ experts, const int* __restrict__ order,
                                             const unsigned* __restrict__ counts, index_t tokens, int num_experts,
                                             int k, int tile, int tiles, unsigned capacity, int* __restrict__ slots) {
  extern __shared__ unsigned slots_memory[];
  unsigned* const taken = slots_memory;                                              // (k, num_experts)
  int* const chunk = reinterpret_cast<int*>(slots_memory) + k * num_experts;  // (256, k): experts, then slots
  const index_t group = blockIdx.x / tiles;
  const int b = blockIdx.x % tiles;
  const index_t in_group = static_cast<index_t>(b) * tile;
  const index_t first = group * tokens + in_group;
  const int count = static_cast<int>(min(static_cast<index_t>(tile), tokens - in_group));
  const int lane = threadIdx.x % warp_size;
  const int warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size;
  const unsigned below = (1u << lane) - 1;

  for (int i = threadIdx.x; i < k * num_experts; i += blockDim.x) {
    const int j = i / num_experts;
    taken[i] = counts[((group * k + j) * tiles + b) * num_experts + (i - j * num_experts)];
  }
  for (int start = 0; start < count; start += slots_chunk) {
    const int places = min(slots_chunk, count - start);
    // The entry of a (place, choice) in experts and slots.
    const auto entry = [&](int i) {
      if (order == nullptr) return (first + start) * k + i;
      const int place = i / k;
      return static_cast<index_t>(order[first + start + place]) * k + (i - place * k);
    };
    for (int i = threadIdx.x; i < places * k; i += blockDim.x) chunk[i] = experts[entry(i)];
    __syncthreads();
    // A warp has all of a choice's places, so it alone counts up that choice's experts.
    for (int j = warp; j < k; j += warps) {
      for (int at = 0; at < places; at += warp_size) {
        const int place = at + lane;
        const int expert = place < places ? chunk[place * k + j] : -1;
        const unsigned same = __match_any_sync(full_warp, expert);
        const bool valid = static_cast<unsigned>(expert) < static_cast<unsigned>(num_experts);
        unsigned slot = capacity;
        if (valid) slot = taken[j * num_experts + expert] + __popc(same & below);
        __syncwarp();
        if (valid && (same & below) == 0) taken[j * num_experts + expert] += __popc(same);
        if (place < places) chunk[place * k + j] = slot < capacity ? static_cast<int>(slot) : -1;
        __syncwarp();
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < places * k; i += blockDim.x) slots[entry(i)] = chunk[i];
    __syncthreads();
  }
}

}  // namespace fsmoe

// ----------------------------------------------------------------------------
// Entry points

extern "C" __global__ void slots_count(const int* experts, const int* order, fsmoe::index_t tokens, int num_experts,
                                       int k, int tile, int tiles, unsigned* counts) {
  fsmoe::slots_count(experts, order, tokens, num_experts, k, tile, tiles, counts);
}

extern "C" __global__ void __launch_bounds__(1024)
    slots_scan(unsigned* counts, fsmoe::index_t rows, fsmoe::index_t first_rows, int num_experts,
               fsmoe::index_t groups, int* loads, unsigned* firsts, const float* columns, float* column_sums,
               const float* sums, fsmoe::index_t all_tiles, fsmoe::index_t tokens, int first_only, float* balance,
               float* fraction, float* z, float* entropy, unsigned* ticket) {
  const fsmoe::Losses losses{firsts,          columns, column_sums, sums, all_tiles, tokens,
                             first_only != 0, balance, fraction,    z,    entropy,   ticket};
  fsmoe::slots_scan(counts, rows, first_rows, num_experts, groups, loads, losses);
}

extern "C" __global__ void slots_assign(const int* experts, const int* order, const unsigned* counts,
                                        fsmoe::index_t tokens, int num_experts, int k, int tile, int tiles,
                                        unsigned capacity, int* slots) {
  fsmoe::slots_assign(experts, order, counts, tokens, num_experts, k, tile, tiles, capacity, slots);
}
