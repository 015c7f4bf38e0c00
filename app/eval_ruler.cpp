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
using Json = nlohmann::ordered_json;

struct RulerFlags {
  EvalFlags common;
  std::vector<std::string> tasks = llm::eval::ruler_tasks(), lengths{"4k"};
  std::int64_t samples = 10;
  bool no_chat = false;
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

std::string table(const Subject& subject, const std::vector<std::string>& tasks,
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

Json to_json(const RulerFlags& flags, const Subject& subject, bool chat, const std::string& haystack,
             const std::vector<Cell>& cells, bool complete) {
  Json json = json_head("ruler", flags.common, subject);
  json["haystack"] = haystack;
  json["chat"] = chat;
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

int ruler(const RulerFlags& flags) {
  const std::int64_t samples = in_range("--samples", flags.samples, 1, 100000);
  for (auto task = flags.tasks.begin(); task != flags.tasks.end(); ++task) {
    llm::eval::ruler_answer_tokens(*task);  // throws where there is no such task
    if (std::find(flags.tasks.begin(), task, *task) != task)
      throw llm::UsageError(fmt::format("--tasks: expected each once, got {} again", *task));
  }
  const Subject subject = open_subject(flags.common);
  const std::vector<std::int64_t> lengths = lengths_from(flags.lengths, subject);
  const bool chat = llm::eval::asks_by_chat(subject.tokenizer, flags.no_chat);
  const llm::eval::Haystack haystack = llm::eval::Haystack::open(paths_of(flags.common), flags.common.seed);
  std::fprintf(stderr, "haystack: %s\n", haystack.source().c_str());
  const RulerMaker maker(haystack, subject.tokenizer, chat, flags.common.seed);
  std::vector<Cell> cells;
  for (const std::string& task : flags.tasks) {
    for (const std::int64_t length : lengths) {
      maker.make(task, length, 0);  // what cannot be made is told before the weights are read
      for (std::size_t w = 0; w < subject.variants.size(); ++w) cells.push_back({w, task, length, {}});
    }
  }
  const llm::Model model = load_model(subject, flags.common);
  note_interrupts();
  bool complete = true;
  try {
    answer_all(subject, model, maker, samples, cells);
  } catch (const Interrupted&) {
    complete = false;
  }
  if (flags.common.json) {
    print_json(to_json(flags, subject, chat, haystack.source(), cells, complete));
  } else {
    print(table(subject, flags.tasks, lengths, cells));
  }
  if (flags.common.png) draw(*flags.common.png, subject, flags.tasks, lengths, cells);
  return complete ? 0 : kInterruptedCode;
}

}  // namespace

CLI::App* add_eval_ruler(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("ruler", "RULER's tasks that need no outside corpus");
  const auto flags = std::make_shared<RulerFlags>();
  add_flags(*command, flags->common,
            "Text to hide in: files and folders [the sources of Python's standard library]");
  command->add_option("--tasks", flags->tasks, "Which of them")->delimiter(',')->capture_default_str();
  command->add_option("--lengths", flags->lengths, "Tokens of prompt and answer; 8k is 8192")
      ->delimiter(',')
      ->capture_default_str();
  add_number(*command, "--samples", flags->samples, "Prompts of every task and length")
      ->capture_default_str();
  command->add_flag("--no-chat", flags->no_chat, "Give the model the bare text, without chat turns");
  add_answer_flags(*command, flags->common.session);
  add_block_flags(*command, flags->common.session);
  command->footer(
      "Example: two tasks at two lengths\n"
      "  moba eval ruler -m model --tasks niah_single_2,vt --lengths 4k,8k --samples 20 --png ruler.png\n");
  command->callback([flags, &action] { action = [flags] { return ruler(*flags); }; });
  return command;
}

}  // namespace moba::app
