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

#include <type_traits>

#include "common/dtype.cuh"
#include "expert/grouped_schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace fsmoe::grouped {

using ptx::Major;
using ptx::TensorMap;

// What a block may have of shared memory, and is always launched with.
constexpr int shared_bytes = 227 * 1024;

// What each consumer warp has of shared memory for its epilogue: slots of 512 bytes (grouped_epilogue.cuh).
constexpr int slots_per_warp = 3;
constexpr int slot_bytes = 512;

// What an epilogue reads comes through rings of its own, one per consumer, in boxes of 64 rows and 32 columns, loaded
// while the tile's products are still summed. Read straight from memory, each read waits behind what the copy engine has
// in flight for the other consumer: the backwards with an activation took 3 to 11% longer.
constexpr int input_cols = 32;
constexpr int input_bytes = 64 * input_cols * 2;
constexpr int input_stages = 3;

constexpr int barriers_bytes = 256;

enum class Consumers { PingPong, Cooperative };

// One kernel's shape.
//   A, B      which dimension of each operand is contiguous
//   Cols      width of a tile, a width of wgmma
//   Pairs     operand pairs whose products are summed, one after the other
//   Weights   weights side by side in a tile, Cols / Weights columns of each
//   Inputs    matrices like D that the epilogue reads
template <Major A_, Major B_, int Cols_, Consumers Consumers_, int Cluster_, int Pairs_ = 1, int Weights_ = 1,
          int Inputs_ = 0>
struct Shape {
  static constexpr Major A = A_, B = B_;
  static constexpr int Cols = Cols_, Cluster = Cluster_, Pairs = Pairs_, Weights = Weights_;
  static constexpr int Inputs = Inputs_;
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

  // As many stages as fit beside what the epilogue and the barriers take and what
  // the swizzle's 1024-byte boundary may cost.
  static constexpr int slots_bytes = 8 * slots_per_warp * slot_bytes;
  static constexpr int inputs_bytes = 2 * input_stages * Inputs * input_bytes;
  static constexpr int other_bytes = slots_bytes + inputs_bytes + barriers_bytes + 1024;
  static_assert(Inputs == 0 || ping_pong, "a consumer's inputs come in tiles of its own");
  static constexpr int stages = (shared_bytes - other_bytes) / stage_bytes;
  // The rest holds the segments of this many experts.
  static constexpr int experts = (shared_bytes - other_bytes - stages * stage_bytes) / 8 - 1;
};

constexpr int threads = 384;

