#include "app/bench/check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "llm/error.h"

namespace moba::bench {
namespace {

using llm::DataError;

/// Below this, differences are measured against this: what should be 0 comes out as rounding errors.
constexpr double kSmallest = 1e-3;

/// <query, mean of the keys of a block> in double, and a bound on it for rounding to be measured by.
struct Score {
  double value = 0, bound = 0;
};

Score score_of(const Inputs& inputs, std::int64_t query_row, std::int64_t head, std::int64_t block_size,
               std::int64_t block) {
  const auto [pass, tokens, heads, kv_heads, head_dim, dtype, pattern, share] = inputs.setting;
  double value = 0, query_norm = 0, mean_norm = 0;
  for (std::int64_t d = 0; d < head_dim; ++d) {
    double mean = 0;
    for (std::int64_t key = block * block_size; key < (block + 1) * block_size; ++key)
      mean += get(inputs.k.tensor, (key * kv_heads + head / inputs.heads_per_kv()) * head_dim + d);
    mean /= static_cast<double>(block_size);
    const double query = get(inputs.q.tensor, (query_row * heads + head) * head_dim + d);
    value += query * mean;
    query_norm += query * query;
    mean_norm += mean * mean;
  }
  return {value, std::sqrt(query_norm * mean_norm)};
}

}  // namespace

void compare_rows(const char* what, const Tensor& found, const Tensor& expected, std::int64_t first_row,
                  double tolerance, const std::function<bool(std::int64_t, std::int64_t)>& skip) {
  const std::int64_t rows = expected.sizes[0], heads = expected.sizes[1], head_dim = expected.sizes[2];
  double largest = kSmallest;
  for (std::int64_t i = 0; i < rows * heads * head_dim; ++i)
    largest = std::max(largest, std::fabs(static_cast<double>(get(expected, i))));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t head = 0; head < heads; ++head) {
      if (skip && skip(row, head)) continue;
      const std::int64_t begin = (row * heads + head) * head_dim;
      for (std::int64_t i = begin; i < begin + head_dim; ++i) {
        const double is = get(found, i), should = get(expected, i);
        if (std::fabs(is - should) <= tolerance * largest) continue;  // a NaN is never close
        throw DataError(
            fmt::format("{} of row {}, head {}, element {}: expected {} as the reference has it, got {}",
                        what, first_row + row, head, i - begin, should, is));
      }
    }
  }
}

double output_tolerance(DType dtype) {
  return dtype == DType::f32 ? 2e-4 : dtype == DType::f16 ? 5e-3 : 3e-2;
}

double gradient_tolerance(DType dtype) {
  return dtype == DType::f32 ? 2e-3 : dtype == DType::f16 ? 2e-2 : 6e-2;
}

bool tied(const Inputs& inputs, const Variant& variant, const Blocks& found, const Blocks& expected,
          std::int64_t head, std::int64_t row) {
  std::vector<std::int32_t> is(found.of(head, row).begin(), found.of(head, row).end()),
      should(expected.of(head, row).begin(), expected.of(head, row).end()), extra, missing;
  if (is == should) return false;
  std::set_difference(is.begin(), is.end(), should.begin(), should.end(), std::back_inserter(extra));
  std::set_difference(should.begin(), should.end(), is.begin(), is.end(), std::back_inserter(missing));
  const std::int64_t query = found.slice.offset + row, blocks = inputs.setting.tokens / variant.chunk_size;
  const double rounding = inputs.setting.dtype == DType::f32 ? 1e-5 : 1e-2;
  bool close = extra.size() == missing.size();
  for (std::size_t i = 0; close && i < extra.size(); ++i) {
    close = extra[i] >= 0 && extra[i] < blocks && missing[i] >= 0 && missing[i] < blocks;
    if (!close) break;
    const Score a = score_of(inputs, query, head, variant.chunk_size, extra[i]);
    const Score b = score_of(inputs, query, head, variant.chunk_size, missing[i]);
    close = std::fabs(a.value - b.value) <= rounding * std::max(a.bound, b.bound);
  }
  if (!close) {
    throw DataError(fmt::format("blocks of row {}, head {}: expected {} as the reference has them, got {}",
                                found.slice.first + row, head, fmt::join(should, " "), fmt::join(is, " ")));
  }
  return true;
}

void check_probes(const Inputs& inputs, const Variant& variant, const Blocks& blocks, const Tensor* out,
                  Checked& checked) {
  const Setting& s = inputs.setting;
  for (const Slice& probe : inputs.probes) {
    if (probe.first < blocks.slice.first || probe.end() > blocks.slice.end()) continue;
    const Tensor q = rows_of(inputs.q.tensor, probe.offset, probe.count);
    Blocks expected(inputs, variant, probe);
    const Array reference(s.dtype, probe.count, s.heads, s.head_dim);
    const Sequences sequence = one_sequence(probe.count, probe.end());
    if (out != nullptr) {
      attention(q, inputs.keys(probe.end()), inputs.values(probe.end()), sequence, routing_of(variant),
                {.out = reference.tensor, .selection = expected.data()}, inputs.reference());
    } else {
      select_blocks(q, inputs.keys(probe.end()), sequence, routing_of(variant), expected.data(),
                    inputs.reference());
    }
    const Blocks found = blocks.cut(inputs, variant, probe);
    const auto differs = [&](std::int64_t row, std::int64_t head) {
      return tied(inputs, variant, found, expected, head, row);
    };
    for (std::int64_t row = 0; row < probe.count; ++row) {
      for (std::int64_t head = 0; head < s.heads; ++head) checked.ties += differs(row, head);
    }
    checked.rows += probe.count;
    if (out != nullptr) {
      compare_rows("out", rows_of(*out, probe.offset, probe.count), reference.tensor, probe.first,
                   output_tolerance(s.dtype), differs);
    }
  }
}

}  // namespace moba::bench
