#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "llm/error.h"
#include "llm/formats/quoted.h"
#include "llm/tokenizer/pattern.h"
#include "llm/tokenizer/tokenizer.h"
#include "llm/tokenizer/utf8.h"

namespace moba::llm {
namespace {

/// The text of a conversation.
struct Rendered {
  std::vector<TextPart> parts;
  std::vector<Span> answers;    // the parts of each assistant turn after its header
  std::vector<TurnText> turns;  // the texts of the caller's turns
  std::size_t bytes = 0;        // of the parts

  void special(std::string text) { add({std::move(text), true}); }
  void plain(std::string text) { add({std::move(text), false}); }
  /// Adds the text of a turn and the special token that ends it.
  void content(const std::string& role, std::string text, std::string end) {
    plain(std::move(text));
    special(std::move(end));
    if (role == "assistant") answers.push_back({parts.size() - 2, parts.size()});
  }
  /// Notes that the next part shows `shown`, of the text of a turn, from its byte `at` on.
  void note(std::size_t turn, const std::string& text, std::string_view shown, std::size_t at = 0) {
    const std::size_t offset = text.find(shown);
    if (!shown.empty() && offset != std::string::npos)
      turns.push_back({turn, offset, {bytes + at, bytes + at + shown.size()}});
  }

 private:
  void add(TextPart part) {
    bytes += part.text.size();
    parts.push_back(std::move(part));
  }
};

bool has(std::string_view text, std::string_view marker) {
  return text.find(marker) != std::string::npos;
}

/// Returns the value of a Jinja string literal.
std::string unescaped(std::string_view literal) {
  std::string text;
  for (std::size_t i = 0; i < literal.size(); ++i) {
    if (literal[i] != '\\' || i + 1 == literal.size()) {
      text += literal[i];
      continue;
    }
    const char c = literal[++i];
    text += c == 'n' ? '\n' : c == 't' ? '\t' : c;
  }
  return text;
}

/// Returns the first part of `source` between `begin` and the next `end` that lies within one literal.
std::optional<std::string> literal_between(const std::string& source, std::string_view begin,
                                           std::string_view end) {
  for (std::size_t at = source.find(begin); at != std::string::npos; at = source.find(begin, at + 1)) {
    constexpr std::size_t kLongest = 1 << 14;
    const std::string window = source.substr(at + begin.size(), kLongest);
    const std::size_t size = window.find(end);
    if (size == std::string::npos) continue;
    const std::string text = window.substr(0, size);
    const std::string_view leaves_literal[] = {"{{", "{%",   "}}",  "%}",  "' +",
                                               "'+", "\" +", "\"+", "' ~", "\" ~"};
    if (std::none_of(std::begin(leaves_literal), std::end(leaves_literal),
                     [&](std::string_view mark) { return has(text, mark); })) {
      return unescaped(text);
    }
  }
  return std::nullopt;
}

std::string trimmed(const std::string& text) {
  constexpr const char* kSpaces = " \t\n\v\f\r";
  const std::size_t begin = text.find_first_not_of(kSpaces);
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(kSpaces) - begin + 1);
}

/// Returns whether the template strips spaces at both ends of a message.
bool trims_content(const std::string& source) {
  const Pattern trim = Pattern::regex(R"(content['"]?\]?\s*\|\s*trim)", "chat template");
  return !trim.find_all(class_stand_in(source)).empty();
}

/// Returns the BOS token if the template writes one: by its variable, or by its text (SmolLM2's BOS is
/// ChatML's mark).
std::string bos_text(const Tokenizer& tokenizer) {
  const std::string bos = tokenizer.piece(tokenizer.bos(), true);
  const std::string& source = tokenizer.chat_template();
  const bool spelled = !bos.empty() && bos != "<|im_start|>" && has(source, bos);
  return spelled || has(source, "bos_token") ? bos : "";
}

bool begins_with_system(const std::vector<Turn>& turns) {
  return !turns.empty() && turns.front().role == "system";
}

/// Returns `text` without the newlines at its beginning or end.
std::string without_newlines(const std::string& text, bool at_begin, bool at_end) {
  const std::size_t begin = at_begin ? text.find_first_not_of('\n') : 0;
  if (begin == std::string::npos) return "";
  const std::size_t last = at_end ? text.find_last_not_of('\n') : text.size() - 1;
  return last == std::string::npos ? "" : text.substr(begin, last + 1 - begin);
}

