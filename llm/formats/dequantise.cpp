#include <cassert>
#include <cstring>

#include "llm/formats/tensor.h"
#include "src/number.h"

// Products and sums are rounded one by one, as PyPI's gguf rounds them: this file is compiled without
// contraction to fused multiply-adds.
namespace moba::llm {
namespace {

using Byte = std::uint8_t;

constexpr int kSmall = 32;   // values in a block of the plain formats
constexpr int kLarge = 256;  // values in a super-block of the K formats

std::uint16_t load_u16(const Byte* bytes) {
  return static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8);
}

float half_at(const Byte* bytes) {
  return float_of(float16{load_u16(bytes)});
}

void f32(const Byte* in, float* out) {
  std::memcpy(out, in, sizeof(float));
}

void f16(const Byte* in, float* out) {
  *out = half_at(in);
}

void bf16(const Byte* in, float* out) {
  *out = float_of(bfloat16{load_u16(in)});
}

void q4_0(const Byte* in, float* out) {  // d, 16 x two nibbles
  const float d = half_at(in);
  const Byte* q = in + 2;
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((q[i] & 0xF) - 8);
    out[i + 16] = d * static_cast<float>((q[i] >> 4) - 8);
  }
}

void q4_1(const Byte* in, float* out) {  // d, m, 16 x two nibbles
  const float d = half_at(in), m = half_at(in + 2);
  const Byte* q = in + 4;
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(q[i] & 0xF) + m;
    out[i + 16] = d * static_cast<float>(q[i] >> 4) + m;
  }
}

/// The 32 five-bit numbers of Q5_0 and Q5_1: four bytes of high bits, then nibbles.
void five_bits(const Byte* in, int (&q)[kSmall]) {
  const std::uint32_t high = load_u16(in) | static_cast<std::uint32_t>(load_u16(in + 2)) << 16;
  for (int i = 0; i < 16; ++i) {
    q[i] = (in[4 + i] & 0xF) | static_cast<int>(high >> i & 1) << 4;
    q[i + 16] = (in[4 + i] >> 4) | static_cast<int>(high >> (i + 16) & 1) << 4;
  }
}

void q5_0(const Byte* in, float* out) {
  const float d = half_at(in);
  int q[kSmall];
  five_bits(in + 2, q);
  for (int i = 0; i < kSmall; ++i) out[i] = d * static_cast<float>(q[i] - 16);
}

void q5_1(const Byte* in, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  int q[kSmall];
  five_bits(in + 4, q);
  for (int i = 0; i < kSmall; ++i) out[i] = d * static_cast<float>(q[i]) + m;
}

void q8_0(const Byte* in, float* out) {
  const float d = half_at(in);
  for (int i = 0; i < kSmall; ++i) out[i] = static_cast<float>(static_cast<std::int8_t>(in[2 + i])) * d;
}

/// Two bits of each of 256 numbers: 128 numbers share 32 bytes.
int two_bits(const Byte* packed, int i) {
  return packed[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
}

void q2_k(const Byte* in, float* out) {  // 16 x (scale, minimum), q, d, dmin
  const Byte *scales = in, *q = in + 16;
  const float d = half_at(in + 80), dmin = half_at(in + 82);
  for (int group = 0; group < 16; ++group) {
    const float scale = d * static_cast<float>(scales[group] & 0xF);
    const float minimum = dmin * static_cast<float>(scales[group] >> 4);
    for (int i = group * 16; i < group * 16 + 16; ++i) {
      out[i] = scale * static_cast<float>(two_bits(q, i)) - minimum;
    }
  }
}

void q3_k(const Byte* in, float* out) {  // high bits, q, 16 x six-bit scale, d
  const Byte *high = in, *q = in + 32, *scales = in + 96;
  const float d = half_at(in + 108);
  for (int group = 0; group < 16; ++group) {
    const int low_bits = scales[group % 8] >> (group / 8 * 4) & 0xF;
    const int high_bits = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    const float scale = d * static_cast<float>((low_bits | high_bits << 4) - 32);
    for (int i = group * 16; i < group * 16 + 16; ++i) {
      const int offset = (high[i % 32] >> (i / 32) & 1) != 0 ? 0 : 4;
      out[i] = scale * static_cast<float>(two_bits(q, i) - offset);
    }
  }
}

struct ScaleAndMinimum {
  float scale, minimum;
};

/// The scales of group `group` (of 8) in Q4_K and Q5_K: d, dmin, then 12 bytes of six-bit numbers.
ScaleAndMinimum k_scale(const Byte* in, int group) {
  const Byte* packed = in + 4;
  int scale, minimum;
  if (group < 4) {
    scale = packed[group] & 0x3F;
    minimum = packed[group + 4] & 0x3F;
  } else {
    scale = (packed[group + 4] & 0xF) | (packed[group - 4] >> 2 & 0x30);
    minimum = packed[group + 4] >> 4 | (packed[group] >> 2 & 0x30);
  }
  return {half_at(in) * static_cast<float>(scale), half_at(in + 2) * static_cast<float>(minimum)};
}

void q4_k(const Byte* in, float* out) {
  const Byte* q = in + 16;
  for (int group = 0; group < 8; ++group) {
    const auto [scale, minimum] = k_scale(in, group);
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      out[group * 32 + i] = scale * static_cast<float>(q[group / 2 * 32 + i] >> shift & 0xF) - minimum;
    }
  }
}

