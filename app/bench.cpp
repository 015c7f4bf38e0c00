#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "app/bench/bench_case.h"
#include "app/bench/measure.h"
#include "app/bench/memory.h"
#include "app/bench/report.h"
#include "app/commands.h"
#include "app/flags.h"
#include "llm/error.h"
#include "moba/error.h"

namespace moba::app {
namespace {

using bench::Choice;
using bench::Pass;
using bench::Pattern;
using llm::UsageError;

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 30, kMaxHeads = 1024, kMaxDim = 256;

struct BenchFlags {
  std::vector<std::string> tokens{"8k"}, chunk_sizes{"512"};
  std::vector<std::int64_t> topks{3};
  std::vector<std::string> dtypes{"f32"}, passes{"forward"}, routings{"independent"};
  std::int64_t heads = 1, kv_heads = 0, head_dim = 128, threads = 0, runs = 5;
  double sample = 1, budget = 0;
  std::uint64_t seed = 1;
  std::string output = "table", workspace = "256m";
};

template <typename T>
T word_from(const char* flag, const std::string& word, const std::vector<T>& choices) {
  std::string words;
  for (const T choice : choices) {
    if (word == name_of(choice)) return choice;
    words += fmt::format("{}{}", words.empty() ? "" : "|", name_of(choice));
  }
  throw UsageError(fmt::format("{}: expected {}, got '{}'", flag, words, word));
}

/// Lists of one length are pairs; otherwise every chunk size goes with every top-k.
std::vector<Choice> choices_from(const BenchFlags& flags) {
  std::vector<std::int64_t> sizes;
  for (const std::string& text : flags.chunk_sizes)
    sizes.push_back(size_from("--chunk-size", text, kMaxTokens));
  for (const std::int64_t topk : flags.topks) in_range("--topk", topk, 0, kMaxTokens);
  std::vector<Choice> choices;
  const bool pairs = sizes.size() == flags.topks.size();
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    for (std::size_t j = 0; j < flags.topks.size(); ++j) {
      if (!pairs || i == j) choices.push_back({sizes[i], flags.topks[j]});
    }
  }
  return choices;
}

void check_possible(const bench::Setting& setting, const std::vector<Choice>& choices,
                    const bench::Conditions& conditions) {
  if (setting.dtype == DType::i8 && setting.pass != Pass::decode)
    throw UsageError(fmt::format("--dtype i8: expected --pass decode, got {}", name_of(setting.pass)));
  if (setting.share < 1 && setting.pass != Pass::forward)
    throw UsageError(fmt::format("--sample: expected --pass forward, got {}", name_of(setting.pass)));
  for (const Choice& choice : choices) {
    if (setting.pass == Pass::gate &&
        (choice.topk < 2 || choice.chunk_size * choice.topk >= setting.tokens)) {
      throw UsageError(
          fmt::format("--pass gate: expected a top-k of 2 or more and more blocks than that, got (chunk {}, "
                      "topk {}) of {} tokens",
                      choice.chunk_size, choice.topk, setting.tokens));
    }
  }
  const double needed = needed_bytes(setting, choices, conditions),
               available = static_cast<double>(bench::available_memory());
  if (available > 0 && needed > available) {
    throw UsageError(fmt::format("--tokens {}: {} of {} needs {:.1f} GiB; {:.1f} GiB are free",
                                 setting.tokens, name_of(setting.pass), name_of(setting.dtype),
                                 needed / (1 << 30), available / (1 << 30)));
  }
}

std::vector<bench::Setting> settings_from(const BenchFlags& flags) {
  bench::Setting base{.share = flags.sample};
  base.heads = in_range("--heads", flags.heads, 1, kMaxHeads);
  base.kv_heads = in_range("--kv-heads", flags.kv_heads == 0 ? flags.heads : flags.kv_heads, 1, kMaxHeads);
  base.head_dim = in_range("--head-dim", flags.head_dim, 1, kMaxDim);
  if (base.heads % base.kv_heads != 0)
    throw UsageError(
        fmt::format("--kv-heads: expected a divisor of {} heads, got {}", base.heads, base.kv_heads));
  if (!(flags.sample > 0 && flags.sample <= 1))
    throw UsageError(fmt::format("--sample: expected a share above 0, at most 1, got {}", flags.sample));

  std::vector<bench::Setting> settings;
  for (const std::string& pass : flags.passes) {
    for (const std::string& dtype : flags.dtypes) {
      for (const std::string& routing : flags.routings) {
        for (const std::string& tokens : flags.tokens) {
          bench::Setting setting = base;
          setting.pass =
              word_from<Pass>("--pass", pass, {Pass::forward, Pass::backward, Pass::gate, Pass::decode});
          setting.dtype =
              word_from<DType>("--dtype", dtype, {DType::f32, DType::bf16, DType::f16, DType::i8});
          setting.pattern = word_from<Pattern>("--routing", routing,
                                               {Pattern::independent, Pattern::clustered, Pattern::sink});
          setting.tokens = size_from("--tokens", tokens, kMaxTokens);
          settings.push_back(setting);
        }
      }
    }
  }
  return settings;
}

/// One line on a terminal, rewritten; nothing elsewhere.
void show_progress(const std::string& text) {
  static const bool terminal = isatty(STDERR_FILENO) == 1;
  if (terminal) std::fputs(fmt::format("\r{}\033[K", text).c_str(), stderr);
}

int run(const BenchFlags& flags) {
  using Text = std::string (*)(const std::vector<bench::Row>&);
  const std::map<std::string, Text> outputs{
      {"table", bench::table_text}, {"csv", bench::csv_text}, {"json", bench::json_text}};
  const auto output = outputs.find(flags.output);
  if (output == outputs.end())
    throw UsageError(fmt::format("-o/--output: expected table|csv|json, got '{}'", flags.output));

  bench::Conditions conditions;
  conditions.threads = flags.threads == 0
                           ? openmp().threads
                           : static_cast<int>(in_range("-t/--threads", flags.threads, 1, 1024));
  conditions.runs = static_cast<int>(in_range("-n/--runs", flags.runs, 5, 1000));
  if (!(flags.budget >= 0))
    throw UsageError(fmt::format("--budget: expected seconds, 0: no limit, got {}", flags.budget));
  if (flags.budget > 0) conditions.budget_seconds = flags.budget;
  conditions.seed = flags.seed;
  conditions.workspace_bytes =
      static_cast<std::size_t>(size_from("--workspace", flags.workspace, std::int64_t{1} << 40));
  const std::vector<Choice> choices = choices_from(flags);
  const std::vector<bench::Setting> settings = settings_from(flags);
  for (const bench::Setting& setting : settings) check_possible(setting, choices, conditions);

  std::vector<bench::Row> rows;
  try {
    for (const bench::Setting& setting : settings) {
      for (bench::Row& row : measure(setting, choices, conditions, show_progress))
        rows.push_back(std::move(row));
    }
  } catch (const Error& error) {
    throw UsageError(error.what());  // what the library cannot do with these flags
  }
  show_progress("");
  std::fputs(output->second(rows).c_str(), stdout);
  if (std::fflush(stdout) != 0) throw llm::DataError("standard output: cannot be written");
  return 0;
}

}  // namespace

