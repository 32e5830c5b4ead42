// What happens to a tile's sums: the activation, and the way to memory.
//
// While one consumer is here the other multiplies, so this costs nothing as long as it is the shorter of the two: what counts
// is that instructions do not wait for one another, and that nothing is spilled (there is hardly any first-level cache left
// to spill to). A lane's sums of one row are two columns of every eight (ptx/wgmma.cuh);
// stored as they lie, a warp would write 16 bytes here and there. Four fragments of eight rows and eight columns therefore
// pass through shared memory, one instruction in and one out, after which each of the four lanes that share a row has all
// eight columns of one fragment: 16 bytes, and four such side by side. (Trading them by shuffles takes 16 instructions; a
// GELU forward took 2 to 3% longer with it.) Inputs are read as fragments, so that the sums need not move.
#pragma once

#include <utility>

#include "expert/activation.cuh"
#include "expert/grouped_gemm.cuh"

namespace fsmoe::grouped {

// ----------------------------------------------------------------------------
// Pieces of a tile

// 8 rows and 8 columns, a pair of neighbouring values per lane: rows 64 * block + 8 * half + (0..8) of the warp's 16-row
// stripes, columns 8 * group + (0..8).
struct Fragment {
  int block, half, group;
};

constexpr int slot_bytes = 512;

// A unit is four fragments that the lanes of a quad share out: four groups of a row if there are as many, else what is
// left of several rows. Every fragment of Groups column groups and Blocks blocks is in one unit. The two halves of the
// same groups come one after the other: together their sums are whole quads of registers, free for 16-byte loads.
template <int Groups, int Blocks>
struct Units {
  static constexpr int fours = Groups / 4, twos = Groups % 4 / 2, ones = Groups % 2;
  static constexpr int count = Blocks * (2 * fours + twos) + ones;
  static_assert(ones == 0 || Blocks == 2, "a group left over needs four 8-row halves to make a unit");

  static constexpr int per_block = 2 * fours + twos;
  // Fragment `i` of the unit; its lane's own is number lane % 4.
  __host__ __device__ static constexpr Fragment fragment(int unit, int i) {
    const int block = unit / per_block, in_block = unit % per_block;
    if (block == Blocks) return {i / 2, i % 2, Groups - 1};
    if (in_block < 2 * fours) return {block, in_block % 2, in_block / 2 * 4 + i};
    return {block, i / 2, 4 * fours + i % 2};
  }
};

// Calls body(unit) with the unit's number as a type, so that every index into the sums is a constant.
template <int... I, class Body>
__device__ __forceinline__ void for_each(std::integer_sequence<int, I...>, Body body) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <class Units, class Body>
__device__ __forceinline__ void for_units(Body body) {
  for_each(std::make_integer_sequence<int, Units::count>{}, body);
}

// The sum at column c (0 or 1) of a lane's pair in a fragment.
template <int Blocks, int Count>
__device__ __forceinline__ float sum_at(const float (&sums)[Blocks][Count], Fragment f, int c) {
  return sums[f.block][4 * f.group + 2 * f.half + c];
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float low(uint32_t both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high(uint32_t both) { return __uint_as_float(both & 0xffff0000u); }

__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 w;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(at) : "memory");
  return w;
}

// The warp's slots in shared memory, through which the four lanes of a quad trade a unit of 32-bit words: each lane gives
// word i of fragment i and gets the four words of its own fragment. Slots are put, then all got, then may be put again.
class Trade {
 public:
  __device__ __forceinline__ explicit Trade(uint32_t slots) {
    const int lane = threadIdx.x % 32;
    // Fragments are 128 bytes apart and turned by two rows each: without the turn the four lanes of a quad would read from
    // the same banks.
    put_ = slots + lane / 8 * 128 + (lane % 8 + lane / 8 * 2) % 8 * 16;
    get_ = slots + lane % 4 * 128 + (lane / 4 + lane % 4 * 2) % 8 * 16;
    put_sums_ = slots + lane * 8;
    get_sums_ = slots + wide_fragment(lane % 4) + lane / 4 * 32;
  }

  __device__ __forceinline__ void put(int slot, const uint32_t (&w)[4]) const {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(put_ + slot * slot_bytes),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  }
  __device__ __forceinline__ uint4 get(int slot) const { return load_shared(get_ + slot * slot_bytes); }
  // Between puts and gets, and between gets and the next puts.
  __device__ __forceinline__ void turn() const { __syncwarp(); }

