#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llm/tokenizer/tokenizer_data.h"

namespace moba::llm {

/// The kinds of pieces, with the numbers of `tokenizer.model` and GGUF's `tokenizer.ggml.token_type`.
enum class PieceKind { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

struct ScoredPiece {
  std::string text;  // spaces written as U+2581
  float score = 0;
  PieceKind kind = PieceKind::kNormal;
};

PieceKind piece_kind(std::int64_t number, const std::string& where);

/// Builds a tokenizer from the pieces of a SentencePiece-BPE model; ids are their indices.
/// `add_space_prefix`: a text begins with a space. `where` names the file, for DataErrors.
TokenizerData sentencepiece_tokenizer(const std::vector<ScoredPiece>& pieces, bool add_space_prefix,
                                      const std::string& where);

}  // namespace moba::llm
