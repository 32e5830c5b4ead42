// The matrix products of the experts on Hopper, bf16 with f32 sums: persistent blocks of three warpgroups. Of the
// first, one thread walks the list of tiles and hands them to the others, one keeps a ring of stages in shared memory filled
// through the copy engine, and one, where the end of a product reads matrices, a ring of those; the other two multiply.
//
// The thread that fills the ring has a few hundred cycles per stage. It computes next to nothing, spills nothing, and is
// elected (ptx/cluster.cuh): while it did more, the ring ran dry, and weight gradients took 11 to 20% longer.
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

// What each consumer warp has of shared memory for its epilogue, unless the epilogue says otherwise.
constexpr int warp_bytes = 3 * 512;

// What an epilogue reads comes through a ring of its own, in boxes of 64 rows and 32 columns, loaded while the tile's
// products are still summed. Read straight from memory, each read waits behind what the copy engine has in flight for the
// other consumer: the backwards with an activation took 3 to 11% longer. One ring serves both consumers, tile after tile, so
// that an epilogue finds many boxes there when it begins. One input leaves room for a stage more of the products; two need
// the room themselves: with two boxes ahead SwiGLU's backward took 6 to 13% longer.
constexpr int input_cols = 32;
constexpr int input_bytes = 64 * input_cols * 2;

constexpr int barriers_bytes = 256, handover_places = 4, handover_bytes = handover_places * (32 + 8 + 8);

enum class Consumers { PingPong, Cooperative };

// One kernel's shape.
//   A, B      which dimension of each operand is contiguous
//   Cols      width of a tile, a width of wgmma
//   Pairs     operand pairs whose products are summed, one after the other
//   Weights   weights side by side in a tile, Cols / Weights columns of each
//   Inputs    matrices like D that the epilogue reads
//   Warp      bytes of shared memory that it has per warp
template <Major A_, Major B_, int Cols_, Consumers Consumers_, int Cluster_, int Pairs_ = 1, int Weights_ = 1,
          int Inputs_ = 0, int Warp_ = warp_bytes>
struct Shape {
  static constexpr Major A = A_, B = B_;
  static constexpr int Cols = Cols_, Cluster = Cluster_, Pairs = Pairs_, Weights = Weights_;
  static constexpr int Inputs = Inputs_, Warp = Warp_;
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
  static constexpr int slots_bytes = 8 * Warp;
  static constexpr int other_bytes = slots_bytes + barriers_bytes + handover_bytes + 1024;
  static_assert(Inputs == 0 || ping_pong, "a consumer's inputs come in tiles of its own");
  static constexpr int input_box_bytes = Inputs * input_bytes, least_input_boxes = Inputs == 2 ? 6 : 4;
  static constexpr int stages = (shared_bytes - other_bytes - least_input_boxes * input_box_bytes) / stage_bytes;
  // All but half a kibibyte of what the stages leave.
  static constexpr int left_bytes = shared_bytes - other_bytes - stages * stage_bytes;
  static constexpr int input_boxes = Inputs == 0 ? 1 : (left_bytes - 512) / (Inputs == 0 ? 1 : input_box_bytes);
  static constexpr int inputs_bytes = input_boxes * input_box_bytes;
  // The rest holds the segments of this many experts.
  static constexpr int experts = (left_bytes - inputs_bytes) / 8 - 1;
  static_assert(8 * (2 * stages + 2 + 2 * input_boxes + 2) <= barriers_bytes, "the barriers must fit");
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

// The tiles as one thread hands them to all others, the last few of them, in shared memory: walking the list itself would
// cost every role registers that it needs.
struct Handover {
  static constexpr int places = handover_places;
  uint32_t at;

  __device__ __forceinline__ uint32_t place(int number) const { return at + number % places * 32; }
  __device__ __forceinline__ uint32_t full(int number) const { return at + 32 * places + number % places * 8; }
  __device__ __forceinline__ uint32_t empty(int number) const { return full(number) + 8 * places; }
  __device__ __forceinline__ static uint32_t parity(int number) { return number / places & 1; }

