#include "app/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "app/commands.h"
#include "app/program.h"
#include "llm/session/session_memory.h"

namespace moba::app {
void add_flags(FlagTable& table, EvalFlags& flags) {
  const Words<ReportFormat> outputs{
      {"table", ReportFormat::table}, {"json", ReportFormat::json}, {"lm-eval", ReportFormat::lm_eval}};
  add_model_flag(table, flags);
  add_dtype_flag(table, flags);
  add_kv_dtype_flag(table, flags);
  add_threads_flag(table, flags.session.threads);
  table.number("--seed", flags.seed, {0, kMaxSeed}, "Random seed of the evaluation").json();
  table.choice("-o,--output", flags.format, outputs,
               "Format of the results; lm-eval: JSON in the layout of lm-evaluation-harness");
  table.value("--png", flags.png, "PATH", "Also draw the results into this PNG file");
}

void add_attention_flags(FlagTable& table, EvalFlags& flags, bool decodes) {
  table.group("Attention");
  Words<llm::AttentionMode> modes = kAttentionModes;
  modes.emplace_back("oracle", llm::AttentionMode::oracle);
  table.choice(
      "--attn", flags.attention, modes,
      "Attention variants for prefill, each evaluated; moba-naive is MoBA on the reference backend, "
      "slow; oracle selects the blocks with the most mass under full attention, slow, and shows what "
      "a better gate could reach");
  llm::SessionSettings& session = flags.session;
  if (decodes) {
    table.choice("--decode", session.decode, kDecodeModes, "Attention for decode").json();
  } else {
    table.report("decode", [&session] { return Json(name_of(session.decode)); });
  }
  add_moba_flags(table, flags, /*has_tail=*/decodes);
}

void add_haystack_flags(FlagTable& table, EvalFlags& flags, std::vector<std::int64_t>& lengths, bool& chat) {
  table.value("--data", flags.data, "PATH", "Text files and folders that the haystack is taken from")
      .default_text("code and prose: the sources of Python's standard library and Debian's licences");
  table.size("--lengths", lengths, {1, kMaxTokens}, "Tokens of prompt and answer together, such as 8k");
  table.toggle("--no-chat", chat, "Do not apply the chat template").json();
}

Subject open_subject(const FlagTable& table, EvalFlags& flags) {
  llm::Weights weights = llm::Weights::open(flags.model);
  complete(table, weights, flags);
  std::vector<Variant> variants;
  std::vector<std::string_view> names;
  for (const llm::AttentionMode mode : flags.attention) {
    variants.push_back({std::string(name_of(mode)), flags.session});
    variants.back().session.prefill = mode;
    names.push_back(name_of(mode));
  }
  check_distinct("--attn", names);
  for (const Variant& variant : variants) check(variant.session, weights.config());
  return {std::move(weights), llm::Tokenizer::open(flags.model), std::move(variants)};
}

llm::Model load_model(const Subject& subject, const EvalFlags& flags, std::int64_t tokens) {
  check_memory(flags.model, session_memory(subject.weights, flags.arithmetic, flags.session), tokens,
               llm::available_memory());
  llm::use_threads(subject.variants.front().session.threads);
  return llm::Model::load(subject.weights, flags.arithmetic);
}

void sort_lengths(std::vector<std::int64_t>& lengths, const Subject& subject) {
  check_distinct("--lengths", lengths);
  std::sort(lengths.begin(), lengths.end());
  const std::int64_t context = subject.weights.config().context;
  if (lengths.back() > context) {
    std::fprintf(stderr, "note: lengths above %lld are beyond the model's context\n",
                 static_cast<long long>(context));
  }
}

std::string share_text(double share, const llm::eval::Interval& interval) {
  return fmt::format("{:.3f} ({:.3f} to {:.3f})", share, interval.low, interval.high);
}

Json json_head(const char* task, const FlagTable& table, EvalFlags& flags, const Subject& subject) {
  Json json{{"task", task}};
  json.update(table.json("Options"));
  json["requested"] = table.requested();
  json["settings"] = Json::array();
  for (const Variant& variant : subject.variants) {
    flags.session = variant.session;
    Json settings{{"attn", variant.name}};
    settings.update(table.json("Attention"));
    json["settings"].push_back(settings);
  }
  return json;
}

void print_json(const Json& json) {
  print(json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

double share_error(double share, std::int64_t tried) {
  return tried > 1 ? std::sqrt(share * (1 - share) / static_cast<double>(tried - 1))
                   : std::numeric_limits<double>::quiet_NaN();
}

void print_lm_eval(const char* task, const Json& config, std::int64_t samples,
                   const std::vector<std::pair<std::string, std::vector<Metric>>>& by_variant) {
  Json json;
  for (const char* member : {"results", "versions", "n-shot", "higher_is_better", "n-samples"})
    json[member] = Json::object();
  for (const auto& [variant, metrics] : by_variant) {
    const std::string name = fmt::format("moba_{}_{}", task, variant);
    json["results"][name]["alias"] = name;
    for (const Metric& metric : metrics) {
      json["results"][name][metric.name + ",none"] = metric.value;
      json["results"][name][metric.name + "_stderr,none"] =
          std::isfinite(metric.error) ? Json(metric.error) : Json("N/A");
      json["higher_is_better"][name][metric.name] = metric.higher_is_better;
    }
    json["versions"][name] = 1;
    json["n-shot"][name] = 0;
    json["n-samples"][name] = {{"original", samples}, {"effective", samples}};
  }
  json["config"] = config;
  json["model_name"] = config["model"];
  print_json(json);
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
