#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llm/eval/haystack.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// RULER's tasks (arXiv 2404.06654) except qa_1 and qa_2, which need SQuAD and HotpotQA: prompts in the
/// wording of the paper's appendix, tasks as it configures them, with texts and words of this project.
const std::vector<std::string>& ruler_tasks();

struct RulerCase {
  std::vector<std::int32_t> prompt;
  std::vector<std::string> expected;
};

/// Creates prompts. The same seed, task, length and sample give the same prompt.
class RulerMaker {
 public:
  /// `haystack` and `tokenizer` must outlive this object.
  RulerMaker(const Haystack& haystack, const Tokenizer& tokenizer, bool chat, std::int64_t seed)
      : haystack_(haystack), tokenizer_(tokenizer), words_(haystack.words()), chat_(chat), seed_(seed) {}

  /// Returns a prompt that together with its answer has nearly `length` tokens. Throws UsageError for a
  /// length that is too short for the task, DataError if the text is too short.
  RulerCase make(const std::string& task, std::int64_t length, std::int64_t sample) const;

 private:
  const Haystack& haystack_;
  const Tokenizer& tokenizer_;
  std::vector<std::string> words_;
  bool chat_;
  std::int64_t seed_;
};

/// Returns the number of tokens of an answer.
std::int64_t ruler_answer_tokens(const std::string& task);

/// Returns RULER's score of these tasks: the share of the expected strings that the answer contains, without
/// regard to case.
double ruler_score(const std::string& answer, const std::vector<std::string>& expected);

}  // namespace moba::llm::eval
