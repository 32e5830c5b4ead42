// What happens to a tile's sums: the activation, and the way to memory.
//
// A lane's sums of one row are two columns of every eight (ptx/wgmma.cuh): stored as they lie, a warp would write 16 bytes
// here and there. So the four lanes that share a row trade: each gives the others their pairs of three column groups of
// eight and gets all of one, which is 16 bytes, and four such lie side by side. It takes four shuffles per 16 bytes and no
// shared memory, which the ring of stages has to itself. Inputs of an activation's backward come in the same way.
#pragma once

#include <utility>

#include "expert/activation.cuh"
#include "expert/grouped_gemm.cuh"

namespace fsmoe::grouped {

// ----------------------------------------------------------------------------
// Pieces of a tile

// A fragment is 8 rows and 8 columns, a pair of neighbouring values per lane: rows 64 * block + 8 * half + (0..8) of the
// warp's 16-row stripes, columns 8 * group + (0..8).
struct Fragment {
  int block, half, group;
};

// Four fragments that the lanes of a quad trade: four groups of a row if there are as many, else what is left of several
// rows. Every fragment of Groups column groups and Blocks blocks occurs in one unit.
template <int Groups, int Blocks>
struct Units {
  static constexpr int fours = Groups / 4, twos = Groups % 4 / 2, ones = Groups % 2;
  static constexpr int count = Blocks * (2 * fours + twos) + ones;
  static_assert(ones == 0 || Blocks == 2, "a group left over needs four 8-row halves to make a unit");

