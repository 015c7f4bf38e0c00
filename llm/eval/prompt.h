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

/// Returns whether prompts are chat turns: if the model has a chat template, unless `no_chat`.
bool asks_by_chat(const Tokenizer& tokenizer, bool no_chat);

/// Encodes a prompt as a user's turn, or as plain text to be continued. Special tokens in it stay text.
std::vector<std::int32_t> tokens_of(const Prompt& prompt, const Tokenizer& tokenizer, bool chat);

/// Returns `text` with every {name} replaced.
std::string filled(std::string text, const std::vector<std::pair<std::string, std::string>>& values);

/// Returns the largest number of units (words, lines or tokens) for which `tokens_with(units)` is at most
/// `max_tokens`, to within 1/256 or one unit; -1 if no units exceed it already.
std::int64_t units_that_fit(std::int64_t max_tokens,
                            const std::function<std::int64_t(std::int64_t)>& tokens_with);

}  // namespace moba::llm::eval
