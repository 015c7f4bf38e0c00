#include "llm/eval/ruler.h"

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
#include "llm/eval/prompt.h"

namespace moba::app {
namespace {

using llm::eval::RulerCase;
using llm::eval::RulerMaker;

struct RulerFlags : EvalFlags {
  std::vector<std::string> tasks = llm::eval::ruler_tasks();
  std::vector<std::int64_t> lengths{4096};
  std::int64_t samples = 10;
  bool chat = true;
};

struct Sample {
  std::vector<std::string> expected;
  std::string answer;
  std::size_t tokens;
  double score;
};

/// All samples of one attention variant, one task, one length.
struct Cell {
  std::size_t variant;
  std::string task;
  std::int64_t length;
  std::vector<Sample> samples;
};

/// The mean of many scores.
struct Score {
  double sum = 0;
  std::int64_t tried = 0;

  void add(const Cell& cell) {
    for (const Sample& sample : cell.samples) sum += sample.score;
    tried += static_cast<std::int64_t>(cell.samples.size());
  }
  double mean() const { return tried > 0 ? sum / static_cast<double>(tried) : 0; }
  llm::eval::Interval interval() const { return llm::eval::wilson(sum, tried); }
};

Score score_of(const Cell& cell) {
  Score score;
  score.add(cell);
  return score;
}

Score score_of(const std::vector<Cell>& cells, std::size_t variant) {
  Score score;
  for (const Cell& cell : cells) {
    if (cell.variant == variant) score.add(cell);
  }
  return score;
}

/// Fills the cells. Throws Interrupted with what is done in them.
void answer_all(const Subject& subject, const llm::Model& model, const RulerMaker& maker,
                std::int64_t samples, std::vector<Cell>& cells) {
  double total = 0, done = 0;
  for (const Cell& cell : cells) total += static_cast<double>(samples * cell.length);
  ProgressLine progress("", total);
  for (Cell& cell : cells) {
    const Variant& variant = subject.variants[cell.variant];
    llm::eval::GreedyGenerator generator(model, subject.tokenizer, variant.session);
    for (std::int64_t sample = 0; sample < samples; ++sample) {
      progress.name(fmt::format("{}, {}, {}:", variant.name, cell.task, size_text(cell.length)));
      const RulerCase made = maker.make(cell.task, cell.length, sample);
      const std::string answer = generator.generate(made.prompt, llm::eval::ruler_answer_tokens(cell.task),
                                                    [&](double read) { progress(done + read); });
      cell.samples.push_back(
          {made.expected, answer, made.prompt.size(), llm::eval::ruler_score(answer, made.expected)});
      done += static_cast<double>(cell.length);
    }
  }
}

const Cell& cell_at(const std::vector<Cell>& cells, std::size_t variant, const std::string& task,
                    std::int64_t length) {
  return *std::find_if(cells.begin(), cells.end(), [&](const Cell& cell) {
    return cell.variant == variant && cell.task == task && cell.length == length;
  });
}

std::string text_table(const Subject& subject, const std::vector<std::string>& tasks,
                       const std::vector<std::int64_t>& lengths, const std::vector<Cell>& cells) {
  std::string text = fmt::format("{:<18}", "task");
  for (const Variant& variant : subject.variants) {
    for (const std::int64_t length : lengths)
      text += fmt::format(" {:>12}", variant.name + " " + size_text(length));
  }
  for (const std::string& task : tasks) {
    text += fmt::format("\n{:<18}", task);
    for (std::size_t w = 0; w < subject.variants.size(); ++w) {
      for (const std::int64_t length : lengths)
        text += fmt::format(" {:>12.1f}", 100 * score_of(cell_at(cells, w, task, length)).mean());
    }
  }
  text += "\n";
  for (std::size_t w = 0; w < subject.variants.size(); ++w) {
    const Score score = score_of(cells, w);
    text += fmt::format("\n{}: mean score {} of {} answers", subject.variants[w].name,
                        share_text(score.mean(), score.interval()), score.tried);
  }
  return text + "\n";
}

void put_score(Json& json, const Score& score) {
  const llm::eval::Interval interval = score.interval();
  json["score"] = score.mean();
  json["low"] = interval.low;
  json["high"] = interval.high;
  json["tried"] = score.tried;
}

Json to_json(Json json, const Subject& subject, const std::vector<Cell>& cells, bool complete) {
  json["complete"] = complete;
  Score all;
  Json by_variant = Json::array(), by_cell = Json::array();
  for (std::size_t w = 0; w < subject.variants.size(); ++w) {
    Json variant{{"attn", subject.variants[w].name}};
    put_score(variant, score_of(cells, w));
    by_variant.push_back(variant);
  }
  for (const Cell& cell : cells) {
    all.add(cell);
    Json object{{"attn", subject.variants[cell.variant].name}, {"task", cell.task}, {"length", cell.length}};
    put_score(object, score_of(cell));
    object["samples"] = Json::array();
    for (const Sample& sample : cell.samples) {
      object["samples"].push_back({{"tokens", sample.tokens},
                                   {"expected", sample.expected},
                                   {"answer", sample.answer},
                                   {"score", sample.score}});
    }
    by_cell.push_back(object);
  }
  json["score"] = all.mean();
  json["by_attn"] = by_variant;
  json["cells"] = by_cell;
  return json;
}

void print_lm_eval(const Json& config, const Subject& subject, const std::vector<Cell>& cells) {
  std::vector<std::pair<std::string, std::vector<Metric>>> by_variant;
  for (std::size_t w = 0; w < subject.variants.size(); ++w) {
    const Score score = score_of(cells, w);
    by_variant.push_back(
        {subject.variants[w].name, {{"score", score.mean(), share_error(score.mean(), score.tried), true}}});
  }
  print_lm_eval("ruler", config, score_of(cells, 0).tried, by_variant);
}

void draw(const std::string& png, const Subject& subject, const std::vector<std::string>& tasks,
          const std::vector<std::int64_t>& lengths, const std::vector<Cell>& cells) {
  std::vector<Heatmap> maps;
  for (std::size_t w = 0; w < subject.variants.size(); ++w) {
    Heatmap map{
        fmt::format("{}: {:.1f}", subject.variants[w].name, 100 * score_of(cells, w).mean()), tasks, {}, {}};
    for (const std::int64_t length : lengths) map.columns.push_back(size_text(length));
    for (const std::string& task : tasks) {
      std::vector<std::optional<double>>& row = map.values.emplace_back();
      for (const std::int64_t length : lengths) {
        const Score score = score_of(cell_at(cells, w, task, length));
        row.push_back(score.tried > 0 ? std::optional(score.mean()) : std::nullopt);
      }
    }
    maps.push_back(std::move(map));
  }
  draw_heatmaps(png, "RULER: expected strings found, %", maps, "task", "tokens");
}

int ruler(const FlagTable& table, RulerFlags& flags) {
  check_distinct("--tasks", flags.tasks);
  const Subject subject = open_subject(table, flags);
  sort_lengths(flags.lengths, subject);
  flags.chat = llm::eval::asks_by_chat(subject.tokenizer, !flags.chat);
  const llm::eval::Haystack haystack = llm::eval::Haystack::open(flags.data, flags.seed);
  std::fprintf(stderr, "haystack: %s\n", haystack.source().c_str());
  const RulerMaker maker(haystack, subject.tokenizer, flags.chat, flags.seed);
  std::vector<Cell> cells;
  for (const std::string& task : flags.tasks) {
    for (const std::int64_t length : flags.lengths) {
      maker.make(task, length, 0);  // what cannot be made is told before the weights are read
      for (std::size_t w = 0; w < subject.variants.size(); ++w) cells.push_back({w, task, length, {}});
    }
  }
  const llm::Model model = load_model(subject, flags, flags.lengths.back());
  note_interrupts();
  bool complete = true;
  try {
    answer_all(subject, model, maker, flags.samples, cells);
  } catch (const Interrupted&) {
    complete = false;
  }
  Json head = json_head("ruler", table, flags, subject);
  head["haystack"] = haystack.source();
  head.update(table.json("Tasks"));
  if (flags.format == ReportFormat::json) {
    print_json(to_json(std::move(head), subject, cells, complete));
  } else if (flags.format == ReportFormat::lm_eval) {
    print_lm_eval(head, subject, cells);
  } else {
    print(text_table(subject, flags.tasks, flags.lengths, cells));
  }
  if (flags.png) draw(*flags.png, subject, flags.tasks, flags.lengths, cells);
  return complete ? 0 : kInterruptedCode;
}

}  // namespace

CLI::App* add_eval_ruler(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("ruler", "RULER's tasks that need no outside corpus");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<RulerFlags>();
  add_flags(*table, *flags);

  table->group("Tasks");
  add_haystack_flags(*table, *flags, flags->lengths, flags->chat);
  table->choice("--tasks", flags->tasks, words_of(flags->tasks), "Tasks of RULER").default_text("all");
  table->number("--samples", flags->samples, {1, 100000}, "Prompts of each task and length");
  add_attention_flags(*table, *flags, /*decodes=*/true);
  command->footer(
      "Example: two tasks at two lengths\n"
      "  moba eval ruler -m model --tasks niah_single_2,vt --lengths 4k,8k --samples 20 --png ruler.png\n");
  command->callback([=, &action] { action = [=] { return ruler(*table, *flags); }; });
  return command;
}

}  // namespace moba::app
