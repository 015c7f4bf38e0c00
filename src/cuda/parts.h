#pragma once

#include <functional>
#include <vector>

#include "cuda/stages.h"

namespace moba::cuda {

/// Scratch memory of a call, unless told otherwise.
constexpr std::size_t kWorkspace = std::size_t{1} << 30;

/// Cuts a task into parts whose memory, `bytes(part)`, fits the budget: first between kv heads, then between
/// tokens. The first part needs most. Throws Error when even the smallest does not fit.
std::vector<WorkSlice> parts_within(std::string_view function, const Task& task, const Execution& execution,
                                    const std::function<std::size_t(const WorkSlice&)>& bytes);

}  // namespace moba::cuda
