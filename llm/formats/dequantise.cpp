// Products and sums are rounded one by one, as PyPI's gguf rounds them: this file is compiled without
// contraction to fused multiply-adds.
#include "llm/formats/dequantise.h"

#include <cassert>

#include "llm/formats/instruction_set.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "llm/formats/dequantise.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "llm/formats/unpack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::llm::HWY_NAMESPACE {
namespace {

template <class Format, typename Out>
void convert_blocks(const Byte* HWY_RESTRICT in, std::int64_t values, Out* HWY_RESTRICT out) {
  for (std::int64_t i = 0; i < values; i += Format::kValues, in += Format::kBytes) {
    Out* to = out + i;
    each_value<Format>(in, [to](int j, auto d, auto v) HWY_ATTR { store(d, v, to + j); });
  }
}

template <typename In, typename Out>
void convert_floats(const In* HWY_RESTRICT in, std::int64_t values, Out* HWY_RESTRICT out) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= values; i += lanes) store(d, load(d, in + i), out + i);
  for (const hn::CappedTag<float, 1> one; i < values; ++i) store(one, load(one, in + i), out + i);
}

template <typename Out>
void convert(Storage storage, const Byte* HWY_RESTRICT in, std::int64_t values, Out* HWY_RESTRICT out) {
  if (storage == Storage::f32) {
    convert_floats(reinterpret_cast<const float*>(in), values, out);
  } else if (storage == Storage::f16) {
    convert_floats(reinterpret_cast<const float16*>(in), values, out);
  } else if (storage == Storage::bf16) {
    convert_floats(reinterpret_cast<const bfloat16*>(in), values, out);
  } else {
    with_format(storage, [&](auto format) HWY_ATTR { convert_blocks<decltype(format)>(in, values, out); });
  }
}

}  // namespace

void to_f32(Storage storage, const Byte* in, std::int64_t values, float* out) {
  convert(storage, in, values, out);
}

void to_bf16(Storage storage, const Byte* in, std::int64_t values, bfloat16* out) {
  convert(storage, in, values, out);
}

}  // namespace moba::llm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::llm {
namespace {

HWY_EXPORT(to_f32);
HWY_EXPORT(to_bf16);

const std::uint8_t* row_of(const StoredTensor& tensor, std::int64_t first,
                           [[maybe_unused]] std::int64_t count) {
  assert(first >= 0 && count >= 0);
  assert((first + count) * tensor.row_bytes() <= static_cast<std::int64_t>(tensor.bytes.size()));
  return reinterpret_cast<const std::uint8_t*>(tensor.bytes.data()) + first * tensor.row_bytes();
}

}  // namespace

void dequantise(const StoredTensor& tensor, std::int64_t first, std::int64_t count, float* out) {
  choose_instruction_set();
  HWY_DYNAMIC_DISPATCH(to_f32)
  (tensor.storage, row_of(tensor, first, count), count * tensor.row_length(), out);
}

void dequantise(const StoredTensor& tensor, std::int64_t first, std::int64_t count, bfloat16* out) {
  choose_instruction_set();
  HWY_DYNAMIC_DISPATCH(to_bf16)
  (tensor.storage, row_of(tensor, first, count), count * tensor.row_length(), out);
}

}  // namespace moba::llm
#endif
