#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "llm/session/session.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// Reads prompts and writes answers, one after the other. What a prompt begins with in common with the one
/// before it is not read again.
class Reader {
 public:
  Reader(const Model& model, const Tokenizer& tokenizer, const SessionSettings& settings)
      : settings_(settings), tokenizer_(tokenizer), session_(model, settings) {}

  /// The likeliest answer, until the model ends it, it has `most` tokens, or `is_enough` says so of the text
  /// so far. Whole characters alone.
  std::string answer(const std::vector<std::int32_t>& prompt, std::int64_t most,
                     const Session::Progress& progress,
                     const std::function<bool(const std::string&)>& is_enough = {});

 private:
  /// Tokens of the cache that are those that reading `prompt` would put there.
  std::int64_t shared_with(const std::vector<std::int32_t>& prompt) const;

  SessionSettings settings_;
  const Tokenizer& tokenizer_;
  Session session_;
  std::vector<std::int32_t> held_;
};

}  // namespace moba::llm::eval
