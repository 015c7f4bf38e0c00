#include "app/serve/openai_response.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "llm/session/text_stream.h"
#include "llm/tokenizer/utf8.h"

namespace moba::app {
namespace {

/// JSON has no infinity.
constexpr double kMinLogprob = -9999;

OrderedJson number(double logprob) {
  return std::isnan(logprob) ? OrderedJson() : OrderedJson(std::max(logprob, kMinLogprob));
}

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const std::size_t size = llm::utf8_size(text);
    if (size == 0) return false;
    text.remove_prefix(size);
  }
  return true;
}

std::int64_t characters_of(std::string_view text) {
  std::int64_t count = 0;
  for (; !text.empty(); ++count) text.remove_prefix(llm::character_size(text));
  return count;
}

/// Returns the text of a token, or "bytes:\xe2\x80" for a part of a character.
std::string completion_token(const std::string& piece) {
  if (is_utf8(piece)) return piece;
  std::string text = "bytes:";
  for (const char byte : piece) text += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
  return text;
}

OrderedJson completion_logprobs(std::span<const TokenLogprobs> tokens, const llm::Tokenizer& tokenizer,
                                std::int64_t& offset) {
  OrderedJson json{{"tokens", OrderedJson::array()},
                   {"token_logprobs", OrderedJson::array()},
                   {"top_logprobs", OrderedJson::array()},
                   {"text_offset", OrderedJson::array()}};
  for (const TokenLogprobs& token : tokens) {
    const std::string piece = tokenizer.piece(token.token.id, /*show_special=*/true);
    json["tokens"].push_back(completion_token(piece));
    json["token_logprobs"].push_back(number(token.token.logprob));
    OrderedJson top;
    for (const TokenLogprob& other : token.top) {
      const std::string name = completion_token(tokenizer.piece(other.id, /*show_special=*/true));
      if (!top.contains(name)) top[name] = number(other.logprob);  // of equal texts the likeliest
    }
    json["top_logprobs"].push_back(std::move(top));
    json["text_offset"].push_back(offset);
    offset += characters_of(piece);
  }
  return json;
}

OrderedJson chat_logprobs(std::span<const TokenLogprobs> tokens, const llm::Tokenizer& tokenizer) {
  const auto entry = [&](const TokenLogprob& of) {
    const std::string piece = tokenizer.piece(of.id, /*show_special=*/true);
    llm::TextStream stream;
    const std::string text = stream.push(piece) + stream.finish();
    std::vector<unsigned> bytes;
    for (const char byte : piece) bytes.push_back(static_cast<unsigned char>(byte));
    return OrderedJson{{"token", text}, {"logprob", number(of.logprob)}, {"bytes", bytes}};
  };
  OrderedJson content = OrderedJson::array();
  for (const TokenLogprobs& token : tokens) {
    OrderedJson json = entry(token.token);
    json["top_logprobs"] = OrderedJson::array();
    for (const TokenLogprob& other : token.top) json["top_logprobs"].push_back(entry(other));
    content.push_back(std::move(json));
  }
  OrderedJson json;
  json["content"] = std::move(content);
  return json;
}

OrderedJson finish_json(const std::optional<llm::Finish>& finish) {
  if (!finish) return {};
  const bool is_stop = *finish == llm::Finish::end_token || *finish == llm::Finish::stopped;
  return is_stop ? "stop" : "length";
}

OrderedJson head_json(const ResponseHead& head, const char* object) {
  return {{"id", head.id}, {"object", object}, {"created", head.created}, {"model", head.model}};
}

}  // namespace

OrderedJson logprobs_json(bool is_chat, std::span<const TokenLogprobs> tokens,
                          const llm::Tokenizer& tokenizer, std::int64_t& offset) {
  return is_chat ? chat_logprobs(tokens, tokenizer) : completion_logprobs(tokens, tokenizer, offset);
}

void append_logprobs(OrderedJson& logprobs, OrderedJson more) {
  if (logprobs.is_null()) {
    logprobs = std::move(more);
    return;
  }
  for (auto& [name, list] : more.items())
    for (auto& entry : list) logprobs[name].push_back(std::move(entry));
}

OrderedJson usage_json(std::int64_t prompt_tokens, std::int64_t cached_tokens,
                       std::int64_t completion_tokens) {
  return {{"prompt_tokens", prompt_tokens},
          {"completion_tokens", completion_tokens},
          {"total_tokens", prompt_tokens + completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", cached_tokens}}}};
}

OrderedJson timings_json(const llm::RequestUsage& usage) {
  const std::int64_t read = usage.prompt_tokens - usage.cached_tokens, written = usage.generated_tokens;
  const auto ratio = [](double a, double b) { return b > 0 ? a / b : 0.0; };
  const auto per_second = [&](std::int64_t tokens, double seconds) {
    return ratio(static_cast<double>(tokens), seconds);
  };
  const auto per_token_ms = [&](std::int64_t tokens, double seconds) {
    return ratio(1e3 * seconds, static_cast<double>(tokens));
  };
  return {{"queue_ms", 1e3 * usage.queue_seconds},
          {"cache_n", usage.cached_tokens},
          {"prompt_n", read},
          {"prompt_ms", 1e3 * usage.prefill_seconds},
          {"prompt_per_token_ms", per_token_ms(read, usage.prefill_seconds)},
          {"prompt_per_second", per_second(read, usage.prefill_seconds)},
          {"predicted_n", written},
          {"predicted_ms", 1e3 * usage.decode_seconds},
          {"predicted_per_token_ms", per_token_ms(written, usage.decode_seconds)},
          {"predicted_per_second", per_second(written, usage.decode_seconds)}};
}

OrderedJson progress_json(const PromptProgress& progress) {
  return {{"total", progress.total},
          {"cache", progress.cache},
          {"processed", progress.processed},
          {"time_ms", static_cast<std::int64_t>(1e3 * progress.seconds)}};
}

OrderedJson whole_json(const ResponseHead& head, std::span<const ChoiceText> choices) {
  OrderedJson json = head_json(head, head.is_chat ? "chat.completion" : "text_completion");
  json["choices"] = OrderedJson::array();
  for (const ChoiceText& choice : choices) {
    OrderedJson entry;
    entry["index"] = choice.index;
    if (head.is_chat) {
      entry["message"] = {{"role", "assistant"}, {"content", choice.text}};
    } else {
      entry["text"] = choice.text;
    }
    entry["logprobs"] = choice.logprobs;
    entry["finish_reason"] = finish_json(choice.finish);
    if (!choice.evidence.is_null()) entry["evidence"] = choice.evidence;
    json["choices"].push_back(std::move(entry));
  }
  return json;
}

OrderedJson chunk_json(const ResponseHead& head, const ChoiceText* choice, bool is_first) {
  OrderedJson json = head_json(head, head.is_chat ? "chat.completion.chunk" : "text_completion");
  json["choices"] = OrderedJson::array();
  if (choice == nullptr) return json;
  OrderedJson entry;
  entry["index"] = choice->index;
  if (head.is_chat) {
    OrderedJson delta = OrderedJson::object();
    if (is_first) delta["role"] = "assistant";
    if (is_first || !choice->text.empty()) delta["content"] = choice->text;
    entry["delta"] = std::move(delta);
  } else {
    entry["text"] = choice->text;
  }
  entry["logprobs"] = choice->logprobs;
  entry["finish_reason"] = finish_json(choice->finish);
  if (!choice->evidence.is_null()) entry["evidence"] = choice->evidence;
  json["choices"].push_back(std::move(entry));
  return json;
}

std::string dump(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

}  // namespace moba::app
