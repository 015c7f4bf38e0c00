#include "llm/tokenizer/tokenizer_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "llm/error.h"
#include "llm/formats/quoted.h"

namespace moba::llm {

void place_token(TokenizerData& data, std::int64_t id, Token token, std::size_t count,
                 const std::string& where) {
  // Vocabularies may have gaps, but none of a million ids.
  const auto limit = static_cast<std::int64_t>(count) + (1 << 20);
  if (id < 0 || id >= limit) {
    throw DataError(fmt::format("{}: expected ids from 0 to {} ({} tokens), got {} for {}", where, limit - 1,
                                count, id, llm::quoted(token.text)));
  }
  const auto index = static_cast<std::size_t>(id);
  if (index >= data.tokens.size()) data.tokens.resize(index + 1);
  Token& place = data.tokens[index];
  if (place.kind != Token::Kind::kNone && place.text != token.text) {
    throw DataError(fmt::format("{}: expected one token for every id, got {} and {} for id {}", where,
                                llm::quoted(place.text), llm::quoted(token.text), id));
  }
  const auto [it, is_new] = data.ids.try_emplace(token.text, static_cast<std::int32_t>(id));
  if (!is_new && it->second != id) {
    throw DataError(fmt::format("{}: expected one id for every token, got {} and {} for {}", where,
                                it->second, id, llm::quoted(token.text)));
  }
  place = std::move(token);
}

void add_found_token(TokenizerData& data, const AddedToken& token) {
  if (token.normalized) {
    data.added_normalized.add(normalize(token.text, data.normalizer), token);
  } else {
    data.added.add(token.text, token);
  }
}

void add_end_token(TokenizerData& data, std::int64_t id) {
  const bool exists = id >= 0 && id < static_cast<std::int64_t>(data.tokens.size());
  const bool known = std::find(data.end_tokens.begin(), data.end_tokens.end(), id) != data.end_tokens.end();
  if (exists && !known) data.end_tokens.push_back(static_cast<std::int32_t>(id));
}

void add_known_end_tokens(TokenizerData& data) {
  constexpr std::array<std::string_view, 5> kEnds{"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
                                                  "<|endoftext|>"};
  for (const std::string_view text : kEnds) {
    const auto it = data.ids.find(text);
    if (it != data.ids.end() &&
        data.tokens[static_cast<std::size_t>(it->second)].kind == Token::Kind::kSpecial) {
      add_end_token(data, it->second);
    }
  }
}

}  // namespace moba::llm