  // Fragment `i` of unit `unit`.
  __host__ __device__ static constexpr Fragment fragment(int unit, int i) {
    if (unit < Blocks * 2 * fours) {
      return {unit / (2 * fours), unit / fours % 2, unit % fours * 4 + i};
    }
    if (unit < Blocks * (2 * fours + twos)) return {unit - Blocks * 2 * fours, i / 2, 4 * fours + i % 2};
    return {i / 2, i % 2, Groups - 1};
  }
  // The same for a lane's own number: no table, which would go through memory.
  __device__ __forceinline__ static Fragment mine(int unit, int quad) { return fragment(unit, quad); }
};

// Four registers of four lanes as a 4 x 4 matrix, transposed. Its own inverse.
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t& low = w[bit == 1 ? 2 * pair : pair];
      uint32_t& high = w[bit == 1 ? 2 * pair + 1 : pair + 2];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
      low = upper ? got : low;
      high = upper ? high : got;
    }
  }
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float low(uint32_t both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high(uint32_t both) { return __uint_as_float(both & 0xffff0000u); }

// A thread's view of one (rows, cols) matrix tile in memory. Rows and columns past the matrix are neither read nor written.
struct Window {
  // Of the thread's first row, and the elements from one row to the next.
  int row, rows;
  index_t stride;
  int col, cols;

  __device__ __forceinline__ Window(int tile_row, int rows, int tile_col, int cols)
      : row(tile_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4), rows(rows), stride(cols), col(tile_col),
        cols(cols) {}

  __device__ __forceinline__ int row_of(Fragment f) const { return row + 64 * f.block + 8 * f.half; }
  __device__ __forceinline__ bool has(Fragment f) const { return row_of(f) < rows && col + 8 * f.group < cols; }
  __device__ __forceinline__ index_t at(Fragment f) const { return row_of(f) * stride + col + 8 * f.group; }
};

__device__ __forceinline__ void store(bf16* matrix, const Window& window, Fragment mine, uint32_t (&w)[4]) {
  quad_transpose(w);
  if (window.has(mine)) *reinterpret_cast<uint4*>(matrix + window.at(mine)) = make_uint4(w[0], w[1], w[2], w[3]);
}

// Asks for what `spread` will trade; zeros outside the matrix.
__device__ __forceinline__ uint4 fetch(const bf16* matrix, const Window& window, Fragment mine) {
  return window.has(mine) ? *reinterpret_cast<const uint4*>(matrix + window.at(mine)) : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ void spread(uint4 fetched, uint32_t (&w)[4]) {
  w[0] = fetched.x, w[1] = fetched.y, w[2] = fetched.z, w[3] = fetched.w;
  quad_transpose(w);
}

// Calls body(unit) with the unit's number as a type, so that every index into the sums is a constant.
template <int... I, class Body>
__device__ __forceinline__ void for_units(std::integer_sequence<int, I...>, Body body) {
  (body(std::integral_constant<int, I>{}), ...);
}

// The sum at column c (0 or 1) of a lane's pair in a fragment.
template <int Blocks, int Count>
__device__ __forceinline__ float sum_at(const float (&sums)[Blocks][Count], Fragment f, int c) {
  return sums[f.block][4 * f.group + 2 * f.half + c];
}

// ----------------------------------------------------------------------------
// D as it is, or added to what is there (once rounded, either way). Up to two outputs.

struct PlainArgs {
  bf16* d[2];
  int rows, cols;
  // From one expert's output to the next one's: 0 where the experts' rows lie in one output.
  index_t expert_stride;
  int accumulate;
};

struct Plain {
  using Args = PlainArgs;

  template <int Blocks, int Count>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Tile& tile, int first_row,
                                             const Args& args) {
    constexpr int Groups = Count / 4;
    using U = Units<Groups, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const int quad = threadIdx.x % 4;
    bf16* d = args.d[tile.output] + tile.expert * args.expert_stride;
    for_units(std::make_integer_sequence<int, U::count>{}, [&](auto number) {
      constexpr int unit = decltype(number)::value;
      const Fragment mine = U::mine(unit, quad);
      uint32_t w[4];
      if (args.accumulate) {
        spread(fetch(d, window, mine), w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Fragment f = U::fragment(unit, i);
          w[i] = pack(low(w[i]) + sum_at(sums, f, 0), high(w[i]) + sum_at(sums, f, 1));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Fragment f = U::fragment(unit, i);
          w[i] = pack(sum_at(sums, f, 0), sum_at(sums, f, 1));
        }
      }
      store(d, window, mine, w);
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

  template <int Blocks, int Count>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Tile& tile, int first_row,
                                             const Args& args) {
    using U = Units<Count / 4, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const int quad = threadIdx.x % 4;
    for_units(std::make_integer_sequence<int, U::count>{}, [&](auto number) {
      constexpr int unit = decltype(number)::value;
      const Fragment mine = U::mine(unit, quad);
      uint32_t w[4];
      if (args.pre[0]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Fragment f = U::fragment(unit, i);
          w[i] = pack(sum_at(sums, f, 0), sum_at(sums, f, 1));
        }
        store(args.pre[0], window, mine, w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Fragment f = U::fragment(unit, i);
        w[i] = pack(Gelu::value(sum_at(sums, f, 0)), Gelu::value(sum_at(sums, f, 1)));
      }
      store(args.act, window, mine, w);
    });
  }
};

// The tile's left half is gate, its right half up, of the same columns.
struct SwigluForward {
  using Args = ForwardArgs;

  template <int Blocks, int Count>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Tile& tile, int first_row,
                                             const Args& args) {
    constexpr int Groups = Count / 8;
    using U = Units<Groups, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const int quad = threadIdx.x % 4;
    for_units(std::make_integer_sequence<int, U::count>{}, [&](auto number) {
      constexpr int unit = decltype(number)::value;
      const Fragment mine = U::mine(unit, quad);
      uint32_t w[4];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (args.pre[side]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Fragment f = U::fragment(unit, i);
            f.group += side * Groups;
            w[i] = pack(sum_at(sums, f, 0), sum_at(sums, f, 1));
          }
          store(args.pre[side], window, mine, w);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Fragment gate = U::fragment(unit, i);
        const Fragment up = {gate.block, gate.half, gate.group + Groups};
        w[i] = pack(swiglu<bf16>(sum_at(sums, gate, 0), sum_at(sums, up, 0)).value,
                    swiglu<bf16>(sum_at(sums, gate, 1), sum_at(sums, up, 1)).value);
      }
      store(args.act, window, mine, w);
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
  // (R): what scales a row, and (column tiles, R): each tile's share of the weights' gradient. Both null: rows unscaled.
  const float* weight;
  float* partial;
  int rows, cols;
};

// Per row of a thread: block, half.
template <int Blocks>
struct RowValues {
  float v[Blocks][2];
};

template <int Blocks>
__device__ __forceinline__ RowValues<Blocks> load_weights(const BackwardArgs& args, const Window& window) {
  RowValues<Blocks> rows;
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.v[block][half] = args.weight ? __ldg(args.weight + window.row_of({block, half, 0})) : 1.0f;
    }
  }
  return rows;
}

// Every lane of a quad has summed its own columns of the same rows.
template <int Blocks>
__device__ __forceinline__ void store_partials(const BackwardArgs& args, const Window& window, const Tile& tile,
                                               RowValues<Blocks>& rows) {
  if (!args.partial) return;
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = rows.v[block][half];
      x += __shfl_xor_sync(0xffffffffu, x, 1);
      x += __shfl_xor_sync(0xffffffffu, x, 2);
      // A cluster's second column tile may lie past the last one.
      if (threadIdx.x % 4 == 0 && tile.col < args.cols) {
        args.partial[static_cast<index_t>(tile.col_tile) * args.rows + window.row_of({block, half, 0})] = x;
      }
    }
  }
}

