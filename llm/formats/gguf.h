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

/// One metadata value, still in the file's memory: nothing is copied until it is asked for. Reading it as
/// something that it is not is a DataError that names the file and the key.
class GgufValue {
 public:
  std::string_view string() const;
  bool boolean() const;
  std::int64_t integer() const;  // of any width
  double number() const;         // a float or an integer of any width

  bool is_array() const { return type_ == GgufType::array; }
  /// Elements of an array; 1 otherwise.
  std::uint64_t count() const { return count_; }
  std::vector<std::string_view> strings() const;
  std::vector<std::int64_t> integers() const;
  std::vector<float> numbers() const;

  /// The file and the key, as errors name them.
  std::string where() const;
  [[noreturn]] void fail(std::string_view expected, std::string_view found) const;

 private:
  friend class GgufReader;

  void expect(bool is_right, std::string_view expected) const;
  std::string kind() const;

  const std::string* file_ = nullptr;
  std::string_view key_;
  GgufType type_ = GgufType::u8;
  GgufType element_ = GgufType::u8;  // what an array holds; `type_` again otherwise
  std::uint64_t count_ = 1;
  std::span<const std::byte> bytes_;  // of the elements, without type and count
};

/// A GGUF file (version 2 or 3, little-endian): its metadata and where its tensors lie. Opening reads the
/// headers only and checks every length and offset in them. Everything returned points into the mapping and
/// is good for as long as a copy of the file object is.
class GgufFile {
 public:
  /// Throws DataError.
  static GgufFile open(const std::filesystem::path& path);
  /// Returns whether the file starts as a GGUF file does.
  static bool is_gguf(const std::filesystem::path& path);

  const std::string& name() const;
  std::uint32_t version() const;
  std::uint64_t bytes() const;
  const std::vector<StoredTensor>& tensors() const;

  std::optional<GgufValue> find(std::string_view key) const;
  /// A key that must be there: a DataError otherwise.
  GgufValue at(std::string_view key) const;

 private:
  friend class GgufReader;
  struct Impl;

  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm
