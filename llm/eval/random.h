#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace moba::llm::eval {

/// Random numbers that are the same on every machine: from the standard's generators without its
/// distributions.
class Random {
 public:
  /// `key` distinguishes this case: the user's seed, the length, the number of the sample, ...
  Random(std::initializer_list<std::int64_t> parts) : engine_(seeded(parts)) {}

  /// Returns 0 to count - 1; `count` is so small that the bias of the remainder is negligible.
  std::int64_t below(std::int64_t count) {
    return static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(count));
  }
  template <typename T>
  const T& one_of(const std::vector<T>& values) {
    return values[static_cast<std::size_t>(below(static_cast<std::int64_t>(values.size())))];
  }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i)
      std::swap(values[i - 1], values[static_cast<std::size_t>(below(static_cast<std::int64_t>(i)))]);
  }
  /// Returns a number of this many digits, the first not 0.
  std::string number(std::int64_t digits) {
    std::string text(1, static_cast<char>('1' + below(9)));
    while (static_cast<std::int64_t>(text.size()) < digits) text += static_cast<char>('0' + below(10));
    return text;
  }

 private:
  static std::mt19937_64 seeded(std::initializer_list<std::int64_t> parts) {
    std::vector<std::uint32_t> words;
    for (const std::int64_t part : parts) {
      words.push_back(static_cast<std::uint32_t>(part));
      words.push_back(static_cast<std::uint32_t>(static_cast<std::uint64_t>(part) >> 32));
    }
    std::seed_seq sequence(words.begin(), words.end());
    return std::mt19937_64(sequence);
  }

  std::mt19937_64 engine_;
};

}  // namespace moba::llm::eval
