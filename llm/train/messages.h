#pragma once

#include <vector>

#include "llm/formats/json.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::train {

/// A conversation in the format of OpenAI and TRL: {"messages": [{"role": ..., "content": ...}, ...]}.
struct Messages {
  std::vector<Turn> turns;
  /// Whether the loss on completions counts each assistant turn, in order: unless its "weight" is 0.
  std::vector<bool> counts;
};

/// Reads the member "messages" of `line`. A content is a string, or a list of parts of type "text", which are
/// joined. Throws DataError for other roles than system, user and assistant, for other parts, and for members
/// that would change the text: tools, tool calls and reasoning.
Messages read_messages(const JsonValue& line);

}  // namespace moba::llm::train
