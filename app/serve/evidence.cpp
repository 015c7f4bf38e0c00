#include "app/serve/evidence.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "llm/tokenizer/token_offsets.h"

namespace moba::app {
namespace {

/// Blocks with less of the attention are not listed.
constexpr double kMinWeight = 1e-3;
/// Shorter texts, such as "1." and "Dr.", are no sentences.
constexpr std::size_t kMinSentence = 8;
constexpr std::string_view kSpaces = " \t\r\n";

/// Returns the begin of the character that the byte belongs to.
std::size_t character_begin(std::string_view text, std::size_t at) {
  const auto continues = [&](std::size_t i) {
    return (static_cast<unsigned char>(text[i]) & 0xC0U) == 0x80U;
  };
  while (at > 0 && at < text.size() && continues(at)) --at;
  return at;
}

double rounded(double weight) {
  constexpr double kDigits = 1e6;
  return std::round(weight * kDigits) / kDigits;
}

OrderedJson pair(std::size_t begin, std::size_t end) {
  return OrderedJson::array({begin, end});
}

}  // namespace

PromptBlocks prompt_blocks(const llm::Tokenizer& tokenizer, std::string_view text,
                           std::span<const std::int32_t> tokens, std::span<const llm::TurnText> messages,
                           std::int64_t block_size) {
  const std::vector<std::size_t> offsets = llm::token_offsets(tokenizer, text, tokens);
  PromptBlocks result{.block_size = block_size};
  const auto count = static_cast<std::int64_t>(tokens.size());
  for (std::int64_t begin = 0; begin < count; begin += block_size) {
    const std::int64_t end = std::min(begin + block_size, count);
    const auto byte = [&](std::int64_t token) {
      return character_begin(text, offsets[static_cast<std::size_t>(token)]);
    };
    PromptBlocks::Block& block = result.blocks.emplace_back();
    block.tokens = {begin, end};
    block.bytes = {byte(begin), byte(end)};
    for (const llm::TurnText& message : messages) {
      const std::size_t first = std::max(block.bytes.begin, message.place.begin),
                        last = std::min(block.bytes.end, message.place.end);
      const auto inside = [&](std::size_t at) { return message.offset + at - message.place.begin; };
      if (first < last) block.messages.push_back({message.turn, {inside(first), inside(last)}});
    }
  }
  return result;
}

bool ends_sentence(std::string_view before, std::string_view after) {
  if (after.find_first_not_of(kSpaces) == std::string_view::npos) return false;
  const std::size_t last = before.find_last_not_of(kSpaces);
  if (last == std::string_view::npos) return false;
  const auto has_newline = [](std::string_view spaces) {
    return spaces.find('\n') != std::string_view::npos;
  };
  const std::string_view between = before.substr(last + 1);
  if (has_newline(between) || has_newline(after.substr(0, after.find_first_not_of(kSpaces)))) return true;

  std::string_view sentence = before.substr(0, last + 1);
  for (const std::string_view mark : {"。", "！", "？"})
    if (sentence.ends_with(mark)) return true;
  sentence = sentence.substr(0, sentence.find_last_not_of("\"')]*") + 1);
  const bool has_space = !between.empty() || kSpaces.find(after.front()) != std::string_view::npos;
  return has_space && sentence.size() >= kMinSentence &&
         std::string_view(".!?").find(sentence.back()) != std::string_view::npos;
}

Evidence::Evidence(std::shared_ptr<const PromptBlocks> prompt)
    : prompt_(std::move(prompt)), sums_(prompt_->blocks.size()), sentence_sums_(sums_.size()) {
  sentences_.emplace_back();
}

void Evidence::add(std::span<const float> weights, std::string_view text) {
  if (ends_sentence(sentence_text_, text)) {
    end_sentence();
    sentences_.push_back({.tokens = {tokens_, tokens_}, .bytes = {bytes_, bytes_}});
  }
  ++tokens_;
  bytes_ += text.size();
  sentence_text_ += text;
  sentences_.back().tokens.end = tokens_;
  sentences_.back().bytes.end = bytes_;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    sums_[i] += weights[i];
    sentence_sums_[i] += weights[i];
  }
}

void Evidence::end_sentence() {
  Sentence& sentence = sentences_.back();
  const auto tokens = static_cast<double>(sentence.tokens.end - sentence.tokens.begin);
  for (std::size_t i = 0; i < sentence_sums_.size(); ++i) {
    const double weight = sentence_sums_[i] / tokens;
    if (weight >= kMinWeight) sentence.weights.push_back({i, weight});
    sentence_sums_[i] = 0;
  }
  sentence_text_.clear();
}

void Evidence::finish(std::size_t bytes) {
  end_sentence();
  std::erase_if(sentences_, [&](const Sentence& s) { return s.bytes.begin >= bytes; });
  if (!sentences_.empty()) sentences_.back().bytes.end = bytes;
}

OrderedJson Evidence::json() const {
  std::vector<bool> is_listed(sums_.size());
  double prompt = 0;
  const auto tokens = static_cast<double>(std::max<std::int64_t>(tokens_, 1));
  for (std::size_t i = 0; i < sums_.size(); ++i) {
    is_listed[i] = sums_[i] / tokens >= kMinWeight;
    prompt += sums_[i] / tokens;
  }
  OrderedJson sentences = OrderedJson::array();
  for (const Sentence& sentence : sentences_) {
    OrderedJson json{{"tokens", {sentence.tokens.begin, sentence.tokens.end}},
                     {"bytes", pair(sentence.bytes.begin, sentence.bytes.end)},
                     {"blocks", OrderedJson::array()},
                     {"weights", OrderedJson::array()}};
    for (const Weight& weight : sentence.weights) {
      is_listed[weight.block] = true;
      json["blocks"].push_back(weight.block);
      json["weights"].push_back(rounded(weight.value));
    }
    sentences.push_back(std::move(json));
  }
  OrderedJson blocks = OrderedJson::array();
  for (std::size_t i = 0; i < is_listed.size(); ++i) {
    if (!is_listed[i]) continue;
    const PromptBlocks::Block& block = prompt_->blocks[i];
    OrderedJson messages = OrderedJson::array();
    for (const PromptBlocks::MessageBytes& part : block.messages)
      messages.push_back({{"message", part.message}, {"bytes", pair(part.bytes.begin, part.bytes.end)}});
    blocks.push_back({{"block", i},
                      {"tokens", {block.tokens.begin, block.tokens.end}},
                      {"bytes", pair(block.bytes.begin, block.bytes.end)},
                      {"messages", std::move(messages)},
                      {"weight", rounded(sums_[i] / tokens)}});
  }
  return {{"block_size", prompt_->block_size},
          {"prompt_weight", rounded(prompt)},
          {"blocks", std::move(blocks)},
          {"sentences", std::move(sentences)}};
}

}  // namespace moba::app
