#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "app/logprobs.h"
#include "llm/engine/engine.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {

using OrderedJson = nlohmann::ordered_json;

/// The members that all objects of one response share.
struct ResponseHead {
  bool is_chat = false;
  std::string id, model;
  std::int64_t created = 0;
};

/// The state of reading a prompt, with the names that llama.cpp uses.
struct PromptProgress {
  /// Tokens of the prompt; those that a cache had; those that are read, cached ones included.
  std::int64_t total = 0, cache = 0, processed = 0;
  double seconds = 0;
};

/// The answers so far, or a part of one.
struct ChoiceText {
  std::size_t index = 0;
  std::string text{};
  /// Null, or as logprobs_json() returns it.
  OrderedJson logprobs{};
  std::optional<llm::Finish> finish{};
  /// Null, or Evidence::json().
  OrderedJson evidence{};
};

/// Returns the log-probabilities of tokens in the form of chats or of completions, whose `text_offset` begins
/// with `offset`, which is advanced.
OrderedJson logprobs_json(bool is_chat, std::span<const TokenLogprobs> tokens,
                          const llm::Tokenizer& tokenizer, std::int64_t& offset);
/// Appends the arrays of `more`, which logprobs_json() returned, to those of `logprobs`, which may be null.
void append_logprobs(OrderedJson& logprobs, OrderedJson more);

/// The sums of a response's requests.
OrderedJson usage_json(std::int64_t prompt_tokens, std::int64_t cached_tokens,
                       std::int64_t completion_tokens);
/// The times of one request, with the names that llama.cpp uses.
OrderedJson timings_json(const llm::RequestUsage& usage);

OrderedJson progress_json(const PromptProgress& progress);

/// Returns a whole response without usage and timings.
OrderedJson whole_json(const ResponseHead& head, std::span<const ChoiceText> choices);
/// Returns a chunk of a stream; no `choice`: one without choices.
OrderedJson chunk_json(const ResponseHead& head, const ChoiceText* choice, bool is_first = false);

/// Returns JSON on one line, text that is not UTF-8 replaced.
std::string dump(const OrderedJson& json);

}  // namespace moba::app
