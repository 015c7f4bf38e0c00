// Compiled once per instruction set: 2^x, the exponential of every softmax.
#if defined(MOBA_EXP2_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_EXP2_INL_H_
#undef MOBA_EXP2_INL_H_
#else
#define MOBA_EXP2_INL_H_
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using Vec = hn::Vec<F32>;

/// 2^x for x <= 0, relative error below 2e-7, 2^0 exactly 1 (a decay that is not would add up); exactly 0
/// from -150 down, NaN stays NaN. A polynomial of degree 5 on an interval of length 1.
HWY_INLINE Vec exp2(Vec x) {
  const F32 d;
#if HWY_TARGET <= HWY_AVX3
  // x less its floor, and the scaling by 2 to the floor, are an instruction each; both keep NaN, and the
  // fraction of -inf is 0.
  const Vec f{_mm512_reduce_ps(x.raw, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec y = hn::MulAdd(hn::Set(d, 1.867130213e-3F), f, hn::Set(d, 9.017030019e-3F));
  y = hn::MulAdd(y, f, hn::Set(d, 5.579991332e-2F));
  y = hn::MulAdd(y, f, hn::Set(d, 2.401644501e-1F));
  y = hn::MulAdd(y, f, hn::Set(d, 6.931513118e-1F));
  y = hn::MulAdd(y, f, hn::Set(d, 1.0F));
  return Vec{_mm512_scalef_ps(y.raw, x.raw)};
#else
  // x86's instruction returns its second operand when one is NaN, which keeps it; Highway's scalar code drops
  // it.
  const Vec lowest = hn::Set(d, -200.0F);
  x = HWY_TARGET == HWY_SCALAR ? hn::IfThenElse(hn::Lt(x, lowest), lowest, x) : hn::Max(lowest, x);
  const Vec whole = hn::Round(x), f = hn::Sub(x, whole);
  Vec y = hn::MulAdd(hn::Set(d, 1.326472725e-3F), f, hn::Set(d, 9.671512688e-3F));
  y = hn::MulAdd(y, f, hn::Set(d, 5.550733744e-2F));
  y = hn::MulAdd(y, f, hn::Set(d, 2.402224208e-1F));
  y = hn::MulAdd(y, f, hn::Set(d, 6.931469776e-1F));
  y = hn::MulAdd(y, f, hn::Set(d, 1.0F));
  const hn::RebindToSigned<F32> di;
  const auto exponent =
      hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, hn::Max(hn::Set(d, -126.0F), whole)), hn::Set(di, 127)));
  const Vec scaled = hn::Mul(y, hn::BitCast(d, exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0F)), scaled);
#endif
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
