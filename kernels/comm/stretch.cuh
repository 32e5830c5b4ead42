// What the kernels of collectives are told: which memory is whose.
#pragma once

#include "common/vector.cuh"

namespace fsmoe {

struct Stretch {
  const uint8_t* from;
  uint8_t* to;
  index_t bytes;
};

constexpr int most_stretches = 64;

struct Stretches {
  Stretch of[most_stretches];
};

constexpr int most_parts = 64;

struct Parts {
  const void* of[most_parts];
};

}  // namespace fsmoe