  // A unit's sums unrounded: take all slots. Got are four columns of the lane's eight, the first or the last of them.
  template <class Units, int Unit, int Blocks, int Count>
  __device__ __forceinline__ void put_sums(const float (&sums)[Blocks][Count]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Fragment f = Units::fragment(Unit, i);
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(put_sums_ + wide_fragment(i)), "f"(sum_at(sums, f, 0)),
                   "f"(sum_at(sums, f, 1))
                   : "memory");
    }
  }
  __device__ __forceinline__ void get_sums(int part, float (&row)[4]) const {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(row[0]), "=f"(row[1]), "=f"(row[2]), "=f"(row[3])
                 : "r"(get_sums_ + 16 * part)
                 : "memory");
  }

 private:
  // Where an unrounded fragment, 8 rows of 32 bytes, begins: four of them, read side by side, fall on different banks.
  __device__ __forceinline__ static constexpr int wide_fragment(int i) { return 256 * i + 16 * (i % 2) + 64 * (i / 2); }
  static_assert(256 * 4 + 16 + 64 <= warp_bytes, "a unit's sums take all slots");

  uint32_t put_, get_, put_sums_, get_sums_;
};

// A thread's view of one tile of a (rows, cols) matrix in memory. What lies past the matrix is neither read nor written.
struct Window {
  int row, col, rows, cols;

  __device__ __forceinline__ Window(int tile_row, int rows, int tile_col, int cols)
      : row(tile_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4), col(tile_col), rows(rows), cols(cols) {}

  __device__ __forceinline__ int row_of(Fragment f) const { return row + 64 * f.block + 8 * f.half; }
  // Rows can be past the end in weight gradients only: everywhere else a tile lies within the experts' rows.
  template <bool CheckRows>
  __device__ __forceinline__ bool has(Fragment f) const {
    return 8 * f.group < cols - col && (!CheckRows || row_of(f) < rows);
  }
  __device__ __forceinline__ index_t at(Fragment f) const {
    return static_cast<index_t>(row_of(f)) * cols + (col + 8 * f.group);
  }
};

// At a distance in bytes from the matrix's first element.
// Under a predicate, not a branch: where lanes part, the compiler serialises a warpgroup's products.
__device__ __forceinline__ void store_at(bf16* matrix, index_t distance, uint4 w, bool has) {
  asm volatile(
      "{\n"
      ".reg .pred has;\n"
      "setp.ne.b32 has, %0, 0;\n"
      "@has st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
      "}" ::"r"(static_cast<int>(has)),
      "l"(reinterpret_cast<char*>(matrix) + distance), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
      : "memory");
}
template <bool CheckRows = false>
__device__ __forceinline__ void store(bf16* matrix, const Window& window, Fragment mine, uint4 w) {
  store_at(matrix, 2 * window.at(mine), w, window.has<CheckRows>(mine));
}
// Zeros outside the matrix.
template <bool CheckRows = false>
__device__ __forceinline__ uint4 fetch(const bf16* matrix, const Window& window, Fragment mine) {
  uint4 w = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{\n"
      ".reg .pred has;\n"
      "setp.ne.b32 has, %4, 0;\n"
      "@has ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%5];\n"
      "}"
      : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w)
      : "r"(static_cast<int>(window.has<CheckRows>(mine))), "l"(matrix + window.at(mine)));
  return w;
}

// ----------------------------------------------------------------------------
// D as it is.

struct PlainArgs {
  bf16* d;
  int rows, cols;
};

struct Plain {
  using Args = PlainArgs;
  static constexpr int inputs = 0, warp_bytes = grouped::warp_bytes;
  __device__ __forceinline__ static void early(int, uint32_t, const Args&) {}

  template <int Blocks, int Count, class Ring>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Given& tile, uint32_t place, int first_row,
                                             uint32_t slots, Ring&, const Args& args) {
    using U = Units<Count / 4, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const Trade trade(slots);
    const int quad = threadIdx.x % 4;
    // As many units at a time as there are slots.
    constexpr int plain_slots = warp_bytes / slot_bytes;
    constexpr int batches = (U::count + plain_slots - 1) / plain_slots;
    for_each(std::make_integer_sequence<int, batches>{}, [&](auto number) {
      constexpr int first = decltype(number)::value * plain_slots;
      constexpr int here = U::count - first < plain_slots ? U::count - first : plain_slots;
#pragma unroll
      for (int slot = 0; slot < here; ++slot) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Fragment f = U::fragment(first + slot, i);
          w[i] = pack(sum_at(sums, f, 0), sum_at(sums, f, 1));
        }
        trade.put(slot, w);
      }
      trade.turn();
#pragma unroll
      for (int slot = 0; slot < here; ++slot) {
        store(args.d, window, U::fragment(first + slot, quad), trade.get(slot));
      }
      trade.turn();
    });
  }
};

