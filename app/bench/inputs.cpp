#include "app/bench/inputs.h"

#include <algorithm>
#include <cmath>

namespace moba::bench {
namespace {

constexpr std::int64_t kMaxSlices = 8, kProbes = 8, kProbeRows = 8;
/// A shorter slice brings a block of 4096 of a million tokens too few rows to be worth packing, which says
/// nothing about the whole.
constexpr std::int64_t kSliceRows = 65536;
/// The reference compares about a million and a half (query, key) pairs a second.
constexpr std::int64_t kProbePairs = std::int64_t{1} << 24;
constexpr std::size_t kReferenceWorkspace = std::size_t{1} << 30;

/// Evenly spread: the middle of each stretch of the sequence.
std::vector<Slice> slices_of(const Setting& setting) {
  if (setting.share >= 1) return {{0, setting.tokens, 0}};
  std::vector<Slice> slices;
  const auto all = std::llround(setting.share * static_cast<double>(setting.tokens));
  const std::int64_t number = std::clamp<std::int64_t>(all / kSliceRows, 1, kMaxSlices),
                     stretch = setting.tokens / number;
  const auto count = std::clamp<std::int64_t>(std::llround(setting.share * static_cast<double>(stretch)),
                                              std::min(kProbeRows, stretch), stretch);
  for (std::int64_t i = 0; i < number; ++i)
    slices.push_back({i * stretch + (stretch - count) / 2, count, i * count});
  return slices;
}

/// Rows of a probe, by how many keys a row sees under the widest of the variants.
std::int64_t probe_rows(const Setting& setting, const std::vector<Variant>& variants) {
  std::int64_t keys = 1;
  for (const Variant& variant : variants)
    keys = std::max(
        keys, is_dense(variant, setting.tokens) ? setting.tokens / 2 : variant.topk * variant.chunk_size);
  return std::clamp<std::int64_t>(kProbePairs / kProbes / keys, 1, kProbeRows);
}

std::vector<Slice> probes_of(const std::vector<Slice>& slices, std::int64_t max_rows) {
  std::vector<Slice> probes;
  const auto each = kProbes / static_cast<std::int64_t>(slices.size());
  for (const Slice& slice : slices) {
    const std::int64_t rows = std::min(max_rows, slice.count), room = slice.count - rows;
    for (std::int64_t i = 0; i < each; ++i) {
      const std::int64_t at = each == 1 ? room : room * i / (each - 1);
      if (!probes.empty() && slice.first + at < probes.back().end()) continue;  // too few rows for all
      probes.push_back({slice.first + at, rows, slice.offset + at});
    }
  }
  return probes;
}

}  // namespace

Execution Inputs::execution(Profile* profile) const {
  return {.parallel = parallel, .workspace_bytes = conditions.workspace_bytes, .profile = profile};
}

Execution Inputs::reference() const {
  return {.backend = "reference", .parallel = parallel, .workspace_bytes = kReferenceWorkspace};
}

Inputs make_inputs(const Setting& setting, const std::vector<Variant>& variants, const Conditions& conditions,
                   const Parallel& parallel) {
  Inputs inputs{.setting = setting, .conditions = conditions, .parallel = parallel};
  inputs.slices = slices_of(setting);
  inputs.probes = probes_of(inputs.slices, probe_rows(setting, variants));
  return inputs;
}

Routing routing_of(const Variant& variant) {
  return variant.topk == 0 ? Routing::full()
                           : Routing{.block_size = variant.chunk_size, .top_k = variant.topk};
}

bool is_dense(const Variant& variant, std::int64_t tokens) {
  return variant.topk == 0 || (tokens - 1) / variant.chunk_size < variant.topk;
}

Blocks::Blocks(const Inputs& inputs, const Variant& variant, const Slice& part) : slice(part) {
  if (is_dense(variant, inputs.setting.tokens)) return;
  width = selection_width(one_sequence(slice.count, slice.end()), routing_of(variant));
  blocks.resize(static_cast<std::size_t>(inputs.setting.heads * slice.count * width));
}

std::span<const std::int32_t> Blocks::of(std::int64_t head, std::int64_t row) const {
  const auto size = static_cast<std::size_t>(width);
  return std::span(blocks).subspan(static_cast<std::size_t>(head * slice.count + row) * size, size);
}

Blocks Blocks::cut(const Inputs& inputs, const Variant& variant, const Slice& part) const {
  Blocks result(inputs, variant, part);
  auto to = result.blocks.begin();
  for (std::int64_t head = 0; head < inputs.setting.heads && width > 0; ++head) {
    for (std::int64_t row = 0; row < part.count; ++row) {
      const auto from = of(head, part.first - slice.first + row);
      to = std::copy_n(from.begin(), result.width, to);
    }
  }
  return result;
}

Work work_of(const Inputs& inputs, const Variant& variant, const Blocks& blocks) {
  const Slice& slice = blocks.slice;
  const std::int64_t size = variant.chunk_size;
  double pairs = 0, scored = 0;
  for (std::int64_t row = 0; row < slice.count; ++row) {
    const std::int64_t position = slice.first + row, own = position / size;
    if (blocks.width == 0) {
      pairs += static_cast<double>(inputs.setting.heads * (position + 1));
      continue;
    }
    if (own >= variant.topk && variant.topk > 1) scored += static_cast<double>(inputs.setting.heads * own);
    for (std::int64_t head = 0; head < inputs.setting.heads; ++head) {
      for (const std::int32_t block : blocks.of(head, row)) {
        if (block >= 0) pairs += static_cast<double>(block == own ? position + 1 - own * size : size);
      }
    }
  }
  const auto depth = static_cast<double>(inputs.setting.head_dim);
  return {.attention_flops = 4 * depth * pairs, .gate_flops = 2 * depth * scored};
}

Work whole_work(const Inputs& inputs, const Variant& variant) {
  const bool dense = is_dense(variant, inputs.setting.tokens);
  const std::int64_t size = variant.chunk_size;
  double pairs = 0, scored = 0;
  for (std::int64_t position = 0; position < inputs.setting.tokens; ++position) {
    const std::int64_t own = position / size, others = std::min(variant.topk - 1, own);
    pairs += static_cast<double>(dense ? position + 1 : others * size + position + 1 - own * size);
    if (!dense && own >= variant.topk && variant.topk > 1) scored += static_cast<double>(own);
  }
  const auto depth = static_cast<double>(inputs.setting.heads * inputs.setting.head_dim);
  return {.attention_flops = 4 * depth * pairs, .gate_flops = 2 * depth * scored};
}

}  // namespace moba::bench
