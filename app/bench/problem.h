#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "app/bench/memory.h"
#include "app/bench/row.h"
#include "moba/attention.h"

namespace moba::bench {

/// Queries [first, first + count) of the sequence, found from row `offset` of the arrays on.
struct Slice {
  std::int64_t first = 0, count = 0, offset = 0;

  std::int64_t end() const { return first + count; }
};

/// The data of a setting and the parts of it that are computed and checked.
struct Problem {
  Setting setting;
  Conditions conditions;
  const Parallel& parallel;
  Array q{}, k{}, v{};
  /// The computed slices: everything, or evenly spread ranges.
  std::vector<Slice> slices{};
  /// The checked rows: short runs inside the slices.
  std::vector<Slice> probes{};

  std::int64_t queries() const { return slices.back().offset + slices.back().count; }
  std::int64_t group() const { return setting.heads / setting.kv_heads; }
  Tensor keys(std::int64_t end) const { return rows_of(k.tensor, 0, end); }
  Tensor values(std::int64_t end) const { return rows_of(v.tensor, 0, end); }
  Execution execution(Profile* profile = nullptr) const;
  Execution reference() const;
};

/// Slices and probes, with empty arrays. `choices`: what probes will be compared for; where rows see millions
/// of keys, fewer are.
Problem make_problem(const Setting& setting, const std::vector<Choice>& choices, const Conditions& conditions,
                     const Parallel& parallel);

Routing routing_of(const Choice& choice);
bool is_dense(const Choice& choice, std::int64_t tokens);

/// Selected blocks [heads, count, width] of a slice; empty for dense attention.
struct Blocks {
  Slice slice;
  std::int64_t width = 0;
  std::vector<std::int32_t> blocks;

  Blocks(const Problem& problem, const Choice& choice, const Slice& slice);
  std::int32_t* data() { return blocks.empty() ? nullptr : blocks.data(); }
  /// The choice of query `row` of the slice.
  std::span<const std::int32_t> of(std::int64_t head, std::int64_t row) const;
  /// The rows of `part`, which lies in the slice, at the width that its keys need.
  Blocks cut(const Problem& problem, const Choice& choice, const Slice& part) const;
};

/// Useful floating-point operations of a slice: 4 D for each selected and unmasked (query, key) pair, counted
/// from the blocks that were selected; 2 D for each (query, candidate block) where there is a choice.
Work work_of(const Problem& problem, const Choice& choice, const Blocks& blocks);
/// The same of all tokens, from the rule that a query selects as many complete blocks as it may.
Work whole_work(const Problem& problem, const Choice& choice);

}  // namespace moba::bench
