#include "llm/eval/needle.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <memory>

#include "app/eval.h"
#include "app/flags.h"
#include "app/plot/charts.h"
#include "app/program.h"
#include "app/progress.h"
#include "llm/error.h"
#include "llm/eval/greedy_generator.h"
#include "src/stopwatch.h"

namespace moba::app {
namespace {

using llm::UsageError;
using llm::eval::NeedleCase;
using llm::eval::NeedleMaker;
using llm::eval::NeedleSettings;

struct NeedleFlags : EvalFlags {
  std::vector<std::int64_t> lengths{8192};
  std::int64_t depths = 10, per_cell = 1;
  NeedleSettings needle{.needle = llm::eval::kNeedle, .question = "", .chat = true};
};

struct Sample {
  std::string key, value, answer;
  std::size_t tokens;
  bool found;
};

/// All samples of one attention variant at one length and depth.
struct Cell {
  std::int64_t length;
  double depth;
  std::vector<Sample> samples;

  std::int64_t found() const {
    return std::count_if(samples.begin(), samples.end(), [](const Sample& s) { return s.found; });
  }
};

/// The cells of one attention variant.
struct Findings {
  std::vector<Cell> cells;
  double seconds = 0;

  std::int64_t found() const {
    return sum([](const Cell& cell) { return cell.found(); });
  }
  std::int64_t tried() const {
    return sum([](const Cell& cell) { return static_cast<std::int64_t>(cell.samples.size()); });
  }

