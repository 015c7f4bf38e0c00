#include "llm/session/oracle_gate.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/number.h"

namespace moba::llm {
namespace {

/// Queries whose scores are in memory at a time.
constexpr std::int64_t kRows = 256;

float value_at(const Tensor& t, std::int64_t token, std::int64_t head, std::int64_t d) {
  return static_cast<float>(load(t.data, t.dtype, token * t.strides[0] + head * t.strides[1] + d));
}

/// Writes the blocks of one query: `mass` of each block up to its own, the last one.
void write_best(std::vector<double>& mass, const Routing& routing, std::int32_t* row, std::int64_t width) {
  const auto blocks = static_cast<std::int64_t>(mass.size());
  for (std::int64_t b = 0; b < std::min(routing.sink_blocks, blocks); ++b)
    mass[static_cast<std::size_t>(b)] = 2;  // more than all mass
  mass.back() = 3;
  std::vector<std::int32_t> order(mass.size());
  std::iota(order.begin(), order.end(), 0);
  const std::int64_t count = std::min(blocks, routing.top_k);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](std::int32_t a, std::int32_t b) {
    return std::pair(mass[static_cast<std::size_t>(a)], a) > std::pair(mass[static_cast<std::size_t>(b)], b);
  });
  std::sort(order.begin(), order.begin() + count);
  std::copy_n(order.begin(), count, row);
  std::fill(row + count, row + width, -1);
}

}  // namespace

void OracleGate::append(const Tensor& k) {
  kv_heads_ = k.sizes[1];
  head_dim_ = k.sizes[2];
  for (std::int64_t token = 0; token < k.sizes[0]; ++token) {
    for (std::int64_t head = 0; head < kv_heads_; ++head) {
      for (std::int64_t d = 0; d < head_dim_; ++d) keys_.push_back(value_at(k, token, head, d));
    }
  }
  tokens_ += k.sizes[0];
}

void OracleGate::truncate(std::int64_t tokens) {
  tokens_ = tokens;
  keys_.resize(static_cast<std::size_t>(tokens * kv_heads_ * head_dim_));
}

Routing OracleGate::select(const Tensor& q, const Routing& routing, const Parallel& parallel) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const std::int64_t queries = q.sizes[0], heads = q.sizes[1], first = tokens_ - queries;
  const float scale = routing.scale.value_or(1 / std::sqrt(static_cast<float>(head_dim_)));
  const std::int64_t width = selection_width(one_sequence(queries, tokens_), routing);
  selection_.resize(static_cast<std::size_t>(heads * queries * width));
  const at::Tensor keys = at::from_blob(keys_.data(), {tokens_, kv_heads_, head_dim_}, at::kFloat);
  at::Tensor rows = at::empty({kRows, head_dim_}, at::kFloat);
  for (std::int64_t head = 0; head < heads; ++head) {
    const at::Tensor transposed = keys.select(1, head * kv_heads_ / heads).t();
    for (std::int64_t begin = 0; begin < queries; begin += kRows) {
      const std::int64_t count = std::min(kRows, queries - begin);
      float* values = rows.mutable_data_ptr<float>();
      for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t d = 0; d < head_dim_; ++d) *values++ = scale * value_at(q, begin + i, head, d);
      }
      const at::Tensor scores = at::matmul(rows.narrow(0, 0, count), transposed).contiguous();
      parallel.run(count, [&](std::int64_t i, int) {
        const std::int64_t position = first + begin + i;
        const float* row = scores.const_data_ptr<float>() + i * tokens_;
        const float most = *std::max_element(row, row + position + 1);
        std::vector<double> mass(static_cast<std::size_t>(position / routing.block_size + 1));
        double sum = 0;
        for (std::int64_t key = 0; key <= position; ++key) {
          const double weight = static_cast<double>(std::exp(row[key] - most));
          mass[static_cast<std::size_t>(key / routing.block_size)] += weight;
          sum += weight;
        }
        for (double& of_block : mass) of_block /= sum;
        write_best(mass, routing, selection_.data() + (head * queries + begin + i) * width, width);
      });
    }
  }
  Routing selected = routing;
  selected.selection = {.blocks = selection_.data(), .heads = heads, .width = width};
  return selected;
}

}  // namespace moba::llm
