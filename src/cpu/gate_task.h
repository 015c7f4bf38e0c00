#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/gate_int8.h"

namespace moba::cpu {

/// Queries [q0, q1) of one sequence at one kv head.
struct GateTask {
  std::size_t sequence = 0;
  std::int64_t head = 0, q0 = 0, q1 = 0;
  const ScreenedMeans* screened = nullptr;  // null: score everything in f32
};

}  // namespace moba::cpu
