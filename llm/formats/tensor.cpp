#include "llm/formats/tensor.h"

namespace moba::llm {

std::string_view name_of(Storage storage) {
  switch (storage) {
    case Storage::f32:
      return "F32";
    case Storage::f16:
      return "F16";
    case Storage::bf16:
      return "BF16";
    case Storage::q4_0:
      return "Q4_0";
    case Storage::q4_1:
      return "Q4_1";
    case Storage::q5_0:
      return "Q5_0";
    case Storage::q5_1:
      return "Q5_1";
    case Storage::q8_0:
      return "Q8_0";
    case Storage::q2_k:
      return "Q2_K";
    case Storage::q3_k:
      return "Q3_K";
    case Storage::q4_k:
      return "Q4_K";
    case Storage::q5_k:
      return "Q5_K";
    case Storage::q6_k:
      return "Q6_K";
  }
  return "?";
}

StorageBlock block_of(Storage storage) {
  switch (storage) {
    case Storage::f32:
      return {1, 4};
    case Storage::f16:
    case Storage::bf16:
      return {1, 2};
    case Storage::q4_0:
      return {32, 18};
    case Storage::q4_1:
      return {32, 20};
    case Storage::q5_0:
      return {32, 22};
    case Storage::q5_1:
      return {32, 24};
    case Storage::q8_0:
      return {32, 34};
    case Storage::q2_k:
      return {256, 84};
    case Storage::q3_k:
      return {256, 110};
    case Storage::q4_k:
      return {256, 144};
    case Storage::q5_k:
      return {256, 176};
    case Storage::q6_k:
      return {256, 210};
  }
  return {1, 1};
}

std::int64_t StoredTensor::count() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

std::int64_t StoredTensor::row_bytes() const {
  const StorageBlock block = block_of(storage);
  return row_length() / block.values * block.bytes;
}

}  // namespace moba::llm
