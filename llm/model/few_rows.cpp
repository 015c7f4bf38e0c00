#include "llm/model/few_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "llm/formats/instruction_set.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "llm/model/few_rows.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "llm/formats/unpack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::llm::HWY_NAMESPACE {
namespace {

using F32 = hn::ScalableTag<float>;
using Vec = hn::Vec<F32>;
/// The sums of 32 bytes: a vector of 256 bits, for which three ports of current CPUs multiply, where two do
/// for 512.
using F32x8 = hn::CappedTag<float, 8>;
using I32x8 = hn::CappedTag<std::int32_t, 8>;

constexpr std::int64_t kLanes = hn::MaxLanes(F32());
constexpr std::int64_t kGroup = 32;
/// Rows of activations for which a group of weights is unpacked once.
constexpr std::int64_t kRowsAtOnce = 4;
/// How far ahead of a row memory is fetched: hardware stops at the ends of pages, which files have every 4
/// KiB.
constexpr std::int64_t kPrefetchBytes = 4096, kCacheLine = 64;

#undef MOBA_HAS_BYTE_PRODUCTS
#if HWY_TARGET <= HWY_AVX2 && HWY_ARCH_X86
#define MOBA_HAS_BYTE_PRODUCTS 1
#else
#define MOBA_HAS_BYTE_PRODUCTS 0
#endif

template <class Format>
constexpr int kMaxQ = Format::kOffset == 128 ? 255 : 63;

#if MOBA_HAS_BYTE_PRODUCTS
/// Sums of four neighbouring products of 32 integers up to kMaxQ and levels.
template <int kMaxQ>
HWY_INLINE hn::Vec<I32x8> products(Bytes32 q, const std::int8_t* level) {
  const auto a = reinterpret_cast<__m256i>(q);
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(level));
#if HWY_TARGET <= HWY_AVX3_DL
  return hn::Vec<I32x8>{_mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b)};
#else
  if constexpr (kMaxQ < 128) {
    return hn::Vec<I32x8>{_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1))};
  } else {  // sums of two products do not fit 16 bits
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xFF)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return hn::Vec<I32x8>{_mm256_add_epi32(even, odd)};
  }
#endif
}

/// The scale of each lane of products().
template <std::int64_t kScaleGroup>
HWY_INLINE hn::Vec<F32x8> lane_scales(const float* scale, std::int64_t group) {
  const F32x8 d;
  if constexpr (kScaleGroup == kGroup) return hn::Set(d, scale[group]);
  return hn::ConcatLowerLower(d, hn::Set(d, scale[2 * group + 1]), hn::Set(d, scale[2 * group]));
}
#endif

/// The scales and minimums of a row of `blocks` blocks.
template <class Format>
HWY_INLINE void row_scales(const Byte* HWY_RESTRICT in, std::int64_t blocks, float* HWY_RESTRICT scale,
                           float* HWY_RESTRICT minimum) {
  constexpr std::int64_t kScales = Format::kValues / Format::kGroup;
  std::int64_t i = 0;
#if MOBA_HAS_BYTE_PRODUCTS
  if constexpr (kScales == 1) {
    const hn::CappedTag<std::uint32_t, 8> d32;
    const hn::Rebind<hwy::float16_t, F32x8> d16;
    const F32x8 d;
    const auto offsets =
        hn::Mul(hn::Iota(I32x8(), 0), hn::Set(I32x8(), static_cast<std::int32_t>(Format::kBytes)));
    for (; i + 8 <= blocks; i += 8, in += 8 * Format::kBytes) {
      const auto both = hn::GatherOffset(d32, reinterpret_cast<const std::uint32_t*>(in), offsets);
      const hn::Rebind<std::uint16_t, F32x8> du16;
      const auto low = hn::And(both, hn::Set(d32, 0xFFFFU));
      hn::StoreU(hn::PromoteTo(d, hn::BitCast(d16, hn::DemoteTo(du16, hn::BitCast(I32x8(), low)))), d,
                 scale + i);
      if constexpr (Format::kHasMinimum) {
        const auto high = hn::ShiftRight<16>(both);
        hn::StoreU(hn::PromoteTo(d, hn::BitCast(d16, hn::DemoteTo(du16, hn::BitCast(I32x8(), high)))), d,
                   minimum + i);
      }
    }
  }
#endif
  for (; i < blocks; ++i, in += Format::kBytes)
    Format::scales(in, scale + i * kScales, minimum + i * kScales);
}

