#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "app/commands.h"
#include "app/flags.h"
#include "app/program.h"
#include "llm/error.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {
namespace {

struct TokenizeFlags {
  std::string model;
  std::optional<std::string> prompt;
  std::string file = "-";
  bool special = true;
  bool parse_special = true;
  bool chat = false;
  bool lines = false;
  bool json = false;
};

std::string read_text(const TokenizeFlags& flags) {
  if (flags.prompt) return *flags.prompt;
  if (std::filesystem::is_directory(flags.file)) {
    throw llm::DataError(fmt::format("-f/--file: expected a file, got the folder '{}'", flags.file));
  }
  std::ifstream file;
  if (flags.file != "-") file.open(flags.file, std::ios::binary);
  std::istream& in = flags.file == "-" ? std::cin : file;
  std::string text{std::istreambuf_iterator<char>(in), {}};
  if (!in) throw llm::DataError(fmt::format("-f/--file: expected a readable file, got '{}'", flags.file));
  return text;
}

/// A turn or a conversation of --lines: a string, or a list of {"role": ..., "content": ...}.
std::vector<llm::Turn> turns_of(const nlohmann::json& line) {
  if (line.is_string()) return {{"user", line.get<std::string>()}};
  std::vector<llm::Turn> turns;
  for (const auto& turn : line) turns.push_back({turn.at("role"), turn.at("content")});
  return turns;
}

std::vector<std::int32_t> encode(const llm::Tokenizer& tokenizer, const std::string& text,
                                 const TokenizeFlags& flags) {
  if (flags.chat) return apply_chat_template(tokenizer, {{"user", text}});
  return tokenizer.encode(text, flags.special, flags.parse_special);
}

std::vector<std::int32_t> encode_line(const llm::Tokenizer& tokenizer, std::string_view line,
                                      const TokenizeFlags& flags, int number) {
  try {
    const nlohmann::json value = nlohmann::json::parse(line);
    if (flags.chat) return apply_chat_template(tokenizer, turns_of(value));
    return encode(tokenizer, value.get<std::string>(), flags);
  } catch (const nlohmann::json::exception&) {
    throw llm::DataError(fmt::format("--lines: expected {} as line {}, got '{}'",
                                     flags.chat ? "a JSON string or a list of turns" : "a JSON string",
                                     number, line.substr(0, 60)));
  }
}

/// A token on one line of a terminal: everything that would not show as itself is written as \n, \t or \xNN.
std::string visible(std::string_view piece) {
  const nlohmann::json text = piece;
  try {
    const std::string quoted = text.dump();
    return quoted.substr(1, quoted.size() - 2);
  } catch (const nlohmann::json::type_error&) {  // a part of a character
    std::string bytes;
    for (const char c : piece) {
      const auto byte = static_cast<unsigned char>(c);
      bytes += byte >= 0x20 && byte < 0x7F ? std::string(1, c) : fmt::format("\\x{:02X}", byte);
    }
    return bytes;
  }
}

std::string json_list(const std::vector<std::int32_t>& ids) {
  return nlohmann::json(ids).dump() + "\n";
}

std::string table(const llm::Tokenizer& tokenizer, const std::vector<std::int32_t>& ids) {
  std::string text;
  for (const std::int32_t id : ids)
    text += fmt::format("{:>7}  {}\n", id, visible(tokenizer.piece(id, true)));
  return text;
}

int tokenize(const TokenizeFlags& flags) {
  const llm::Tokenizer tokenizer = llm::Tokenizer::open(flags.model);
  const std::string text = read_text(flags);
  if (!flags.lines) {
    const std::vector<std::int32_t> ids = encode(tokenizer, text, flags);
    print(flags.json ? json_list(ids) : table(tokenizer, ids));
    return 0;
  }
  int number = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    print(json_list(encode_line(tokenizer, std::string_view(text).substr(at, end - at), flags, ++number)));
    at = end + 1;
  }
  return 0;
}

}  // namespace

CLI::App* add_tokenize(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("tokenize", "Show the tokens that a model reads a text as");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<TokenizeFlags>();
  table->value("-m,--model", flags->model, "PATH", "Model: a GGUF file or a Hugging Face folder").required();
  table->value("-p,--prompt", flags->prompt, "TEXT", "Text to tokenize");
  table->value("-f,--file", flags->file, "PATH", "File with the text; -: standard input")
      .excludes("--prompt");
  table->toggle("--no-special", flags->special, "Do not add the BOS and EOS tokens");
  table->toggle("--no-parse-special", flags->parse_special, "Read special tokens in the text as text");
  table->toggle("--chat", flags->chat, "Apply the chat template to the text as one user turn")
      .excludes("--no-special")
      .excludes("--no-parse-special");
  table->toggle(
      "--lines", flags->lines,
      "Read one JSON string a line, or with --chat a list of {\"role\", \"content\"}, and print one JSON "
      "list of ids a line");
  table->toggle("--json", flags->json, "Print the ids as a JSON list");
  command->footer("Example:\n  moba tokenize -m SmolLM2-135M-Instruct.Q4_1.gguf -p 'Hello, world!'");
  command->callback([=, &action] { action = [=, keep = table] { return tokenize(*flags); }; });
  return command;
}

}  // namespace moba::app
