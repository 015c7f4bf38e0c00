#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "app/session_flags.h"
#include "llm/eval/haystack.h"
#include "llm/eval/interval.h"
#include "llm/formats/weights.h"
#include "llm/model/model.h"
#include "llm/tokenizer/tokenizer.h"

// The flags, output and set-up that the evaluations share.
namespace moba::app {

/// A table; everything as JSON; or the metrics alone, as lm-evaluation-harness writes them.
enum class ReportFormat : std::uint8_t { table, json, lm_eval };

/// The variables of the flags that the evaluations share.
struct EvalFlags : SessionFlags {
  std::vector<llm::AttentionMode> attention{llm::AttentionMode::full, llm::AttentionMode::moba};
  std::vector<std::filesystem::path> data;
  std::int64_t seed = 0;
  ReportFormat format = ReportFormat::table;
  std::optional<std::string> png;
};

/// Adds the flags that come before those of an evaluation.
void add_flags(FlagTable& table, EvalFlags& flags);
/// Adds --attn and the flags of the attention.
void add_attention_flags(FlagTable& table, EvalFlags& flags, bool decodes);
/// Adds --data, --lengths and --no-chat.
void add_haystack_flags(FlagTable& table, EvalFlags& flags, std::vector<std::int64_t>& lengths, bool& chat);

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
Subject open_subject(const FlagTable& table, EvalFlags& flags);

/// Reads the weights and sets the threads. Throws DataError unless there is memory for `tokens` tokens in the
/// KV caches.
llm::Model load_model(const Subject& subject, const EvalFlags& flags, std::int64_t tokens);

/// Sorts the lengths. Throws UsageError where two are equal. Says on standard error which are beyond the
/// model's context.
void sort_lengths(std::vector<std::int64_t>& lengths, const Subject& subject);

/// "0.950 (0.835 to 0.986)".
std::string share_text(double share, const llm::eval::Interval& interval);

/// Returns the settings in an evaluation's JSON: task, model, seed, and the attention of each variant.
Json json_head(const char* task, const FlagTable& table, EvalFlags& flags, const Subject& subject);

void print_json(const Json& json);

/// A mean over samples with its standard error, NaN where it is unknown.
struct Metric {
  std::string name;
  double value, error;
  bool higher_is_better;
};
/// Prints results in the layout of lm-evaluation-harness: the metrics of each variant of `task` as those of a
/// task "<task>_<variant>", over `samples` sequences or questions. `config` is the head of the JSON.
void print_lm_eval(const char* task, const Json& config, std::int64_t samples,
                   const std::vector<std::pair<std::string, std::vector<Metric>>>& by_variant);
/// The standard error of a share of `tried`.
double share_error(double share, std::int64_t tried);

/// Each adds itself to `moba eval`.
CLI::App* add_eval_loss(CLI::App& parent, std::function<int()>& action);
CLI::App* add_eval_needle(CLI::App& parent, std::function<int()>& action);
CLI::App* add_eval_ruler(CLI::App& parent, std::function<int()>& action);

}  // namespace moba::app