/// Rounded activations of rows [row, row + kRows) times a row of weights, whose scales were read: to out[0],
/// out[y_stride], ... A group of weights is unpacked once for all rows. `combined` has room for
/// `combined_stride` floats for each.
template <class Format, std::int64_t kRows>
void int8_dots(const Byte* HWY_RESTRICT in, const float* HWY_RESTRICT w_scale,
               const float* HWY_RESTRICT w_minimum, const FewRows& x, std::int64_t row,
               float* HWY_RESTRICT combined, std::size_t combined_stride, float* out, std::int64_t y_stride) {
  constexpr std::int64_t kPerGroup = kGroup / Format::kGroup;  // scales in a group of 32
  constexpr auto kOffset = static_cast<float>(Format::kOffset);
  const std::int64_t scales = x.groups * kPerGroup, levels = x.groups * kGroup;
  const float* HWY_RESTRICT x_scale = (kPerGroup == 1 ? x.scale.data() : x.half_scale.data()) + row * scales;
  const float* HWY_RESTRICT x_sum = (kPerGroup == 1 ? x.sum.data() : x.half_sum.data()) + row * scales;
  const std::int8_t* level = x.level.data() + row * levels;
  const std::int64_t blocks = x.columns / Format::kValues;
#if MOBA_HAS_BYTE_PRODUCTS
  const F32x8 d;
  hn::Vec<F32x8> sum0[kRows], sum1[kRows], shifts[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) sum0[r] = sum1[r] = shifts[r] = hn::Zero(d);
  for (std::int64_t i = 0; i < x.columns / Format::kGroup;
       i += 8) {  // whole vectors: all arrays are padded with zeros
    const auto scale = hn::LoadU(d, w_scale + i);
    auto shift = hn::Mul(scale, hn::Set(d, -kOffset));
    if constexpr (Format::kHasMinimum) shift = hn::LoadU(d, w_minimum + i);
    for (std::int64_t r = 0; r < kRows; ++r) {
      hn::StoreU(hn::Mul(scale, hn::LoadU(d, x_scale + r * scales + i)), d,
                 combined + static_cast<std::size_t>(r) * combined_stride + i);
      shifts[r] = hn::MulAdd(shift, hn::LoadU(d, x_sum + r * scales + i), shifts[r]);
    }
  }
  const auto add = [&](const Byte* block, auto g, std::int64_t group, auto& sum) HWY_ATTR {
    const Bytes32 q = Format::template group<g>(block);
#pragma GCC unroll 8
    for (std::int64_t r = 0; r < kRows; ++r) {
      const auto product = hn::ConvertTo(d, products<kMaxQ<Format>>(q, level + r * levels + group * kGroup));
      sum[r] = hn::MulAdd(
          product,
          lane_scales<Format::kGroup>(combined + static_cast<std::size_t>(r) * combined_stride, group),
          sum[r]);
    }
  };
  if constexpr (Format::kValues == kGroup) {
    const std::integral_constant<int, 0> first;
    std::int64_t i = 0;
    for (; i + 2 <= blocks; i += 2, in += 2 * Format::kBytes) {
      add(in, first, i, sum0);
      add(in + Format::kBytes, first, i + 1, sum1);
    }
    if (i < blocks) add(in, first, i, sum0);
  } else {
    for (std::int64_t i = 0; i < blocks; ++i, in += Format::kBytes) {
      each_group<Format>(
          [&](auto g) HWY_ATTR { add(in, g, i * (Format::kValues / kGroup) + g, g % 2 == 0 ? sum0 : sum1); });
    }
  }
  for (std::int64_t r = 0; r < kRows; ++r)
    out[r * y_stride] = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum0[r], sum1[r]), shifts[r])));
