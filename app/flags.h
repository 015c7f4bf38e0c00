#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "llm/config.h"
#include "llm/error.h"

// The checks and helpers that the flags of every subcommand share.
namespace moba::app {

inline constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

/// Gives a flag that takes one of a few words.
template <typename T>
void add_choice(CLI::App& command, const std::string& flag, T& value, const std::map<std::string, T>& choices,
                const std::string& help) {
  std::string words;
  for (const auto& [word, meaning] : choices) words += (words.empty() ? "" : "|") + word;
  const auto choose = [&value, &choices, flag, words](const std::string& word) {
    const auto found = choices.find(word);
    if (found == choices.end())
      throw CLI::ValidationError(flag, fmt::format("expected {}, got {}", words, word));
    value = found->second;
  };
  command.add_option_function<std::string>(flag, choose, help)->type_name(words);
}

/// Gives a flag with a whole number. CLI11 by itself takes 10^19 for the largest int64.
template <typename T>
CLI::Option* add_number(CLI::App& command, const std::string& flags, T& value, const std::string& help) {
  const auto check = [](const std::string& text) {
    std::int64_t number = 0;
    const char* end = text.data() + text.size();
    const auto parsed = std::from_chars(text.data(), end, number);
    const bool fits = parsed.ec == std::errc() && parsed.ptr == end;
    return fits ? std::string() : fmt::format("expected a whole number, got {}", text);
  };
  return command.add_option(flags, value, help)->check(check)->type_name("INT");
}

/// Returns the value. Throws UsageError where it is out of range.
template <typename T>
T in_range(const char* flag, T value, std::type_identity_t<T> low, std::type_identity_t<T> high) {
  if (value >= low && value <= high) return value;  // a NaN is in no range
  throw llm::UsageError(fmt::format("{}: expected {} to {}, got {}", flag, low, high, value));
}

template <typename T>
T in_range(const char* flag, const std::optional<T>& value, std::type_identity_t<T> low,
           std::type_identity_t<T> high, std::type_identity_t<T> otherwise) {
  return value ? in_range(flag, *value, low, high) : otherwise;
}

/// "8k" is 8192, "1m" 1048576. Throws UsageError for what is no such number from 1 to `max`.
std::int64_t size_from(const char* flag, std::string_view text, std::int64_t max = kMaxTokens);

/// The number of threads; where none is given, the number of cores. Throws UsageError where it is out of
/// range.
int threads_from(const std::optional<std::int64_t>& threads);

/// Throws UsageError where a flag is given that would have no effect; `why` goes on from "has no effect".
inline void refuse(bool given, const char* flag, const char* why) {
  if (given) throw llm::UsageError(fmt::format("{}: has no effect {}", flag, why));
}

/// "0,27-29" to {0, 0}, {27, 29}.
std::vector<llm::LayerRange> layer_ranges(const char* flag, std::string_view text);

}  // namespace moba::app
