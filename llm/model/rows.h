/// Loops over the rows of a tensor, shared by the element-wise parts of inference and training.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

// One source, compiled for each instruction set and chosen when the program starts.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOBA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOBA_CLONES
#endif

namespace moba::llm {

/// Returns the rows of a task: fewer than 16384 elements are faster on one thread.
inline std::int64_t rows_per_task(std::int64_t width) {
  return std::max<std::int64_t>(1, 16384 / width);
}

/// Calls `body(first, last)` for ranges of `rows` rows of `width` elements, in parallel.
template <typename Body>
void for_rows(std::int64_t rows, std::int64_t width, const Body& body) {
  at::parallel_for(0, rows, rows_per_task(width), body);
}

}  // namespace moba::llm