// ----------------------------------------------------------------------------
// A weight gradient: D of each expert, up to two of them, or added to what is there, rounded once either way.

struct WeightArgs {
  bf16* d[2];
  int rows, cols;
  int accumulate;
};

struct WeightGradient {
  using Args = WeightArgs;
  static constexpr int inputs = 0, warp_bytes = grouped::warp_bytes;
  __device__ __forceinline__ static void early(int, uint32_t, const Args&) {}

  template <int Blocks, int Count, class Ring>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Given& tile, uint32_t place, int first_row,
                                             uint32_t slots, Ring&, const Args& args) {
    using U = Units<Count / 4, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const Trade trade(slots);
    const int quad = threadIdx.x % 4;
    bf16* d = args.d[tile.output()] + static_cast<index_t>(Given::expert(place)) * args.rows * args.cols;
    for_units<U>([&](auto number) {
      constexpr int unit = decltype(number)::value;
      const Fragment mine = U::fragment(unit, quad);
      trade.put_sums<U, unit>(sums);
      trade.turn();
      float l[4], r[4];
      trade.get_sums(0, l);
      trade.get_sums(1, r);
      trade.turn();
      if (args.accumulate) {
        const uint4 old = fetch<true>(d, window, mine);
        l[0] += low(old.x), l[1] += high(old.x), l[2] += low(old.y), l[3] += high(old.y);
        r[0] += low(old.z), r[1] += high(old.z), r[2] += low(old.w), r[3] += high(old.w);
      }
      store<true>(d, window, mine, make_uint4(pack(l[0], l[1]), pack(l[2], l[3]), pack(r[0], r[1]), pack(r[2], r[3])));
    });
  }
};

// ----------------------------------------------------------------------------
// Forward with an activation. What backward will read is written too, unless its pointer is null.

struct ForwardArgs {
  // GELU: pre and none; SwiGLU: gate and up. May be null.
  bf16* pre[2];
  bf16* act;
  int rows, cols;
};

template <class Gelu>
struct GeluForward {
  using Args = ForwardArgs;
  static constexpr int inputs = 0, warp_bytes = grouped::warp_bytes;
  __device__ __forceinline__ static void early(int, uint32_t, const Args&) {}

  template <int Blocks, int Count, class Ring>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Given& tile, uint32_t place, int first_row,
                                             uint32_t slots, Ring&, const Args& args) {
    using U = Units<Count / 4, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const Trade trade(slots);
    const int quad = threadIdx.x % 4;
    for_units<U>([&](auto number) {
      constexpr int unit = decltype(number)::value;
      uint32_t pre[4], act[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Fragment f = U::fragment(unit, i);
        const float left = sum_at(sums, f, 0), right = sum_at(sums, f, 1);
        pre[i] = pack(left, right);
        act[i] = pack(Gelu::value(left), Gelu::value(right));
      }
      trade.put(0, pre);
      trade.put(1, act);
      trade.turn();
      const Fragment mine = U::fragment(unit, quad);
      if (args.pre[0]) store(args.pre[0], window, mine, trade.get(0));
      store(args.act, window, mine, trade.get(1));
      trade.turn();
    });
  }
};

// The tile's left half is gate, its right half up, of the same columns.
struct SwigluForward {
  using Args = ForwardArgs;
  static constexpr int inputs = 0, warp_bytes = grouped::warp_bytes;
  __device__ __forceinline__ static void early(int, uint32_t, const Args&) {}

