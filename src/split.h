#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "call.h"

namespace moba {

/// Splits `kv_heads` x `tokens` into slices whose scratch memory, `bytes(slice)`, is within the budget: first
/// between kv heads, then between tokens. Slices of the same heads follow each other, and the first slice is
/// the largest. `fits`, if given, is a further condition. Throws ArgumentError if no slice is within the
/// budget.
std::vector<WorkSlice> split_within(std::size_t budget, std::int64_t kv_heads, std::int64_t tokens,
                                    const std::function<std::size_t(const WorkSlice&)>& bytes,
                                    const std::function<bool(const WorkSlice&)>& fits = {});
/// The same, between kv heads alone.
std::vector<WorkSlice> split_heads_within(std::size_t budget, std::int64_t kv_heads, std::int64_t tokens,
                                          const std::function<std::size_t(const WorkSlice&)>& bytes);

}  // namespace moba
