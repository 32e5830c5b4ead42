// Which output tile a block computes next, when only the device knows how many rows each expert has.
//
// Rows of all experts lie in one buffer, expert e's from offsets[e] to offsets[e + 1], multiples of 128 (rows that only
// fill up a segment are zero). The grid is as large as the GPU; one thread of every block walks the same list of tiles in
// steps of the grid, so that nothing has to be passed between blocks and the host needs to know no count.
//
// With clusters the list's units are pairs of tiles, one per block of a cluster: two row tiles that share a weight tile
// (the larger, so that each byte of it is read from L2 once for both), or, of the last row tile of an expert with an odd
// number, two column tiles that share the row tile.
#pragma once

#include <cstdint>

namespace fsmoe::grouped {

constexpr int tile_rows = 128;
// Of the dimension that is summed over, per stage of the pipeline: 128 bytes, a swizzled row.
constexpr int tile_depth = 64;

// What the two blocks of a cluster load once for both.
enum class Shared { None, A, B };

struct Tile {
  // The first row and column of the tile, in D.
  int row, col;
  int expert;
  // Which of two outputs, where a kernel has two.
  int output;
  // Where the sum begins, and over how many stages it runs.
  int depth, steps;
  // Whether the lower 64 rows are all known to be filling.
  bool half;
  Shared shared;
};

// Splits the units of one expert among row tiles (`rows` tiles or pairs of them) and `cols` column tiles. Row tiles go
// first, in groups of about `group`: what a wave of blocks reads is then near square and stays in L2.
__device__ __forceinline__ void locate(int unit, int rows, int cols, int group, int& row, int& col) {
  const int groups = max(1, (rows + group / 2) / group);
  const int height = (rows + groups - 1) / groups;
  const int above = unit / (height * cols) * height;
  const int here = min(height, rows - above);
  const int rest = unit - above * cols;
  col = rest / here;
  row = above + rest - col * here;
}

// The units of `rows` row tiles and `cols` column tiles: groups of tiles, one per block of a cluster.
template <int Cluster>
__device__ __forceinline__ int cluster_units(int rows, int cols) {
  return rows / Cluster * cols + rows % Cluster * ((cols + Cluster - 1) / Cluster);
}

// The tile of one of them that is block `rank`'s. A column tile past the last one reads zeros and writes nothing.
template <int Cluster>
__device__ __forceinline__ void place(int unit, int rank, int rows, int cols, int& row, int& col, Shared& shared) {
  const int grouped = rows / Cluster * cols;
  if (unit < grouped) {
    locate(unit, rows / Cluster, cols, 16 / Cluster, row, col);
    row = Cluster * row + rank;
    shared = Cluster == 1 ? Shared::None : Shared::B;
  } else {
    row = rows - 1;
    col = Cluster * (unit - grouped) + rank;
    shared = Shared::A;
  }
}

// The experts' segments: from a copy in shared memory, unless there are too many. Straight from memory every expert passed
// costs a wait, one after the other, behind what the copy engine has in flight.
class SegmentTable {
 public:
  __device__ __forceinline__ SegmentTable(const int* offsets, const int* counts, int experts, int room, uint32_t copy)
      : offsets_(offsets), counts_(counts), counts_at_(copy + 4 * (experts + 1)), copy_(experts <= room ? copy : 0) {}

  // By all threads of a block, before any reads.
  __device__ __forceinline__ void fill(int experts) const {
    if (copy_ == 0) return;
    for (int i = threadIdx.x; i <= experts; i += blockDim.x) write(copy_ + 4 * i, offsets_[i]);
    if (counts_ == nullptr) return;
    for (int i = threadIdx.x; i < experts; i += blockDim.x) write(counts_at_ + 4 * i, counts_[i]);
  }

  __device__ __forceinline__ int begin(int expert) const {
    return copy_ != 0 ? read(copy_ + 4 * expert) : __ldg(offsets_ + expert);
  }
  // The rows that are not filling, as far as that is known.
  __device__ __forceinline__ int rows(int expert) const {
    if (counts_ == nullptr) return begin(expert + 1) - begin(expert);
    return copy_ != 0 ? read(counts_at_ + 4 * expert) : __ldg(counts_ + expert);
  }

