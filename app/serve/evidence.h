#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "app/serve/openai_response.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {

/// A prompt in blocks of tokens, and the texts that each block covers. No range splits a character.
struct PromptBlocks {
  /// Bytes of the content of one of the request's messages.
  struct MessageBytes {
    std::size_t message = 0;
    llm::Span bytes{};
  };
  struct Block {
    llm::TokenRange tokens{};
    llm::Span bytes{};  // of the prompt's text
    std::vector<MessageBytes> messages{};
  };
  std::int64_t block_size = 0;
  std::vector<Block> blocks{};
};

/// `text`: what `tokens` encode. `messages`: the contents of messages in it, in order.
PromptBlocks prompt_blocks(const llm::Tokenizer& tokenizer, std::string_view text,
                           std::span<const std::int32_t> tokens, std::span<const llm::TurnText> messages,
                           std::int64_t block_size);

/// Attention weights of an answer's tokens on the blocks of its prompt, by the sentences of the answer.
class Evidence {
 public:
  explicit Evidence(std::shared_ptr<const PromptBlocks> prompt);

  /// Adds a token: its weights on the blocks, and the text that it completes.
  void add(std::span<const float> weights, std::string_view text);
  /// Ends the answer, of which `bytes` are sent.
  void finish(std::size_t bytes);

  OrderedJson json() const;

 private:
  struct Weight {
    std::size_t block;
    double value;
  };
  struct Sentence {
    llm::TokenRange tokens{};
    llm::Span bytes{};
    std::vector<Weight> weights{};
  };
  void end_sentence();

  std::shared_ptr<const PromptBlocks> prompt_;
  std::int64_t tokens_ = 0;
  std::vector<double> sums_;           // of all tokens
  std::vector<double> sentence_sums_;  // of those since the last sentence
  std::string sentence_text_;
  std::vector<Sentence> sentences_;
  std::size_t bytes_ = 0;
};

/// Returns whether a sentence ends between two texts: at a full stop, a question or exclamation mark before a
/// space, and at the end of a line.
bool ends_sentence(std::string_view before, std::string_view after);

}  // namespace moba::app
