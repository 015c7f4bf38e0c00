#include "groups.h"

#include <algorithm>

#include "argument_error.h"

namespace moba {
namespace {

[[noreturn]] void refuse_budget(std::size_t budget, std::size_t needed) {
  refuse("workspace_bytes", "expected at least ", needed, " for this call, got ", budget);
}

/// The largest count in [1, most] for which `bytes(count)`, which grows with it, fits; 0 when none does.
template <typename Bytes>
std::int64_t largest_within(std::size_t budget, std::int64_t most, Bytes&& bytes) {
  std::int64_t low = 0, high = most;
  while (low < high) {
    const std::int64_t middle = low + (high - low + 1) / 2;
    if (bytes(middle) <= budget) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace

std::vector<HeadGroup> groups_within(const Backend& backend, const Problem& problem, int threads,
                                     std::size_t budget) {
  if (problem.tokens == 0) return {};
  const auto bytes = [&](std::int64_t heads, std::int64_t tokens) {
    return backend.workspace(problem, {0, heads, 0, tokens}, threads);
  };
  std::int64_t heads =
      largest_within(budget, problem.kv_heads, [&](auto n) { return bytes(n, problem.tokens); });
  std::int64_t tokens = problem.tokens;
  if (heads == 0) {
    heads = 1;
    tokens = largest_within(budget, problem.tokens, [&](auto n) { return bytes(1, n); });
    if (tokens == 0) refuse_budget(budget, bytes(1, 1));
  }

  std::vector<HeadGroup> result;
  for (std::int64_t head = 0; head < problem.kv_heads; head += heads) {
    HeadGroup& group = result.emplace_back(HeadGroup{head, std::min(head + heads, problem.kv_heads), {}});
    for (std::int64_t token = 0; token < problem.tokens; token += tokens) {
      group.groups.push_back({group.head0, group.head1, token, std::min(token + tokens, problem.tokens)});
    }
  }
  return result;
}

std::vector<WorkSlice> head_groups_within(const Backend& backend, const Problem& problem, int threads,
                                          std::size_t budget) {
  const auto bytes = [&](std::int64_t heads) {
    return backend.workspace_backward(problem, {0, heads, 0, problem.tokens}, threads);
  };
  const std::int64_t heads = largest_within(budget, problem.kv_heads, bytes);
  if (heads == 0) refuse_budget(budget, bytes(1));
  std::vector<WorkSlice> result;
  for (std::int64_t head = 0; head < problem.kv_heads; head += heads) {
    result.push_back({head, std::min(head + heads, problem.kv_heads), 0, problem.tokens});
  }
  return result;
}

namespace {

/// Calls visit(sequence, query, packed token, query head, row of the selection) for every row of a group.
template <typename Visit>
void for_each_row(const Problem& problem, const Selection& selection, Visit&& visit) {
  const WorkSlice& group = selection.group;
  for (std::int64_t head = group.head0; head < group.head1; ++head) {
    for (const SequenceView& s : problem.sequences) {
      const auto [first, last] = group.queries_of(s);
      for (std::int64_t query = first; query < last; ++query) {
        std::int32_t* rows = selection.of(head, s.q_begin + query);
        for (std::int64_t g = 0; g < problem.heads_per_kv; ++g) {
          visit(s, query, head * problem.heads_per_kv + g, rows + g * selection.width);
        }
      }
    }
  }
}

std::int64_t public_width(const Problem& problem) {
  const std::int64_t blocks =
      problem.max_seqlen_k == 0 ? 0 : (problem.max_seqlen_k - 1) / problem.requested.block_size + 1;
  return std::min(problem.requested.top_k, blocks);
}

/// The blocks that one query selected, own block included, ascending, padded with -1.
void check_row(const Problem& problem, const SequenceView& s, std::int64_t query, const std::int32_t* row,
               std::int64_t width) {
  const std::int64_t own = problem.routing.causal ? problem.own_block(s, query) : problem.blocks(s);
  std::int64_t count = 0, last = -1;
  for (std::int64_t i = 0; i < width && row[i] >= 0; ++i) {
    if (problem.routing.causal && row[i] == own) continue;
    if (row[i] >= own || row[i] <= last || count == problem.width()) {
      refuse("saved.selection", "expected ascending blocks that query ", query, " may see, got block ",
             row[i]);
    }
    last = row[i];
    ++count;
  }
}

}  // namespace

void write_selection(const Problem& problem, const Selection& selection, std::int32_t* out) {
  const std::int64_t width = public_width(problem), block_size = problem.requested.block_size;
  const bool causal = problem.routing.causal;
  for_each_row(
      problem, selection,
      [&](const SequenceView& s, std::int64_t query, std::int64_t q_head, const std::int32_t* row) {
        std::int32_t* to = out + (q_head * problem.tokens + s.q_begin + query) * width;
        const std::int64_t p = s.position(query), own = p < 0 ? -1 : p / block_size;
        std::int64_t count = 0;
        if (problem.is_dense) {
          const std::int64_t seen = causal ? own + 1 : s.keys == 0 ? 0 : (s.keys - 1) / block_size + 1;
          for (; count < seen; ++count) to[count] = static_cast<std::int32_t>(count);
        } else {
          for (; count < selection.width && row[count] >= 0; ++count) to[count] = row[count];
          if (causal && own >= 0) to[count++] = static_cast<std::int32_t>(own);
        }
        std::fill(to + count, to + width, -1);
      });
}

void check_saved_selection(const Problem& problem, const std::int32_t* saved) {
  if (saved == nullptr || problem.is_dense || problem.width() == 0) return;
  const std::int64_t width = public_width(problem);
  for (std::int64_t head = 0; head < problem.q_heads; ++head) {
    for (const SequenceView& s : problem.sequences) {
      for (std::int64_t query = 0; query < s.queries; ++query) {
        check_row(problem, s, query, saved + (head * problem.tokens + s.q_begin + query) * width, width);
      }
    }
  }
}

Selection read_selection(const Problem& problem, const WorkSlice& group, const std::int32_t* saved,
                         Scratch& scratch) {
  Selection selection{group, problem.heads_per_kv, problem.width(), {}};
  const std::int64_t width = public_width(problem);
  selection.blocks =
      Buffer<std::int32_t>(scratch, group.heads() * group.tokens() * problem.heads_per_kv * selection.width);
  if (selection.width == 0) return selection;
  for_each_row(problem, selection,
               [&](const SequenceView& s, std::int64_t query, std::int64_t q_head, std::int32_t* row) {
                 std::int64_t count = 0;
                 if (problem.is_dense) {
                   if (s.keys > 0) row[count++] = 0;
                 } else {
                   const std::int32_t* from = saved + (q_head * problem.tokens + s.q_begin + query) * width;
                   const std::int64_t own = problem.routing.causal ? problem.own_block(s, query) : -1;
                   for (std::int64_t i = 0; i < width && from[i] >= 0; ++i) {
                     if (from[i] != own) row[count++] = from[i];
                   }
                 }
                 std::fill(row + count, row + selection.width, -1);
               });
  return selection;
}

void add_profile(const Execution& execution, const Profile& profile, const Scratch& scratch) {
  if (execution.profile == nullptr) return;
  Profile& total = *execution.profile;
  total.centroids += profile.centroids;
  total.gate += profile.gate;
  total.plan += profile.plan;
  total.attend += profile.attend;
  total.workspace_bytes = std::max(total.workspace_bytes, scratch.peak());
}

}  // namespace moba
