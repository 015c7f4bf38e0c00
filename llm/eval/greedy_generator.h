#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "llm/session/session.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// Generates answers to prompts by greedy decoding, one after the other. The prefix that a prompt shares with
/// the previous one stays in the cache and is not computed again.
class GreedyGenerator {
 public:
  GreedyGenerator(const Model& model, const Tokenizer& tokenizer, const SessionSettings& settings)
      : settings_(settings), tokenizer_(tokenizer), session_(model, settings) {}

  /// Returns the likeliest answer up to an end token, `max_tokens` tokens, or the first text for which
  /// `is_enough` is true. It ends with a complete character.
  std::string generate(const std::vector<std::int32_t>& prompt, std::int64_t max_tokens,
                       const Session::Progress& progress,
                       const std::function<bool(const std::string&)>& is_enough = {});

 private:
  /// Returns how many tokens of the cache a prefill of `prompt` would compute again.
  std::int64_t shared_with(const std::vector<std::int32_t>& prompt) const;

  SessionSettings settings_;
  const Tokenizer& tokenizer_;
  Session session_;
  std::vector<std::int32_t> cached_;
};

}  // namespace moba::llm::eval
