#include "split.h"

#include <algorithm>

#include "errors.h"

namespace moba {
namespace {

/// Returns the largest count in [1, max] that `fits`, if a count that fits implies smaller ones; 0 if none
/// does.
template <typename Fits>
std::int64_t largest_that(std::int64_t max, Fits&& fits) {
  std::int64_t low = 0, high = max;
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

[[noreturn]] void refuse_budget(std::size_t budget, std::size_t needed) {
  refuse("workspace_bytes", "expected at least ", needed, " for this call, got ", budget);
}

/// The size of as many equal parts of `all` as there are parts of `most`.
std::int64_t equal_parts(std::int64_t all, std::int64_t most) {
  const std::int64_t parts = (all + most - 1) / most;
  return parts == 0 ? most : (all + parts - 1) / parts;
}

/// Slices of at most `heads` kv heads and `step` tokens, at least one for every range of heads. They are
/// about equal, since a small one would leave most of a machine idle.
std::vector<WorkSlice> slices_of(std::int64_t kv_heads, std::int64_t heads, std::int64_t tokens,
                                 std::int64_t step) {
  heads = equal_parts(kv_heads, heads);
  step = equal_parts(tokens, step);
  std::vector<WorkSlice> slices;
  for (std::int64_t head = 0; head < kv_heads; head += heads) {
    std::int64_t token = 0;
    do {
      slices.push_back({head, std::min(head + heads, kv_heads), token, std::min(token + step, tokens)});
      token += step;
    } while (token < tokens);
  }
  return slices;
}

}  // namespace

std::vector<WorkSlice> split_within(std::size_t budget, std::int64_t kv_heads, std::int64_t tokens,
                                    const std::function<std::size_t(const WorkSlice&)>& bytes,
                                    const std::function<bool(const WorkSlice&)>& fits) {
  const auto can_be = [&](std::int64_t heads, std::int64_t count) {
    const WorkSlice slice{0, heads, 0, count};
    return (!fits || fits(slice)) && bytes(slice) <= budget;
  };
  const std::int64_t heads = largest_that(kv_heads, [&](std::int64_t n) { return can_be(n, tokens); });
  if (heads > 0) return slices_of(kv_heads, heads, tokens, std::max<std::int64_t>(tokens, 1));
  const std::int64_t step = largest_that(tokens, [&](std::int64_t n) { return can_be(1, n); });
  if (step == 0) refuse_budget(budget, bytes({0, 1, 0, 1}));
  return slices_of(kv_heads, 1, tokens, step);
}

std::vector<WorkSlice> split_heads_within(std::size_t budget, std::int64_t kv_heads, std::int64_t tokens,
                                          const std::function<std::size_t(const WorkSlice&)>& bytes) {
  const std::int64_t heads = largest_that(kv_heads, [&](std::int64_t n) {
    return bytes({0, n, 0, tokens}) <= budget;
  });
  if (heads == 0) refuse_budget(budget, bytes({0, 1, 0, tokens}));
  return slices_of(kv_heads, heads, tokens, std::max<std::int64_t>(tokens, 1));
}

}  // namespace moba
