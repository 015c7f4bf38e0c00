#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "llm/error.h"

namespace moba::llm {

/// The document in a file. Throws DataError for what is not JSON.
nlohmann::json read_json(const std::filesystem::path& file);

/// A place in a JSON file. What is not as expected is a DataError that names the file and the place.
class JsonNode {
 public:
  /// The whole document of a file.
  JsonNode(const nlohmann::json& document, const std::filesystem::path& file)
      : JsonNode(document, file.string(), true) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }

  [[noreturn]] void fail(std::string_view expected, std::string_view found) const {
    throw DataError(fmt::format("{}: expected {}; found {}", where_, expected, found));
  }
  [[noreturn]] void fail(std::string_view expected) const { fail(expected, value_->type_name()); }

  const nlohmann::json::object_t& object() const {
    if (const auto* o = value_->get_ptr<const nlohmann::json::object_t*>()) return *o;
    fail("an object");
  }
  const nlohmann::json::array_t& array() const {
    if (const auto* a = value_->get_ptr<const nlohmann::json::array_t*>()) return *a;
    fail("an array");
  }
  const std::string& string() const {
    if (const auto* s = value_->get_ptr<const std::string*>()) return *s;
    fail("a string");
  }
  bool boolean() const {
    if (!value_->is_boolean()) fail("true or false");
    return value_->get<bool>();
  }
  std::int64_t integer() const {
    if (!value_->is_number_integer()) fail("an integer");
    return value_->get<std::int64_t>();
  }

  /// A member of this object, which must be there.
  JsonNode at(const std::string& key) const {
    if (const auto node = find(key)) return *node;
    fail(fmt::format("a member '{}'", key), "none");
  }
  /// A member of this object; nothing where it is missing or null.
  std::optional<JsonNode> find(const std::string& key) const {
    const auto it = object().find(key);
    if (it == object().end() || it->second.is_null()) return std::nullopt;
    return JsonNode(it->second, where_ + (is_file_ ? ": " : ".") + key, false);
  }
  bool flag(const std::string& key, bool otherwise) const {
    const auto node = find(key);
    return node ? node->boolean() : otherwise;
  }
  std::string text(const std::string& key, std::string otherwise) const {
    const auto node = find(key);
    return node ? node->string() : std::move(otherwise);
  }
  JsonNode element(std::size_t index) const {
    return JsonNode(array()[index], fmt::format("{}[{}]", where_, index), false);
  }
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (std::size_t i = 0; i < array().size(); ++i) visit(element(i));
  }

 private:
  JsonNode(const nlohmann::json& value, std::string where, bool is_file)
      : value_(&value), where_(std::move(where)), is_file_(is_file) {}

  const nlohmann::json* value_;
  std::string where_;
  bool is_file_;
};

}  // namespace moba::llm
