#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>

#include "llm/error.h"
#include "llm/formats/quoted.h"
#include "llm/tokenizer/pattern.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm {
namespace {

using Parts = std::vector<TextPart>;

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

Parts chatml(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  const std::string& source = tokenizer.chat_template();
  const bool trim = trims_content(source);
  Parts parts{{bos_text(tokenizer), true}};
  const auto say = [&](const Turn& turn) {
    parts.push_back({"<|im_start|>", true});
    parts.push_back({turn.role + "\n" + (trim ? trimmed(turn.text) : turn.text), false});
    parts.push_back({"<|im_end|>", true});
    parts.push_back({"\n", false});
  };
  auto system = literal_between(source, "<|im_start|>system\\n", "<|im_end|>");
  if (!system) system = literal_between(source, "<|im_start|>system\n", "<|im_end|>");
  if (system && !begins_with_system(turns)) say({"system", *system});
  for (const Turn& turn : turns) say(turn);
  parts.push_back({"<|im_start|>", true});
  parts.push_back({"assistant\n", false});
  return parts;
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

Parts llama3(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  const std::string& source = tokenizer.chat_template();
  const bool trim = trims_content(source);
  Parts parts{{bos_text(tokenizer), true}};
  const auto head = [&](const std::string& role) {
    parts.push_back({"<|start_header_id|>", true});
    parts.push_back({role, false});
    parts.push_back({"<|end_header_id|>", true});
    parts.push_back({"\n\n", false});
  };
  const auto say = [&](const std::string& role, const std::string& text) {
    head(role);
    parts.push_back({text, false});
    parts.push_back({"<|eot_id|>", true});
  };
  const std::string dates = llama3_dates(source);
  const bool has_system = begins_with_system(turns);
  if (!dates.empty() && !has_system) say("system", dates);
  for (const Turn& turn : turns) {
    const bool first_system = has_system && &turn == &turns.front();
    say(turn.role, (first_system ? dates : "") + (trim ? trimmed(turn.text) : turn.text));
  }
  head("assistant");
  return parts;
}

Parts llama2(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  const std::string bos = bos_text(tokenizer);
  const std::string eos =
      tokenizer.end_tokens().empty() ? "" : tokenizer.piece(tokenizer.end_tokens().front(), true);
  const bool has_system = begins_with_system(turns);
  std::string system = has_system ? fmt::format("<<SYS>>\n{}\n<</SYS>>\n\n", turns.front().text) : "";
  Parts parts;
  bool users_turn = true;
  for (std::size_t i = has_system ? 1 : 0; i < turns.size(); ++i) {
    const Turn& turn = turns[i];
    if (turn.role != (users_turn ? "user" : "assistant")) {
      throw UsageError(fmt::format("chat: expected user and assistant in turn, got {} as turn {}",
                                   llm::quoted(turn.role), i));
    }
    if (users_turn) {
      parts.push_back({bos, true});
      parts.push_back({fmt::format("[INST] {} [/INST]", trimmed(system + turn.text)), false});
      system.clear();
    } else {
      parts.push_back({fmt::format(" {} ", trimmed(turn.text)), false});
      parts.push_back({eos, true});
    }
    users_turn = !users_turn;
  }
  return parts;
}

Parts rendered(const Tokenizer& tokenizer, const std::vector<Turn>& turns) {
  const std::string_view form = chat_form(tokenizer.chat_template());
  if (form == "ChatML") return chatml(tokenizer, turns);
  if (form == "Llama 3") return llama3(tokenizer, turns);
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
  return tokenizer.encode(rendered(tokenizer, turns));
}

}  // namespace moba::llm
