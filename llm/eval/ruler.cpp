#include "llm/eval/ruler.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <functional>
#include <numbers>
#include <optional>
#include <set>

#include "llm/error.h"
#include "llm/eval/needle.h"
#include "llm/eval/prompt.h"
#include "llm/eval/words.h"
#include "llm/session/text_stream.h"

namespace moba::llm::eval {
namespace {

using Texts = std::vector<std::string>;

constexpr const char* kNoise =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// The parts of a prompt, and the random numbers of this case, which start anew for every size tried.
struct Source {
  Random random;
  std::int64_t length;  // of prompt and answer, in tokens
  std::string text;     // from the haystack, of the requested size
  const Texts& words;   // from the haystack
};

struct Draft {
  Prompt prompt;
  Texts expected;
};

std::string joined(const Texts& texts, const char* between) {
  return fmt::format("{}", fmt::join(texts, between));
}

// ---- needles

enum class Filler : std::uint8_t { noise, text, needles };

struct Niah {
  Filler filler = Filler::text;
  bool uuid_keys = false, uuid_values = false;
  int keys = 1, values = 1, queries = 1;
};

std::string random_uuid(Random& random) {
  std::string text;
  for (int i = 0; i < 36; ++i) {
    const bool is_dash = i == 8 || i == 13 || i == 18 || i == 23;
    const std::int64_t digit = i == 14 ? 4 : i == 19 ? 8 + random.below(4) : random.below(16);  // version 4
    text += is_dash ? '-' : "0123456789abcdef"[digit];
  }
  return text;
}

std::string niah_needle(const Niah& task, const std::string& key, const std::string& value) {
  return fmt::format("One of the special magic {} for {} is: {}.", task.uuid_values ? "uuids" : "numbers",
                     key, value);
}

/// Plants needles among `units` lines of filler, or in the draft's text.
std::string niah_context(const Niah& task, const Texts& needles, Source& source, std::int64_t units,
                         const std::function<std::string()>& other_needle) {
  if (task.filler == Filler::text) {
    std::vector<double> depths(40);  // as many as RULER has, from 0 to 1
    for (std::size_t i = 0; i < depths.size(); ++i) depths[i] = static_cast<double>(i) / 39;
    source.random.shuffle(depths);
    depths.resize(needles.size());
    std::sort(depths.rbegin(), depths.rend());  // from the back, so that planting moves no later place
    std::string text = source.text;
    for (std::size_t i = 0; i < needles.size(); ++i) text = planted(text, needles[i], depths[i]);
    return text;
  }
  Texts lines;
  for (std::int64_t i = 0; i < units; ++i)
    lines.push_back(task.filler == Filler::noise ? std::string(kNoise) : other_needle());
  for (const std::string& needle : needles) {
    const std::int64_t at = source.random.below(static_cast<std::int64_t>(lines.size()) + 1);
    lines.insert(lines.begin() + at, needle);
  }
  return joined(lines, "\n");
}

Draft niah(const Niah& task, Source source, std::int64_t units) {
  std::set<std::string> used;
  const auto new_key = [&] {
    std::string key;
    do {
      key = task.uuid_keys ? random_uuid(source.random) : random_name(source.random);
    } while (!used.insert(key).second);
    return key;
  };
  const auto new_value = [&] {
    return task.uuid_values ? random_uuid(source.random) : source.random.number(7);
  };

  Texts needles, queries, expected;
  for (int k = 0; k < task.keys; ++k) {
    const std::string key = new_key();
    const bool is_asked = k < task.queries;  // needles are shuffled, so their order gives nothing away
    if (is_asked) queries.push_back(key);
    for (int v = 0; v < task.values; ++v) {
      const std::string value = new_value();
      needles.push_back(niah_needle(task, key, value));
      if (is_asked) expected.push_back(value);
    }
  }
  source.random.shuffle(needles);
  const std::string context = niah_context(task, needles, source, units, [&] {
    const std::string key = new_key();
    return niah_needle(task, key, new_value());
  });
  std::string query = queries.front();
  if (queries.size() > 1) {
    const std::string last = queries.back();
    queries.pop_back();
    query = joined(queries, ", ") + ", and " + last;
  }
  const bool one = expected.size() == 1;
  const std::string what = fmt::format("{}{}", task.uuid_values ? "uuid" : "number", one ? "" : "s");
  return {{fmt::format(
               "{} special magic {} {} hidden within the following text. Make sure to memorize it. I will "
               "quiz you about the {} afterwards.\n{}\n{} the special magic {} for {} mentioned in the "
               "provided text?",
               one ? "A" : "Some", what, one ? "is" : "are", what, context, one ? "What is" : "What are all",
               what, query),
           fmt::format(" The special magic {} for {} mentioned in the provided text {}", what, query,
                       one ? "is" : "are")},
          expected};
}

// ---- variable tracking

Draft chain(Random& random, std::int64_t lines, int letters) {
  constexpr int kHops = 4;
  std::set<std::string> used;
  Texts names;
  while (names.size() < kHops + 1) {
    std::string name;
    for (int i = 0; i < letters; ++i) name += static_cast<char>('A' + random.below(26));
    if (used.insert(name).second) names.push_back(name);
  }
  const std::string value = random.number(5);
  std::vector<std::int64_t> places;  // of the assignments: in their order, each before a line of noise
  for (int i = 0; i <= kHops; ++i) places.push_back(random.below(lines + 1));
  std::sort(places.begin(), places.end());

  std::string context;
  std::size_t next = 0;
  for (std::int64_t line = 0; line <= lines; ++line) {
    for (; next < places.size() && places[next] == line; ++next) {
      context += next == 0 ? fmt::format("VAR {} = {} ", names[0], value)
                           : fmt::format("VAR {} = VAR {} ", names[next], names[next - 1]);
    }
    if (line < lines) context += fmt::format("{}\n", kNoise);
  }
  return {
      {fmt::format(
           "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}\n"
           "Question: Find all variables that are assigned the value {} in the text above.",
           context, value),
       fmt::format(
           " Answer: According to the chain(s) of variable assignment in the text above, {} variables are "
           "assigned the value {}, they are: ",
           kHops + 1, value)},
      names};
}

/// Adds a worked example, then the question.
Draft after_example(const Draft& example, const std::string& answer, Draft draft) {
  draft.prompt.text = example.prompt.text + example.prompt.answer_start + answer + "\n\n" + draft.prompt.text;
  return draft;
}

Draft variable_tracking(Source source, std::int64_t lines) {
  const Draft example = chain(source.random, 8, 3);
  return after_example(example, joined(example.expected, " "), chain(source.random, lines, 5));
}

// ---- words

struct Frequencies {
  int common, uncommon;
};

/// Returns a numbered list in which ten words are more frequent than the `others`.
Draft word_list(Source& source, std::int64_t others, const Frequencies& times) {
  constexpr std::int64_t kCommon = 10;
  const auto needed = static_cast<std::size_t>(kCommon + others);
  if (needed > source.words.size()) {
    throw DataError(fmt::format("cwe: expected {} different words in the text of --data, got {}", needed,
                                source.words.size()));
  }
  std::set<std::string> used;
  Texts words, list;
  while (words.size() < needed) {
    const std::string& word = source.random.one_of(source.words);
    if (used.insert(word).second) words.push_back(word);
  }
  for (std::size_t w = 0; w < words.size(); ++w)
    list.insert(list.end(), static_cast<std::size_t>(w < kCommon ? times.common : times.uncommon), words[w]);
  source.random.shuffle(list);
  for (std::size_t i = 0; i < list.size(); ++i) list[i] = fmt::format("{}. {}", i + 1, list[i]);
  words.resize(kCommon);
  return {
      {fmt::format(
           "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
           "the ones that appear most often.\n{}\nQuestion: What are the 10 most common words in the above "
           "list?",
           joined(list, " ")),
       " Answer: The top 10 words that appear most often in the list are:"},
      words};
}

Draft common_words(Source source, std::int64_t others) {
  const bool is_short = source.length < 4096;
  const Draft example =
      word_list(source, is_short ? 10 : 30, is_short ? Frequencies{3, 1} : Frequencies{10, 3});
  std::string answer;
  for (std::size_t i = 0; i < example.expected.size(); ++i)
    answer += fmt::format(" {}. {}", i + 1, example.expected[i]);
  return after_example(example, answer,
                       word_list(source, others, is_short ? Frequencies{6, 1} : Frequencies{30, 3}));
}

/// Returns words of random letters whose frequencies fall with the square of their rank; the first is dots.
Draft frequent_words(Source source, std::int64_t count) {
  constexpr double kZeta = std::numbers::pi * std::numbers::pi / 6;
  const std::int64_t vocabulary = std::max<std::int64_t>(source.length / 50, 4);
  Texts words{"..."}, list;
  std::set<std::string> used;
  while (static_cast<std::int64_t>(words.size()) < vocabulary) {
    std::string word;
    for (int i = 0; i < 6; ++i) word += static_cast<char>('a' + source.random.below(26));
    if (used.insert(word).second) words.push_back(word);
  }
  for (std::size_t w = 0; w < words.size(); ++w) {
    const double rank = static_cast<double>(w) + 1;
    list.insert(list.end(), static_cast<std::size_t>(static_cast<double>(count) / (kZeta * rank * rank)),
                words[w]);
  }
  source.random.shuffle(list);
  return {
      {fmt::format(
           "Read the following coded text and track the frequency of each coded word. Find the three most "
           "frequently appeared coded words. {}\nQuestion: Do not provide any explanation. Please ignore the "
           "dots '....'. What are the three most frequently appeared words in the above coded text?",
           joined(list, " ")),
       " Answer: According to the coded text above, the three most frequently appeared words are:"},
      {words[1], words[2], words[3]}};
}

// ---- the table of tasks

struct Task {
  const char* name;
  std::int64_t answer_tokens;
  /// True if `units` count tokens of the haystack instead of lines or words.
  bool takes_text;
  std::function<Draft(const Source&, std::int64_t units)> draft;
};

Task niah_task(const char* name, const Niah& niah_settings) {
  return {name, 128, niah_settings.filler == Filler::text,
          [niah_settings](const Source& source, std::int64_t units) {
            return niah(niah_settings, source, units);
          }};
}

const std::vector<Task>& tasks() {
  static const std::vector<Task> all{
      niah_task("niah_single_1", {.filler = Filler::noise}),
      niah_task("niah_single_2", {}),
      niah_task("niah_single_3", {.uuid_values = true}),
      niah_task("niah_multikey_1", {.keys = 4}),
      niah_task("niah_multikey_2", {.filler = Filler::needles}),
      niah_task("niah_multikey_3", {.filler = Filler::needles, .uuid_keys = true, .uuid_values = true}),
      niah_task("niah_multivalue", {.values = 4}),
      niah_task("niah_multiquery", {.keys = 4, .queries = 4}),
      {"vt", 30, false, variable_tracking},
      {"cwe", 120, false, common_words},
      {"fwe", 50, false, frequent_words}};
  return all;
}

std::size_t index_of(const std::string& name) {
  const auto& all = tasks();
  const auto found =
      std::find_if(all.begin(), all.end(), [&](const Task& task) { return name == task.name; });
  if (found == all.end())
    throw UsageError(
        fmt::format("--tasks: expected some of {}, got {}", fmt::join(ruler_tasks(), ","), name));
  return static_cast<std::size_t>(found - all.begin());
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(c < 0x80 ? std::tolower(c) : c); });
  return text;
}

}  // namespace

