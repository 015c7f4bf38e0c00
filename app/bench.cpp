#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
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
#include "app/program.h"
#include "llm/error.h"
#include "moba/error.h"

namespace moba::app {
namespace {

using bench::Pass;
using bench::Pattern;
using bench::Variant;
using llm::UsageError;

constexpr std::int64_t kMaxHeads = 1024, kMaxDim = 256, kMaxBytes = std::int64_t{1} << 40;

enum class Format : std::uint8_t { table, csv, json };

struct BenchFlags {
  std::vector<Pass> passes{Pass::forward};
  std::vector<std::int64_t> tokens{8192}, chunk_sizes{512}, topks{3};
  std::vector<DType> dtypes{DType::f32};
  std::vector<Pattern> patterns{Pattern::independent};
  bench::Setting shape;
  bench::Conditions conditions{.seed = 1, .workspace_bytes = std::size_t{256} << 20};
  double budget = 0;
  Format format = Format::table;
};

/// Lists of one length are pairs; otherwise every chunk size goes with every top-k.
std::vector<Variant> variants_from(const BenchFlags& flags) {
  std::vector<Variant> variants;
  const bool pairs = flags.chunk_sizes.size() == flags.topks.size();
  for (std::size_t i = 0; i < flags.chunk_sizes.size(); ++i) {
    for (std::size_t j = 0; j < flags.topks.size(); ++j) {
      if (!pairs || i == j) variants.push_back({flags.chunk_sizes[i], flags.topks[j]});
    }
  }
  return variants;
}

void check_possible(const bench::Setting& setting, const std::vector<Variant>& variants,
                    const bench::Conditions& conditions) {
  if (setting.dtype == DType::i8 && setting.pass != Pass::decode)
    throw UsageError(fmt::format("--dtype i8: expected --pass decode, got {}", name_of(setting.pass)));
  if (setting.share < 1 && setting.pass != Pass::forward)
    throw UsageError(fmt::format("--sample: expected --pass forward, got {}", name_of(setting.pass)));
  for (const Variant& variant : variants) {
    if (setting.pass == Pass::gate &&
        (variant.topk < 2 || variant.chunk_size * variant.topk >= setting.tokens)) {
      throw UsageError(
          fmt::format("--pass gate: expected a top-k of 2 or more and more blocks than that, got (chunk {}, "
                      "topk {}) of {} tokens",
                      variant.chunk_size, variant.topk, setting.tokens));
    }
  }
  const double needed = needed_bytes(setting, variants, conditions),
               available = static_cast<double>(bench::available_memory());
  if (available > 0 && needed > available) {
    throw UsageError(fmt::format("--tokens {}: {} of {} needs {:.1f} GiB; {:.1f} GiB are free",
                                 setting.tokens, name_of(setting.pass), name_of(setting.dtype),
                                 needed / (1 << 30), available / (1 << 30)));
  }
}

/// Every combination of passes, dtypes, patterns and lengths.
std::vector<bench::Setting> settings_from(const BenchFlags& flags) {
  std::vector<bench::Setting> settings;
  for (const Pass pass : flags.passes) {
    for (const DType dtype : flags.dtypes) {
      for (const Pattern pattern : flags.patterns) {
        for (const std::int64_t tokens : flags.tokens) {
          bench::Setting setting = flags.shape;
          setting.pass = pass;
          setting.dtype = dtype;
          setting.pattern = pattern;
          setting.tokens = tokens;
          settings.push_back(setting);
        }
      }
    }
  }
  return settings;
}

std::string text_of(const std::vector<bench::Row>& rows, Format format) {
  return format == Format::table ? bench::table_text(rows)
         : format == Format::csv ? bench::csv_text(rows)
                                 : bench::json_text(rows);
}

/// One line on a terminal, rewritten; nothing elsewhere.
void show_progress(const std::string& text) {
  static const bool terminal = isatty(STDERR_FILENO) == 1;
  if (terminal) std::fputs(fmt::format("\r{}\033[K", text).c_str(), stderr);
}

int run(const FlagTable& table, BenchFlags& flags) {
  bench::Setting& shape = flags.shape;
  if (!table.given("--kv-heads")) shape.kv_heads = shape.heads;
  if (shape.heads % shape.kv_heads != 0)
    throw UsageError(
        fmt::format("--kv-heads: expected a divisor of {} heads, got {}", shape.heads, shape.kv_heads));
  bench::Conditions& conditions = flags.conditions;
  if (flags.budget > 0) conditions.budget_seconds = flags.budget;
  const std::vector<Variant> variants = variants_from(flags);
  const std::vector<bench::Setting> settings = settings_from(flags);
  for (const bench::Setting& setting : settings) check_possible(setting, variants, conditions);

  std::vector<bench::Row> rows;
  try {
    for (const bench::Setting& setting : settings) {
      for (bench::Row& row : measure(setting, variants, conditions, show_progress))
        rows.push_back(std::move(row));
    }
  } catch (const Error& error) {
    throw UsageError(error.what());  // what the library cannot do with these flags
  }
  show_progress("");
  print(text_of(rows, flags.format));
  return 0;
}

void add_flags(FlagTable& table, BenchFlags& flags) {
  const Words<Pass> passes{{"forward", Pass::forward},
                           {"backward", Pass::backward},
                           {"gate", Pass::gate},
                           {"decode", Pass::decode}};
  const Words<DType> dtypes{
      {"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}, {"i8", DType::i8}};
  const Words<Pattern> patterns{
      {"independent", Pattern::independent}, {"clustered", Pattern::clustered}, {"sink", Pattern::sink}};
  const Words<Format> formats{{"table", Format::table}, {"csv", Format::csv}, {"json", Format::json}};
  table.choice("--pass", flags.passes, passes, "Passes to time");
  table.size("--tokens", flags.tokens, {1, kMaxTokens}, "Sequence lengths, such as 8k or 1m");
  table.size("--chunk-size", flags.chunk_sizes, {1, kMaxTokens}, "Block sizes in tokens");
  table.number(
      "--topk", flags.topks, {0, kMaxTokens},
      "Blocks that a query attends to, its own included; 0: full attention. As many values as --chunk-size "
      "make pairs; otherwise each is combined with each");
  table.number("--heads", flags.shape.heads, {1, kMaxHeads}, "Query heads");
  table
      .number("--kv-heads", flags.shape.kv_heads, {1, kMaxHeads}, "Key and value heads, a divisor of --heads")
      .default_text("as --heads");
  table.number("--head-dim", flags.shape.head_dim, {1, kMaxDim}, "Head dimension");
  table.choice("--dtype", flags.dtypes, dtypes, "Data types; i8 is for the KV cache of decode");
  table.choice(
      "--routing", flags.patterns, patterns,
      "Routing patterns: each query its own blocks, neighbouring queries the same, nearly all block 0");
  table.number("--sample", flags.shape.share, {1e-9, 1},
               "Share of the queries to compute, in evenly spread ranges; times are scaled to all of them");
  add_threads_flag(table, flags.conditions.threads, openmp().threads);
  table.number("-n,--runs", flags.conditions.runs, {5, 1000}, "Timed runs of each row");
  table.number(
      "--budget", flags.budget, {0, 1e9},
      "Maximum seconds for the timed runs of a row, estimated from the run that is checked; a slow row has "
      "fewer of them, or that run alone; 0: no limit");
  table.number("--seed", flags.conditions.seed, {0, kMaxSeed}, "Random seed of the data");
  table.size("--workspace", flags.conditions.workspace_bytes, {1, kMaxBytes},
             "Maximum scratch memory in bytes, such as 256m");
  table.choice("-o,--output", flags.format, formats, "Output format");
}

}  // namespace

CLI::App* add_bench(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand(
      "bench", "Time attention alone, against the machine's ceilings, or with -m a model");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<BenchFlags>();
  add_flags(*table, *flags);
  command->footer(
      "Before timing, sampled rows are compared with the reference backend; a wrong result ends the "
      "program.\n"
      "Example: full attention and two block sizes, at two lengths\n"
      "  moba bench --tokens 8k,32k --chunk-size 512,512,128 --topk 0,3,8\n"
      "With -m, a model is timed instead; its flags:\n"
      "  moba bench -m MODEL --help");
  command->callback([=, &action] { action = [=] { return run(*table, *flags); }; });
  return command;
}

}  // namespace moba::app
