#pragma once

#include "moba/attention.h"

namespace moba::llm {

/// Makes the library choose the instruction set, which MOBA_CPU_TARGET may name, before this code's first
/// kernel runs.
inline void choose_instruction_set() {
  [[maybe_unused]] static const bool is_chosen = !cpu_target().empty();
}

}  // namespace moba::llm
