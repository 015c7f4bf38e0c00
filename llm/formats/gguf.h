#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/formats/tensor.h"

namespace moba::llm {

enum class GgufType : std::uint32_t {
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  f32,
  boolean,
  string,
  array,
  u64,
  i64,
  f64
};

/// A view of one metadata value in the mapped file. Reading it as another type throws a DataError that names
/// the file and the key.
class GgufValue {
 public:
  std::string_view string() const;
  bool boolean() const;
  std::int64_t integer() const;  // of any width
  double number() const;         // a float or an integer of any width

  bool is_array() const { return type_ == GgufType::array; }
  /// Returns the number of elements of an array; 1 otherwise.
  std::uint64_t count() const { return count_; }
  std::vector<std::string_view> strings() const;
  std::vector<std::int64_t> integers() const;
  std::vector<float> numbers() const;

  /// Returns the file and the key, for errors.
  std::string where() const;
  [[noreturn]] void fail(std::string_view expected, std::string_view found) const;

 private:
  friend class GgufReader;

  void expect(bool is_right, std::string_view expected) const;
  std::string kind() const;

  const std::string* file_ = nullptr;
  std::string_view key_;
  GgufType type_ = GgufType::u8;
  GgufType element_ = GgufType::u8;  // the type of an array's elements; `type_` otherwise
  std::uint64_t count_ = 1;
  std::span<const std::byte> bytes_;  // of the elements, without type and count
};

/// A GGUF file (version 2 or 3, little-endian): its metadata and tensors. Opening reads the headers only and
/// checks every length and offset in them. All results point into the mapping and are valid as long as a copy
/// of the file object.
class GgufFile {
 public:
  /// Throws DataError.
  static GgufFile open(const std::filesystem::path& path);
  /// Returns whether the file begins with GGUF's magic number.
  static bool is_gguf(const std::filesystem::path& path);

  const std::string& name() const;
  std::uint32_t version() const;
  std::uint64_t bytes() const;
  const std::vector<StoredTensor>& tensors() const;

  std::optional<GgufValue> find(std::string_view key) const;
  /// Returns the value of a key; throws DataError if it is missing.
  GgufValue at(std::string_view key) const;

 private:
  friend class GgufReader;
  struct Impl;

  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm
