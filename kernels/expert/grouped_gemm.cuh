// The matrix products of the experts on Hopper, bf16 with f32 sums: persistent blocks of three warpgroups. One thread of
// the first keeps a ring of stages in shared memory filled through the copy engine; the other two multiply.
//
// The two consumers either take alternate tiles of 128 rows ("ping-pong": one writes its results while the other has the
// tensor cores) or the two halves of each tile ("cooperative": the tile can be wider, but nothing multiplies while results
// are written). Which is faster is a matter of measurement; the code differs in three lines.
//
// In ping-pong a consumer begins its tile when the other has seen the last stage of the tile before: the two are then in
// order on the ring (a barrier tells one turn of a stage from the next, but not from the one after that), and the tensor
// cores change hands without a pause.
#pragma once

#include "common/dtype.cuh"
#include "expert/grouped_schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace fsmoe::grouped {

using ptx::Major;
using ptx::TensorMap;

enum class Consumers { PingPong, Cooperative };

// One kernel's shape.
//   A, B      which dimension of each operand is contiguous
//   Cols      width of a tile, a width of wgmma
//   Pairs     operand pairs whose products are summed, one after the other
//   Weights   weights side by side in a tile, Cols / Weights columns of each
template <Major A_, Major B_, int Cols_, Consumers Consumers_, int Cluster_, int Pairs_ = 1, int Weights_ = 1>
struct Shape {
  static constexpr Major A = A_, B = B_;
  static constexpr int Cols = Cols_, Cluster = Cluster_, Pairs = Pairs_, Weights = Weights_;
  static constexpr bool ping_pong = Consumers_ == Consumers::PingPong;
  // 64-row products per consumer and tile.
  static constexpr int Blocks = ping_pong ? 2 : 1;

  // Boxes per stage. A always comes as two of 64 rows; B, if MN-major, in boxes of 64 columns, else as two halves.
  static constexpr int b_boxes = B == Major::MN ? (Cols + 63) / 64 : 2;
  static constexpr int b_box_cols = B == Major::MN ? 64 : Cols / 2;
  static constexpr int box_bytes = 64 * tile_depth * 2;
  static constexpr int b_box_bytes = b_box_cols * tile_depth * 2;
  static constexpr int a_bytes = 2 * box_bytes;
  static constexpr int stage_bytes = a_bytes + b_boxes * b_box_bytes;
  static_assert(b_box_bytes % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static_assert(Weights == 1 || (Weights == 2 && B == Major::K), "two weights are the two halves of a K-major tile");

  // A block has 227 KB of shared memory: as many stages as fit beside the barriers and the 1024-byte boundary.
  static constexpr int stages = (227 * 1024 - 1024 - 256) / stage_bytes;
  static constexpr int shared_bytes = 1024 + 256 + stages * stage_bytes;
};

constexpr int threads = 384;

struct Maps {
  // Of a pair or an output each; B of a pair or a weight.
  TensorMap a[2], b[2];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The ring's place: stage and the parity of its turn.
template <int Stages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int steps) {
    const int at = stage + steps;
    stage = at % Stages;
    parity ^= at / Stages & 1;
  }
};

template <class Shape, class Tiles>
__device__ __forceinline__ void produce(const Maps& maps, const typename Tiles::Args& tiles_args, int rank,
                                        uint32_t stages, uint32_t full, uint32_t empty) {
  Tiles tiles(tiles_args, rank);
  Turn<Shape::stages> turn;
  Tile tile;
  while (tiles.next(tile)) {
    const bool a_shared = Shape::Cluster > 1 && tile.shared == Shared::A;
    const bool b_shared = Shape::Cluster > 1 && tile.shared == Shared::B;
    const int half = Shape::Pairs == 2 ? tile.steps / 2 : tile.steps;
    for (int step = 0; step < tile.steps; ++step, turn.next()) {
      const int pair = Shape::Pairs == 2 && step >= half ? 1 : 0;
      const int depth = tile.depth + (step - pair * half) * tile_depth;
      const uint32_t barrier = full + 8 * turn.stage;
      uint32_t to = stages + turn.stage * Shape::stage_bytes;
      ptx::mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
      ptx::mbarrier_arrive_expect(barrier, Shape::stage_bytes);
      // Of a shared operand each block loads every other box for both.
#pragma unroll
      for (int box = 0; box < 2; ++box, to += Shape::box_bytes) {
        const TensorMap& map = maps.a[Shape::Pairs == 2 ? pair : tile.output];
        const int own = tile.row + 64 * box;
        const int x = Shape::A == Major::K ? depth : own;
        const int y = Shape::A == Major::K ? own : depth;
        if (!a_shared) {
          ptx::tma_load(map, barrier, to, x, y, 0);
        } else if (box % 2 == rank) {
          ptx::tma_load_multicast(map, barrier, to, x, y, 0, 3);
        }
      }
#pragma unroll
      for (int box = 0; box < Shape::b_boxes; ++box, to += Shape::b_box_bytes) {
        const TensorMap& map = maps.b[Shape::Weights == 2 ? box : pair];
        const int own = tile.col + (Shape::Weights == 2 ? 0 : Shape::b_box_cols * box);
        const int x = Shape::B == Major::K ? depth : own;
        const int y = Shape::B == Major::K ? own : depth;
        // The rows of a weight gradient lie in one buffer for all experts, weights apart.
        const int z = Shape::A == Major::MN ? 0 : tile.expert;
        if (!b_shared) {
          ptx::tma_load(map, barrier, to, x, y, z);
        } else if (box % 2 == rank) {
          ptx::tma_load_multicast(map, barrier, to, x, y, z, 3);
        }
      }
    }
  }
}