  template <int Blocks, int Count, class Ring>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Given& tile, uint32_t place, int first_row,
                                             uint32_t slots, Ring&, const Args& args) {
    constexpr int Groups = Count / 8;
    using U = Units<Groups, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const Trade trade(slots);
    const int quad = threadIdx.x % 4;
    for_units<U>([&](auto number) {
      constexpr int unit = decltype(number)::value;
      uint32_t gate[4], up[4], act[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Fragment f = U::fragment(unit, i);
        const Fragment g = {f.block, f.half, f.group + Groups};
        gate[i] = pack(sum_at(sums, f, 0), sum_at(sums, f, 1));
        up[i] = pack(sum_at(sums, g, 0), sum_at(sums, g, 1));
        act[i] = pack(swiglu<bf16>(sum_at(sums, f, 0), sum_at(sums, g, 0)).value,
                      swiglu<bf16>(sum_at(sums, f, 1), sum_at(sums, g, 1)).value);
      }
      trade.put(0, gate);
      trade.put(1, up);
      trade.put(2, act);
      trade.turn();
      const Fragment mine = U::fragment(unit, quad);
      if (args.pre[0]) {
        store(args.pre[0], window, mine, trade.get(0));
        store(args.pre[1], window, mine, trade.get(1));
      }
      store(args.act, window, mine, trade.get(2));
      trade.turn();
    });
  }
};

// ----------------------------------------------------------------------------
// Backward with an activation. The sums are the gradient of the activation for an output gradient that the rows' combine
// weights have not yet scaled: so the same operand serves every choice of a token, and the weight's own gradient, the
// product of that gradient and the activation summed over the row, falls out here.

struct BackwardArgs {
  // GELU: pre and none; SwiGLU: gate and up.
  const bf16* pre[2];
  bf16* d_pre[2];
  // The activation times the row's weight, the operand of the next weight gradient; null where it is not wanted.
  bf16* act;
  // (R): what scales a row, and (column tiles, R): each tile's share of the weights' gradient. Either may be null.
  const float* weight;
  float* partial;
  int rows, cols;
};

// What an element of the activation's input contributes.
struct Swiglus {
  static constexpr int inputs = 2;
  __device__ __forceinline__ static Swiglu at(float gate, float up) { return swiglu<bf16>(gate, up); }
};
template <class Gelu>
struct Gelus {
  static constexpr int inputs = 1;
  __device__ __forceinline__ static Swiglu at(float pre, float) {
    const ValueAndDerivative both = Gelu::both(pre);
    return {both.value, both.derivative, 0.0f};
  }
};

template <class Activation>
struct Backward {
  using Args = BackwardArgs;
  static constexpr int inputs = Activation::inputs;
  // The activation of a warp's 16 rows of a box, and the weights of its rows in the tile.
  static constexpr int act_bytes = 16 * input_cols * 2;
  static constexpr int warp_bytes = act_bytes + 32 * 4;

