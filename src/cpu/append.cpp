// Stores new keys and values in the pages of a cache, and sums the keys of a block in token order as
// `centroids` does. Every value has the bits that the reference gives it.
#include <cstring>

#include "cpu/stages.h"
#include "number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/append.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "cpu/features-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Rounds a row to integers of at most 127; returns what they are multiples of. `row` is padded with zeros to
/// whole vectors. NaN becomes 0.
float store_int8(const float* row, std::size_t size, std::int8_t* to) {
  const F32 d;
  const hn::Rebind<std::int8_t, F32> bytes;
  Vec largest = hn::Zero(d);
  for (std::size_t i = 0; i < size; i += kLanes) {
    const Vec magnitude = hn::Abs(hn::LoadU(d, row + i));
    largest = hn::IfThenElse(hn::Gt(magnitude, largest), magnitude, largest);
  }
  const float amax = hn::GetLane(hn::MaxOfLanes(d, largest));
  const Vec inverse = hn::Set(d, amax > 0 ? 127 / amax : 0), limit = hn::Set(d, 127);
  for (std::size_t i = 0; i < size; i += kLanes) {
    const Vec level = hn::Mul(hn::LoadU(d, row + i), inverse);
    const Vec known = hn::IfThenElseZero(hn::Eq(level, level), level);
    const auto rounded = hn::DemoteTo(bytes, hn::NearestInt(hn::Max(hn::Min(known, limit), hn::Neg(limit))));
    if (i + kLanes <= size) {
      hn::StoreU(rounded, bytes, to + i);
    } else {
      std::int8_t last[kLanes];
      hn::StoreU(rounded, bytes, last);
      std::memcpy(to + i, last, size - i);
    }
  }
  return amax / 127;
}

/// `scratch` holds a row, rounded up to whole vectors.
void store_row(const Tensor& t, std::int64_t token, std::int64_t head, DType dtype, float* scratch,
               const CacheRow& to) {
  const auto size = static_cast<std::size_t>(t.sizes[2]);
  const std::byte* from =
      static_cast<const std::byte*>(t.data) +
      (token * t.strides[0] + head * t.strides[1]) * static_cast<std::int64_t>(size_of(t.dtype));
  if (t.dtype == dtype) {
    std::memcpy(to.data, from, size * size_of(dtype));
    return;
  }
  load_f32(from, t.dtype, size, 1.0F, scratch);
  if (dtype == DType::i8) {
    std::fill(scratch + size, scratch + round_up(size, kLanes), 0.0F);
    *to.scale = store_int8(scratch, size, reinterpret_cast<std::int8_t*>(to.data));
  } else {
    store_f32(scratch, size, 1.0F, dtype, to.data);
  }
}

}  // namespace

void append_rows(const Append& rows, std::int64_t block, std::int64_t head, float* scratch) {
  const DType dtype = rows.k_layout.dtype;
  const auto size = static_cast<std::size_t>(rows.k.sizes[2]);
  const FeatureRows to = rows.features_of(block, head);
  float* mean = to.mean;
  if (rows.begins(block)) begin_extremes(to, size);
  const auto [first, last] = rows.tokens_of(block);
  for (std::int64_t token = first; token < last; ++token) {
    const CacheRow key = cache_row(rows.k_layout, rows.k_pages, rows.first + token, head);
    store_row(rows.k, token, head, dtype, scratch, key);
    store_row(rows.v, token, head, dtype, scratch,
              cache_row(rows.v_layout, rows.v_pages, rows.first + token, head));
    const float* row = row_as_f32({.data = key.data, .scales = key.scale}, dtype, 0, size, scratch);
    add_row(row, size, mean);
    add_to_extremes(row, size, to);
  }
  if (!rows.completes(block)) return;
  for (std::size_t i = 0; i < size; ++i)
    mean[i] = rounded_to(dtype, mean[i] / static_cast<float>(rows.block_size));
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(append_rows);

void append(const Append& rows, std::int64_t block, std::int64_t head) {
  target_refusal();  // a cache may be filled before the first call that reports it
  std::vector<float> scratch(round_up(static_cast<std::size_t>(rows.k.sizes[2]), kMaxLanes));
  HWY_DYNAMIC_DISPATCH(append_rows)(rows, block, head, scratch.data());
}

}  // namespace moba::cpu
#endif