  // By one thread. Readers: how often each is read.
  __device__ __forceinline__ void init(int readers) const {
    for (int i = 0; i < places; ++i) {
      ptx::mbarrier_init(full(i), 1);
      ptx::mbarrier_init(empty(i), readers);
    }
  }
  __device__ __forceinline__ void wait(int number) const { ptx::mbarrier_wait(full(number), parity(number)); }
  __device__ __forceinline__ void done(int number) const { ptx::mbarrier_arrive(empty(number)); }

  // Tile `number`, whose first stage comes at `turn`; one without steps says that there is none.
  template <int Stages>
  __device__ __forceinline__ void write(int number, const Tile& tile, const Turn<Stages>& turn) const {
    ptx::mbarrier_wait(empty(number), parity(number) ^ 1);
    const int rest = turn.stage | static_cast<int>(turn.parity) << 4 | (tile.half ? 1 : 0) << 5 | tile.output << 6 |
                     static_cast<int>(tile.shared) << 7;
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(place(number)), "r"(tile.row), "r"(tile.col),
                 "r"(tile.steps), "r"(rest)
                 : "memory");
    asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(place(number) + 16), "r"(tile.expert), "r"(tile.depth) : "memory");
    ptx::mbarrier_arrive(full(number));
  }
};

// What is told of a tile.
struct Given {
  int row, col, steps, rest;

  __device__ __forceinline__ static Given read(uint32_t place) {
    Given g;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(g.row), "=r"(g.col), "=r"(g.steps), "=r"(g.rest)
                 : "r"(place)
                 : "memory");
    return g;
  }
  __device__ __forceinline__ static int expert(uint32_t place) { return read_one(place + 16); }
  __device__ __forceinline__ static int depth(uint32_t place) { return read_one(place + 20); }
  template <int Stages>
  __device__ __forceinline__ Turn<Stages> turn() const {
    return {rest & 15, static_cast<uint32_t>(rest >> 4 & 1)};
  }
  __device__ __forceinline__ bool half() const { return (rest >> 5 & 1) != 0; }
  __device__ __forceinline__ int output() const { return rest >> 6 & 1; }
  __device__ __forceinline__ Shared shared() const { return static_cast<Shared>(rest >> 7 & 3); }

 private:
  __device__ __forceinline__ static int read_one(uint32_t at) {
    int x;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
  }
};

// Walks the list of tiles.
template <class Shape, class Tiles>
__device__ __forceinline__ void hand_over(const typename Tiles::Args& tiles_args, const SegmentTable& segments, int rank,
                                          Handover handover) {
  Tiles tiles(tiles_args, segments, rank);
  Turn<Shape::stages> turn;
  Tile tile;
  int number = 0;
  for (; tiles.next(tile); ++number) {
    handover.write(number, tile, turn);
    turn.skip(tile.steps);
  }
  tile.steps = 0;
  handover.write(number, tile, turn);
  if (Shape::ping_pong) handover.write(number + 1, tile, turn);
}

// Who loads an operand of a tile: this block the boxes whose bits are set, into the `blocks` whose are.
struct Share {
  uint32_t boxes;
  uint16_t blocks;
};

template <int Cluster>
__device__ __forceinline__ Share share(Shared shared, Shared operand, int rank) {
  // Of a shared operand each of two blocks loads every other box, for both.
  if (Cluster > 1 && shared == operand) return {0x5555u << rank, (1 << Cluster) - 1};
  return {~0u, static_cast<uint16_t>(1 << rank)};
}