/// Writes an assistant turn as Qwen3's template does: an earlier turn loses its reasoning, and the last one
/// has a block of it, empty if there is none. `is_open`: no user turn follows.
std::string qwen3_answer(const std::string& text, bool is_open, bool is_last) {
  constexpr std::string_view kBegin = "<think>", kEnd = "</think>";
  std::string reasoning, answer = text;
  if (has(text, kEnd)) {
    reasoning = without_newlines(text.substr(0, text.find(kEnd)), false, true);
    if (const std::size_t begin = reasoning.rfind(kBegin); begin != std::string::npos)
      reasoning = reasoning.substr(begin + kBegin.size());
    reasoning = without_newlines(reasoning, true, false);
    answer = without_newlines(text.substr(text.rfind(kEnd) + kEnd.size()), true, false);
  }
  if (!is_open || (!is_last && reasoning.empty())) return answer;
  return fmt::format("<think>\n{}\n</think>\n\n{}", without_newlines(reasoning, true, true),
                     without_newlines(answer, true, false));
}

/// Returns the turns with the assistant's as the template rewrites their reasoning.
std::vector<Turn> with_reasoning(const std::string& source, std::vector<Turn> turns) {
  if (!has(source, "</think>")) return turns;
  std::size_t after_user = turns.size();
  for (std::size_t i = 0; i < turns.size(); ++i)
    if (turns[i].role == "user") after_user = i + 1;
  for (std::size_t i = 0; i < turns.size(); ++i) {
    if (turns[i].role != "assistant") continue;
    if (!has(source, "ns.last_query_index")) {
      throw UsageError(
          "the model's chat template: expected Qwen3's reasoning blocks or none in assistant turns, got "
          "others");
    }
    turns[i].text = qwen3_answer(turns[i].text, i >= after_user, i + 1 == turns.size());
  }
  return turns;
}

Rendered chatml(const Tokenizer& tokenizer, const std::vector<Turn>& turns, bool add_generation_prompt) {
  const std::string& source = tokenizer.chat_template();
  const bool trim = trims_content(source);
  Rendered chat;
  chat.special(bos_text(tokenizer));
  const auto head = [&](const std::string& role) {
    chat.special("<|im_start|>");
    chat.plain(role + "\n");
  };
  const auto say = [&](const std::string& role, const std::string& text) {
    chat.content(role, text, "<|im_end|>");
    chat.plain("\n");
  };
  auto system = literal_between(source, "<|im_start|>system\\n", "<|im_end|>");
  if (!system) system = literal_between(source, "<|im_start|>system\n", "<|im_end|>");
  if (system && !begins_with_system(turns)) {
    head("system");
    say("system", trim ? trimmed(*system) : *system);
  }
  const std::vector<Turn> written = with_reasoning(source, turns);
  for (std::size_t i = 0; i < turns.size(); ++i) {
    const std::string text = trim ? trimmed(written[i].text) : written[i].text;
    head(written[i].role);
    chat.note(i, turns[i].text, text);
    say(written[i].role, text);
  }
  if (add_generation_prompt) head("assistant");
  return chat;
}

/// Returns the lines that Llama 3.1 and later put before every system turn: the dates, with the template's
/// default for today, so that a prompt is the same every day.
std::string llama3_dates(const std::string& source) {
  const auto knowledge = literal_between(source, "Cutting Knowledge Date: ", "\\n");
  if (!knowledge) return "";
  auto today = literal_between(source, "date_string = \"", "\"");
  if (!today) today = literal_between(source, "date_string = '", "'");
  return fmt::format("Cutting Knowledge Date: {}\n{}\n", *knowledge,
                     today ? fmt::format("Today Date: {}\n", *today) : "");
}

