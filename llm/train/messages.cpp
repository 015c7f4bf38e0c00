#include "llm/train/messages.h"

#include <string>

namespace moba::llm::train {
namespace {

/// Refuses a member that is neither null nor empty.
void refuse(const JsonValue& object, const std::string& member) {
  const auto value = object.find(member);
  if (value && !value->value().empty()) value->fail("none (it is not supported)");
}

std::string content_of(const JsonValue& message) {
  const JsonValue content = message.at("content");
  if (content.value().is_string()) return content.string();
  if (!content.value().is_array()) content.fail("a string or a list of text parts");
  std::string text;
  for (std::size_t i = 0; i < content.array().size(); ++i) {
    const JsonValue part = content.element(i), type = part.at("type");
    if (type.string() != "text") type.fail("'text' (images, audio and files are not supported)");
    text += part.at("text").string();
  }
  return text;
}

bool counts(const JsonValue& message) {
  const auto weight = message.find("weight");
  if (!weight) return true;
  const double value = weight->number();
  if (value != 0 && value != 1) weight->fail("0 or 1");
  return value == 1;
}

}  // namespace

Messages read_messages(const JsonValue& line) {
  for (const char* member : {"tools", "functions"}) refuse(line, member);
  const JsonValue list = line.at("messages");
  if (list.array().empty()) list.fail("at least one message");
  Messages messages;
  for (std::size_t i = 0; i < list.array().size(); ++i) {
    const JsonValue message = list.element(i), role = message.at("role");
    for (const char* member : {"tool_calls", "function_call", "reasoning_content", "thinking"})
      refuse(message, member);
    const std::string& name = role.string();
    if (name != "system" && name != "user" && name != "assistant") {
      role.fail("'system', 'user' or 'assistant'");
    }
    messages.turns.push_back({name, content_of(message)});
    if (name == "assistant") messages.counts.push_back(counts(message));
  }
  return messages;
}

}  // namespace moba::llm::train
