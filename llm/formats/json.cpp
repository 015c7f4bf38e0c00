#include "llm/formats/json.h"

#include <fmt/format.h>

#include <string>
#include <unordered_set>

#include "llm/error.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/quoted.h"

namespace moba::llm {
namespace {

constexpr int kDeepest = 64;

/// Returns a short form of a document for error messages.
std::string shown(const nlohmann::json& value) {
  using Json = nlohmann::json;
  switch (value.type()) {
    case Json::value_t::object:
      return "an object";
    case Json::value_t::array:
      return fmt::format("an array of {}", value.size());
    case Json::value_t::string:
      return llm::quoted(value.get_ref<const std::string&>());
    default:
      return value.dump();
  }
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& file) {
  using Event = nlohmann::json::parse_event_t;
  std::unordered_set<std::string> members;
  const auto watch = [&](int depth, Event event, nlohmann::json& parsed) {
    if (depth >= kDeepest && (event == Event::object_start || event == Event::array_start)) {
      throw DataError(fmt::format("{}: expected JSON nested at most {} deep, got more", file, kDeepest));
    }
    if (depth == 1 && event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!members.insert(key).second) {
        throw DataError(fmt::format("{}: expected each member once, got {} twice", file, llm::quoted(key)));
      }
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, watch);
  } catch (const nlohmann::json::parse_error& error) {
    throw DataError(fmt::format("{}: expected JSON, got something else at byte {}", file, error.byte));
  } catch (const nlohmann::json::exception&) {
    throw DataError(fmt::format("{}: expected JSON, got a number out of range", file));
  }
}

nlohmann::json load_json(const std::filesystem::path& path, std::uint64_t max_bytes) {
  const MappedFile file(path);
  if (file.bytes().size() > max_bytes) {
    throw DataError(fmt::format("{}: expected JSON of at most {} bytes, got {} bytes", file.name(), max_bytes,
                                file.bytes().size()));
  }
  return parse_json({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, file.name());
}

void JsonValue::fail(std::string_view expected, std::string_view found) const {
  throw DataError(fmt::format("{}: expected {}, got {}", where_, expected, found));
}

void JsonValue::fail(std::string_view expected) const {
  fail(expected, shown(*value_));
}

const nlohmann::json::object_t& JsonValue::object() const {
  if (const auto* object = value_->get_ptr<const nlohmann::json::object_t*>()) return *object;
  fail("an object");
}

const nlohmann::json::array_t& JsonValue::array() const {
  if (const auto* array = value_->get_ptr<const nlohmann::json::array_t*>()) return *array;
  fail("an array");
}

const std::string& JsonValue::string() const {
  if (const auto* string = value_->get_ptr<const std::string*>()) return *string;
  fail("a string");
}

bool JsonValue::boolean() const {
  if (!value_->is_boolean()) fail("true or false");
  return value_->get<bool>();
}

std::int64_t JsonValue::integer() const {
  const bool fits = value_->is_number_integer() &&
                    (!value_->is_number_unsigned() || value_->get<std::uint64_t>() <= INT64_MAX);
  if (!fits) fail("an integer of 64 bits");
  return value_->get<std::int64_t>();
}

double JsonValue::number() const {
  if (!value_->is_number()) fail("a number");
  return value_->get<double>();
}

JsonValue JsonValue::at(const std::string& key) const {
  if (const auto member = find(key)) return *member;
  fail(fmt::format("a member {}", llm::quoted(key)), "none");
}

std::optional<JsonValue> JsonValue::find(const std::string& key) const {
  const auto member = object().find(key);
  if (member == object().end() || member->second.is_null()) return std::nullopt;

  return JsonValue(member->second, where_ + separator_ + one_line(key), ".");
}

JsonValue JsonValue::element(std::size_t index) const {
  return JsonValue(array()[index], fmt::format("{}[{}]", where_, index), ".");
}

}  // namespace moba::llm
