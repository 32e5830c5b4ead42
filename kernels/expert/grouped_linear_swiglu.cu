// gate = x * w1^T, up = x * w3^T and act = silu(gate) * up for the rows x of every expert, in one product: a tile is cols / 2
// columns of either weight, so that gate and up of a column meet in one thread.
//
//   grouped_linear_swiglu_bf16_{cols}(maps: x | w1, w3, tiles, args: gate, up, act)

#include "expert/grouped_epilogue.cuh"

namespace fsmoe::grouped {

template <int Cols>
using LinearSwigluShape = Shape<Major::K, Major::K, Cols, Consumers::PingPong, 2, 1, 2>;
template <int Cols>
using LinearSwigluTiles = RowTiles<2, Cols / 2>;

}  // namespace fsmoe::grouped

using namespace fsmoe::grouped;

FSMOE_GROUPED(grouped_linear_swiglu_bf16_208, LinearSwigluShape<208>, LinearSwigluTiles<208>, SwigluForward)
FSMOE_GROUPED(grouped_linear_swiglu_bf16_192, LinearSwigluShape<192>, LinearSwigluTiles<192>, SwigluForward)
