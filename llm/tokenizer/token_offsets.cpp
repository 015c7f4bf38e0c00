#include "llm/tokenizer/token_offsets.h"

#include <algorithm>
#include <optional>

namespace moba::llm {
namespace {

/// How far the next match may be, and how long it is.
constexpr std::size_t kMaxPieces = 8, kMaxBytes = 64, kMinMatch = 6;

/// A match of pieces from `piece` on, at `at`.
struct Match {
  std::size_t piece, at;
};

bool match_at(std::string_view text, std::size_t at, std::span<const std::string> pieces, std::size_t piece) {
  for (std::size_t matched = 0; piece < pieces.size() && matched < kMinMatch; ++piece) {
    if (text.substr(at, pieces[piece].size()) != pieces[piece]) return false;
    at += pieces[piece].size();
    matched += pieces[piece].size();
  }
  return true;
}

std::optional<Match> next_match(std::string_view text, std::size_t at, std::span<const std::string> pieces,
                                std::size_t piece) {
  for (std::size_t bytes = 0; bytes <= kMaxBytes && at + bytes < text.size(); ++bytes) {
    for (std::size_t skipped = 0; skipped < kMaxPieces && piece + skipped < pieces.size(); ++skipped)
      if (match_at(text, at + bytes, pieces, piece + skipped)) return Match{piece + skipped, at + bytes};
  }
  return std::nullopt;
}

}  // namespace

std::vector<std::size_t> piece_offsets(std::string_view text, std::span<const std::string> pieces) {
  std::vector<std::size_t> offsets;
  offsets.reserve(pieces.size() + 1);
  std::size_t at = 0;
  while (offsets.size() < pieces.size()) {
    const std::string_view piece = pieces[offsets.size()];
    const std::string_view rest = text.substr(at);
    if (rest.starts_with(piece)) {
      offsets.push_back(at);
      at += piece.size();
    } else if (piece.size() > 1 && piece.front() == ' ' && rest.starts_with(piece.substr(1))) {
      offsets.push_back(at);
      at += piece.size() - 1;
    } else if (const auto match = next_match(text, at, pieces, offsets.size())) {
      if (match->piece > offsets.size()) offsets.push_back(at);
      at = match->at;
      offsets.resize(match->piece, at);
    } else {
      offsets.push_back(at);
    }
  }
  offsets.push_back(text.size());
  return offsets;
}

std::vector<std::size_t> token_offsets(const Tokenizer& tokenizer, std::string_view text,
                                       std::span<const std::int32_t> tokens) {
  std::vector<std::string> pieces;
  pieces.reserve(tokens.size());
  for (const std::int32_t token : tokens) pieces.push_back(tokenizer.piece(token, /*show_special=*/true));
  return piece_offsets(text, pieces);
}

}  // namespace moba::llm