 private:
  template <typename Count>
  std::int64_t sum(const Count& count) const {
    std::int64_t all = 0;
    for (const Cell& cell : cells) all += count(cell);
    return all;
  }
};

struct Grid {
  std::vector<std::int64_t> lengths;
  std::vector<double> depths;
  std::int64_t per_cell;
};

/// From the beginning of the text to its end; a single one lies in the middle.
std::vector<double> depths_from(std::int64_t count) {
  std::vector<double> depths;
  for (std::int64_t i = 0; i < count; ++i)
    depths.push_back(count == 1 ? 0.5 : static_cast<double>(i) / static_cast<double>(count - 1));
  return depths;
}

/// A template as it is meant: \n, \t and \\ stand for what they do everywhere.
std::string unescaped(const std::string& text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char next = text[i] == '\\' && i + 1 < text.size() ? text[i + 1] : '\0';
    const bool is_escape = next == 'n' || next == 't' || next == '\\';
    out += !is_escape ? text[i] : next == 'n' ? '\n' : next == 't' ? '\t' : '\\';
    if (is_escape) ++i;
  }
  return out;
}

void complete(const FlagTable& table, const Subject& subject, std::int64_t seed, NeedleSettings& settings) {
  settings.chat = llm::eval::asks_by_chat(subject.tokenizer, !settings.chat);
  if (!table.given("--question-template"))
    settings.question = settings.chat ? llm::eval::kChatQuestion : llm::eval::kBareQuestion;
  settings.needle = unescaped(settings.needle);
  settings.question = unescaped(settings.question);
  settings.seed = seed;
  for (const auto& [flag, text, mark] : {std::tuple("--needle-template", settings.needle, "{value}"),
                                         std::tuple("--needle-template", settings.needle, "{key}"),
                                         std::tuple("--question-template", settings.question, "{key}")}) {
    if (text.find(mark) == std::string::npos)
      throw UsageError(fmt::format("{}: expected {} in it, got '{}'", flag, mark, text));
  }
}

/// Fills `findings`, one for each variant, cell by cell. Throws Interrupted with what is done in them.
void find_needles(const Subject& subject, const llm::Model& model, const Grid& grid, std::int64_t predict,
                  NeedleMaker& maker, std::vector<Findings>& findings) {
  double total = 0;
  for (const std::int64_t length : grid.lengths) total += static_cast<double>(length);
  total *=
      static_cast<double>(grid.depths.size() * subject.variants.size()) * static_cast<double>(grid.per_cell);
  ProgressLine progress("", total);
  double done = 0;

  for (std::size_t l = 0; l < grid.lengths.size(); ++l) {
    for (std::int64_t sample = 0; sample < grid.per_cell; ++sample) {
      std::vector<NeedleCase> cases;
      for (const double depth : grid.depths) cases.push_back(maker.make(grid.lengths[l], depth, sample));
      for (std::size_t w = 0; w < subject.variants.size(); ++w) {
        llm::eval::GreedyGenerator generator(model, subject.tokenizer, subject.variants[w].session);
        for (std::size_t d = 0; d < cases.size(); ++d) {
          progress.name(fmt::format("{}, {} at {:.0f}%:", subject.variants[w].name,
                                    size_text(grid.lengths[l]), 100 * grid.depths[d]));
          const Stopwatch stopwatch;
          const std::string answer = generator.generate(
              cases[d].prompt, predict, [&](double read) { progress(done + read); },
              llm::eval::has_whole_number);
          findings[w].seconds += stopwatch.seconds();
          findings[w].cells[l * grid.depths.size() + d].samples.push_back(
              {cases[d].key, cases[d].value, answer, cases[d].prompt.size(),
               llm::eval::first_number(answer) == cases[d].value});
          done += static_cast<double>(grid.lengths[l]);
        }
      }
    }
  }
}

double share(std::int64_t found, std::int64_t tried) {
  return tried > 0 ? static_cast<double>(found) / static_cast<double>(tried) : 0;
}

std::string text_table(const Subject& subject, const Grid& grid, const std::vector<Findings>& findings) {
  std::string text;
  for (std::size_t w = 0; w < findings.size(); ++w) {
    const std::int64_t found = findings[w].found(), tried = findings[w].tried();
    text += fmt::format("{}{}: found {} of {}, accuracy {}, {:.0f} s\n   depth", w > 0 ? "\n" : "",
                        subject.variants[w].name, found, tried,
                        share_text(share(found, tried), llm::eval::wilson(static_cast<double>(found), tried)),
                        findings[w].seconds);
    for (const std::int64_t length : grid.lengths) text += fmt::format(" {:>8}", size_text(length));
    for (std::size_t d = 0; d < grid.depths.size(); ++d) {
      text += fmt::format("\n{:>7.0f}%", 100 * grid.depths[d]);
      for (std::size_t l = 0; l < grid.lengths.size(); ++l) {
        const Cell& cell = findings[w].cells[l * grid.depths.size() + d];
        text += fmt::format(" {:>8}", fmt::format("{}/{}", cell.found(), cell.samples.size()));
      }
    }
    std::string all = "\n     all", intervals = "\n     95%";
    for (std::size_t l = 0; l < grid.lengths.size(); ++l) {
      std::int64_t found_there = 0, tried_there = 0;
      for (std::size_t d = 0; d < grid.depths.size(); ++d) {
        const Cell& cell = findings[w].cells[l * grid.depths.size() + d];
        found_there += cell.found();
        tried_there += static_cast<std::int64_t>(cell.samples.size());
      }
      const llm::eval::Interval interval = llm::eval::wilson(static_cast<double>(found_there), tried_there);
      all += fmt::format(" {:>8}", fmt::format("{}/{}", found_there, tried_there));
      intervals +=
          fmt::format(" {:>8}", fmt::format("{:.0f}-{:.0f}%", 100 * interval.low, 100 * interval.high));
    }
    text += all + intervals + "\n";
  }
  return text;
}

Json to_json(const Cell& cell, const std::string& variant) {
  const auto tried = static_cast<std::int64_t>(cell.samples.size());
  Json json{{"attn", variant},         {"length", cell.length},
            {"depth", cell.depth},     {"accuracy", share(cell.found(), tried)},
            {"found", cell.found()},   {"tried", tried},
            {"samples", Json::array()}};
  for (const Sample& sample : cell.samples) {
    json["samples"].push_back({{"tokens", sample.tokens},
                               {"key", sample.key},
                               {"value", sample.value},
                               {"answer", sample.answer},
                               {"found", sample.found}});
  }
  return json;
}

Json to_json(Json json, const Subject& subject, const std::vector<Findings>& findings, bool complete) {
  json["complete"] = complete;
  std::int64_t found = 0, tried = 0;
  Json by_variant = Json::array(), cells = Json::array();
  for (std::size_t w = 0; w < findings.size(); ++w) {
    const llm::eval::Interval interval =
        llm::eval::wilson(static_cast<double>(findings[w].found()), findings[w].tried());
    by_variant.push_back({{"attn", subject.variants[w].name},
                          {"accuracy", share(findings[w].found(), findings[w].tried())},
                          {"low", interval.low},
                          {"high", interval.high},
                          {"found", findings[w].found()},
                          {"tried", findings[w].tried()},
                          {"seconds", findings[w].seconds}});
    found += findings[w].found();
    tried += findings[w].tried();
    for (const Cell& cell : findings[w].cells) cells.push_back(to_json(cell, subject.variants[w].name));
  }
  json["accuracy"] = share(found, tried);
  json["by_attn"] = by_variant;
  json["cells"] = cells;
  return json;
}

void print_lm_eval(const Json& config, const Subject& subject, const std::vector<Findings>& findings) {
  std::vector<std::pair<std::string, std::vector<Metric>>> by_variant;
  for (std::size_t w = 0; w < findings.size(); ++w) {
    const std::int64_t found = findings[w].found(), tried = findings[w].tried();
    const double accuracy = share(found, tried);
    by_variant.push_back({subject.variants[w].name, {{"acc", accuracy, share_error(accuracy, tried), true}}});
  }
  print_lm_eval("needle", config, findings.front().tried(), by_variant);
}

void draw(const std::string& png, const Subject& subject, const Grid& grid,
          const std::vector<Findings>& findings) {
  std::vector<Heatmap> maps;
  for (std::size_t w = 0; w < findings.size(); ++w) {
    Heatmap map;
    map.title =
        fmt::format("{}: {} of {} found", subject.variants[w].name, findings[w].found(), findings[w].tried());
    for (const std::int64_t length : grid.lengths) map.columns.push_back(size_text(length));
    for (std::size_t d = 0; d < grid.depths.size(); ++d) {
      map.rows.push_back(fmt::format("{:.0f}%", 100 * grid.depths[d]));
      std::vector<std::optional<double>>& row = map.values.emplace_back();
      for (std::size_t l = 0; l < grid.lengths.size(); ++l) {
        const Cell& cell = findings[w].cells[l * grid.depths.size() + d];
        const auto tried = static_cast<std::int64_t>(cell.samples.size());
        row.push_back(tried > 0 ? std::optional(share(cell.found(), tried)) : std::nullopt);
      }
    }
    maps.push_back(std::move(map));
  }
  draw_heatmaps(png, "Needle in a haystack: facts found, %", maps, "depth", "tokens");
}

int needle(const FlagTable& table, NeedleFlags& flags) {
  const Subject subject = open_subject(table, flags);
  complete(table, subject, flags.seed, flags.needle);
  sort_lengths(flags.lengths, subject);
  const Grid grid{flags.lengths, depths_from(flags.depths), flags.per_cell};
  const llm::eval::Haystack haystack = llm::eval::Haystack::open(flags.data, flags.seed);
  std::fprintf(stderr, "haystack: %s\n", haystack.source().c_str());
  NeedleMaker maker(haystack, subject.tokenizer, flags.needle);
  for (const std::int64_t length : {grid.lengths.front(), grid.lengths.back()})
    maker.make(length, 0, 0);  // what cannot be made is told before the weights are read
  const llm::Model model = load_model(subject, flags, grid.lengths.back());

  std::vector<Findings> findings(subject.variants.size());
  for (Findings& finding : findings) {
    for (const std::int64_t length : grid.lengths) {
      for (const double depth : grid.depths) finding.cells.push_back({length, depth, {}});
    }
  }
  note_interrupts();
  bool complete = true;
  try {
    find_needles(subject, model, grid, flags.needle.answer_tokens, maker, findings);
  } catch (const Interrupted&) {
    complete = false;
  }
  Json head = json_head("needle", table, flags, subject);
  head["haystack"] = haystack.source();
  head.update(table.json("Needles"));
  if (flags.format == ReportFormat::json) {
    print_json(to_json(std::move(head), subject, findings, complete));
  } else if (flags.format == ReportFormat::lm_eval) {
    print_lm_eval(head, subject, findings);
  } else {
    print(text_table(subject, grid, findings));
  }
  if (flags.png) draw(*flags.png, subject, grid, findings);
  return complete ? 0 : kInterruptedCode;
}

}  // namespace

