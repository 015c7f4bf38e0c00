#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace moba::llm {

/// Parses `text`, a part of `file`. Throws DataError for invalid JSON, for a nesting of more than 64 levels
/// and for a member that the outermost object has twice.
nlohmann::json parse_json(std::string_view text, const std::string& file);

/// Parses a file of at most `max_bytes`. Throws DataError.
nlohmann::json load_json(const std::filesystem::path& file,
                         std::uint64_t max_bytes = std::uint64_t{64} << 20);

/// A value in a JSON document, which has to outlive it. Members throw a DataError that names the file and the
/// place unless the value is as expected.
class JsonValue {
 public:
  /// The whole document of a file.
  JsonValue(const nlohmann::json& document, const std::string& file) : JsonValue(document, file, ": ") {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }
  [[noreturn]] void fail(std::string_view expected, std::string_view found) const;
  /// Fails with a short form of the value as what was found.
  [[noreturn]] void fail(std::string_view expected) const;

  const nlohmann::json::object_t& object() const;
  const nlohmann::json::array_t& array() const;
  const std::string& string() const;
  bool boolean() const;
  std::int64_t integer() const;
  double number() const;

  /// Returns a member of this object, which must exist and not be null.
  JsonValue at(const std::string& key) const;
  /// Returns a member of this object, or nothing if it is missing or null.
  std::optional<JsonValue> find(const std::string& key) const;
  JsonValue element(std::size_t index) const;

 private:
  JsonValue(const nlohmann::json& value, std::string where, const char* separator)
      : value_(&value), where_(std::move(where)), separator_(separator) {}

  const nlohmann::json* value_;
  std::string where_;
  const char* separator_;  // between `where_` and the name of a member
};

}  // namespace moba::llm
