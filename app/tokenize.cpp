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
#include <string>
#include <string_view>
#include <vector>

#include "app/commands.h"
#include "app/program.h"
#include "llm/error.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {
namespace {

struct TokenizeFlags {
  std::string model;
  std::string prompt;
  std::string file = "-";
  bool has_prompt = false;
  bool no_special = false;
  bool no_parse_special = false;
  bool chat = false;
  bool lines = false;
  bool json = false;
};

std::string read_text(const TokenizeFlags& flags) {
  if (flags.has_prompt) return flags.prompt;
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
  return tokenizer.encode(text, !flags.no_special, !flags.no_parse_special);
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
  const auto flags = std::make_shared<TokenizeFlags>();
  CLI::App* app = parent.add_subcommand("tokenize", "Show the tokens that a model reads a text as");
  app->add_option("-m,--model", flags->model, "GGUF file or Hugging Face folder")
      ->required()
      ->type_name("PATH");
  CLI::Option* prompt = app->add_option("-p,--prompt", flags->prompt, "Text")->type_name("TEXT");
  CLI::Option* file = app->add_option("-f,--file", flags->file, "File with the text; - is standard input")
                          ->type_name("PATH")
                          ->capture_default_str();
  prompt->excludes(file);
  app->add_flag("--no-special", flags->no_special, "Add no BOS or EOS token");
  app->add_flag("--no-parse-special", flags->no_parse_special,
                "Special tokens written in the text stay text");
  app->add_flag("--chat", flags->chat, "The text is a user's turn: show it in the model's chat form")
      ->excludes("--no-special")
      ->excludes("--no-parse-special");
  app->add_flag(
      "--lines", flags->lines,
      "One JSON string a line in (with --chat also a list of {\"role\", \"content\"}), one JSON list of ids "
      "a line out");
  app->add_flag("--json", flags->json, "Print the ids as a JSON list");
  app->footer("Example:\n  moba tokenize -m SmolLM2-135M-Instruct.Q4_1.gguf -p 'Hello, world!'");
  app->callback([flags, prompt, &action] {
    flags->has_prompt = prompt->count() > 0;
    action = [flags] { return tokenize(*flags); };
  });
  return app;
}

}  // namespace moba::app