template <class Shape>
__device__ __forceinline__ void produce(const Maps& maps, int rank, uint32_t stages, uint32_t full, uint32_t empty,
                                        Handover handover) {
  const auto load = [](const TensorMap& map, uint32_t barrier, uint32_t to, int x, int y, int z, uint16_t blocks) {
    if constexpr (Shape::Cluster == 1) {
      ptx::tma_load(map, barrier, to, x, y, z);
    } else {
      ptx::tma_load_multicast(map, barrier, to, x, y, z, blocks);
    }
  };
  Turn<Shape::stages> turn;
  for (int number = 0;; ++number) {
    handover.wait(number);
    const Given tile = Given::read(handover.place(number));
    // The rows of a weight gradient lie in one buffer for all experts, weights apart.
    const int z = Shape::A == Major::MN ? 0 : Given::expert(handover.place(number));
    const int first = Shape::A == Major::MN ? Given::depth(handover.place(number)) : 0;
    if (tile.steps == 0) break;
    handover.done(number);
    const Share a = share<Shape::Cluster>(tile.shared(), Shared::A, rank);
    const Share b = share<Shape::Cluster>(tile.shared(), Shared::B, rank);
    const int half = Shape::Pairs == 2 ? tile.steps / 2 : tile.steps;
    for (int step = 0; step < tile.steps; ++step, turn.next()) {
      const int pair = Shape::Pairs == 2 && step >= half ? 1 : 0;
      const int depth = first + (step - pair * half) * tile_depth;
      const uint32_t barrier = full + 8 * turn.stage;
      uint32_t to = stages + turn.stage * Shape::stage_bytes;
      ptx::mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
      ptx::mbarrier_arrive_expect(barrier, Shape::stage_bytes);
#pragma unroll
      for (int box = 0; box < 2; ++box, to += Shape::box_bytes) {
        const TensorMap& map = maps.a[Shape::Pairs == 2 ? pair : Shape::A == Major::MN ? tile.output() : 0];
        const int own = tile.row + 64 * box;
        const int x = Shape::A == Major::K ? depth : own;
        const int y = Shape::A == Major::K ? own : depth;
        if ((a.boxes >> box & 1) != 0) load(map, barrier, to, x, y, 0, a.blocks);
      }
#pragma unroll
      for (int box = 0; box < Shape::b_boxes; ++box, to += Shape::b_box_bytes) {
        const TensorMap& map = maps.b[Shape::Weights == 2 ? box : pair];
        const int own = tile.col + (Shape::Weights == 2 ? 0 : Shape::b_box_cols * box);
        const int x = Shape::B == Major::K ? depth : own;
        const int y = Shape::B == Major::K ? own : depth;
        if ((b.boxes >> box & 1) != 0) load(map, barrier, to, x, y, z, b.blocks);
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

// The ring of inputs. Order: as for the products', whose turn it is.
template <int Stages>
struct InputRing {
  uint32_t stages, full, empty, order;
  Turn<Stages> turn;
};

template <class Shape>
__device__ __forceinline__ void produce_inputs(const Maps& maps, Handover handover, InputRing<Shape::input_boxes> ring) {
  using Boxes = InputBoxes<Shape::Cols>;
  for (int number = 0;; ++number) {
    handover.wait(number);
    const Given tile = Given::read(handover.place(number));
    if (tile.steps == 0) break;
    handover.done(number);
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

template <class Shape, class Epilogue>
__device__ __forceinline__ void consume(const typename Epilogue::Args& args, int consumer, uint32_t stages, uint32_t full,
                                        uint32_t empty, uint32_t order, Handover handover, uint32_t slots,
                                        InputRing<Shape::input_boxes> inputs) {
  const int lane = threadIdx.x % 32;
  // A stage is free when all blocks of the cluster have read it: a shared box lands in several.
  const auto release = [&](int stage) {
    if constexpr (Shape::Cluster == 1) {
      if (lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);
    } else {
      if (lane < Shape::Cluster) ptx::mbarrier_arrive_at(empty + 8 * stage, lane);
    }
  };
  // Of the inputs' ring too a consumer passes over the other's tiles.
  constexpr int boxes = Shape::Inputs == 0 ? 0 : InputBoxes<Shape::Cols>::count;
  if (consumer == 1) inputs.turn.skip(boxes);
  for (int number = Shape::ping_pong ? consumer : 0;; number += Shape::ping_pong ? 2 : 1) {
    handover.wait(number);
    const Given tile = Given::read(handover.place(number));
    if (tile.steps == 0) break;
    Turn<Shape::stages> turn = tile.turn<Shape::stages>();
    const int first_row = Shape::ping_pong ? 0 : 64 * consumer;
    Epilogue::early(tile.row + first_row, slots, args);
    // Set to zero rather than by the first product: then nothing of the last tile's sums lives on, and their registers are the
    // epilogue's as it goes.
    float sums[Shape::Blocks][Shape::Cols / 2];
#pragma unroll
    for (int i = 0; i < Shape::Blocks * Shape::Cols / 2; ++i) sums[i / (Shape::Cols / 2)][i % (Shape::Cols / 2)] = 0.0f;
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
                b + k * ptx::wgmma_step<Shape::B>);
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
    if (Shape::Blocks == 2 && tile.half()) {
      multiply(std::integral_constant<int, 1>{});
    } else {
      multiply(std::integral_constant<int, Shape::Blocks>{});
    }
    settle(sums);
    // Read again: no register holds it meanwhile.
    const Given again = Given::read(handover.place(number));
    // In the inputs' ring as in the products': nobody may be more than a turn ahead.
    if (Shape::Inputs > 0) ptx::mbarrier_wait(inputs.order + 8 * consumer, (number >> 1 & 1) ^ (consumer == 0 ? 1 : 0));
    Epilogue::run(sums, again, handover.place(number), first_row, slots, inputs, args);
    if (lane == 0) {
      handover.done(number);
      if (Shape::Inputs > 0) ptx::mbarrier_arrive(inputs.order + 8 * (1 - consumer));
    }
    inputs.turn.skip(boxes);
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
  const uint32_t inputs_empty = inputs_full + 8 * Shape::input_boxes;
  const Handover handover{full + barriers_bytes};
  const InputRing<Shape::input_boxes> ring{inputs, inputs_full, inputs_empty, inputs_empty + 8 * Shape::input_boxes, {}};
  // The same in all threads of a warp, and known to be.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = warp / 4;
  const int rank = Shape::Cluster == 1 ? 0 : ptx::cluster_rank();

  const SegmentTable segments(tiles_args.offsets, tiles_args.counts, tiles_args.experts, Shape::experts,
                              handover.at + handover_bytes);
  segments.fill(tiles_args.experts);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::stages; ++stage) {
      ptx::mbarrier_init(full + 8 * stage, 1);
      // Each warp that has read a stage arrives once.
      ptx::mbarrier_init(empty + 8 * stage, Shape::Cluster * (Shape::ping_pong ? 4 : 8));
    }
    for (int consumer = 0; consumer < 2; ++consumer) {
      ptx::mbarrier_init(order + 8 * consumer, 4);
      ptx::mbarrier_init(ring.order + 8 * consumer, 4);
    }
    for (int stage = 0; stage < Shape::input_boxes; ++stage) {
      ptx::mbarrier_init(inputs_full + 8 * stage, 1);
      ptx::mbarrier_init(inputs_empty + 8 * stage, 4);
    }
    // The consumers' warps and those who load.
    handover.init((Shape::ping_pong ? 4 : 8) + 1 + (Shape::Inputs > 0 ? 1 : 0));
    ptx::fence_mbarrier_init();
  }
  if constexpr (Shape::Cluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (group == 0) {
    ptx::give_registers<24>();
    if (ptx::elect_one()) {
      if (warp == 0) {
        produce<Shape>(maps, rank, stages, full, empty, handover);
      } else if (warp == 3) {
        hand_over<Shape, Tiles>(tiles_args, segments, rank, handover);
      } else if (Shape::Inputs > 0 && warp == 1) {
        produce_inputs<Shape>(maps, handover, ring);
      }
    }
  } else {
    ptx::take_registers<240>();
    consume<Shape, Epilogue>(args, group - 1, stages, full, empty, order, handover,
                             slots + (warp - 4) * Shape::Warp, ring);
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
