#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/tokenizer/tokenizer.h"

namespace moba::llm {

/// Returns for each piece where it begins in `text`, in bytes, and at the end the size of `text`. The pieces
/// are those of the text, up to what tokenizers change: a space at the begin, another Unicode form, tokens
/// that the text lacks, and characters without a token. Where they differ, the text between two pieces that
/// are found belongs to the first one between.
std::vector<std::size_t> piece_offsets(std::string_view text, std::span<const std::string> pieces);

/// Returns the same for the tokens of a text, special ones as they are written.
std::vector<std::size_t> token_offsets(const Tokenizer& tokenizer, std::string_view text,
                                       std::span<const std::int32_t> tokens);

}  // namespace moba::llm
