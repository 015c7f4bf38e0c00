// Compiled once per instruction set: the block formats of GGUF, taken apart into integers and the scales of
// groups of them.
#if defined(MOBA_LLM_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_LLM_UNPACK_INL_H_
#undef MOBA_LLM_UNPACK_INL_H_
#else
#define MOBA_LLM_UNPACK_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "llm/formats/float_vectors-inl.h"
#include "llm/formats/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace moba::llm::HWY_NAMESPACE {
namespace {

using Byte = std::uint8_t;

HWY_INLINE float half_at(const Byte* in) {
  return hn::GetLane(load(hn::CappedTag<float, 1>(), reinterpret_cast<const float16*>(in)));
}

/// 32 integers of 8 bits, in the vectors that the instruction set has.
using Bytes32 [[gnu::vector_size(32)]] = Byte;
using Words32 [[gnu::vector_size(32)]] = std::uint32_t;

HWY_INLINE Bytes32 load32(const Byte* in) {
  Bytes32 bytes;
  std::memcpy(&bytes, in, sizeof bytes);
  return bytes;
}

/// `kBits` bits of each byte, from bit `kFrom` on, moved to bit `kTo`.
template <int kBits, int kFrom, int kTo>
HWY_INLINE Bytes32 bits_of(Bytes32 bytes) {
  constexpr auto kMask = static_cast<Byte>(((1 << kBits) - 1) << kTo);
  auto words = reinterpret_cast<Words32>(bytes);
  if constexpr (kFrom > kTo) words >>= kFrom - kTo;
  if constexpr (kFrom < kTo) words <<= kTo - kFrom;
  return reinterpret_cast<Bytes32>(words) & kMask;
}

/// The low four bits of 16 bytes, then the high ones.
HWY_INLINE Bytes32 nibbles_of_16(const Byte* in) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  // One load; compilers shuffle instead.
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  const auto both = reinterpret_cast<Words32>(_mm256_broadcastsi128_si256(half));
#else
  Words32 both;
  std::memcpy(&both, in, 16);
  std::memcpy(reinterpret_cast<Byte*>(&both) + 16, in, 16);
#endif
  const Words32 shifts = {0, 0, 0, 0, 4, 4, 4, 4};
  return reinterpret_cast<Bytes32>(both >> shifts) & Byte{0xF};
}

/// 0x10 where one of the 32 bits is set.
HWY_INLINE Bytes32 fifth_bits(const Byte* in) {
  std::uint32_t bits;
  std::memcpy(&bits, in, sizeof bits);
  const auto all = reinterpret_cast<Bytes32>(Words32{} + bits);
  // Within halves of 16 bytes, which is one instruction.
  const Bytes32 bytes = __builtin_shufflevector(all, all, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18,
                                                18, 18, 18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
  const Bytes32 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                       1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return reinterpret_cast<Bytes32>((bytes & bit) != 0) & Byte{0x10};
}

/// A format's values in groups of 32: value i of a group is scale * (q[i] - kOffset) + minimum. A scale and a
/// minimum belong to kGroup values; minimums exist if kHasMinimum. `group<g>(block)` returns the integers of
/// group g of a block, `scales(block, scale, minimum)` writes those of the block. Products and sums are those
/// of PyPI's gguf, so that the values are equal bit for bit.
template <Storage>
struct BlockFormat;

template <std::int64_t kBytes_, int kOffset_, bool kHasMinimum_ = false>
struct SmallBlock {
  static constexpr std::int64_t kValues = 32, kBytes = kBytes_, kGroup = 32;
  static constexpr int kOffset = kOffset_;
  static constexpr bool kHasMinimum = kHasMinimum_;

  static HWY_INLINE void scales(const Byte* in, float* scale, float* minimum) {
    *scale = half_at(in);
    if constexpr (kHasMinimum) *minimum = half_at(in + 2);
  }
};

template <std::int64_t kBytes_, std::int64_t kGroup_, int kOffset_, bool kHasMinimum_ = false>
struct SuperBlock {
  static constexpr std::int64_t kValues = 256, kBytes = kBytes_, kGroup = kGroup_;
  static constexpr int kOffset = kOffset_;
  static constexpr bool kHasMinimum = kHasMinimum_;
};

template <>
struct BlockFormat<Storage::q4_0> : SmallBlock<18, 8> {  // d, 16 x two nibbles
  template <int>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return nibbles_of_16(in + 2);
  }
};

