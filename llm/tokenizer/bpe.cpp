#include "llm/tokenizer/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "llm/error.h"
#include "llm/tokenizer/utf8.h"

namespace moba::llm {
namespace {

constexpr std::int32_t kNone = -1;

/// A node of the linked list of a word's symbols.
struct Symbol {
  std::int32_t id;  // kNone: a text without a token
  std::int32_t previous;
  std::int32_t next;
  std::int32_t begin;
  std::int32_t size;  // 0: merged into its left neighbour
};

struct Candidate {
  Merge merge;
  std::int32_t left;
  std::int32_t size;  // of both: symbols only grow, so another size means that one was merged

  bool operator<(const Candidate& other) const {  // std::priority_queue returns the greatest
    return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : left > other.left;
  }
};

class Word {
 public:
  void reserve(std::size_t symbols) { symbols_.reserve(symbols); }

  void add(std::int32_t id, std::size_t begin, std::size_t size) {
    const auto index = static_cast<std::int32_t>(symbols_.size());
    if (index > 0) symbols_.back().next = index;
    symbols_.push_back(
        {id, index - 1, kNone, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(size)});
  }

  /// Merges neighbours, the lowest rank first, until `find_merge(left, right)` has no merge for any two.
  template <class FindMerge>
  void merge_all(const FindMerge& find_merge) {
    std::vector<Candidate> found;
    const auto propose = [&](std::int32_t left, const auto& take) {
      if (left == kNone || symbols_[left].next == kNone) return;
      const Symbol& a = symbols_[left];
      const Symbol& b = symbols_[a.next];
      if (const std::optional<Merge> merge = find_merge(a, b)) take(Candidate{*merge, left, a.size + b.size});
    };
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(symbols_.size()); ++i) {
      propose(i, [&](const Candidate& candidate) { found.push_back(candidate); });
    }
    std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(found));
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      Symbol& left = symbols_[best.left];
      if (left.size == 0 || left.next == kNone || left.size + symbols_[left.next].size != best.size) continue;
      join_with_next(best.left, best.merge.id);
      const auto push = [&](const Candidate& candidate) { queue.push(candidate); };
      propose(left.previous, push);
      propose(best.left, push);
    }
  }

  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const Symbol& symbol : symbols_) {
      if (symbol.size > 0) visit(symbol);
    }
  }

 private:
  void join_with_next(std::int32_t index, std::int32_t id) {
    Symbol& left = symbols_[index];
    Symbol& right = symbols_[left.next];
    left.id = id;
    left.size += right.size;
    left.next = right.next;
    right.size = 0;
    if (left.next != kNone) symbols_[left.next].previous = index;
  }

  std::vector<Symbol> symbols_;
};

void check_size(std::string_view word) {
  constexpr auto kMax = static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max());
  if (word.size() > kMax) {
    throw UsageError(
        fmt::format("text: expected words of at most {} bytes, got one of {}", kMax, word.size()));
  }
}

bool all_have_tokens(std::string_view text, const ByteTokens& tokens) {
  return std::all_of(text.begin(), text.end(),
                     [&](char c) { return tokens[static_cast<unsigned char>(c)] != kNone; });
}

/// Returns the symbols that the merges of `model` begin from.
Word first_symbols(const Bpe& model, std::string_view text) {
  Word word;
  word.reserve(text.size());
  Span unknown;  // kept to be fused with its neighbours
  const auto flush = [&] {
    if (!unknown.empty()) word.add(model.unknown, unknown.begin, unknown.size());
    unknown = {};
  };
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t size = model.byte_level ? 1 : character_size(text.substr(at));
    const std::string_view character = text.substr(at, size);
    const auto known = model.byte_level ? model.vocab.end() : model.vocab.find(character);
    if (known != model.vocab.end()) {
      flush();
      word.add(known->second, at, size);
    } else if (all_have_tokens(character, model.byte_tokens)) {
      flush();
      for (std::size_t i = 0; i < size; ++i) {
        word.add(model.byte_tokens[static_cast<unsigned char>(character[i])], at + i, 1);
      }
    } else if (model.unknown != kNone) {
      if (!model.fuse_unknown) flush();
      unknown = {unknown.empty() ? at : unknown.begin, at + size};
    }
    at += size;
  }
  flush();
  return word;
}

