#include "llm/tokenizer/added_tokens.h"

#include <algorithm>
#include <utility>

namespace moba::llm {
namespace {

std::int64_t edge(std::int32_t node, char byte) {
  return std::int64_t{node} * 256 + static_cast<unsigned char>(byte);
}

/// Returns the bytes of the last character of `text`, 0 for none.
std::size_t last_character_size(std::string_view text) {
  for (std::size_t size = 1; size <= std::min<std::size_t>(4, text.size()); ++size) {
    if (utf8_size(text.substr(text.size() - size)) == size) return size;
  }
  return text.empty() ? 0 : 1;
}

template <class Is>
bool begins_with(std::string_view text, const Is& is) {
  const std::size_t size = utf8_size(text);
  return size > 0 && is(utf8_decode(text.substr(0, size)));
}

template <class Is>
bool ends_with(std::string_view text, const Is& is) {
  return begins_with(text.substr(text.size() - last_character_size(text)), is);
}

std::size_t spaces_begin(std::string_view text) {
  while (ends_with(text, is_space)) text.remove_suffix(last_character_size(text));
  return text.size();
}

std::size_t spaces_end(std::string_view text, std::size_t at) {
  while (begins_with(text.substr(at), is_space)) at += character_size(text.substr(at));
  return at;
}

}  // namespace

void AddedTokens::add(const std::string& key, AddedToken token) {
  if (key.empty()) return;
  std::int32_t node = 0;
  for (const char byte : key) {
    const auto [it, is_new] =
        edges_.try_emplace(edge(node, byte), static_cast<std::int32_t>(token_at_.size()));
    if (is_new) token_at_.push_back(-1);
    node = it->second;
  }
  token_at_[node] = static_cast<std::int32_t>(tokens_.size());
  tokens_.push_back(std::move(token));
}

std::int32_t AddedTokens::child(std::int32_t node, char byte) const {
  const auto it = edges_.find(edge(node, byte));
  return it == edges_.end() ? -1 : it->second;
}

const AddedToken* AddedTokens::longest_at(std::string_view text, std::size_t at, std::size_t& end) const {
  const AddedToken* longest = nullptr;
  std::int32_t node = 0;
  for (std::size_t i = at; i < text.size(); ++i) {
    node = child(node, text[i]);
    if (node < 0) break;
    if (token_at_[node] >= 0) {
      longest = &tokens_[token_at_[node]];
      end = i + 1;
    }
  }
  return longest;
}

std::vector<Segment> AddedTokens::split(std::string_view text,
                                        const std::function<bool(Span)>& allows) const {
  std::vector<Segment> segments;
  std::size_t done = 0;
  std::size_t at = 0;
  while (at < text.size()) {
    std::size_t end = at;
    const AddedToken* token = longest_at(text, at, end);
    if (token == nullptr) {
      ++at;
      continue;
    }
    Span span{std::max(at, done), end};
    at = end;
    if (span.begin >= span.end) continue;  // the previous token includes all of this one
    if (token->special && !allows(span)) continue;
    if (token->single_word &&
        (ends_with(text.substr(0, span.begin), is_word) || begins_with(text.substr(span.end), is_word))) {
      continue;
    }
    if (token->left_strip) span.begin = done + spaces_begin(text.substr(done, span.begin - done));
    if (token->right_strip) span.end = spaces_end(text, span.end);
    if (span.begin > done) segments.push_back({{done, span.begin}, -1});
    segments.push_back({span, token->id});
    done = span.end;
  }
  if (done < text.size()) segments.push_back({{done, text.size()}, -1});
  return segments;
}

}  // namespace moba::llm
