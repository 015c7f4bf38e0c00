#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <type_traits>

namespace moba {

/// Storage types. `f64` is for the reference backend alone (gradient checks), `i8` for a KV cache alone.
enum class DType : std::uint8_t { f32, bf16, f16, f64, i8 };
/// Memory that a view points to. `cuda` views are for the cuda backend alone.
enum class Device : std::uint8_t { cpu, cuda };

/// The bits of a 16-bit float, so that views over them are typed. No arithmetic is offered.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

/// A non-owning view: a pointer with its shape. Strides count elements, not bytes, and may have any value,
/// except that the last dimension is contiguous. Copying a view copies no data.
struct Tensor {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> sizes{};
  std::array<std::int64_t, kMaxRank> strides{};
};

/// The DType of float, double, bfloat16 or float16.
template <typename T>
constexpr DType dtype_of() {
  using Bare = std::remove_const_t<T>;
  if constexpr (std::is_same_v<Bare, float>) {
    return DType::f32;
  } else if constexpr (std::is_same_v<Bare, double>) {
    return DType::f64;
  } else if constexpr (std::is_same_v<Bare, bfloat16>) {
    return DType::bf16;
  } else {
    static_assert(std::is_same_v<Bare, float16>, "a view is over float, double, bfloat16 or float16");
    return DType::f16;
  }
}

/// A view with given strides, in elements. Inputs are never written through, so a pointer to const is
/// accepted.
template <typename T>
Tensor view(T* data, std::initializer_list<std::int64_t> sizes, std::initializer_list<std::int64_t> strides) {
  Tensor tensor{.data = const_cast<std::remove_const_t<T>*>(data), .dtype = dtype_of<T>()};
  for (std::int64_t size : sizes) tensor.sizes[static_cast<std::size_t>(tensor.rank++)] = size;
  std::size_t dim = 0;
  for (std::int64_t stride : strides) tensor.strides[dim++] = stride;
  return tensor;
}

/// A view of contiguous memory, the last dimension fastest.
template <typename T>
Tensor view(T* data, std::initializer_list<std::int64_t> sizes) {
  Tensor tensor = view(data, sizes, {});
  std::int64_t stride = 1;
  for (int dim = tensor.rank - 1; dim >= 0; --dim) {
    tensor.strides[static_cast<std::size_t>(dim)] = stride;
    stride *= tensor.sizes[static_cast<std::size_t>(dim)];
  }
  return tensor;
}

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::i8:
      return 1;
  }
  return 0;
}

/// "f32", "bf16", ...; "?" for a value that is no DType.
constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return "f64";
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
    case DType::i8:
      return "i8";
  }
  return "?";
}

}  // namespace moba
