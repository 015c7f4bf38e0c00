#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// The question to a model, and the first words of its answer.
struct Prompt {
  std::string text, answer_start;
};

/// Returns whether to ask by chat turns: where the model has a chat template, unless `no_chat`.
bool asks_by_chat(const Tokenizer& tokenizer, bool no_chat);

/// A prompt as a user's turn, or as bare text to be continued. Special tokens spelled in it stay text.
std::vector<std::int32_t> tokens_of(const Prompt& prompt, const Tokenizer& tokenizer, bool chat);

/// `text` with every {name} replaced.
std::string filled(std::string text, const std::vector<std::pair<std::string, std::string>>& values);

/// The approximate largest number of units (words, lines or tokens) of which
/// `tokens_with(units)` tokens are made, at most `max_tokens`: within 1/256 of it, or one unit. -1 where none
/// is too many already.
std::int64_t units_that_fit(std::int64_t max_tokens,
                            const std::function<std::int64_t(std::int64_t)>& tokens_with);

}  // namespace moba::llm::eval
