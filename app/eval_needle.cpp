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

struct NeedleFlags {
  EvalFlags common;
  std::vector<std::string> lengths{"8k"};
  std::int64_t depths = 10, per_cell = 1, digits = 7, predict = 32;
  std::string needle = llm::eval::kNeedle;
  std::optional<std::string> question;
  bool no_chat = false;
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

NeedleSettings settings_from(const NeedleFlags& flags, const Subject& subject) {
  NeedleSettings settings;
  settings.chat = llm::eval::asks_by_chat(subject.tokenizer, flags.no_chat);
  settings.needle = unescaped(flags.needle);
  settings.question =
      unescaped(flags.question.value_or(settings.chat ? llm::eval::kChatQuestion : llm::eval::kBareQuestion));
  settings.digits = in_range("--digits", flags.digits, 1, 18);
  settings.answer_tokens = in_range("-n/--predict", flags.predict, 1, 4096);
  settings.seed = flags.common.seed;
  for (const auto& [flag, text, mark] : {std::tuple("--needle-template", settings.needle, "{value}"),
                                         std::tuple("--needle-template", settings.needle, "{key}"),
                                         std::tuple("--question-template", settings.question, "{key}")}) {
    if (text.find(mark) == std::string::npos)
      throw UsageError(fmt::format("{}: expected {} in it, got '{}'", flag, mark, text));
  }
  return settings;
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

std::string table(const Subject& subject, const Grid& grid, const std::vector<Findings>& findings) {
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
    text += "\n";
  }
  return text;
}

nlohmann::ordered_json to_json(const Cell& cell, const std::string& variant) {
  const auto tried = static_cast<std::int64_t>(cell.samples.size());
  nlohmann::ordered_json json{{"attn", variant},
                              {"length", cell.length},
                              {"depth", cell.depth},
                              {"accuracy", share(cell.found(), tried)},
                              {"found", cell.found()},
                              {"tried", tried},
                              {"samples", nlohmann::json::array()}};
  for (const Sample& sample : cell.samples) {
    json["samples"].push_back({{"tokens", sample.tokens},
                               {"key", sample.key},
                               {"value", sample.value},
                               {"answer", sample.answer},
                               {"found", sample.found}});
  }
  return json;
}

nlohmann::ordered_json to_json(const NeedleFlags& flags, const NeedleSettings& settings,
                               const Subject& subject, const std::string& haystack,
                               const std::vector<Findings>& findings, bool complete) {
  nlohmann::ordered_json json = json_head("needle", flags.common, subject);
  json["haystack"] = haystack;
  json["chat"] = settings.chat;
  json["needle_template"] = settings.needle;
  json["question_template"] = settings.question;
  json["digits"] = settings.digits;
  json["predict"] = settings.answer_tokens;
  json["complete"] = complete;
  std::int64_t found = 0, tried = 0;
  nlohmann::ordered_json by_variant = nlohmann::json::array(), cells = nlohmann::json::array();
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

int needle(const NeedleFlags& flags) {
  const Grid grid_of_flags{{},
                           depths_from(in_range("--depths", flags.depths, 1, 1000)),
                           in_range("--per-cell", flags.per_cell, 1, 100000)};
  const Subject subject = open_subject(flags.common);
  const NeedleSettings settings = settings_from(flags, subject);
  Grid grid = grid_of_flags;
  grid.lengths = lengths_from(flags.lengths, subject);
  const llm::eval::Haystack haystack = llm::eval::Haystack::open(paths_of(flags.common), flags.common.seed);
  std::fprintf(stderr, "haystack: %s\n", haystack.source().c_str());
  NeedleMaker maker(haystack, subject.tokenizer, settings);
  for (const std::int64_t length : {grid.lengths.front(), grid.lengths.back()})
    maker.make(length, 0, 0);  // what cannot be made is told before the weights are read
  const llm::Model model = load_model(subject, flags.common);

  std::vector<Findings> findings(subject.variants.size());
  for (Findings& finding : findings) {
    for (const std::int64_t length : grid.lengths) {
      for (const double depth : grid.depths) finding.cells.push_back({length, depth, {}});
    }
  }
  note_interrupts();
  bool complete = true;
  try {
    find_needles(subject, model, grid, settings.answer_tokens, maker, findings);
  } catch (const Interrupted&) {
    complete = false;
  }
  if (flags.common.json) {
    print_json(to_json(flags, settings, subject, haystack.source(), findings, complete));
  } else {
    print(table(subject, grid, findings));
  }
  if (flags.common.png) draw(*flags.common.png, subject, grid, findings);
  return complete ? 0 : kInterruptedCode;
}

}  // namespace

CLI::App* add_eval_needle(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command =
      parent.add_subcommand("needle", "Plant a fact in a long text and ask for it: lengths by depths");
  const auto flags = std::make_shared<NeedleFlags>();
  add_flags(*command, flags->common,
            "Text to hide in: files and folders [the sources of Python's standard library]");
  command->add_option("--lengths", flags->lengths, "Tokens of prompt and answer; 8k is 8192")
      ->delimiter(',')
      ->capture_default_str();
  add_number(*command, "--depths", flags->depths,
             "How many places, from the beginning of the text to its end")
      ->capture_default_str();
  add_number(*command, "--per-cell", flags->per_cell, "Facts at every length and depth")
      ->capture_default_str();
  add_number(*command, "--digits", flags->digits, "Digits of the number")->capture_default_str();
  add_number(*command, "-n,--predict", flags->predict, "Most tokens of the answer")->capture_default_str();
  command->add_option("--needle-template", flags->needle, "The line with the fact, with {key} and {value}")
      ->capture_default_str();
  command->add_option(
      "--question-template", flags->question,
      "What follows the text, with {key} [a question; without chat turns also the beginning of "
      "its answer]");
  command->add_flag("--no-chat", flags->no_chat, "Give the model the bare text, without chat turns");
  add_answer_flags(*command, flags->common.session);
  add_block_flags(*command, flags->common.session);
  command->footer(
      "Example: full attention and MoBA side by side, with a picture\n"
      "  moba eval needle -m model --lengths 8k,32k --depths 10 --attn full,moba --png needle.png\n");
  command->callback([flags, &action] { action = [flags] { return needle(*flags); }; });
  return command;
}

}  // namespace moba::app