Rendered llama3(const Tokenizer& tokenizer, const std::vector<Turn>& turns, bool add_generation_prompt) {
  const std::string& source = tokenizer.chat_template();
  const bool trim = trims_content(source);
  Rendered chat;
  chat.special(bos_text(tokenizer));
  const auto head = [&](const std::string& role) {
    chat.special("<|start_header_id|>");
    chat.plain(role);
    chat.special("<|end_header_id|>");
    chat.plain("\n\n");
  };
  const std::string dates = llama3_dates(source);
  const bool has_system = begins_with_system(turns);
  if (!dates.empty() && !has_system) {
    head("system");
    chat.content("system", dates, "<|eot_id|>");
  }
  for (std::size_t i = 0; i < turns.size(); ++i) {
    const std::string before = has_system && i == 0 ? dates : "";
    const std::string text = trim ? trimmed(turns[i].text) : turns[i].text;
    head(turns[i].role);
    chat.note(i, turns[i].text, text, before.size());
    chat.content(turns[i].role, before + text, "<|eot_id|>");
  }
  if (add_generation_prompt) head("assistant");
  return chat;
}

Rendered llama2(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  const std::string bos = bos_text(tokenizer);
  const std::string eos =
      tokenizer.end_tokens().empty() ? "" : tokenizer.piece(tokenizer.end_tokens().front(), true);
  const bool has_system = begins_with_system(turns);
  constexpr std::string_view kInst = "[INST] ", kSystem = "<<SYS>>\n";
  std::string system = has_system ? fmt::format("{}{}\n<</SYS>>\n\n", kSystem, turns.front().text) : "";
  Rendered chat;
  bool users_turn = true;
  for (std::size_t i = has_system ? 1 : 0; i < turns.size(); ++i) {
    const Turn& turn = turns[i];
    if (turn.role != (users_turn ? "user" : "assistant")) {
      throw UsageError(fmt::format("chat: expected user and assistant in turn, got {} as turn {}",
                                   llm::quoted(turn.role), i));
    }
    if (users_turn) {
      chat.special(bos);
      const std::string body = trimmed(system + turn.text), text = trimmed(turn.text);
      if (!system.empty()) chat.note(0, turns[0].text, turns[0].text, kInst.size() + kSystem.size());
      chat.note(i, turn.text, text, kInst.size() + body.size() - text.size());
      chat.plain(fmt::format("{}{} [/INST]", kInst, body));
      system.clear();
    } else {
      const std::string text = trimmed(turn.text);
      chat.note(i, turn.text, text, 1);
      chat.content("assistant", fmt::format(" {} ", text), eos);
    }
    users_turn = !users_turn;
  }
  return chat;
}

Rendered rendered(const Tokenizer& tokenizer, const std::vector<Turn>& turns, bool add_generation_prompt) {
  const std::string_view form = chat_form(tokenizer.chat_template());
  if (form == "ChatML") return chatml(tokenizer, turns, add_generation_prompt);
  if (form == "Llama 3") return llama3(tokenizer, turns, add_generation_prompt);
  if (form == "Llama 2") return llama2(tokenizer, turns);
  throw UsageError(fmt::format(
      "the model's chat template: expected ChatML, Llama 3 or Llama 2, got {}; use --no-chat", form));
}

}  // namespace

std::string_view chat_form(std::string_view source) {
  if (source.empty()) return "none";
  if (has(source, "<|im_start|>")) return "ChatML";
  if (has(source, "<|start_header_id|>")) return "Llama 3";
  if (has(source, "[INST]") && has(source, "<<SYS>>")) return "Llama 2";
  return "another";
}

std::vector<std::int32_t> apply_chat_template(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  return tokenizer.encode(rendered(tokenizer, turns, true).parts);
}

ChatPrompt chat_prompt(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  Rendered chat = rendered(tokenizer, turns, true);
  ChatPrompt prompt{.text = {}, .ids = tokenizer.encode(chat.parts), .turns = std::move(chat.turns)};
  prompt.text.reserve(chat.bytes);
  for (const TextPart& part : chat.parts) prompt.text += part.text;
  return prompt;
}

ChatTokens encode_chat(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  const Rendered chat = rendered(tokenizer, turns, false);
  std::vector<std::size_t> begins;
  ChatTokens tokens{tokenizer.encode(chat.parts, &begins), {}};
  begins.push_back(tokens.ids.size());
  for (const Span& answer : chat.answers) {
    tokens.answers.push_back(
        {static_cast<std::int64_t>(begins[answer.begin]), static_cast<std::int64_t>(begins[answer.end])});
  }
  return tokens;
}

}  // namespace moba::llm