template <>
struct BlockFormat<Storage::q4_1> : SmallBlock<20, 0, true> {  // d, minimum, 16 x two nibbles
  template <int>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return nibbles_of_16(in + 4);
  }
};

template <>
struct BlockFormat<Storage::q5_0> : SmallBlock<22, 16> {  // d, 32 fifth bits, 16 x two nibbles
  template <int>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return nibbles_of_16(in + 6) | fifth_bits(in + 2);
  }
};

template <>
struct BlockFormat<Storage::q5_1> : SmallBlock<24, 0, true> {  // d, minimum, 32 fifth bits, 16 x two nibbles
  template <int>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return nibbles_of_16(in + 8) | fifth_bits(in + 4);
  }
};

template <>
struct BlockFormat<Storage::q8_0> : SmallBlock<34, 128> {  // d, 32 signed bytes
  template <int>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return load32(in + 2) ^ Byte { 0x80 };
  }
};

/// Group `g` of 256 numbers of two bits: 128 numbers share 32 bytes.
template <int g, int kTo>
HWY_INLINE Bytes32 two_bits(const Byte* in) {
  return bits_of<2, g % 4 * 2, kTo>(load32(in + g / 4 * 32));
}

template <>
struct BlockFormat<Storage::q2_k> : SuperBlock<84, 16, 0, true> {  // 16 x (scale, minimum), q, d, dmin
  template <int g>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return two_bits<g, 0>(in + 16);
  }
  static HWY_INLINE void scales(const Byte* in, float* scale, float* minimum) {
    const float d = half_at(in + 80), dmin = half_at(in + 82);
    for (int i = 0; i < 16; ++i) scale[i] = d * static_cast<float>(in[i] & 0xF);
    for (int i = 0; i < 16; ++i) minimum[i] = -(dmin * static_cast<float>(in[i] >> 4));
  }
};

template <>
struct BlockFormat<Storage::q3_k> : SuperBlock<110, 16, 4> {  // high bits, q, 16 x six-bit scale, d
  template <int g>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return two_bits<g, 0>(in + 32) | bits_of<1, g, 2>(load32(in));
  }
  static HWY_INLINE void scales(const Byte* in, float* scale, float* /*minimum*/) {
    const Byte* packed = in + 96;
    const float d = half_at(in + 108);
    for (int i = 0; i < 16; ++i) {
      const int low_bits = packed[i % 8] >> (i / 8 * 4) & 0xF,
                high_bits = packed[8 + i % 4] >> (i / 4 * 2) & 3;
      scale[i] = d * static_cast<float>((low_bits | high_bits << 4) - 32);
    }
  }
};

/// Q4_K and Q5_K begin with d, dmin, and 12 bytes of six-bit scales and minimums.
template <std::int64_t kBytes>
struct SixBitScales : SuperBlock<kBytes, 32, 0, true> {
  static HWY_INLINE void scales(const Byte* in, float* scale, float* minimum) {
    const float d = half_at(in), dmin = half_at(in + 2);
    const Byte* packed = in + 4;
    Byte scale_bits[8], minimum_bits[8];
    for (int i = 0; i < 4; ++i) {
      scale_bits[i] = packed[i] & 0x3F;
      minimum_bits[i] = packed[i + 4] & 0x3F;
      scale_bits[i + 4] = static_cast<Byte>((packed[i + 8] & 0xF) | (packed[i] >> 2 & 0x30));
      minimum_bits[i + 4] = static_cast<Byte>(packed[i + 8] >> 4 | (packed[i + 4] >> 2 & 0x30));
    }
    for (int i = 0; i < 8; ++i) scale[i] = d * static_cast<float>(scale_bits[i]);
    for (int i = 0; i < 8; ++i) minimum[i] = -(dmin * static_cast<float>(minimum_bits[i]));
  }
};

template <>
struct BlockFormat<Storage::q4_k> : SixBitScales<144> {  // scales, q
  template <int g>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return bits_of<4, g % 2 * 4, 0>(load32(in + 16 + g / 2 * 32));
  }
};

