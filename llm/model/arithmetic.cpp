#include "llm/model/arithmetic.h"

#include "src/cpu_features.h"

namespace moba::llm {

Arithmetic best_arithmetic() {
  return {.dtype = bf16_unit() == Bf16Unit::none ? DType::f32 : DType::bf16, .int8_decode = true};
}

}  // namespace moba::llm
