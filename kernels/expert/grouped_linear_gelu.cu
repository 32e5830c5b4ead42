// pre = x * w^T and act = gelu(pre) for the rows x of every expert.
//
//   grouped_linear_gelu_bf16_{cols}(maps: x | w, tiles, args: pre, act)          with the error function
//   grouped_linear_gelu_tanh_bf16_{cols}(...)                                    GPT-2's form

#include "expert/grouped_epilogue.cuh"

namespace fsmoe::grouped {

template <int Cols>
using LinearGeluShape = Shape<Major::K, Major::K, Cols, Consumers::PingPong, 2>;
template <int Cols>
using LinearGeluTiles = RowTiles<2, Cols>;
using GeluErfForward = GeluForward<GeluErf<bf16>>;
using GeluTanhForward = GeluForward<GeluTanh<bf16>>;

}  // namespace fsmoe::grouped

using namespace fsmoe::grouped;

FSMOE_GROUPED(grouped_linear_gelu_bf16_208, LinearGeluShape<208>, LinearGeluTiles<208>, GeluErfForward)
FSMOE_GROUPED(grouped_linear_gelu_tanh_bf16_208, LinearGeluShape<208>, LinearGeluTiles<208>, GeluTanhForward)
