// SwiGLU's backward at the end of the product dy * w2 that it starts from, for the rows of every expert; see BackwardArgs.
//
//   grouped_data_swiglu_bf16_{cols}(maps: dy | w2 | gate, up, tiles, args: d_gate, d_up, act, weight, partial)

#include "expert/grouped_epilogue.cuh"

namespace fsmoe::grouped {

template <int Cols>
using DataSwigluShape = Shape<Major::K, Major::MN, Cols, Consumers::PingPong, 2, 1, 1, SwigluBackward::inputs,
                              SwigluBackward::warp_bytes>;
template <int Cols>
using DataSwigluTiles = RowTiles<2, Cols>;

}  // namespace fsmoe::grouped

using namespace fsmoe::grouped;

FSMOE_GROUPED(grouped_data_swiglu_bf16_192, DataSwigluShape<192>, DataSwigluTiles<192>, SwigluBackward)
FSMOE_GROUPED(grouped_data_swiglu_bf16_128, DataSwigluShape<128>, DataSwigluTiles<128>, SwigluBackward)
