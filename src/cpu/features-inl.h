// The largest and the smallest value of every channel of a block of keys.
#if defined(MOBA_CPU_FEATURES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_FEATURES_INL_H_
#undef MOBA_CPU_FEATURES_INL_H_
#else
#define MOBA_CPU_FEATURES_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "backend.h"
#include "constants.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// The extremes of no row.
void begin_extremes(const FeatureRows& to, std::size_t size) {
  if (to.max != nullptr) std::fill_n(to.max, size, kNegInf);
  if (to.min != nullptr) std::fill_n(to.min, size, -kNegInf);
}

/// Replaces each value of `to` by that of the row where it is larger, or smaller if `sign` is -1, or NaN.
HWY_INLINE void raise(const float* HWY_RESTRICT row, float sign, std::size_t size, float* HWY_RESTRICT to) {
  const F32 d;
  const Vec by = hn::Set(d, sign);
  std::size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec value = hn::LoadU(d, row + i), before = hn::LoadU(d, to + i);
    const auto replaces = hn::Or(hn::Gt(hn::Mul(by, value), hn::Mul(by, before)), hn::IsNaN(value));
    hn::StoreU(hn::IfThenElse(replaces, value, before), d, to + i);
  }
  for (; i < size; ++i) {
    if (sign * row[i] > sign * to[i] || std::isnan(row[i])) to[i] = row[i];
  }
}

/// Widens the extremes of some rows by a further one. NaN stays.
HWY_INLINE void add_to_extremes(const float* row, std::size_t size, const FeatureRows& to) {
  if (to.max != nullptr) raise(row, 1, size, to.max);
  if (to.min != nullptr) raise(row, -1, size, to.min);
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
