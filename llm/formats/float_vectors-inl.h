// Compiled once per instruction set: vectors of f32 in and out of f32, bf16 and f16 memory of any alignment.
#if defined(MOBA_LLM_FLOAT_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_LLM_FLOAT_VECTORS_INL_H_
#undef MOBA_LLM_FLOAT_VECTORS_INL_H_
#else
#define MOBA_LLM_FLOAT_VECTORS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>

#include "moba/tensor.h"
#include "src/number.h"

HWY_BEFORE_NAMESPACE();
namespace moba::llm::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const float* in) {
  return hn::LoadU(d, in);
}

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const bfloat16* in) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<std::uint16_t, D> d16;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(in));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
}

// Without conversion instructions Highway 1.0 cuts f16 off instead of rounding it, and knows no infinity.
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const float16* in) {
#if HWY_TARGET == HWY_SCALAR
  float16 value;
  std::memcpy(&value, in, sizeof value);
  return hn::Set(d, float_of(value));
#else
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(in)));
#endif
}

template <class D>
HWY_INLINE void store(D d, hn::Vec<D> values, float* out) {
  hn::StoreU(values, d, out);
}

/// Rounds to nearest, ties to even; a NaN stays one.
template <class D>
HWY_INLINE void store(D /*d*/, hn::Vec<D> values, bfloat16* out) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<std::uint16_t, D> d16;
  const auto bits = hn::BitCast(du, values);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1U));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFU)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000U));
  const auto kept = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(values)), quiet, rounded);
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(hn::RebindToSigned<D>(), hn::ShiftRight<16>(kept))), d16,
             reinterpret_cast<std::uint16_t*>(out));
}

template <class D>
HWY_INLINE void store(D /*d*/, hn::Vec<D> values, float16* out) {
#if HWY_TARGET == HWY_SCALAR
  *out = to_float16(hn::GetLane(values));
#else
  const hn::Rebind<hwy::float16_t, D> d16;
  hn::StoreU(hn::DemoteTo(d16, values), d16, reinterpret_cast<hwy::float16_t*>(out));
#endif
}

}  // namespace
}  // namespace moba::llm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
