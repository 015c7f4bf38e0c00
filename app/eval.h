#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/session_flags.h"
#include "llm/eval/haystack.h"
#include "llm/eval/interval.h"
#include "llm/formats/weights.h"
#include "llm/model/model.h"
#include "llm/tokenizer/tokenizer.h"

// The flags, output and set-up that the evaluations share.
namespace moba::app {

struct EvalFlags {
  SessionFlags session;
  std::vector<std::string> attention{"full", "moba"};
  std::vector<std::string> data;
  std::int64_t seed = 0;
  bool json = false;
  std::optional<std::string> png;
};

void add_flags(CLI::App& command, EvalFlags& flags, const std::string& data_help);

/// One of the attention variants that are compared.
struct Variant {
  std::string name;
  llm::SessionSettings session;
};

/// The subject of an evaluation, before its weights are read.
struct Subject {
  llm::Weights weights;
  llm::Tokenizer tokenizer;
  std::vector<Variant> variants;
};

/// Checks the flags and opens the model's files. Throws UsageError and DataError.
Subject open_subject(const EvalFlags& flags);

/// Reads the weights and sets the threads.
llm::Model load_model(const Subject& subject, const EvalFlags& flags);

std::vector<std::filesystem::path> paths_of(const EvalFlags& flags);

/// "8k,32k" as tokens, ascending, no two alike. Says on standard error which are beyond the model's context.
std::vector<std::int64_t> lengths_from(const std::vector<std::string>& texts, const Subject& subject);

/// 8192 as "8k"; what is no multiple of 1024 as it is.
std::string size_text(std::int64_t tokens);

/// "0.950 (0.835 to 0.986)".
std::string share_text(double share, const llm::eval::Interval& interval);

/// The parts of every evaluation's JSON that say what was asked: task, model, seed, and the settings of each
/// variant.
nlohmann::ordered_json json_head(const char* task, const EvalFlags& flags, const Subject& subject);

void print_json(const nlohmann::ordered_json& json);

/// Each adds itself to `moba eval`.
CLI::App* add_eval_loss(CLI::App& parent, std::function<int()>& action);
CLI::App* add_eval_needle(CLI::App& parent, std::function<int()>& action);
CLI::App* add_eval_ruler(CLI::App& parent, std::function<int()>& action);

}  // namespace moba::app
