#pragma once

#include <cstdint>

#include "llm/formats/tensor.h"
#include "moba/tensor.h"

namespace moba::llm {

/// Converts rows [first, first + count) of `tensor` (its last dimension is a row) to f32, into `count *
/// row_length()` floats. Equal to `gguf.quants.dequantize` of PyPI's `gguf`, bit for bit.
void dequantise(const StoredTensor& tensor, std::int64_t first, std::int64_t count, float* out);
/// The same, rounded to the nearest bf16.
void dequantise(const StoredTensor& tensor, std::int64_t first, std::int64_t count, bfloat16* out);

}  // namespace moba::llm
