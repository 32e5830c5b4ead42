// GELU's backward at the end of the product dy * w2 that it starts from, for the rows of every expert; see BackwardArgs.
//
//   grouped_data_gelu_bf16_{cols}(maps: dy | w2 | pre, tiles, args: d_pre, act, weight, partial)     with the error function
//   grouped_data_gelu_tanh_bf16_{cols}(...)                                                          GPT-2's form

#include "expert/grouped_epilogue.cuh"

namespace fsmoe::grouped {

using GeluErfBackward = GeluBackward<GeluErf<bf16>>;
using GeluTanhBackward = GeluBackward<GeluTanh<bf16>>;
template <int Cols>
using DataGeluShape = Shape<Major::K, Major::MN, Cols, Consumers::PingPong, 2, 1, 1, GeluErfBackward::inputs,
                            GeluErfBackward::warp_bytes>;
template <int Cols>
using DataGeluTiles = RowTiles<2, Cols>;

}  // namespace fsmoe::grouped

using namespace fsmoe::grouped;

FSMOE_GROUPED(grouped_data_gelu_bf16_192, DataGeluShape<192>, DataGeluTiles<192>, GeluErfBackward)
FSMOE_GROUPED(grouped_data_gelu_bf16_128, DataGeluShape<128>, DataGeluTiles<128>, GeluErfBackward)
FSMOE_GROUPED(grouped_data_gelu_tanh_bf16_192, DataGeluShape<192>, DataGeluTiles<192>, GeluTanhBackward)
FSMOE_GROUPED(grouped_data_gelu_tanh_bf16_128, DataGeluShape<128>, DataGeluTiles<128>, GeluTanhBackward)
