#include "app/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "app/commands.h"
#include "app/flags.h"
#include "app/program.h"
#include "llm/error.h"

namespace moba::app {
namespace {

const std::map<std::string, bool> kOutputs{{"table", false}, {"json", true}};

std::vector<llm::AttentionMode> modes_from(const std::vector<std::string>& words) {
  std::vector<llm::AttentionMode> modes;
  for (const std::string& word : words) {
    const auto found = kAttentionModes.find(word);
    if (found == kAttentionModes.end())
      throw llm::UsageError(fmt::format("--attn: expected some of full,moba,moba-naive, got {}", word));
    if (std::find(modes.begin(), modes.end(), found->second) != modes.end())
      throw llm::UsageError(fmt::format("--attn: expected each once, got {} again", word));
    modes.push_back(found->second);
  }
  return modes;
}

}  // namespace

void add_flags(CLI::App& command, EvalFlags& flags, const std::string& data_help) {
  add_model_flags(command, flags.session);
  add_dtype_flag(command, flags.session);
  command.add_option("--data", flags.data, data_help);
  add_number(command, "--seed", flags.seed, "Seed of every random draw")->capture_default_str();
  add_choice(command, "-o,--output", flags.json, kOutputs, "How to print the results [table]");
  command.add_option("--png", flags.png, "Draw the results into this file");
  command
      .add_option("--attn", flags.attention,
                  "Attention for the prefill; several are compared: full, moba, moba-naive")
      ->delimiter(',')
      ->capture_default_str()
      ->group("Attention");
}

Subject open_subject(const EvalFlags& flags) {
  in_range("--seed", flags.seed, 0, std::numeric_limits<std::int64_t>::max());
  std::vector<Variant> variants;
  for (const llm::SessionSettings& session : sessions_from(flags.session, modes_from(flags.attention)))
    variants.push_back({std::string(name_of(session.prefill)), session});
  llm::Weights weights = llm::Weights::open(flags.session.model);
  for (const Variant& variant : variants) check(variant.session, weights.config());
  return {std::move(weights), llm::Tokenizer::open(flags.session.model), std::move(variants)};
}

llm::Model load_model(const Subject& subject, const EvalFlags& flags) {
  llm::use_threads(subject.variants.front().session.threads);
  return llm::Model::load(subject.weights, flags.session.dtype);
}

std::vector<std::filesystem::path> paths_of(const EvalFlags& flags) {
  return {flags.data.begin(), flags.data.end()};
}

std::vector<std::int64_t> lengths_from(const std::vector<std::string>& texts, const Subject& subject) {
  std::vector<std::int64_t> lengths(texts.size());
  std::transform(texts.begin(), texts.end(), lengths.begin(),
                 [](const std::string& text) { return size_from("--lengths", text); });
  std::sort(lengths.begin(), lengths.end());
  if (const auto twice = std::adjacent_find(lengths.begin(), lengths.end()); twice != lengths.end())
    throw llm::UsageError(fmt::format("--lengths: expected each once, got {} again", *twice));
  const std::int64_t context = subject.weights.config().context;
  if (lengths.back() > context) {
    std::fprintf(stderr, "note: lengths above %lld are beyond the model's context\n",
                 static_cast<long long>(context));
  }
  return lengths;
}

std::string size_text(std::int64_t tokens) {
  return tokens % 1024 == 0 ? fmt::format("{}k", tokens / 1024) : std::to_string(tokens);
}

std::string share_text(double share, const llm::eval::Interval& interval) {
  return fmt::format("{:.3f} ({:.3f} to {:.3f})", share, interval.low, interval.high);
}

nlohmann::ordered_json json_head(const char* task, const EvalFlags& flags, const Subject& subject) {
  nlohmann::ordered_json json{{"task", task},
                              {"model", flags.session.model},
                              {"dtype", name_of(flags.session.dtype)},
                              {"threads", subject.variants.front().session.threads},
                              {"seed", flags.seed},
                              {"settings", nlohmann::json::array()}};
  for (const Variant& variant : subject.variants) {
    nlohmann::ordered_json settings{{"attn", variant.name}};
    add_attention(settings, variant.session);
    json["settings"].push_back(settings);
  }
  return json;
}

void print_json(const nlohmann::ordered_json& json) {
  print(json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

CLI::App* add_eval(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("eval", "Measure the loss and the retrieval of a model");
  command->require_subcommand(1);
  command->footer(
      "Example: which facts does a model find, at which lengths and depths, with and without MoBA?\n"
      "  moba eval needle -m model.gguf --lengths 2k,4k,8k --depths 10 --png needle.png\n");
  add_eval_loss(*command, action);
  add_eval_needle(*command, action);
  add_eval_ruler(*command, action);
  return command;
}

}  // namespace moba::app