#else
  (void)combined;
  (void)combined_stride;
  float sum[kRows] = {};
  for (std::int64_t i = 0; i < blocks; ++i, in += Format::kBytes) {
    each_group<Format>([&](auto g) {
      const Bytes32 q = Format::template group<g>(in);
      const std::int64_t first = i * Format::kValues + g * kGroup;
      for (std::int64_t r = 0; r < kRows; ++r) {
        for (std::int64_t part = 0; part < kPerGroup; ++part) {
          std::int32_t product = 0;
          for (std::int64_t j = part * Format::kGroup; j < (part + 1) * Format::kGroup; ++j)
            product += static_cast<std::int32_t>(q[j]) * level[r * levels + first + j];
          const std::int64_t at = first / Format::kGroup + part;
          sum[r] += w_scale[at] * x_scale[r * scales + at] * static_cast<float>(product);
          sum[r] += (Format::kHasMinimum ? w_minimum[at] : -kOffset * w_scale[at]) * x_sum[r * scales + at];
        }
      }
    });
  }
  for (std::int64_t r = 0; r < kRows; ++r) out[r * y_stride] = sum[r];
#endif
}

/// x . w
template <typename T>
float f32_dot(const float* HWY_RESTRICT x, std::int64_t columns, const T* HWY_RESTRICT w) {
  const F32 d;
  Vec sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= columns; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const std::int64_t at = i + part * kLanes;
      sum[part] = hn::MulAdd(load(d, x + at), load(d, w + at), sum[part]);
    }
  }
  for (; i + kLanes <= columns; i += kLanes) sum[0] = hn::MulAdd(load(d, x + i), load(d, w + i), sum[0]);
  float rest = 0;
  for (const hn::CappedTag<float, 1> one; i < columns; ++i) rest += x[i] * hn::GetLane(load(one, w + i));
  return rest + hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
}

float stored_dot(const float* x, std::int64_t columns, Storage storage, const Byte* w) {
  if (storage == Storage::f32) return f32_dot(x, columns, reinterpret_cast<const float*>(w));
  if (storage == Storage::f16) return f32_dot(x, columns, reinterpret_cast<const float16*>(w));
  return f32_dot(x, columns, reinterpret_cast<const bfloat16*>(w));
}

/// The scales of a row of weights, or its values.
struct RowScratch {
  std::vector<float> scale, minimum, combined, values;
  std::size_t stride = 0;  // of `combined`

  void resize(std::int64_t columns) {
    values.resize(static_cast<std::size_t>(columns));
    stride = static_cast<std::size_t>(columns / 16 + 16);
    for (auto* v : {&scale, &minimum}) v->assign(stride, 0.0F);
    combined.assign(kRowsAtOnce * stride, 0.0F);
  }
};

}  // namespace

void multiply(const FewRows& x, const StoredTensor& weight, const std::int32_t* source, std::int64_t first,
              std::int64_t last, float* y, std::int64_t y_stride) {
  const auto* base = reinterpret_cast<const Byte*>(weight.bytes.data());
  const std::int64_t row_bytes = weight.row_bytes();
  const std::int64_t ahead = (kPrefetchBytes + row_bytes - 1) / row_bytes;
  const auto row_at = [&](std::int64_t i) { return base + (source ? source[i] : i) * row_bytes; };
  const auto each_row = [&](const auto& body) HWY_ATTR {
    for (std::int64_t i = first; i < last; ++i) {
      if (i + ahead < last) {
        const Byte* next = row_at(i + ahead);
        for (std::int64_t line = 0; line < row_bytes; line += kCacheLine) hwy::Prefetch(next + line);
      }
      body(row_at(i), y + i);
    }
  };
  if (weight.storage == Storage::f32 || weight.storage == Storage::f16 || weight.storage == Storage::bf16) {
    each_row([&](const Byte* row, float* out) HWY_ATTR {
      for (std::int64_t r = 0; r < x.rows; ++r) {
        out[r * y_stride] = stored_dot(x.values + r * x.stride, x.columns, weight.storage, row);
      }
    });
    return;
  }
  thread_local RowScratch scratch;
  scratch.resize(x.columns);
  const auto is_rounded = [&](std::int64_t row) {
    return !x.is_rounded.empty() && x.is_rounded[static_cast<std::size_t>(row)] != 0;
  };
  bool any_rounded = false, all_rounded = true;
  for (std::int64_t r = 0; r < x.rows; ++r) {
    any_rounded = any_rounded || is_rounded(r);
    all_rounded = all_rounded && is_rounded(r);
  }
  with_format(weight.storage, [&](auto format) HWY_ATTR {
    using Format = decltype(format);
    each_row([&](const Byte* row, float* out) HWY_ATTR {
      if (any_rounded)
        row_scales<Format>(row, x.columns / Format::kValues, scratch.scale.data(), scratch.minimum.data());
      const Byte* block = row;
      for (std::int64_t i = 0; i < x.columns && !all_rounded; i += Format::kValues, block += Format::kBytes) {
        float* to = scratch.values.data() + i;
        each_value<Format>(block, [to](int j, auto d, auto v) HWY_ATTR { hn::StoreU(v, d, to + j); });
      }
      const auto rounded = [&](auto rows, std::int64_t r) HWY_ATTR {
        int8_dots<Format, decltype(rows)::value>(row, scratch.scale.data(), scratch.minimum.data(), x, r,
                                                 scratch.combined.data(), scratch.stride, out + r * y_stride,
                                                 y_stride);
      };
      std::int64_t r = 0;
      for (; all_rounded && r + kRowsAtOnce <= x.rows; r += kRowsAtOnce)
        rounded(std::integral_constant<std::int64_t, kRowsAtOnce>(), r);
      for (; r < x.rows; ++r) {
        if (is_rounded(r)) {
          rounded(std::integral_constant<std::int64_t, 1>(), r);
        } else {
          out[r * y_stride] = f32_dot(x.values + r * x.stride, x.columns, scratch.values.data());
        }
      }
    });
  });
}

}  // namespace moba::llm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::llm {
namespace {

HWY_EXPORT(multiply);

constexpr std::int64_t kGroup = 32;

/// Returns the largest magnitude of a group: a NaN or an infinity if the group has one.
float largest_magnitude(const float* values) {
  std::uint32_t largest = 0;  // the bits of magnitudes have their order, with NaN last
  for (std::int64_t i = 0; i < kGroup; ++i)
    largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & 0x7FFFFFFFU);
  return std::bit_cast<float>(largest);
}

