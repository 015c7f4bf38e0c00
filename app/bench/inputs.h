#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "app/bench/memory.h"
#include "app/bench/row.h"
#include "moba/attention.h"

namespace moba::bench {

/// Queries [first, first + count) of the sequence, at row `offset` of the arrays.
struct Slice {
  std::int64_t first = 0, count = 0, offset = 0;

  std::int64_t end() const { return first + count; }
};

/// The data of a setting, and the rows of it that are computed and checked.
struct Inputs {
  Setting setting;
  Conditions conditions;
  const Parallel& parallel;
  Array q{}, k{}, v{};
  /// The computed slices: all rows, or evenly spread ranges.
  std::vector<Slice> slices{};
  /// The checked rows: short runs inside the slices.
  std::vector<Slice> probes{};

  std::int64_t queries() const { return slices.back().offset + slices.back().count; }
  std::int64_t heads_per_kv() const { return setting.heads / setting.kv_heads; }
  Tensor keys(std::int64_t end) const { return rows_of(k.tensor, 0, end); }
  Tensor values(std::int64_t end) const { return rows_of(v.tensor, 0, end); }
  Execution execution(Profile* profile = nullptr) const;
  Execution reference() const;
};

/// Makes slices and probes, with empty arrays. The reference compares `variants` on the probes, so there are
/// fewer of them where rows see millions of keys.
Inputs make_inputs(const Setting& setting, const std::vector<Variant>& variants, const Conditions& conditions,
                   const Parallel& parallel);

Routing routing_of(const Variant& variant);
bool is_dense(const Variant& variant, std::int64_t tokens);

/// Selected blocks [heads, count, width] of a slice; empty for dense attention.
struct Blocks {
  Slice slice;
  std::int64_t width = 0;
  std::vector<std::int32_t> blocks;

  Blocks(const Inputs& inputs, const Variant& variant, const Slice& slice);
  std::int32_t* data() { return blocks.empty() ? nullptr : blocks.data(); }
  /// The blocks that query `row` of the slice selected.
  std::span<const std::int32_t> of(std::int64_t head, std::int64_t row) const;
  /// Returns the rows of `part`, which lies in the slice, at the width that its keys need.
  Blocks cut(const Inputs& inputs, const Variant& variant, const Slice& part) const;
};

/// Useful floating-point operations of a slice: 4 D for each selected and unmasked (query, key) pair, counted
/// from the blocks that were selected; 2 D for each (query, candidate block) where blocks are selected by
/// score.
Work work_of(const Inputs& inputs, const Variant& variant, const Blocks& blocks);
/// The same of all tokens, from the rule that a query selects as many complete blocks as it may.
Work whole_work(const Inputs& inputs, const Variant& variant);

}  // namespace moba::bench
