#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace moba::llm {

/// The document that `text`, a part of `file`, spells. A DataError for what is not JSON, is nested deeper
/// than 64 levels, or names a member of its outermost object twice.
nlohmann::json parse_json(std::string_view text, const std::string& file);

/// The document in a file of at most `max_bytes`. Throws DataError.
nlohmann::json load_json(const std::filesystem::path& file,
                         std::uint64_t max_bytes = std::uint64_t{64} << 20);

/// A place in a JSON file, which has to outlive it. What is not as expected is a DataError that names the
/// file and the place.
class JsonValue {
 public:
  /// The whole document of a file.
  JsonValue(const nlohmann::json& document, const std::string& file) : JsonValue(document, file, ": ") {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }
  [[noreturn]] void fail(std::string_view expected, std::string_view found) const;

  const nlohmann::json::object_t& object() const;
  const nlohmann::json::array_t& array() const;
  const std::string& string() const;
  bool boolean() const;
  std::int64_t integer() const;
  double number() const;

  /// A member of this object, which must be there and not null.
  JsonValue at(const std::string& key) const;
  /// A member of this object; nothing where it is missing or null.
  std::optional<JsonValue> find(const std::string& key) const;
  JsonValue element(std::size_t index) const;

 private:
  JsonValue(const nlohmann::json& value, std::string where, const char* separator)
      : value_(&value), where_(std::move(where)), separator_(separator) {}
  [[noreturn]] void fail(std::string_view expected) const;

  const nlohmann::json* value_;
  std::string where_;
  const char* separator_;  // between `where_` and the name of a member
};

}  // namespace moba::llm
