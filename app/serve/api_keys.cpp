#include "app/serve/api_keys.h"

#include <fmt/format.h>

#include <fstream>

#include "llm/error.h"

namespace moba::app {
namespace {

/// Compares all bytes of `given`, whatever they are.
bool is_equal(std::string_view given, std::string_view key) {
  volatile unsigned difference = given.size() == key.size() ? 0 : 1;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const auto byte = static_cast<unsigned char>(key[i % key.size()]);
    difference = difference | (static_cast<unsigned char>(given[i]) ^ byte);
  }
  return difference == 0;
}

}  // namespace

ApiKeys ApiKeys::read(const std::string& path) {
  std::ifstream lines(path);
  std::vector<std::string> keys;
  constexpr const char* kSpaces = " \t\r";
  for (std::string line; std::getline(lines, line);) {
    const std::size_t begin = line.find_first_not_of(kSpaces);
    if (begin != std::string::npos)
      keys.push_back(line.substr(begin, line.find_last_not_of(kSpaces) + 1 - begin));
  }
  if (keys.empty()) throw llm::DataError(fmt::format("{}: expected a key a line, got none", path));
  return ApiKeys(std::move(keys));
}

bool ApiKeys::accepts(std::string_view authorization) const {
  constexpr std::string_view kScheme = "Bearer ";
  if (!required()) return true;
  if (!authorization.starts_with(kScheme)) return false;
  authorization.remove_prefix(kScheme.size());
  bool found = false;
  for (const std::string& key : keys_) found |= is_equal(authorization, key);
  return found;
}

}  // namespace moba::app