void q5_k(const Byte* in, float* out) {
  const Byte *high = in + 16, *q = in + 48;
  for (int group = 0; group < 8; ++group) {
    const auto [scale, minimum] = k_scale(in, group);
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      const int value = (q[group / 2 * 32 + i] >> shift & 0xF) | (high[i] >> group & 1) << 4;
      out[group * 32 + i] = scale * static_cast<float>(value) - minimum;
    }
  }
}

void q6_k(const Byte* in, float* out) {  // nibbles, two-bit heads, 16 x signed scale, d
  const Byte *low = in, *high = in + 128, *scales = in + 192;
  const float d = half_at(in + 208);
  for (int group = 0; group < 16; ++group) {
    const float scale = d * static_cast<float>(static_cast<std::int8_t>(scales[group]));
    for (int i = group * 16; i < group * 16 + 16; ++i) {
      const int nibble = low[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 0xF;
      out[i] = scale * static_cast<float>((nibble | two_bits(high, i) << 4) - 32);
    }
  }
}

template <void (*Block)(const Byte*, float*), int Values, int Bytes>
void each_block(const Byte* in, std::int64_t values, float* out) {
  for (std::int64_t i = 0; i < values / Values; ++i) Block(in + i * Bytes, out + i * Values);
}

void convert(Storage storage, const Byte* in, std::int64_t values, float* out) {
  switch (storage) {
    case Storage::f32:
      return each_block<f32, 1, 4>(in, values, out);
    case Storage::f16:
      return each_block<f16, 1, 2>(in, values, out);
    case Storage::bf16:
      return each_block<bf16, 1, 2>(in, values, out);
    case Storage::q4_0:
      return each_block<q4_0, kSmall, 18>(in, values, out);
    case Storage::q4_1:
      return each_block<q4_1, kSmall, 20>(in, values, out);
    case Storage::q5_0:
      return each_block<q5_0, kSmall, 22>(in, values, out);
    case Storage::q5_1:
      return each_block<q5_1, kSmall, 24>(in, values, out);
    case Storage::q8_0:
      return each_block<q8_0, kSmall, 34>(in, values, out);
    case Storage::q2_k:
      return each_block<q2_k, kLarge, 84>(in, values, out);
    case Storage::q3_k:
      return each_block<q3_k, kLarge, 110>(in, values, out);
    case Storage::q4_k:
      return each_block<q4_k, kLarge, 144>(in, values, out);
    case Storage::q5_k:
      return each_block<q5_k, kLarge, 176>(in, values, out);
    case Storage::q6_k:
      return each_block<q6_k, kLarge, 210>(in, values, out);
  }
}

}  // namespace

void dequantise(const StoredTensor& tensor, std::int64_t first, std::int64_t count, float* out) {
  const StorageBlock block = block_of(tensor.storage);
  const std::int64_t row_bytes = tensor.row_length() / block.values * block.bytes;
  assert(first >= 0 && count >= 0);
  assert((first + count) * row_bytes <= static_cast<std::int64_t>(tensor.bytes.size()));
  const auto* bytes = reinterpret_cast<const Byte*>(tensor.bytes.data());
  convert(tensor.storage, bytes + first * row_bytes, count * tensor.row_length(), out);
}

}  // namespace moba::llm
