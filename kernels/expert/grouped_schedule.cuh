// Which output tile a block computes next, when only the device knows how many rows each expert has.
//
// Rows of all experts lie in one buffer, expert e's from offsets[e] to offsets[e + 1], multiples of 128 (rows that only
// fill up a segment are zero). The grid is as large as the GPU; every role of every block walks the same list of tiles in
// steps of the grid, so that nothing has to be passed between them and the host needs to know no count.
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
  // The column tile's number.
  int col_tile;
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

// The experts' segments as the blocks read them: from a copy in shared memory, unless there are too many. Straight from
// memory every expert passed costs a wait, one after the other, behind what the copy engine has in flight: with 128 experts
// a tenth of the consumers' time, and meanwhile the producer, who walks the same list, lets the ring run dry.
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
    const int unit = unit_;
    if constexpr (Cluster == 1) {
      locate(unit, tiles_, args_.cols, 16, row, col);
      tile.shared = Shared::None;
    } else {
      const int paired = tiles_ / 2 * args_.cols;
      if (unit < paired) {
        locate(unit, tiles_ / 2, args_.cols, 8, row, col);
        row = 2 * row + rank_;
        tile.shared = Shared::B;
      } else {
        // A column tile past the last one reads zeros and writes nothing.
        row = tiles_ - 1;
        col = 2 * (unit - paired) + rank_;
        tile.shared = Shared::A;
      }
    }
    tile.row = row_ + row * tile_rows;
    tile.half = rows_ - row * tile_rows <= tile_rows / 2;
    tile.col = col * TileCols;
    tile.col_tile = col;
    tile.expert = expert_;
    tile.output = 0;
    tile.depth = 0;
    tile.steps = args_.steps;
    unit_ += gridDim.x / Cluster;
    return true;
  }

 private:
  __device__ __forceinline__ int units() const {
    if constexpr (Cluster == 1) return tiles_ * args_.cols;
    return tiles_ / 2 * args_.cols + (tiles_ & 1) * ((args_.cols + 1) / 2);
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
    paired_ = Cluster == 1 ? 0 : args.all_rows / 2 * args.cols;
    count_ = Cluster == 1 ? args.all_rows * args.cols : paired_ + (args.all_rows & 1) * ((args.cols + 1) / 2);
  }

  __device__ __forceinline__ bool next(Tile& tile) {
    const int expert = unit_ / count_;
    if (expert >= args_.experts) return false;
    const int unit = unit_ - expert * count_;
    int row, col;
    if constexpr (Cluster == 1) {
      locate(unit, args_.all_rows, args_.cols, 16, row, col);
      tile.shared = Shared::None;
    } else if (unit < paired_) {
      locate(unit, args_.all_rows / 2, args_.cols, 8, row, col);
      row = 2 * row + rank_;
      tile.shared = Shared::B;
    } else {
      row = args_.all_rows - 1;
      col = 2 * (unit - paired_) + rank_;
      tile.shared = Shared::A;
    }
    tile.output = row >= args_.rows ? 1 : 0;
    tile.row = (row - tile.output * args_.rows) * tile_rows;
    tile.col = col * TileCols;
    tile.col_tile = col;
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
  int unit_, count_, paired_;
};

}  // namespace fsmoe::grouped