/// Rounds group `place` of all rows; returns false if it has a value that is not finite.
bool round_group(const float* values, std::size_t place, FewRows& x) {
  const float largest = largest_magnitude(values);
  if (!std::isfinite(largest)) return false;
  constexpr float kSmallest = 127 / std::numeric_limits<float>::max();  // below, the inverse overflows
  const float scale = largest / 127, inverse = largest > kSmallest ? 127 / largest : 0.0F;
  std::int32_t sums[2] = {0, 0};
  for (std::int64_t i = 0; i < kGroup; ++i) {
    const auto level = static_cast<std::int32_t>(std::lrint(values[i] * inverse));
    x.level[place * kGroup + static_cast<std::size_t>(i)] = static_cast<std::int8_t>(level);
    sums[i / 16] += level;
  }
  x.scale[place] = scale;
  for (std::size_t half = 0; half < 2; ++half) {
    x.half_scale[place * 2 + half] = scale;
    x.half_sum[place * 2 + half] = scale * static_cast<float>(sums[half]);
  }
  x.sum[place] = scale * static_cast<float>(sums[0] + sums[1]);
  return true;
}

}  // namespace

void round_to_int8(FewRows& x) {
  // Padded to the vectors in which scales and sums are read.
  x.groups = (x.columns / kGroup + 7) / 8 * 8;
  const auto groups = static_cast<std::size_t>(x.rows * x.groups);
  x.is_rounded.assign(static_cast<std::size_t>(x.rows), 1);
  x.level.assign(groups * kGroup, 0);
  x.scale.assign(groups, 0.0F);
  x.sum.assign(groups, 0.0F);
  x.half_scale.assign(groups * 2, 0.0F);
  x.half_sum.assign(groups * 2, 0.0F);
  for (std::int64_t row = 0; row < x.rows; ++row) {
    for (std::int64_t group = 0; group < x.columns / kGroup; ++group) {
      const float* values = x.values + row * x.stride + group * kGroup;
      if (round_group(values, static_cast<std::size_t>(row * x.groups + group), x)) continue;
      x.is_rounded[static_cast<std::size_t>(row)] = 0;
      break;
    }
  }
}

void multiply_few_rows(const FewRows& x, const StoredTensor& weight, const std::int32_t* source,
                       std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride) {
  choose_instruction_set();
  HWY_DYNAMIC_DISPATCH(multiply)(x, weight, source, first, last, y, y_stride);
}

}  // namespace moba::llm
#endif
