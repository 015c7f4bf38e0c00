#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "llm/config.h"
#include "llm/error.h"

// The declaration of a flag, once for all its uses: the option with its check in CLI11, the default, the
// value in the JSON of a result, and its description in docs/command-line.md, the man page and the shells'
// completions.
namespace moba::app {

inline constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
inline constexpr std::int64_t kMaxSeed = std::numeric_limits<std::int64_t>::max();

/// The word of a flag whose value the program chooses.
inline constexpr const char* kAuto = "auto";

using Json = nlohmann::ordered_json;

/// Inclusive bounds.
template <typename T>
struct Range {
  T low, high;
};

/// Words that a flag takes, with their values.
template <typename T>
using Words = std::vector<std::pair<std::string, T>>;

/// The type of one value of a variable, which is a T, an optional T or a list of T.
template <typename T>
struct ElementOf {
  using Type = T;
};
template <typename T>
struct ElementOf<std::optional<T>> {
  using Type = T;
};
template <typename T>
struct ElementOf<std::vector<T>> {
  using Type = T;
};
template <typename T>
using Element = typename ElementOf<T>::Type;
template <typename T>
inline constexpr bool kIsList = std::is_same_v<T, std::vector<Element<T>>>;
template <typename T>
inline constexpr bool kIsOptional = std::is_same_v<T, std::optional<Element<T>>>;
template <typename T>
using Bound = std::conditional_t<std::is_floating_point_v<Element<T>>, double, std::int64_t>;

class FlagTable;

/// A declared flag.
class Flag {
 public:
  using Value = std::function<Json()>;
  using Condition = std::function<bool()>;

  Flag(FlagTable& table, CLI::Option* option, std::string help, std::string default_text, Value value);

  Flag& required();
  Flag& excludes(const char* flag);
  /// Splits an argument at commas.
  Flag& comma_separated();
  /// Checks each value; see CLI::Validator.
  Flag& check(const CLI::Validator& validator);
  /// Describes a default that is no constant. "{}" stands for the present value of the variable.
  Flag& default_text(std::string_view text);
  /// Writes the variable into the table's JSON where `condition` holds.
  Flag& json(Condition condition = {});

  const std::string& group() const { return option_->get_group(); }
  /// Returns the key of the flag in JSON: its name.
  std::string key() const;
  Json value() const { return value_(); }
  /// Returns names, type, the words that it takes, default and help.
  Json description() const;

 private:
  void describe();

  FlagTable* table_;
  CLI::Option* option_;
  std::string help_, default_;
  Value value_;
};

/// The flags of a subcommand. A flag writes its variable, whose value before is the default. A value that
/// fails a check ends parsing with "--flag: expected X, got Y". Variables and table must outlive parsing.
class FlagTable {
 public:
  /// Adds the hidden flag --help-json, which prints description() and ends the program.
  explicit FlagTable(CLI::App& command);
  FlagTable(const FlagTable&) = delete;
  FlagTable& operator=(const FlagTable&) = delete;

  /// Begins a group, which has its own heading in the help and its own table.
  void group(const std::string& name);

  template <typename T>
  Flag& number(const char* names, T& variable, Range<Bound<T>> range, const char* help);
  /// A number of tokens or bytes, such as 8k or 1m.
  template <typename T>
  Flag& size(const char* names, T& variable, Range<std::int64_t> range, const char* help);
  /// An optional variable has one more word, auto, for none.
  template <typename T>
  Flag& choice(const char* names, T& variable, const Words<Element<T>>& words, const char* help);
  /// Anything that CLI11 converts: texts, paths, lists of them (one argument each).
  template <typename T>
  Flag& value(const char* names, T& variable, const char* type, const char* help);
  /// Layers, such as 0,27-29.
  Flag& layers(const char* names, std::vector<llm::LayerRange>& variable, const char* help);
  /// A flag without a value, which inverts its variable.
  Flag& toggle(const char* names, bool& variable, const char* help);

  /// Writes a value that has no flag into the JSON, at this place.
  void report(std::string key, Flag::Value value, Flag::Condition condition = {});

  /// Returns whether a flag is on the command line.
  bool given(const std::string& flag) const;
  /// Throws UsageError if the flag is given; `why` continues "has no effect".
  void refuse(const std::string& flag, const char* why) const;

  /// Returns the values in force, in the order of declaration: of one group or of all.
  Json json(std::string_view group = {}) const;
  /// Returns the words of the flags that may be auto, as they were requested.
  Json requested() const;
  /// Returns the subcommand's description, examples and flags.
  Json description() const;

 private:
  struct Report {
    std::string group, key;
    Flag::Value value;
    Flag::Condition condition;
  };

  /// `text` gives one value as it is written on the command line.
  template <typename T, typename Text>
  Flag& add(const char* names, T& variable, const std::string& type, const char* help, const Text& text,
            const Flag::Value& json);

