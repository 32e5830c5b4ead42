// y = x * w^T for the rows x of every expert: the down projection's forward.
//
//   grouped_linear_bf16_{cols}(maps: x | w, tiles, args: y)        rows (R, K) and (R, N), weights (E, N, K)
//
// cols is a tile's width: the less of the last tile lies past N the better.

#include "expert/grouped_epilogue.cuh"

namespace fsmoe::grouped {

template <int Cols>
using LinearShape = Shape<Major::K, Major::K, Cols, Consumers::PingPong, 2>;
template <int Cols>
using LinearTiles = RowTiles<2, Cols>;

}  // namespace fsmoe::grouped

using namespace fsmoe::grouped;

FSMOE_GROUPED(grouped_linear_bf16_208, LinearShape<208>, LinearTiles<208>, Plain)
FSMOE_GROUPED(grouped_linear_bf16_192, LinearShape<192>, LinearTiles<192>, Plain)
