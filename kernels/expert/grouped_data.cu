// dx = dy * w for the rows dy of every expert: the data gradient of y = x * w^T.
//
//   grouped_data_bf16_{cols}(maps: dy | w, tiles, args: dx)            rows (R, N) and (R, K), weights (E, N, K)
//   grouped_data_pairs_bf16_{cols}(maps: dy1, dy2 | w1, w2, ...)       dx = dy1 * w1 + dy2 * w2, in one sum

#include "expert/grouped_epilogue.cuh"

namespace fsmoe::grouped {

template <int Cols, Consumers consumers, int Pairs>
using DataShape = Shape<Major::K, Major::MN, Cols, consumers, 2, Pairs>;
template <int Cols>
using One = DataShape<Cols, Consumers::PingPong, 1>;
using Two = DataShape<192, Consumers::PingPong, 2>;
// With much to multiply per tile, the wider tile gains more than the pause for its results costs: 3% at 4096 columns and a
// depth of 2 x 14336; at 2 x 1024 it loses 6%.
using TwoWide = DataShape<256, Consumers::Cooperative, 2>;
template <int Cols>
using DataTiles = RowTiles<2, Cols>;

}  // namespace fsmoe::grouped

using namespace fsmoe::grouped;

FSMOE_GROUPED(grouped_data_bf16_208, One<208>, DataTiles<208>, Plain)
FSMOE_GROUPED(grouped_data_bf16_192, One<192>, DataTiles<192>, Plain)
FSMOE_GROUPED(grouped_data_pairs_bf16_192, Two, DataTiles<192>, Plain)
FSMOE_GROUPED(grouped_data_pairs_bf16_256, TwoWide, DataTiles<256>, Plain)
