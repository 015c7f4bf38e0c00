#include "llm/model/linear.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "llm/formats/dequantise.h"
#include "llm/model/few_rows.h"

namespace moba::llm {
namespace {

/// The size of a tile of expanded weights, in bytes: large enough for products at full speed.
constexpr std::int64_t kTileBytes = 8 << 20;
/// Weights multiplied by one thread at least.
constexpr std::int64_t kWeightsPerTask = 65536;

std::vector<std::int32_t> source_rows(const Weights& weights, const std::string& name, std::int64_t rows) {
  std::vector<std::int32_t> source;
  bool in_order = true;
  for (std::int64_t row = 0; row < rows; ++row) {
    source.push_back(static_cast<std::int32_t>(weights.stored_row(name, row)));
    in_order = in_order && source.back() == row;
  }
  if (in_order) source.clear();
  return source;
}

template <typename T>
void dequantise_rows(const StoredTensor& weight, const std::vector<std::int32_t>& source, std::int64_t first,
                     std::int64_t last, T* out) {
  if (source.empty()) return dequantise(weight, first, last - first, out);
  for (std::int64_t row = first; row < last; ++row, out += weight.row_length()) {
    dequantise(weight, source[static_cast<std::size_t>(row)], 1, out);
  }
}

}  // namespace

at::Tensor load_vector(const Weights& weights, const std::string& name, std::int64_t size) {
  std::vector<float> values(static_cast<std::size_t>(size));
  dequantise(*weights.find(name), 0, 1, values.data());
  at::Tensor vector = at::empty({size}, at::kFloat);
  float* out = vector.mutable_data_ptr<float>();
  for (std::int64_t i = 0; i < size; ++i)
    out[i] = values[static_cast<std::size_t>(weights.stored_row(name, i))];
  return vector;
}

Linear::Linear(const Weights& weights, const std::string& prefix, const std::vector<LinearShape>& group)
    : inputs_(group.front().inputs) {
  bool has_bias = false;
  for (const LinearShape& linear : group) {
    const std::string name = prefix + linear.name + ".weight";
    parts_.push_back({weights.find(name), linear.outputs, source_rows(weights, name, linear.outputs)});
    outputs_ += linear.outputs;
    has_bias = has_bias || linear.has_bias;
  }
  if (!has_bias) return;
  bias_ = at::zeros({outputs_}, at::kFloat);
  std::int64_t first = 0;
  for (const LinearShape& linear : group) {
    if (linear.has_bias)
      bias_.narrow(0, first, linear.outputs)
          .copy_(load_vector(weights, prefix + linear.name + ".bias", linear.outputs));
    first += linear.outputs;
  }
}

/// Calls `body(part, begin, end, place)` for the parts of outputs [first, last): rows [begin, end) of a part,
/// the first of which is output `place`.
template <typename Body>
void Linear::each_part(std::int64_t first, std::int64_t last, const Body& body) const {
  std::int64_t start = 0;
  for (const Part& part : parts_) {
    const std::int64_t begin = std::max(first - start, std::int64_t{0}),
                       end = std::min(last - start, part.rows);
    if (begin < end) body(part, begin, end, start + begin);
    start += part.rows;
  }
}

void Linear::multiply_few(const at::Tensor& x, const at::Tensor& y, bool round) const {
  FewRows rows{
      .values = x.const_data_ptr<float>(), .rows = x.size(0), .columns = inputs_, .stride = x.stride(0)};
  const bool has_blocks = std::any_of(parts_.begin(), parts_.end(),
                                      [](const Part& p) { return block_of(p.weight->storage).values > 1; });
  if (round && has_blocks) round_to_int8(rows);
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(
      0, outputs_, std::max<std::int64_t>(1, kWeightsPerTask / inputs_),
      [&](std::int64_t first, std::int64_t last) {
        each_part(first, last,
                  [&](const Part& part, std::int64_t begin, std::int64_t end, std::int64_t place) {
                    multiply_few_rows(rows, *part.weight, part.source.empty() ? nullptr : part.source.data(),
                                      begin, end, out + place - begin, y.stride(0));
                  });
      });
}

void Linear::expand(std::int64_t first, const at::Tensor& tile) const {
  const std::int64_t grain = std::max<std::int64_t>(1, kWeightsPerTask / inputs_);
  at::parallel_for(0, tile.size(0), grain, [&](std::int64_t from, std::int64_t to) {
    each_part(first + from, first + to,
              [&](const Part& part, std::int64_t begin, std::int64_t end, std::int64_t place) {
                const std::int64_t offset = (place - first) * inputs_;
                if (tile.scalar_type() == at::kFloat) {
                  dequantise_rows(*part.weight, part.source, begin, end,
                                  tile.mutable_data_ptr<float>() + offset);
                } else {
                  auto* out = reinterpret_cast<bfloat16*>(tile.mutable_data_ptr<at::BFloat16>()) + offset;
                  dequantise_rows(*part.weight, part.source, begin, end, out);
                }
              });
  });
}

void Linear::multiply_expanded(const at::Tensor& x, const at::Tensor& y) const {
  const std::int64_t row_bytes = inputs_ * static_cast<std::int64_t>(x.element_size());
  const std::int64_t tile_rows = std::min(outputs_, std::max<std::int64_t>(1, kTileBytes / row_bytes));
  const at::Tensor scratch = at::empty({tile_rows, inputs_}, x.options());
  for (std::int64_t first = 0; first < outputs_; first += tile_rows) {
    const std::int64_t rows = std::min(tile_rows, outputs_ - first);
    const at::Tensor tile = scratch.narrow(0, 0, rows);
    expand(first, tile);
    at::Tensor out = y.narrow(1, first, rows);
    at::mm_out(out, x, tile.t());
  }
}

void Linear::operator()(const at::Tensor& x, const at::Tensor& y, const Arithmetic& arithmetic) const {
  if (x.size(0) <= kFewRows) {
    multiply_few(x, y, arithmetic.int8_decode);
  } else if (x.scalar_type() == at::kHalf) {
    const at::Tensor wide = at::empty({y.size(0), outputs_}, at::kFloat);
    multiply_expanded(x.to(at::kFloat), wide);
    y.copy_(wide);
  } else {
    multiply_expanded(x, y);
  }
  if (bias_.defined()) y.add_(bias_);
}

void Linear::by_rows(const at::Tensor& x, const at::Tensor& y, const Arithmetic& arithmetic) const {
  for (std::int64_t first = 0; first < x.size(0); first += kFewRows) {
    const std::int64_t rows = std::min(kFewRows, x.size(0) - first);
    (*this)(x.narrow(0, first, rows), y.narrow(0, first, rows), arithmetic);
  }
}

}  // namespace moba::llm