CLI::App* add_eval_needle(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command =
      parent.add_subcommand("needle", "Plant a fact in a long text and ask for it: lengths by depths");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<NeedleFlags>();
  add_flags(*table, *flags);

  table->group("Needles");
  NeedleSettings& needle_settings = flags->needle;
  add_haystack_flags(*table, *flags, flags->lengths, needle_settings.chat);
  table->number("--depths", flags->depths, {1, 1000},
                "Depths of the needle, evenly spaced from start to end of the text");
  table->number("--per-cell", flags->per_cell, {1, 100000}, "Needles at each length and depth");
  table
      ->value("--needle-template", needle_settings.needle, "TEXT",
              "Sentence with the needle, with {key} and {value}")
      .json();
  table->value("--question-template", needle_settings.question, "TEXT", "Question after the text, with {key}")
      .default_text("a question; without a chat template also the beginning of its answer")
      .json();
  table->number("--digits", needle_settings.digits, {1, 18}, "Digits of the value, a random number").json();
  table->number("-n,--predict", needle_settings.answer_tokens, {1, 4096}, "Maximum tokens to generate")
      .json();
  add_attention_flags(*table, *flags, /*decodes=*/true);
  command->footer(
      "Example: full attention and MoBA side by side, with a picture\n"
      "  moba eval needle -m model --lengths 8k,32k --depths 10 --attn full,moba --png needle.png\n");
  command->callback([=, &action] { action = [=] { return needle(*table, *flags); }; });
  return command;
}

}  // namespace moba::app
