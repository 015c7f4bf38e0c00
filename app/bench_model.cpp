#include "app/bench_model.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "app/commands.h"
#include "app/model_summary.h"
#include "app/program.h"
#include "app/progress.h"
#include "app/routing_flags.h"
#include "app/session_flags.h"
#include "llm/error.h"
#include "llm/formats/weights.h"
#include "llm/model/model.h"
#include "src/stopwatch.h"

namespace moba::app {
namespace {

using llm::AttentionMode;
using llm::UsageError;

enum class Format : std::uint8_t { table, csv, json };

struct ModelBenchFlags : SessionFlags {
  std::vector<std::int64_t> prompts{512, 8192}, generated{128}, depths;
  std::vector<AttentionMode> attention{AttentionMode::full, AttentionMode::moba}, decode;
  int repetitions = 5;
  Format format = Format::table;
};

void add_flags(FlagTable& table, ModelBenchFlags& flags) {
  const Words<AttentionMode> modes{{"full", AttentionMode::full}, {"moba", AttentionMode::moba}};
  const Words<Format> formats{{"table", Format::table}, {"csv", Format::csv}, {"json", Format::json}};
  add_model_flag(table, flags);
  table.size("-p,--n-prompt", flags.prompts, {0, kMaxTokens}, "Tokens of the prompts; 0: no prompts");
  table.size("-n,--n-gen", flags.generated, {0, kMaxTokens}, "Tokens to generate; 0: none");
  table
      .size("-d,--n-depth", flags.depths, {0, kMaxTokens},
            "Tokens of context before prompts and generated tokens")
      .default_text("0; for --n-gen 0,8k,32k");
  table.number("-r,--repetitions", flags.repetitions, {1, 1000}, "Timed runs of each row");
  add_threads_flag(table, flags.session.threads);
  add_dtype_flag(table, flags);
  add_kv_dtype_flag(table, flags);
  table.choice("-o,--output", flags.format, formats, "Output format; the table is Markdown");

  table.group("Attention");
  constexpr const char* kDefault = "the model's, else {}";
  table.choice("--attn", flags.attention, modes, "Attention variants for prompts, a row for each");
  table.choice("--decode", flags.decode, modes, "Attention variants for generated tokens, a row for each")
      .default_text("as --attn");
  add_calibration_flag(table, flags);
  add_routing_flags(table, flags.session.moba, kDefault, [&flags] { return !flags.calibration; });
  table
      .number("--moba-full-tail", flags.session.full_tail, {0, kMaxTokens},
              "Last tokens of a prompt whose queries use full attention")
      .default_text(kDefault)
      .json();
  add_full_layers_flag(table, flags.session.full_layers, kDefault, [&flags] { return !flags.calibration; });
}

/// Returns every combination of a variant, a depth and a number of tokens, in this order. Those beyond
/// `context` are left out with a note unless a flag asks for them.
std::vector<ModelTest> tests_from(const FlagTable& table, const ModelBenchFlags& flags,
                                  std::int64_t context) {
  const bool has_depths = table.given("--n-depth");
  std::vector<ModelTest> tests;
  std::set<std::string> left_out;
  const auto add = [&](const ModelTest& test, bool is_asked) {
    if (test.tokens() == 0) return;
    if (is_asked || test.depth + test.prompt <= context) {
      tests.push_back(test);
    } else {
      left_out.insert(name_of(test));
    }
  };
  for (const AttentionMode mode : flags.attention) {
    for (const std::int64_t depth : has_depths ? flags.depths : std::vector<std::int64_t>{0}) {
      for (const std::int64_t tokens : flags.prompts)
        add({.attention = mode, .depth = depth, .prompt = tokens}, has_depths || table.given("--n-prompt"));
    }
  }
  for (const AttentionMode mode : table.given("--decode") ? flags.decode : flags.attention) {
    for (const std::int64_t depth : has_depths ? flags.depths : std::vector<std::int64_t>{0, 8192, 32768}) {
      for (const std::int64_t tokens : flags.generated)
        add({.attention = mode, .depth = depth, .generated = tokens}, has_depths);
    }
  }
  if (!left_out.empty()) {
    std::fputs(fmt::format("note: beyond the model's context of {} tokens, left out: {}\n", context,
                           fmt::join(left_out, ", "))
                   .c_str(),
               stderr);
  }
  return tests;
}

/// Checks the lists and returns the tests. Throws UsageError.
std::vector<ModelTest> checked_tests(const FlagTable& table, const ModelBenchFlags& flags,
                                     std::int64_t context) {
  check_distinct("-p/--n-prompt", flags.prompts);
  check_distinct("-n/--n-gen", flags.generated);
  check_distinct("-d/--n-depth", flags.depths);
  const auto names = [](const std::vector<AttentionMode>& modes) {
    std::vector<std::string_view> list;
    for (const AttentionMode mode : modes) list.push_back(name_of(mode));
    return list;
  };
  check_distinct("--attn", names(flags.attention));
  check_distinct("--decode", names(flags.decode));
  const auto is_zero = [](std::int64_t tokens) { return tokens == 0; };
  if (std::all_of(flags.prompts.begin(), flags.prompts.end(), is_zero) &&
      std::all_of(flags.generated.begin(), flags.generated.end(), is_zero))
    throw UsageError("-p/--n-prompt, -n/--n-gen: expected a number above 0 in one of them, got 0");
  return tests_from(table, flags, context);
}

/// Times tests with one model, on the same random tokens.
class ModelTimer {
 public:
  ModelTimer(const llm::Weights& weights, const ModelBenchFlags& flags)
      : model_(llm::Model::load(weights, flags.arithmetic)), flags_(flags) {}