  // While the tile is multiplied a lane fetches the weight of one of its warp's rows.
  __device__ __forceinline__ static void early(int row, uint32_t slots, const Args& args) {
    const int lane = threadIdx.x % 32;
    const int own = row + lane / 16 * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
    const float weight = args.weight ? __ldg(args.weight + own) : 1.0f;
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(slots + act_bytes + 4 * lane), "f"(weight) : "memory");
  }

  // Box by box, of which a warp has 16 rows, 16 sums of every lane: so much work at a time that little waits for anything.
  // The inputs are read in the layout of the sums; what comes of them goes back to their place in shared memory, from where
  // it is stored by rows.
  template <int Blocks, int Count, class Ring>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Given& tile, uint32_t place, int first_row,
                                             uint32_t slots, Ring& ring, const Args& args) {
    const int lane = threadIdx.x % 32;
    const int row = tile.row + first_row + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const index_t stride = 2 * static_cast<index_t>(args.cols);
    const index_t at = row * stride + 2 * (tile.col + 8 * (lane % 4));
    const int right = args.cols - tile.col - 8 * (lane % 4);
    constexpr int across = 2 * Count / input_cols;
    static_assert(across * input_cols == 2 * Count, "tiles of whole boxes");
    // The weights are there.
    __syncwarp();
    for_each(std::make_integer_sequence<int, Blocks>{}, [&](auto block_number) {
      constexpr int block = decltype(block_number)::value;
      float partials[2] = {0.0f, 0.0f};
      for_each(std::make_integer_sequence<int, across>{}, [&](auto number) {
        constexpr int box = decltype(number)::value;
        run_box<block, 4 * box>(sums, at + 64 * block * stride, right, slots, ring, args, partials);
      });
      if (args.partial) {
        // The lanes of a quad have summed different columns of the same rows.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x = partials[half];
          x += __shfl_xor_sync(0xffffffffu, x, 1);
          x += __shfl_xor_sync(0xffffffffu, x, 2);
          // A cluster's second column tile may lie past the last one.
          if (lane % 4 == 0 && tile.col < args.cols) {
            args.partial[static_cast<index_t>(tile.col / (2 * Count)) * args.rows + row + 64 * block + 8 * half] = x;
          }
        }
      }
    });
  }

 private:
  // Where columns 8 * chunk + (0..8) of a row of a box lie: over rows of 64 bytes the copy engine swizzles chunks by half the
  // row's number. Rows 8 apart are swizzled alike.
  static constexpr int half_bytes = 8 * input_cols * 2;
  __device__ __forceinline__ static uint32_t swizzled(int row, int chunk) {
    return row * (input_cols * 2) + ((chunk ^ row / 2) & 3) * 16;
  }

  // The four groups of columns from `First` on; `at` is where the lane's row and columns begin, in bytes, for First = 0, and
  // `right` how many columns there are from there on.
  template <int Block, int First, int Blocks, int Count, class Ring>
  __device__ __forceinline__ static void run_box(float (&sums)[Blocks][Count], index_t at, int right, uint32_t slots,
                                                 Ring& ring, const Args& args, float (&partials)[2]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // For the instructions that move four fragments, lane l has the address of row l % 8 of fragment l / 8.
    const uint32_t by_fragment = swizzled(lane % 8, lane / 8), by_row = swizzled(lane / 4, lane % 4);
    const uint32_t box = ring.stages + ring.turn.stage * (inputs * input_bytes) + warp * (2 * half_bytes);
    ptx::mbarrier_wait(ring.full + 8 * ring.turn.stage, ring.turn.parity);
    uint32_t a[2][4], b[2][4];
    load_fragments(box + by_fragment, a[0]);
    if (inputs == 2) load_fragments(box + input_bytes + by_fragment, b[0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float weight;
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(weight)
                   : "r"(slots + act_bytes + 4 * (Block * 16 + half * 8 + lane / 4))
                   : "memory");
      if (half == 0) {
        load_fragments(box + by_fragment + half_bytes, a[1]);
        if (inputs == 2) load_fragments(box + input_bytes + by_fragment + half_bytes, b[1]);
      }
      uint32_t act[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Fragment f = {Block, half, First + i};
        const float left = sum_at(sums, f, 0), right_sum = sum_at(sums, f, 1);
        const Swiglu l = Activation::at(low(a[half][i]), inputs == 2 ? low(b[half][i]) : 0.0f);
        const Swiglu r = Activation::at(high(a[half][i]), inputs == 2 ? high(b[half][i]) : 0.0f);
        partials[half] += left * l.value;
        partials[half] += right_sum * r.value;
        const float left_d = left * weight, right_d = right_sum * weight;
        a[half][i] = pack(left_d * l.by_gate, right_d * r.by_gate);
        if (inputs == 2) b[half][i] = pack(left_d * l.by_up, right_d * r.by_up);
        act[i] = pack(weight * l.value, weight * r.value);
      }
      // Now: what is put off holds registers.
      asm volatile("" : "+f"(partials[half]));
      store_fragments(box + by_fragment + half * half_bytes, a[half]);
      if (inputs == 2) store_fragments(box + input_bytes + by_fragment + half * half_bytes, b[half]);
      store_fragments(slots + by_fragment + half * half_bytes, act);
    }
    __syncwarp();
    uint4 rows[3][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[0][half] = load_shared(box + by_row + half * half_bytes);
      if (inputs == 2) rows[1][half] = load_shared(box + input_bytes + by_row + half * half_bytes);
      rows[2][half] = load_shared(slots + by_row + half * half_bytes);
    }
    // The copy engine writes here next, after what this warp has written.
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ring.empty + 8 * ring.turn.stage);
    ring.turn.next();
    // Else the compiler works out the addresses of later boxes beforehand, and spills them.
    asm volatile("" : "+r"(ring.turn.stage), "+r"(ring.turn.parity), "+l"(at));
    const bool has = 8 * First < right;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const index_t here = at + 8 * half * (2 * static_cast<index_t>(args.cols)) + 16 * First;
      store_at(args.d_pre[0], here, rows[0][half], has);
      if (inputs == 2) store_at(args.d_pre[1], here, rows[1][half], has);
      store_at(args.act, here, rows[2][half], has && args.act != nullptr);
    }
  }

  __device__ __forceinline__ static void load_fragments(uint32_t at, uint32_t* w) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
  }
  __device__ __forceinline__ static void store_fragments(uint32_t at, const uint32_t* w) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  }
};

using SwigluBackward = Backward<Swiglus>;
template <class Gelu>
using GeluBackward = Backward<Gelus<Gelu>>;

}  // namespace fsmoe::grouped
