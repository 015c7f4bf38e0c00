#include <cmath>

#include "number.h"
#include "reference/rows.h"
#include "reference/stages.h"

namespace moba::reference {
namespace {

/// Rounds row `token` of `t` at `head` to the dtype of the cache.
void store_row(const Tensor& t, std::int64_t token, std::int64_t head, DType dtype, const CacheRow& to) {
  const std::int64_t first = token * t.strides[0] + head * t.strides[1], head_dim = t.sizes[2];
  const auto value = [&](std::int64_t d) { return static_cast<float>(load(t.data, t.dtype, first + d)); };
  if (dtype != DType::i8) {
    for (std::int64_t d = 0; d < head_dim; ++d) store(to.data, dtype, d, value(d));
    return;
  }
  float amax = 0;
  for (std::int64_t d = 0; d < head_dim; ++d) amax = std::max(amax, std::fabs(value(d)));
  *to.scale = amax / 127;
  const float inverse = amax > 0 ? 127 / amax : 0;
  for (std::int64_t d = 0; d < head_dim; ++d) {
    const float level = std::clamp(value(d) * inverse, -127.0F, 127.0F);
    reinterpret_cast<std::int8_t*>(to.data)[d] =
        std::isnan(level) ? std::int8_t{0} : static_cast<std::int8_t>(std::lrint(level));
  }
}

}  // namespace

void append(const Append& rows, std::int64_t block, std::int64_t head) {
  const DType dtype = rows.k_layout.dtype;
  const FeatureRows to = rows.features_of(block, head);
  float* mean = to.mean;
  if (rows.begins(block)) begin_extremes(to, rows.k.sizes[2]);
  const auto [first, last] = rows.tokens_of(block);
  for (std::int64_t token = first; token < last; ++token) {
    const CacheRow key = cache_row(rows.k_layout, rows.k_pages, rows.first + token, head);
    store_row(rows.k, token, head, dtype, key);
    store_row(rows.v, token, head, dtype, cache_row(rows.v_layout, rows.v_pages, rows.first + token, head));
    const float scale = key.scale == nullptr ? 1.0F : *key.scale;
    for (std::int64_t d = 0; d < rows.k.sizes[2]; ++d) {
      const float value = static_cast<float>(load(key.data, dtype, d)) * scale;
      mean[d] += value;
      add_to_extremes(to, d, value);
    }
  }
  if (!rows.completes(block)) return;
  for (std::int64_t d = 0; d < rows.k.sizes[2]; ++d)
    mean[d] = rounded_to(dtype, mean[d] / static_cast<float>(rows.block_size));
}

}  // namespace moba::reference
