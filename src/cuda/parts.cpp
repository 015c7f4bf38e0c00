#include "cuda/parts.h"

#include <algorithm>
#include <limits>

namespace moba::cuda {
namespace {

/// The largest count in [1, most] that `fits`; 0 when none does.
template <typename Fits>
std::int64_t largest_that(std::int64_t most, Fits&& fits) {
  std::int64_t low = 0, high = most;
  while (low < high) {
    const std::int64_t middle = low + (high - low + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace

std::vector<WorkSlice> parts_within(std::string_view function, const Task& task, const Execution& execution,
                                    const std::function<std::size_t(const WorkSlice&)>& bytes) {
  const std::size_t budget = execution.workspace_bytes.value_or(kWorkspace);
  const auto fits = [&](std::int64_t heads, std::int64_t tokens) {
    const WorkSlice part{0, heads, 0, tokens};
    return slots_are_countable(task, part) && bytes(part) <= budget;
  };
  std::int64_t heads = largest_that(task.kv_heads, [&](std::int64_t n) { return fits(n, task.tokens); });
  std::int64_t tokens = task.tokens;
  if (heads == 0) {
    heads = 1;
    tokens = largest_that(task.tokens, [&](std::int64_t n) { return fits(1, n); });
  }
  if (tokens == 0) {
    throw Error(std::string(function) + ": workspace_bytes: expected at least " +
                std::to_string(bytes({0, 1, 0, 1})) + " for this call, got " + std::to_string(budget));
  }
  std::vector<WorkSlice> parts;
  for (std::int64_t head = 0; head < task.kv_heads; head += heads) {
    for (std::int64_t token = 0; token < task.tokens; token += tokens) {
      parts.push_back(
          {head, std::min(head + heads, task.kv_heads), token, std::min(token + tokens, task.tokens)});
    }
  }
  return parts;
}

}  // namespace moba::cuda
