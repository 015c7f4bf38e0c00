#include "llm/tokenizer/normalizer.h"

namespace moba::llm {
namespace {

std::string apply(const std::string& text, UnicodeForm form) {
  return to_unicode_form(text, form);
}
std::string apply(const std::string& text, const Prepend& step) {
  return text.empty() ? text : step.text + text;
}
std::string apply(const std::string& text, const Replace& step) {
  return replace_all(text, step.from, step.to);
}

}  // namespace

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size());
  for (;;) {
    const std::size_t at = text.find(from);
    out += text.substr(0, at);
    if (at == std::string_view::npos) return out;
    out += to;
    text.remove_prefix(at + from.size());
  }
}

std::string normalize(std::string_view text, const Normalizer& steps) {
  std::string out(text);
  for (const auto& step : steps) {
    out = std::visit([&](const auto& s) { return apply(out, s); }, step);
  }
  return out;
}

}  // namespace moba::llm