CLI::App* add_bench(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("bench", "Time attention alone, against the machine's own limit");
  const auto flags = std::make_shared<BenchFlags>();
  const auto list = [&](const char* name, auto& values, const char* help) {
    command->add_option(name, values, help)->delimiter(',')->capture_default_str();
  };
  list("--pass", flags->passes, "forward, backward, gate, decode");
  list("--tokens", flags->tokens, "Lengths; 8k is 8192, 1m 1048576");
  list("--chunk-size", flags->chunk_sizes, "Tokens in a block");
  list("--topk", flags->topks,
       "Blocks a token attends to, its own included; 0: all. As many as chunk sizes: pairs; otherwise each "
       "with each");
  command->add_option("--heads", flags->heads, "Query heads")->capture_default_str();
  command->add_option("--kv-heads", flags->kv_heads, "Key and value heads [as many as --heads]");
  command->add_option("--head-dim", flags->head_dim, "Head dimension")->capture_default_str();
  list("--dtype", flags->dtypes, "f32, bf16, f16; i8 for a decode's cache");
  list("--routing", flags->routings,
       "Routing pattern of the queries: independent, clustered (neighbours the same), sink (all of them "
       "block 0)");
  command
      ->add_option("--sample", flags->sample,
                   "Compute this share of the queries, in spread ranges, and scale the time to all")
      ->capture_default_str();
  command->add_option("-t,--threads", flags->threads, "Threads [as many as there are cores]");
  command->add_option("-n,--runs", flags->runs, "Timed runs of every row, at least 5")->capture_default_str();
  command
      ->add_option(
          "--budget", flags->budget,
          "Seconds for the timed runs of a row: a slow one gets fewer of them, or none but the run that is "
          "checked; 0: no limit")
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "Seed of the data")->capture_default_str();
  command->add_option("--workspace", flags->workspace, "Most scratch memory, in bytes")
      ->capture_default_str();
  command->add_option("-o,--output", flags->output, "table, csv or json")->capture_default_str();
  command->footer(
      "Before timing, sampled rows are compared with the reference backend; a wrong result ends the "
      "program.\n"
      "Example: full attention and two choices of blocks, at two lengths\n"
      "  moba bench --tokens 8k,32k --chunk-size 512,512,128 --topk 0,3,8");
  command->callback([flags, &action] { action = [flags] { return run(*flags); }; });
  return command;
}

}  // namespace moba::app