constexpr bool stands_for_itself(unsigned char byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct ByteAlphabet {
  std::array<char32_t, 256> characters{};
  std::array<std::int16_t, 0x200> bytes{};  // by character; -1 for none

  constexpr ByteAlphabet() {
    bytes.fill(-1);
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const auto value = static_cast<unsigned char>(byte);
      characters[value] = stands_for_itself(value) ? value : next++;
      bytes[characters[value]] = value;
    }
  }
};

constexpr ByteAlphabet kByteAlphabet;

}  // namespace

std::optional<Merge> MergeTable::find(std::int32_t left, std::int32_t right) const {
  const auto it = merges_.find(key(left, right));
  return it == merges_.end() ? std::nullopt : std::optional(it->second);
}

/// The finaliser of MurmurHash3: ids are small and regular.
std::size_t MergeTable::Mix::operator()(std::uint64_t x) const {
  x = (x ^ x >> 33) * 0xFF51AFD7ED558CCDu;
  x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53u;
  return x ^ x >> 33;
}

void Bpe::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  check_size(text);
  if (ignore_merges) {
    const auto whole = vocab.find(text);
    if (whole != vocab.end()) {
      ids.push_back(whole->second);
      return;
    }
  }
  Word word = first_symbols(*this, text);
  word.merge_all([&](const Symbol& a, const Symbol& b) { return merges.find(a.id, b.id); });
  word.for_each([&](const Symbol& symbol) { ids.push_back(symbol.id); });
}

void SentencePieceBpe::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  check_size(text);
  const auto piece_of = [&](std::int32_t begin, std::int32_t size) -> std::optional<Merge> {
    if (static_cast<std::size_t>(size) > longest_piece) return std::nullopt;
    const auto it = pieces.find(text.substr(begin, size));
    return it == pieces.end() ? std::nullopt : std::optional(Merge{it->second.rank, it->second.id});
  };
  Word word;
  word.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t size = character_size(text.substr(at));
    const auto known = piece_of(static_cast<std::int32_t>(at), static_cast<std::int32_t>(size));
    word.add(known ? known->id : kNone, at, size);
    at += size;
  }
  word.merge_all([&](const Symbol& a, const Symbol& b) { return piece_of(a.begin, a.size + b.size); });
  bool after_unknown = false;  // neighbours without a token share one
  word.for_each([&](const Symbol& symbol) {
    const std::string_view covered = text.substr(symbol.begin, symbol.size);
    const bool is_unknown = symbol.id == kNone;
    if (!is_unknown) {
      ids.push_back(symbol.id);
    } else if (all_have_tokens(covered, byte_tokens)) {
      for (const char c : covered) ids.push_back(byte_tokens[static_cast<unsigned char>(c)]);
    } else if (!after_unknown && unknown != kNone) {
      ids.push_back(unknown);
    }
    after_unknown = is_unknown;
  });
}

char32_t byte_character(unsigned char byte) {
  return kByteAlphabet.characters[byte];
}

std::optional<std::string> bytes_of_characters(std::string_view token) {
  std::string bytes;
  while (!token.empty()) {
    const std::size_t size = utf8_size(token);
    if (size == 0) return std::nullopt;
    const char32_t character = utf8_decode(token.substr(0, size));
    const int byte = character < kByteAlphabet.bytes.size() ? kByteAlphabet.bytes[character] : -1;
    if (byte < 0) return std::nullopt;
    bytes += static_cast<char>(byte);
    token.remove_prefix(size);
  }
  return bytes;
}

std::optional<unsigned char> byte_of_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token.back() != '>') return std::nullopt;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    const bool digit = c >= '0' && c <= '9';
    const bool letter = c >= 'A' && c <= 'F';
    if (!digit && !letter) return std::nullopt;
    value = value * 16 + (digit ? c - '0' : c - 'A' + 10);
  }
  return static_cast<unsigned char>(value);
}

}  // namespace moba::llm