struct Maps {
  // Of a pair or an output each; B of a pair or a weight.
  TensorMap a[2], b[2];
  // Matrices like D that the epilogue reads.
  TensorMap inputs[2];
};

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
__device__ __forceinline__ void produce(const Maps& maps, const typename Tiles::Args& tiles_args,
                                        const SegmentTable& segments, int rank, uint32_t stages, uint32_t full,
                                        uint32_t empty) {
  Tiles tiles(tiles_args, segments, rank);
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

// The boxes of a tile: all of its upper 64 rows, then all of its lower ones.
template <int Cols>
struct InputBoxes {
  static constexpr int across = (Cols + input_cols - 1) / input_cols;
  static constexpr int count = 2 * across;
  __device__ __forceinline__ static int row(int box) { return 64 * (box / across); }
  __device__ __forceinline__ static int col(int box) { return input_cols * (box % across); }
};

// A consumer's ring of inputs.
struct InputRing {
  uint32_t stages, full, empty;
  Turn<input_stages> turn;
};

template <class Shape, class Tiles>
__device__ __forceinline__ void produce_inputs(const Maps& maps, const typename Tiles::Args& tiles_args,
                                               const SegmentTable& segments, int consumer, int rank, InputRing ring) {
  using Boxes = InputBoxes<Shape::Cols>;
  Tiles tiles(tiles_args, segments, rank);
  Tile tile;
  for (int number = 0; tiles.next(tile); ++number) {
    if ((number & 1) != consumer) continue;
    for (int box = 0; box < Boxes::count; ++box, ring.turn.next()) {
      const int stage = ring.turn.stage;
      ptx::mbarrier_wait(ring.empty + 8 * stage, ring.turn.parity ^ 1);
      ptx::mbarrier_arrive_expect(ring.full + 8 * stage, Shape::Inputs * input_bytes);
#pragma unroll
      for (int input = 0; input < Shape::Inputs; ++input) {
        ptx::tma_load(maps.inputs[input], ring.full + 8 * stage,
                      ring.stages + (stage * Shape::Inputs + input) * input_bytes, tile.col + Boxes::col(box),
                      tile.row + Boxes::row(box), 0);
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
__device__ __forceinline__ void consume(const typename Tiles::Args& tiles_args, const SegmentTable& segments,
                                        const typename Epilogue::Args& args, int consumer, int rank, uint32_t stages, uint32_t full, uint32_t empty,
                                        uint32_t order, uint32_t slots, InputRing inputs) {
  const int lane = threadIdx.x % 32;
  Tiles tiles(tiles_args, segments, rank);
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
    const int first_row = Shape::ping_pong ? 0 : 64 * consumer;
    const auto early = Epilogue::template early<Shape::Blocks>(tile, first_row, args);
    // The first tile of the first consumer has none before it.
    if (Shape::ping_pong) ptx::mbarrier_wait(order + 8 * consumer, (number >> 1 & 1) ^ (consumer == 0 ? 1 : 0));
    const auto multiply = [&](auto blocks) {
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
          for (int block = 0; block < decltype(blocks)::value; ++block) {
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
    };
    if (Shape::Blocks == 2 && tile.half) {
      multiply(std::integral_constant<int, 1>{});
#pragma unroll
      for (int i = 0; i < Shape::Cols / 2; ++i) sums[Shape::Blocks - 1][i] = 0.0f;
    } else {
      multiply(std::integral_constant<int, Shape::Blocks>{});
    }
    settle(sums);
    Epilogue::run(sums, early, tile, first_row, slots, inputs, args);
  }
}

template <class Shape, class Tiles, class Epilogue>
__device__ __forceinline__ void gemm(const Maps& maps, const typename Tiles::Args& tiles_args,
                                     const typename Epilogue::Args& args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  const uint32_t begin = ptx::shared_address(shared);
  const uint32_t stages = (begin + 1023) & ~1023u;
  const uint32_t slots = stages + Shape::stages * Shape::stage_bytes;
  const uint32_t inputs = slots + Shape::slots_bytes;
  const uint32_t full = inputs + Shape::inputs_bytes;
  const uint32_t empty = full + 8 * Shape::stages;
  const uint32_t order = empty + 8 * Shape::stages;
  const uint32_t inputs_full = order + 8 * 2;
  const uint32_t inputs_empty = inputs_full + 8 * 2 * input_stages;
  const auto ring_of = [&](int consumer) {
    const uint32_t at = 8 * consumer * input_stages;
    return InputRing{inputs + consumer * (Shape::inputs_bytes / 2), inputs_full + at, inputs_empty + at, {}};
  };
  const int group = threadIdx.x / 128;
  const int rank = Shape::Cluster == 1 ? 0 : ptx::cluster_rank();

  const SegmentTable segments(tiles_args.offsets, tiles_args.counts, tiles_args.experts, Shape::experts,
                              full + barriers_bytes);
  segments.fill(tiles_args.experts);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::stages; ++stage) {
      ptx::mbarrier_init(full + 8 * stage, 1);
      // Each warp that has read a stage arrives once.
      ptx::mbarrier_init(empty + 8 * stage, Shape::Cluster * (Shape::ping_pong ? 4 : 8));
    }
    for (int consumer = 0; consumer < 2; ++consumer) ptx::mbarrier_init(order + 8 * consumer, 4);
    for (int stage = 0; stage < 2 * input_stages; ++stage) {
      ptx::mbarrier_init(inputs_full + 8 * stage, 1);
      ptx::mbarrier_init(inputs_empty + 8 * stage, 4);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (Shape::Cluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (group == 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) {
      produce<Shape, Tiles>(maps, tiles_args, segments, rank, stages, full, empty);
    } else if (Shape::Inputs > 0 && (threadIdx.x == 32 || threadIdx.x == 64)) {
      const int consumer = threadIdx.x / 32 - 1;
      produce_inputs<Shape, Tiles>(maps, tiles_args, segments, consumer, rank, ring_of(consumer));
    }
  } else {
    ptx::take_registers<240>();
    consume<Shape, Tiles, Epilogue>(tiles_args, segments, args, group - 1, rank, stages, full, empty, order,
                                      slots + (threadIdx.x / 32 - 4) * slots_per_warp * slot_bytes, ring_of(group - 1));
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

// An entry point: clusters of two blocks, one block to a multiprocessor.
#define FSMOE_GROUPED(name, shape, tiles, epilogue)                                                                 \
  extern "C" __global__ void FSMOE_CLUSTER(2) __launch_bounds__(fsmoe::grouped::threads, 1)                         \
      name(const __grid_constant__ fsmoe::grouped::Maps maps, const __grid_constant__ tiles::Args tiles_args,       \
           const __grid_constant__ epilogue::Args args) {                                                           \
    fsmoe::grouped::gemm<shape, tiles, epilogue>(maps, tiles_args, args);                                           \
  }
