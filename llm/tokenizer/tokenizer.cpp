#include "llm/tokenizer/tokenizer.h"

#include <algorithm>
#include <iterator>

#include "llm/tokenizer/tokenizer_data.h"

namespace moba::llm {

struct Tokenizer::Impl {
  TokenizerData data;

  bool has(std::int32_t id) const { return id >= 0 && static_cast<std::size_t>(id) < data.tokens.size(); }

  /// Encodes a text without added tokens. `at_start`: it is the beginning of the input.
  void encode_plain(std::string_view text, bool at_start, std::vector<std::int32_t>& ids) const {
    const Pieces pieces = pre_tokenize(std::string(text), at_start, data.pre_tokenizer);
    std::visit(
        [&](const auto& model) {
          for (const Span& span : pieces.spans) model.encode(span.of(pieces.text), ids);
        },
        data.model);
  }

  /// Encodes a segment of `text`; `parse_special`: normalised special tokens in it are parsed.
  std::vector<std::int32_t> encode(std::string_view text, const Segment& segment, bool parse_special) const {
    if (segment.id >= 0) return {segment.id};
    std::vector<std::int32_t> ids;
    const std::string normalized = normalize(segment.span.of(text), data.normalizer);
    const auto allows = [parse_special](Span) { return parse_special; };
    for (const Segment& inner : data.added_normalized.split(normalized, allows)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
      } else {
        encode_plain(inner.span.of(normalized), segment.span.begin == 0 && inner.span.begin == 0, ids);
      }
    }
    return ids;
  }

  /// Returns the number of tokens of a segment, encoded as `ids`, that end before `cut` inside it: those
  /// whose bytes the tokens of the text before it have, too, if perhaps in other tokens. A special token
  /// counts where it begins.
  std::size_t tokens_before(std::size_t cut, std::string_view text, const Segment& segment,
                            bool parse_special, const std::vector<std::int32_t>& ids) const {
    if (segment.id >= 0) return 1;
    const auto bytes = [&](std::int32_t id) {
      return data.tokens[static_cast<std::size_t>(id)].bytes.size();
    };
    std::size_t left = 0, count = 0;
    for (const std::int32_t id : encode(text, {{segment.span.begin, cut}, -1}, parse_special))
      left += bytes(id);
    for (; count < ids.size() && bytes(ids[count]) <= left; ++count) left -= bytes(ids[count]);
    return count;
  }

  /// `may_be_special`: the parts of `text` that may spell special tokens, in order. If `cuts` is not null,
  /// its ascending offsets into `text` become the numbers of tokens before them.
  std::vector<std::int32_t> encode(std::string_view text, const std::vector<Span>& may_be_special,
                                   std::vector<std::size_t>* cuts = nullptr) const {
    const auto allows = [&](Span span) {
      const auto after = std::upper_bound(may_be_special.begin(), may_be_special.end(), span.begin,
                                          [](std::size_t at, const Span& part) { return at < part.begin; });
      return after != may_be_special.begin() && span.end <= std::prev(after)->end;
    };
    std::vector<std::int32_t> ids;
    std::size_t passed = 0;  // of the cuts
    for (const Segment& segment : data.added.split(text, allows)) {
      const bool may = allows(segment.span);
      const std::vector<std::int32_t> of_segment = encode(text, segment, may);
      for (; cuts != nullptr && passed < cuts->size() && (*cuts)[passed] < segment.span.end; ++passed) {
        std::size_t& cut = (*cuts)[passed];
        const bool inside = cut > segment.span.begin;
        cut = ids.size() + (inside ? tokens_before(cut, text, segment, may, of_segment) : 0);
      }
      ids.insert(ids.end(), of_segment.begin(), of_segment.end());
    }
    for (; cuts != nullptr && passed < cuts->size(); ++passed) (*cuts)[passed] = ids.size();
    return ids;
  }
};

Tokenizer Tokenizer::open(const std::filesystem::path& model) {
  const bool is_folder = std::filesystem::is_directory(model);
  return Tokenizer(
      std::make_shared<Impl>(Impl{is_folder ? read_huggingface_folder(model) : read_tokenizer_gguf(model)}));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special,
                                            bool parse_special) const {
  const std::vector<Span> all{{0, text.size()}};
  std::vector<std::int32_t> ids = impl_->encode(text, parse_special ? all : std::vector<Span>{});
  if (add_special) {
    const TokenizerData& data = impl_->data;
    ids.insert(ids.begin(), data.before.begin(), data.before.end());
    ids.insert(ids.end(), data.after.begin(), data.after.end());
  }
  return ids;
}

std::vector<std::int32_t> Tokenizer::encode(const std::vector<TextPart>& parts,
                                            std::vector<std::size_t>* begins) const {
  std::string text;
  std::vector<Span> may_be_special;
  if (begins != nullptr) begins->clear();
  for (const TextPart& part : parts) {
    const std::size_t begin = text.size();
    if (begins != nullptr) begins->push_back(begin);
    text += part.text;
    if (part.parse_special) may_be_special.push_back({begin, text.size()});
  }
  return impl_->encode(text, may_be_special, begins);
}

std::string Tokenizer::piece(std::int32_t id, bool show_special) const {
  if (!impl_->has(id)) return {};
  const Token& token = impl_->data.tokens[static_cast<std::size_t>(id)];
  return token.kind != Token::Kind::kSpecial || show_special ? token.bytes : std::string();
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& ids, bool show_special) const {
  std::string text;
  for (const std::int32_t id : ids) text += piece(id, show_special);
  if (impl_->data.strip_leading_space && text.starts_with(' ')) text.erase(0, 1);
  return text;
}

std::int64_t Tokenizer::vocab_size() const {
  return static_cast<std::int64_t>(impl_->data.tokens.size());
}
std::int32_t Tokenizer::bos() const {
  return impl_->data.bos;
}
const std::vector<std::int32_t>& Tokenizer::end_tokens() const {
  return impl_->data.end_tokens;
}

std::int32_t Tokenizer::id_of(std::string_view token) const {
  const auto it = impl_->data.ids.find(token);
  return it == impl_->data.ids.end() ? -1 : it->second;
}

const std::string& Tokenizer::chat_template() const {
  return impl_->data.chat_template;
}

}  // namespace moba::llm
