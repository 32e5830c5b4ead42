// dw = dy^T * x over the rows of every expert, or dw += it: the weight gradient of y = x * w^T, of two weights with the same
// x if wanted.
//
//   grouped_weight_bf16_{cols}(maps: dy1, dy2 | x, tiles, args: dw1, dw2, accumulate)     rows (R, N) and (R, K), dw (E, N, K)

#include "expert/grouped_epilogue.cuh"

namespace fsmoe::grouped {

template <int Cols, Consumers consumers>
using WeightShape = Shape<Major::MN, Major::MN, Cols, consumers, 2>;
template <int Cols>
using PingPong = WeightShape<Cols, Consumers::PingPong>;
template <int Cols>
using Cooperative = WeightShape<Cols, Consumers::Cooperative>;
template <int Cols>
using Tiles = WeightTiles<2, Cols>;

}  // namespace fsmoe::grouped

using namespace fsmoe::grouped;

FSMOE_GROUPED(grouped_weight_bf16_192, PingPong<192>, Tiles<192>, WeightGradient)
FSMOE_GROUPED(grouped_weight_bf16_208, PingPong<208>, Tiles<208>, WeightGradient)
FSMOE_GROUPED(grouped_weight_bf16_256, Cooperative<256>, Tiles<256>, WeightGradient)