 private:
  __device__ __forceinline__ static void write(uint32_t at, int value) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
  }
  __device__ __forceinline__ static int read(uint32_t at) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(at));
    return value;
  }

  const int* offsets_;
  const int* counts_;
  uint32_t counts_at_, copy_;
};

// ----------------------------------------------------------------------------
// Tiles of D[rows, cols] with the experts' rows as rows: forward and data gradient.

struct RowTilesArgs {
  // experts + 1 of them.
  const int* offsets;
  // How many rows of each expert are not filling; null: all may count. Half a tile of filling is then not multiplied, and
  // its outputs are zeros all the same: with 1024 rows an expert that is 3% of the work.
  const int* counts;
  int experts;
  // Column tiles of D.
  int cols;
  // Stages of the sum.
  int steps;
};

template <int Cluster, int TileCols>
class RowTiles {
 public:
  using Args = RowTilesArgs;

  __device__ __forceinline__ RowTiles(const Args& args, const SegmentTable& segments, int rank)
      : args_(args), segments_(segments), rank_(rank), unit_(blockIdx.x / Cluster), expert_(-1), row_(0), rows_(0),
        tiles_(0) {}

  __device__ __forceinline__ bool next(Tile& tile) {
    // unit_ counts from the expert's first.
    while (unit_ >= units()) {
      unit_ -= units();
      if (++expert_ >= args_.experts) return false;
      row_ = segments_.begin(expert_);
      rows_ = segments_.rows(expert_);
      tiles_ = (segments_.begin(expert_ + 1) - row_) / tile_rows;
    }
    int row, col;
    place<Cluster>(unit_, rank_, tiles_, args_.cols, row, col, tile.shared);
    tile.row = row_ + row * tile_rows;
    tile.half = rows_ - row * tile_rows <= tile_rows / 2;
    tile.col = col * TileCols;
    tile.expert = expert_;
    tile.output = 0;
    tile.depth = 0;
    tile.steps = args_.steps;
    unit_ += gridDim.x / Cluster;
    return true;
  }

 private:
  __device__ __forceinline__ int units() const {
    return cluster_units<Cluster>(tiles_, args_.cols);
  }

  const Args& args_;
  const SegmentTable& segments_;
  int rank_;
  int unit_, expert_, row_, rows_, tiles_;
};

// ----------------------------------------------------------------------------
// Tiles of D[experts, rows, cols], summed over each expert's rows: weight gradients.

struct WeightTilesArgs {
  const int* offsets;
  // May be null, as in RowTilesArgs: stages of filling only are then left out of the sum.
  const int* counts;
  int experts;
  // Row tiles of one output, and of all `outputs` of them.
  int rows, all_rows;
  int cols;
  // A row past the buffer's end, where loads give zeros.
  int past_end;
};

template <int Cluster, int TileCols>
class WeightTiles {
 public:
  using Args = WeightTilesArgs;

  __device__ __forceinline__ WeightTiles(const Args& args, const SegmentTable& segments, int rank)
      : args_(args), segments_(segments), rank_(rank), unit_(blockIdx.x / Cluster) {
    count_ = cluster_units<Cluster>(args.all_rows, args.cols);
  }

  __device__ __forceinline__ bool next(Tile& tile) {
    const int expert = unit_ / count_;
    if (expert >= args_.experts) return false;
    const int unit = unit_ - expert * count_;
    int row, col;
    place<Cluster>(unit, rank_, args_.all_rows, args_.cols, row, col, tile.shared);
    tile.output = row >= args_.rows ? 1 : 0;
    tile.row = (row - tile.output * args_.rows) * tile_rows;
    tile.col = col * TileCols;
    tile.expert = expert;
    tile.depth = segments_.begin(expert);
    tile.steps = (segments_.rows(expert) + tile_depth - 1) / tile_depth;
    tile.half = false;
    // An expert without rows has a gradient all the same: zeros, from one stage of them.
    if (tile.steps == 0) {
      tile.depth = args_.past_end;
      tile.steps = 1;
    }
    unit_ += gridDim.x / Cluster;
    return true;
  }

 private:
  const Args& args_;
  const SegmentTable& segments_;
  int rank_;
  int unit_, count_;
};

}  // namespace fsmoe::grouped