struct SwigluBackward {
  using Args = BackwardArgs;

  template <int Blocks, int Count>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Tile& tile, int first_row,
                                             const Args& args) {
    using U = Units<Count / 4, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const int quad = threadIdx.x % 4;
    const RowValues<Blocks> weights = load_weights<Blocks>(args, window);
    RowValues<Blocks> partials = {};
    // The next unit's inputs are on their way while this one's are used.
    uint4 next_gate = fetch(args.pre[0], window, U::mine(0, quad));
    uint4 next_up = fetch(args.pre[1], window, U::mine(0, quad));
    for_units(std::make_integer_sequence<int, U::count>{}, [&](auto number) {
      constexpr int unit = decltype(number)::value;
      const Fragment mine = U::mine(unit, quad);
      uint32_t gate[4], up[4], act[4];
      spread(next_gate, gate);
      spread(next_up, up);
      if constexpr (unit + 1 < U::count) {
        next_gate = fetch(args.pre[0], window, U::mine(unit + 1, quad));
        next_up = fetch(args.pre[1], window, U::mine(unit + 1, quad));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Fragment f = U::fragment(unit, i);
        const float weight = weights.v[f.block][f.half];
        const Swiglu left = swiglu<bf16>(low(gate[i]), low(up[i]));
        const Swiglu right = swiglu<bf16>(high(gate[i]), high(up[i]));
        const float d_left = sum_at(sums, f, 0), d_right = sum_at(sums, f, 1);
        partials.v[f.block][f.half] += d_left * left.value + d_right * right.value;
        const float w_left = weight * d_left, w_right = weight * d_right;
        gate[i] = pack(w_left * left.by_gate, w_right * right.by_gate);
        up[i] = pack(w_left * left.by_up, w_right * right.by_up);
        act[i] = pack(weight * left.value, weight * right.value);
      }
      store(args.d_pre[0], window, mine, gate);
      store(args.d_pre[1], window, mine, up);
      if (args.act) store(args.act, window, mine, act);
    });
    store_partials<Blocks>(args, window, tile, partials);
  }
};

template <class Gelu>
struct GeluBackward {
  using Args = BackwardArgs;

  template <int Blocks, int Count>
  __device__ __forceinline__ static void run(float (&sums)[Blocks][Count], const Tile& tile, int first_row,
                                             const Args& args) {
    using U = Units<Count / 4, Blocks>;
    const Window window(tile.row + first_row, args.rows, tile.col, args.cols);
    const int quad = threadIdx.x % 4;
    const RowValues<Blocks> weights = load_weights<Blocks>(args, window);
    RowValues<Blocks> partials = {};
    uint4 next_pre = fetch(args.pre[0], window, U::mine(0, quad));
    for_units(std::make_integer_sequence<int, U::count>{}, [&](auto number) {
      constexpr int unit = decltype(number)::value;
      const Fragment mine = U::mine(unit, quad);
      uint32_t pre[4], act[4];
      spread(next_pre, pre);
      if constexpr (unit + 1 < U::count) next_pre = fetch(args.pre[0], window, U::mine(unit + 1, quad));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Fragment f = U::fragment(unit, i);
        const float weight = weights.v[f.block][f.half];
        const ValueAndDerivative left = Gelu::both(low(pre[i])), right = Gelu::both(high(pre[i]));
        const float d_left = sum_at(sums, f, 0), d_right = sum_at(sums, f, 1);
        partials.v[f.block][f.half] += d_left * left.value + d_right * right.value;
        pre[i] = pack(weight * d_left * left.derivative, weight * d_right * right.derivative);
        act[i] = pack(weight * left.value, weight * right.value);
      }
      store(args.d_pre[0], window, mine, pre);
      if (args.act) store(args.act, window, mine, act);
    });
    store_partials<Blocks>(args, window, tile, partials);
  }
};

}  // namespace fsmoe::grouped