const std::vector<std::string>& ruler_tasks() {
  static const Texts names = [] {
    Texts all;
    for (const Task& task : tasks()) all.emplace_back(task.name);
    return all;
  }();
  return names;
}

std::int64_t ruler_answer_tokens(const std::string& task) {
  return tasks()[index_of(task)].answer_tokens;
}

RulerCase RulerMaker::make(const std::string& name, std::int64_t length, std::int64_t sample) const {
  const std::size_t index = index_of(name);
  const Task& task = tasks()[index];
  const Random random{seed_, static_cast<std::int64_t>(index), length, sample};
  std::vector<std::int32_t> text;
  if (task.takes_text) {
    Random place{seed_, length, sample};
    text = haystack_.take(tokenizer_, length, place);
  }
  const auto draft_with = [&](std::int64_t units) {
    Source source{random, length, {}, words_};
    if (task.takes_text) {
      const auto end = text.begin() + std::min<std::int64_t>(units, static_cast<std::int64_t>(text.size()));
      source.text = TextStream().push(tokenizer_.decode({text.begin(), end}));
    }
    return task.draft(source, units);
  };
  const std::int64_t units = units_that_fit(length - task.answer_tokens, [&](std::int64_t count) {
    return static_cast<std::int64_t>(tokens_of(draft_with(count).prompt, tokenizer_, chat_).size());
  });
  if (units < 1) {
    throw UsageError(fmt::format("--lengths: expected more tokens for {}, whose answer takes {}, got {}",
                                 name, task.answer_tokens, length));
  }
  Draft draft = draft_with(units);
  return {tokens_of(draft.prompt, tokenizer_, chat_), std::move(draft.expected)};
}

double ruler_score(const std::string& answer, const std::vector<std::string>& expected) {
  const std::string text = lower(answer);
  const auto contained = std::count_if(expected.begin(), expected.end(), [&](const std::string& string) {
    return text.find(lower(string)) != std::string::npos;
  });
  return static_cast<double>(contained) / static_cast<double>(expected.size());
}

}  // namespace moba::llm::eval
