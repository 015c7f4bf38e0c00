#include "llm/tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "llm/tokenizer/normalizer.h"

namespace moba::llm {
namespace {

struct Part {
  Span span;
  bool is_match;
};

/// Returns the matches and the text between them, covering `size` bytes.
std::vector<Part> parts_of(const std::vector<Span>& matches, std::size_t size, bool invert) {
  std::vector<Part> parts;
  std::size_t end = 0;
  for (const Span& match : matches) {
    if (match.begin > end) parts.push_back({{end, match.begin}, invert});
    parts.push_back({match, !invert});
    end = match.end;
  }
  if (end < size) parts.push_back({{end, size}, invert});
  return parts;
}

std::vector<Part> joined(const std::vector<Part>& parts, SplitBehavior behavior) {
  std::vector<Part> out;
  for (const Part& part : parts) {
    bool join = false;
    if (!out.empty()) {
      const Part& last = out.back();
      switch (behavior) {
        case SplitBehavior::kMergedWithPrevious:
          join = part.is_match && !last.is_match;
          break;
        case SplitBehavior::kMergedWithNext:
          join = last.is_match && !part.is_match;
          break;
        case SplitBehavior::kContiguous:
          join = last.is_match == part.is_match;
          break;
        case SplitBehavior::kIsolated:
        case SplitBehavior::kRemoved:
          break;
      }
    }
    if (join) {
      out.back().span.end = part.span.end;
      // A match that is joined to one neighbour is not joined to the other.
      out.back().is_match = part.is_match;
    } else {
      out.push_back(part);
    }
  }
  return out;
}

void apply(Pieces& pieces, const Split& step, bool) {
  const std::string subject = class_stand_in(pieces.text);
  std::vector<Span> spans;
  for (const Span& piece : pieces.spans) {
    const auto matches = step.pattern.find_all(piece.of(subject));
    for (const Part& part : joined(parts_of(matches, piece.size(), step.invert), step.behavior)) {
      const bool removed = step.behavior == SplitBehavior::kRemoved && part.is_match;
      if (!removed && !part.span.empty()) {
        spans.push_back({piece.begin + part.span.begin, piece.begin + part.span.end});
      }
    }
  }
  pieces.spans = std::move(spans);
}

/// Rewrites every word.
template <class Rewrite>
void rewrite(Pieces& pieces, const Rewrite& rewritten) {
  Pieces out;
  for (const Span& piece : pieces.spans) {
    const std::size_t begin = out.text.size();
    out.text += rewritten(piece.of(pieces.text), piece.begin == 0);
    out.spans.push_back({begin, out.text.size()});
  }
  pieces = std::move(out);
}

void apply(Pieces& pieces, const AddPrefixSpace&, bool) {
  rewrite(pieces, [](std::string_view piece, bool) {
    const std::size_t size = utf8_size(piece);
    const bool has_space = size > 0 && is_space(utf8_decode(piece.substr(0, size)));
    std::string spaced(has_space ? 0 : 1, ' ');
    spaced += piece;
    return spaced;
  });
}

void apply(Pieces& pieces, const Metaspace& step, bool at_start) {
  rewrite(pieces, [&](std::string_view piece, bool first) {
    std::string marked = replace_all(piece, " ", step.mark);
    const bool wanted = step.prepend == Metaspace::Prepend::kAlways ||
                        (step.prepend == Metaspace::Prepend::kFirst && first && at_start);
    return wanted && !marked.starts_with(step.mark) ? step.mark + marked : marked;
  });
}

}  // namespace

Pieces pre_tokenize(std::string text, bool at_start, const PreTokenizer& steps) {
  const std::size_t size = text.size();
  Pieces pieces{std::move(text), {}};
  if (size > 0) pieces.spans.push_back({0, size});
  for (const auto& step : steps) {
    std::visit([&](const auto& s) { apply(pieces, s, at_start); }, step);
  }
  return pieces;
}

}  // namespace moba::llm