template <>
struct BlockFormat<Storage::q5_k> : SixBitScales<176> {  // scales, high bits, q
  template <int g>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return bits_of<4, g % 2 * 4, 0>(load32(in + 48 + g / 2 * 32)) | bits_of<1, g, 4>(load32(in + 16));
  }
};

template <>
struct BlockFormat<Storage::q6_k> : SuperBlock<210, 16, 32> {  // nibbles, two high bits, 16 x signed scale, d
  template <int g>
  static HWY_INLINE Bytes32 group(const Byte* in) {
    return bits_of<4, g % 4 / 2 * 4, 0>(load32(in + g / 4 * 64 + g % 2 * 32)) | two_bits<g, 4>(in + 128);
  }
  static HWY_INLINE void scales(const Byte* in, float* scale, float* /*minimum*/) {
    const auto* packed = reinterpret_cast<const std::int8_t*>(in + 192);
    const float d = half_at(in + 208);
    for (int i = 0; i < 16; ++i) scale[i] = d * static_cast<float>(packed[i]);
  }
};

/// Calls `body(BlockFormat<storage>())`; `storage` is a block format.
template <typename Body>
void with_format(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::q4_0:
      return body(BlockFormat<Storage::q4_0>());
    case Storage::q4_1:
      return body(BlockFormat<Storage::q4_1>());
    case Storage::q5_0:
      return body(BlockFormat<Storage::q5_0>());
    case Storage::q5_1:
      return body(BlockFormat<Storage::q5_1>());
    case Storage::q8_0:
      return body(BlockFormat<Storage::q8_0>());
    case Storage::q2_k:
      return body(BlockFormat<Storage::q2_k>());
    case Storage::q3_k:
      return body(BlockFormat<Storage::q3_k>());
    case Storage::q4_k:
      return body(BlockFormat<Storage::q4_k>());
    case Storage::q5_k:
      return body(BlockFormat<Storage::q5_k>());
    case Storage::q6_k:
      return body(BlockFormat<Storage::q6_k>());
    case Storage::f32:
    case Storage::f16:
    case Storage::bf16:
      return;
  }
}

/// Calls `body(std::integral_constant<int, g>)` for every group of 32 in a block.
template <class Format, typename Body, int... g>
HWY_INLINE void each_group(const Body& body, std::integer_sequence<int, g...>) {
  (body(std::integral_constant<int, g>()), ...);
}
template <class Format, typename Body>
HWY_INLINE void each_group(const Body& body) {
  each_group<Format>(body, std::make_integer_sequence<int, static_cast<int>(Format::kValues / 32)>());
}

/// Calls `put(i, d, values)` for the f32 values of a block in vectors of tag `d`, equal to PyPI gguf's bit
/// for bit if the compiler may not contract.
template <class Format, typename Put>
HWY_INLINE void each_value(const Byte* HWY_RESTRICT block, const Put& put) {
  constexpr std::int64_t kScales = Format::kValues / Format::kGroup;
  float scale[kScales], minimum[kScales] = {};
  Format::scales(block, scale, minimum);
#if HWY_TARGET == HWY_SCALAR
  const hn::CappedTag<float, 1> d;
#else
  const hn::CappedTag<float, 16> d;
#endif
  const hn::Rebind<std::int32_t, decltype(d)> di;
  const hn::Rebind<Byte, decltype(d)> d8;
  each_group<Format>([&](auto g) HWY_ATTR {
    const Bytes32 q = Format::template group<g>(block);
    Byte bytes[32];
    std::memcpy(bytes, &q, sizeof bytes);
#pragma GCC unroll 4
    for (int i = 0; i < 32; i += static_cast<int>(hn::MaxLanes(d))) {
      const int place = g * 32 + i;
      auto integers = hn::PromoteTo(di, hn::LoadU(d8, bytes + i));
      if constexpr (Format::kOffset != 0) integers = hn::Sub(integers, hn::Set(di, Format::kOffset));
      auto values = hn::Mul(hn::Set(d, scale[place / Format::kGroup]), hn::ConvertTo(d, integers));
      if constexpr (Format::kHasMinimum)
        values = hn::Add(values, hn::Set(d, minimum[place / Format::kGroup]));
      put(place, d, values);
    }
  });
}

}  // namespace
}  // namespace moba::llm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