  CLI::App& command_;
  std::string group_;
  std::deque<Flag> flags_;
  std::vector<const Flag*> automatic_;
  std::vector<Report> reports_;
};

/// Adds -t, --threads, whose default is the number of cores.
int core_count();
void add_threads_flag(FlagTable& flags, int& threads, int cores = core_count());

/// Returns "8k" as 8192, "1m" as 1048576. Throws UsageError for what is no such number or out of range.
std::int64_t size_from(const std::string& flag, std::string text, Range<std::int64_t> range);
/// Returns 8192 as "8k"; what is no multiple of 1024 as it is.
std::string size_text(std::int64_t size);

/// Throws UsageError if a value occurs twice.
template <typename T>
void check_distinct(const char* flag, const std::vector<T>& values) {
  for (auto value = values.begin(); value != values.end(); ++value) {
    if (std::find(values.begin(), value, *value) != value)
      throw llm::UsageError(fmt::format("{}: expected each once, got {} again", flag, *value));
  }
}

/// Whole numbers, or numbers, within the bounds.
CLI::Validator in_range(Range<std::int64_t> range);
CLI::Validator in_range(Range<double> range);
/// Replaces "8k" by "8192".
CLI::Validator in_size(Range<std::int64_t> range);
/// Replaces a word by the text of its value. `expected` completes "expected ...".
CLI::Validator one_of(Words<std::string> texts, std::string expected);

/// Returns the words as their own values.
Words<std::string> words_of(const std::vector<std::string>& words);

/// Returns a value as CLI11 reads it.
template <typename T>
std::string text_of(const T& value) {
  if constexpr (std::is_enum_v<T>) {
    return fmt::format("{}", static_cast<int>(value));
  } else if constexpr (std::is_arithmetic_v<T>) {
    return fmt::format("{}", value);
  } else {
    return std::filesystem::path(value).string();
  }
}

/// Returns a variable as it is written on the command line, each value by `text`.
template <typename T, typename Text>
std::string written(const T& variable, const Text& text) {
  if constexpr (kIsList<T>) {
    std::string list;
    for (const auto& value : variable) list += (list.empty() ? "" : ",") + text(value);
    return list;
  } else if constexpr (kIsOptional<T>) {
    return variable ? text(*variable) : "";
  } else {
    return text(variable);
  }
}

template <typename T, typename Text>
Flag& FlagTable::add(const char* names, T& variable, const std::string& type, const char* help,
                     const Text& text, const Flag::Value& json) {
  CLI::Option* option = command_.add_option(names, variable)->type_name(type);
  return flags_.emplace_back(*this, option, help, written(variable, text), json);
}

template <typename T>
Flag& FlagTable::value(const char* names, T& variable, const char* type, const char* help) {
  return add(names, variable, type, help, text_of<Element<T>>, [&variable] {
    if constexpr (kIsOptional<T>) {
      return variable ? Json(*variable) : Json();
    } else {
      return Json(variable);
    }
  });
}

template <typename T>
Flag& FlagTable::number(const char* names, T& variable, Range<Bound<T>> range, const char* help) {
  Flag& flag = value(names, variable, std::is_floating_point_v<Element<T>> ? "FLOAT" : "INT", help);
  if constexpr (kIsList<T>) flag.comma_separated();
  return flag.check(in_range(range));
}

template <typename T>
Flag& FlagTable::size(const char* names, T& variable, Range<std::int64_t> range, const char* help) {
  Flag& flag = add(names, variable, "SIZE", help, size_text, [&variable] { return Json(variable); });
  if constexpr (kIsList<T>) flag.comma_separated();
  return flag.check(in_size(range));
}

template <typename T>
Flag& FlagTable::choice(const char* names, T& variable, const Words<Element<T>>& words, const char* help) {
  const auto word_of = [words](const Element<T>& value) {
    const auto is_it = [&](const auto& word) { return word.second == value; };
    return std::find_if(words.begin(), words.end(), is_it)->first;
  };
  Words<std::string> texts;
  std::string listed;
  if constexpr (kIsOptional<T>) {
    listed = kAuto;
    texts.emplace_back(kAuto, "");
  }
  for (const auto& [word, value] : words) {
    texts.emplace_back(word, text_of(value));
    listed += (listed.empty() ? "" : kIsList<T> ? "," : "|") + word;
  }
  Flag& flag = add(names, variable, listed, help, word_of, [&variable, word_of] {
    if constexpr (kIsOptional<T>) {
      if (!variable) return Json(kAuto);
    }
    return Json(written(variable, word_of));
  });
  if constexpr (kIsList<T>) flag.comma_separated();
  if constexpr (kIsOptional<T>) {
    flag.default_text(kAuto);
    automatic_.push_back(&flag);
  }
  return flag.check(one_of(texts, (kIsList<T> ? "some of " : "") + listed));
}

}  // namespace moba::app