// Keeps the compiler from moving uses of the sums to before the wait that they must follow.
template <int Blocks, int Count>
__device__ __forceinline__ void settle(float (&sums)[Blocks][Count]) {
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[block][i])::"memory");
  }
}

template <class Shape, class Tiles, class Epilogue>
__device__ __forceinline__ void consume(const typename Tiles::Args& tiles_args, const typename Epilogue::Args& args,
                                        int consumer, int rank, uint32_t stages, uint32_t full, uint32_t empty,
                                        uint32_t order) {
  const int lane = threadIdx.x % 32;
  Tiles tiles(tiles_args, rank);
  Turn<Shape::stages> turn;
  Tile tile;
  float sums[Shape::Blocks][Shape::Cols / 2];
  // A stage is free when both blocks of the cluster have read it: a shared box lands in both.
  const auto release = [&](int stage) {
    if constexpr (Shape::Cluster == 1) {
      if (lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);
    } else {
      if (lane < Shape::Cluster) ptx::mbarrier_arrive_at(empty + 8 * stage, lane);
    }
  };
  for (int number = 0; tiles.next(tile); ++number) {
    if (Shape::ping_pong && (number & 1) != consumer) {
      turn.skip(tile.steps);
      continue;
    }
    // The first tile of the first consumer has none before it.
    if (Shape::ping_pong) ptx::mbarrier_wait(order + 8 * consumer, (number >> 1 & 1) ^ (consumer == 0 ? 1 : 0));
    int before = 0;
    for (int step = 0; step < tile.steps; ++step) {
      const uint32_t stage = stages + turn.stage * Shape::stage_bytes;
      const uint32_t own_rows = stage + (Shape::ping_pong ? 0 : consumer * Shape::box_bytes);
      const uint64_t a = ptx::wgmma_descriptor<Shape::A>(own_rows);
      const uint64_t b = ptx::wgmma_descriptor<Shape::B>(stage + Shape::a_bytes);
      ptx::mbarrier_wait(full + 8 * turn.stage, turn.parity);
      if (Shape::ping_pong && step == tile.steps - 1 && lane == 0) {
        ptx::mbarrier_arrive(order + 8 * (1 - consumer));
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < tile_depth / 16; ++k) {
#pragma unroll
        for (int block = 0; block < Shape::Blocks; ++block) {
          ptx::Wgmma<Shape::Cols>::template run<Shape::A, Shape::B>(
              sums[block], a + k * ptx::wgmma_step<Shape::A> + block * (Shape::box_bytes >> 4),
              b + k * ptx::wgmma_step<Shape::B>, k > 0 ? 1 : step);
        }
      }
      ptx::wgmma_commit();
      // One stage's products stay in flight while the next one's are issued.
      ptx::wgmma_wait<1>();
      if (step > 0) release(before);
      before = turn.stage;
      turn.next();
    }
    ptx::wgmma_wait<0>();
    release(before);
    settle(sums);
    Epilogue::run(sums, tile, Shape::ping_pong ? 0 : 64 * consumer, args);
  }
}

#endif

template <class Shape, class Tiles, class Epilogue>
__device__ __forceinline__ void gemm(const Maps& maps, const typename Tiles::Args& tiles_args,
                                     const typename Epilogue::Args& args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  const uint32_t begin = ptx::shared_address(shared);
  const uint32_t stages = (begin + 1023) & ~1023u;
  const uint32_t full = stages + Shape::stages * Shape::stage_bytes;
  const uint32_t empty = full + 8 * Shape::stages;
  const uint32_t order = empty + 8 * Shape::stages;
  const int group = threadIdx.x / 128;
  const int rank = Shape::Cluster == 1 ? 0 : ptx::cluster_rank();

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::stages; ++stage) {
      ptx::mbarrier_init(full + 8 * stage, 1);
      // Each warp that has read a stage arrives once.
      ptx::mbarrier_init(empty + 8 * stage, Shape::Cluster * (Shape::ping_pong ? 4 : 8));
    }
    for (int consumer = 0; consumer < 2; ++consumer) ptx::mbarrier_init(order + 8 * consumer, 4);
    ptx::fence_mbarrier_init();
  }
  if constexpr (Shape::Cluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (group == 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) produce<Shape, Tiles>(maps, tiles_args, rank, stages, full, empty);
  } else {
    ptx::take_registers<240>();
    consume<Shape, Tiles, Epilogue>(tiles_args, args, group - 1, rank, stages, full, empty, order);
  }
  // A block must not leave while the other of its cluster still writes to its memory or arrives at its barriers.
  if constexpr (Shape::Cluster > 1) {
    __syncwarp();
    ptx::cluster_sync();
  }
#else
  // Only Hopper has these instructions; the host launches this nowhere else.
  asm volatile("trap;");
#endif
}

}  // namespace fsmoe::grouped