  ModelRow run(const ModelTest& test) {
    prepare(test);
    fill(test.depth, name_of(test));
    ModelRow row{test, {}};
    for (int run = 0; run <= flags_.repetitions; ++run) {
      const std::string what = fmt::format("{}, {}, run {} of {}", name_of(test), name_of(test.attention),
                                           run, flags_.repetitions);
      const double seconds = run == 0 ? warm_up(test, what) : time(test, what);
      if (run > 0) row.seconds.push_back(seconds);
      session_->rewind(test.depth);
    }
    return row;
  }

 private:
  /// Keeps the session of the test before, and so its cache, where kind and attention are the same.
  void prepare(const ModelTest& test) {
    const bool decodes = test.generated > 0;
    if (session_ && decodes == decodes_ && test.attention == attention_) return;
    decodes_ = decodes;
    attention_ = test.attention;
    llm::SessionSettings settings = flags_.session;
    // What decode reads does not change its time, and MoBA fills the cache fastest.
    settings.prefill = decodes ? AttentionMode::moba : test.attention;
    settings.decode = test.attention;
    session_.emplace(model_, settings);
  }

  /// Brings the cache to `depth` tokens.
  void fill(std::int64_t depth, const std::string& name) {
    if (session_->length() < depth) {
      ProgressLine progress(name + ", context", static_cast<double>(depth - session_->length()));
      session_->prefill(tokens(session_->length(), depth), std::ref(progress), llm::Logits::none);
    }
    session_->rewind(depth);
  }

  double warm_up(ModelTest test, const std::string& what) {
    test.generated = std::min<std::int64_t>(test.generated, 1);
    return time(test, what);
  }

  double time(const ModelTest& test, const std::string& what) {
    const std::span<const std::int32_t> ids = tokens(test.depth, test.depth + test.tokens());
    ProgressLine progress(what, static_cast<double>(test.tokens()));
    const Stopwatch stopwatch;
    if (test.prompt > 0) {
      session_->prefill(ids, std::ref(progress));
    } else {
      for (std::size_t i = 0; i < ids.size(); ++i) {
        session_->decode(ids[i]);
        progress(static_cast<double>(i + 1));
      }
    }
    return stopwatch.seconds();
  }

  /// Returns tokens [first, last) of one random sequence.
  std::span<const std::int32_t> tokens(std::int64_t first, std::int64_t last) {
    while (static_cast<std::int64_t>(ids_.size()) < last)
      ids_.push_back(static_cast<std::int32_t>(random_() % static_cast<std::uint64_t>(session_->vocab())));
    return std::span<const std::int32_t>(ids_).subspan(static_cast<std::size_t>(first),
                                                       static_cast<std::size_t>(last - first));
  }

  llm::Model model_;
  const ModelBenchFlags& flags_;
  std::optional<llm::Session> session_;
  bool decodes_ = false;
  AttentionMode attention_ = AttentionMode::full;
  std::mt19937_64 random_{0};
  std::vector<std::int32_t> ids_;
};

/// Returns such as "llama 135M Q4_1", by the type of most bytes.
std::string type_of(const llm::Weights& weights) {
  const auto mix = storage_mix(weights);
  const auto most = std::max_element(
      mix.begin(), mix.end(), [](const auto& a, const auto& b) { return a.second.bytes < b.second.bytes; });
  const auto parameters = static_cast<double>(parameter_count(weights));
  const std::string size =
      parameters >= 1e9 ? fmt::format("{:.1f}B", parameters / 1e9) : fmt::format("{:.0f}M", parameters / 1e6);
  return fmt::format("{} {} {}", weights.config().architecture, size, name_of(most->first));
}

BenchedModel describe(const FlagTable& table, const ModelBenchFlags& flags, const llm::Weights& weights) {
  BenchedModel model{.file = flags.model,
                     .type = type_of(weights),
                     .bytes = 0,
                     .parameters = parameter_count(weights),
                     .threads = flags.session.threads,
                     .settings = table.json()};
  for (const auto& [storage, share] : storage_mix(weights)) model.bytes += share.bytes;
  model.settings.erase("model");
  model.settings.erase("threads");
  return model;
}

int run(const FlagTable& table, ModelBenchFlags& flags) {
  const llm::Weights weights = llm::Weights::open(flags.model);
  complete(table, weights, flags);
  check(flags.session, weights.config());
  const std::vector<ModelTest> tests = checked_tests(table, flags, weights.config().context);
  const BenchedModel model = describe(table, flags, weights);

  llm::use_threads(flags.session.threads);
  note_interrupts();
  std::vector<ModelRow> rows;
  int code = 0;
  try {
    ModelTimer timer(weights, flags);
    for (const ModelTest& test : tests) rows.push_back(timer.run(test));
  } catch (const Interrupted&) {
    code = kInterruptedCode;  // the rows until then are printed
  }
  print(flags.format == Format::table ? table_text(model, rows)
        : flags.format == Format::csv ? csv_text(model, rows)
                                      : json_text(model, rows));
  return code;
}

}  // namespace

CLI::App* add_bench_model(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command =
      parent.add_subcommand("bench", "Time a model: prompts and generated tokens, full attention and MoBA");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<ModelBenchFlags>();
  add_flags(*table, *flags);
  command->footer(
      "Tests are named as llama-bench names them: pp512 reads 512 tokens, tg128 generates 128, @ d8192 after "
      "8192 of context.\n"
      "Example:\n"
      "  moba bench -m SmolLM2-135M-Instruct.Q4_1.gguf -p 512 -n 128 -d 0,4k");
  command->callback([=, &action] { action = [=] { return run(*table, *flags); }; });
  return command;
}

}  // namespace moba::app
