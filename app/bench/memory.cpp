#include "app/bench/memory.h"

#include <hwy/highway.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <string>

namespace moba::bench {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

/// A figure in kB out of one of the kernel's lists, in bytes; 0 where there is none.
std::int64_t kernel_figure(const char* list, const char* name) {
  std::ifstream file(list);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name)) return std::stoll(line.substr(std::strlen(name))) * 1024;
  }
  return 0;
}

}  // namespace

Memory::Memory(std::size_t bytes) : size_(bytes) {
  const std::size_t whole = (bytes + kHugePage) / kHugePage * kHugePage;
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(kHugePage, whole)));
  if (!data_) throw std::bad_alloc();
  madvise(data_.get(), whole, MADV_HUGEPAGE);
}

void Memory::Free::operator()(std::byte* memory) const {
  std::free(memory);
}

Array::Array(DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim)
    : memory(static_cast<std::size_t>(tokens * heads * head_dim) * size_of(dtype)),
      tensor{.data = memory.data(),
             .dtype = dtype,
             .rank = 3,
             .sizes = {tokens, heads, head_dim},
             .strides = {heads * head_dim, head_dim, 1}} {}

Tensor rows_of(Tensor tensor, std::int64_t first, std::int64_t count) {
  tensor.data = static_cast<std::byte*>(tensor.data) +
                first * tensor.strides[0] * static_cast<std::int64_t>(size_of(tensor.dtype));
  tensor.sizes[0] = count;
  return tensor;
}

float get(const Tensor& tensor, std::int64_t index) {
  namespace hn = hwy::HWY_NAMESPACE;
  switch (tensor.dtype) {
    case DType::bf16:
      return hwy::F32FromBF16(static_cast<const hwy::bfloat16_t*>(tensor.data)[index]);
    case DType::f16: {
      const hn::FixedTag<float, 1> wide;
      const hn::Rebind<hwy::float16_t, decltype(wide)> half;
      return hn::GetLane(
          hn::PromoteTo(wide, hn::LoadU(half, static_cast<const hwy::float16_t*>(tensor.data) + index)));
    }
    default:
      return static_cast<const float*>(tensor.data)[index];
  }
}

void set(const Tensor& tensor, std::int64_t index, float value) {
  namespace hn = hwy::HWY_NAMESPACE;
  switch (tensor.dtype) {
    case DType::bf16:
      static_cast<hwy::bfloat16_t*>(tensor.data)[index] = hwy::BF16FromF32(value);
      break;
    case DType::f16: {
      const hn::FixedTag<float, 1> wide;
      const hn::Rebind<hwy::float16_t, decltype(wide)> half;
      hn::StoreU(hn::DemoteTo(half, hn::Set(wide, value)), half,
                 static_cast<hwy::float16_t*>(tensor.data) + index);
      break;
    }
    default:
      static_cast<float*>(tensor.data)[index] = value;
  }
}

void poison(std::span<std::byte> bytes) {
  std::memset(bytes.data(), 0xFF, bytes.size());
}

std::size_t available_memory() {
  return static_cast<std::size_t>(kernel_figure("/proc/meminfo", "MemAvailable:"));
}

std::int64_t peak_rss_bytes() {
  return kernel_figure("/proc/self/status", "VmHWM:");
}

}  // namespace moba::bench
