#include "llm/tokenizer/sentencepiece.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "llm/error.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/quoted.h"

namespace moba::llm {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581

/// The distinct scores, best first: a piece's rank is the index of its score here.
std::vector<float> distinct_scores(const std::vector<ScoredPiece>& pieces, const std::string& where) {
  std::vector<float> scores;
  for (const ScoredPiece& piece : pieces) {
    if (std::isnan(piece.score)) {
      throw DataError(fmt::format("{}: expected a number as every score, got NaN for {}", where,
                                  llm::quoted(piece.text)));
    }
    scores.push_back(piece.score);
  }
  std::sort(scores.begin(), scores.end(), std::greater<>());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  return scores;
}

/// Returns the bytes of a piece.
std::string piece_bytes(const ScoredPiece& piece, const std::string& where) {
  if (piece.kind != PieceKind::kByte) {
    return piece.kind == PieceKind::kControl ? piece.text : replace_all(piece.text, kSpaceMark, " ");
  }
  const auto byte = byte_of_token(piece.text);
  if (!byte)
    throw DataError(
        fmt::format("{}: expected byte pieces like <0x0A>, got {}", where, llm::quoted(piece.text)));
  return std::string(1, static_cast<char>(*byte));
}

bool can_merge(PieceKind kind) {
  return kind == PieceKind::kNormal || kind == PieceKind::kUserDefined;
}

void add_to_model(const ScoredPiece& piece, std::int32_t id, const std::vector<float>& scores,
                  SentencePieceBpe& model) {
  if (piece.kind == PieceKind::kByte) {
    model.byte_tokens[*byte_of_token(piece.text)] = id;
  } else if (piece.kind == PieceKind::kUnknown) {
    model.unknown = id;
  } else if (can_merge(piece.kind)) {
    const auto place = std::lower_bound(scores.begin(), scores.end(), piece.score, std::greater<>());
    model.pieces[piece.text] = {static_cast<std::int32_t>(place - scores.begin()), id};
    model.longest_piece = std::max(model.longest_piece, piece.text.size());
  }
}

void find_in_texts(const ScoredPiece& piece, std::int32_t id, TokenizerData& data) {
  AddedToken token;
  token.id = id;
  token.text = piece.text;
  if (piece.kind == PieceKind::kUserDefined) {
    data.added_normalized.add(replace_all(piece.text, " ", kSpaceMark), token);
  } else if (piece.kind == PieceKind::kControl || piece.kind == PieceKind::kUnknown) {
    token.special = true;
    add_found_token(data, token);
  }
}

/// Reads the fields of one protobuf message in turn.
class ProtobufFields {
 public:
  ProtobufFields(std::string_view message, const std::string& where) : rest_(message), where_(where) {}

  std::uint64_t number = 0;  // of the current field
  std::uint64_t varint = 0;  // its value, if it is a number
  std::string_view bytes;    // or, if it is a text, a message or a float

  bool next() {
    if (rest_.empty()) return false;
    const std::uint64_t tag = read_varint();
    number = tag >> 3;
    varint = 0;
    bytes = {};
    switch (tag & 7) {
      case 0:
        varint = read_varint();
        break;
      case 1:
        bytes = read_bytes(8);
        break;
      case 2:
        bytes = read_bytes(read_varint());
        break;
      case 5:
        bytes = read_bytes(4);
        break;
      default:
        fail(fmt::format("a field of wire type {}", tag & 7));
    }
    return true;
  }

  float real() const {
    if (bytes.size() != sizeof(float)) fail(fmt::format("a number of {} bytes for a score", bytes.size()));
    float value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& found) const {
    throw DataError(fmt::format("{}: expected a SentencePiece model (protobuf), got {}", where_, found));
  }

  std::uint64_t read_varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(read_bytes(1).front());
      value |= std::uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    fail("a number of more than 64 bits");
  }

  std::string_view read_bytes(std::uint64_t size) {
    if (size > rest_.size()) fail(fmt::format("a field of {} bytes where {} are left", size, rest_.size()));
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  std::string_view rest_;
  const std::string& where_;
};

/// The settings of a model file that affect encoding, besides its pieces. The defaults are the format's.
struct ModelSettings {
  std::uint64_t model_type = 1;
  std::int64_t bos = 1;
  std::int64_t eos = 2;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
  bool whitespace_as_suffix = false;
  bool has_character_map = false;
};

ScoredPiece read_piece(std::string_view message, const std::string& where) {
  ScoredPiece piece;
  ProtobufFields fields(message, where);
  while (fields.next()) {
    switch (fields.number) {
      case 1:
        piece.text = fields.bytes;
        break;
      case 2:
        piece.score = fields.real();
        break;
      case 3:
        piece.kind = piece_kind(static_cast<std::int64_t>(fields.varint), where);
        break;
      default:
        break;
    }
  }
  if (piece.text.empty())
    throw DataError(fmt::format("{}: expected a text for every piece, got none", where));
  return piece;
}

void read_trainer(std::string_view message, const std::string& where, ModelSettings& settings) {
  ProtobufFields fields(message, where);
  while (fields.next()) {
    switch (fields.number) {
      case 3:
        settings.model_type = fields.varint;
        break;
      case 24:
        settings.whitespace_as_suffix = fields.varint != 0;
        break;
      case 41:
        settings.bos = static_cast<std::int32_t>(fields.varint);
        break;
      case 42:
        settings.eos = static_cast<std::int32_t>(fields.varint);
        break;
      default:
        break;
    }
  }
}

void read_normalizer(std::string_view message, const std::string& where, ModelSettings& settings) {
  ProtobufFields fields(message, where);
  while (fields.next()) {
    switch (fields.number) {
      case 2:
        settings.has_character_map = !fields.bytes.empty();
        break;
      case 3:
        settings.add_dummy_prefix = fields.varint != 0;
        break;
      case 4:
        settings.remove_extra_whitespaces = fields.varint != 0;
        break;
      case 5:
        settings.escape_whitespaces = fields.varint != 0;
        break;
      default:
        break;
    }
  }
}

void check(const ModelSettings& settings, const std::string& where) {
  const auto require = [&](bool holds, const std::string& expected, const std::string& found) {
    if (!holds) throw DataError(fmt::format("{}: expected {}, got {}", where, expected, found));
  };
  constexpr std::uint64_t kBpe = 2;
  require(settings.model_type == kBpe, "a model of type BPE (2)",
          fmt::format("type {}", settings.model_type));
  require(!settings.has_character_map, "identity normalisation", "a character map");
  require(!settings.remove_extra_whitespaces, "remove_extra_whitespaces off", "it on");
  require(settings.escape_whitespaces, "escape_whitespaces on", "it off");
  require(!settings.whitespace_as_suffix, "treat_whitespace_as_suffix off", "it on");
}

}  // namespace

PieceKind piece_kind(std::int64_t number, const std::string& where) {
  if (number < 1 || number > 6) {
    throw DataError(fmt::format("{}: expected token types from 1 to 6, got {}", where, number));
  }
  return static_cast<PieceKind>(number);
}

TokenizerData sentencepiece_tokenizer(const std::vector<ScoredPiece>& pieces, bool add_space_prefix,
                                      const std::string& where) {
  TokenizerData data;
  SentencePieceBpe model;
  const std::vector<float> scores = distinct_scores(pieces, where);
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const ScoredPiece& piece = pieces[i];
    const bool special = piece.kind == PieceKind::kControl || piece.kind == PieceKind::kUnknown;
    const auto id = static_cast<std::int32_t>(i);
    place_token(data, id,
                {piece.text, piece_bytes(piece, where), special ? Token::Kind::kSpecial : Token::Kind::kText},
                pieces.size(), where);
    add_to_model(piece, id, scores, model);
    find_in_texts(piece, id, data);
  }
  if (add_space_prefix) data.normalizer.emplace_back(Prepend{std::string(kSpaceMark)});
  data.normalizer.emplace_back(Replace{" ", std::string(kSpaceMark)});
  data.strip_leading_space = add_space_prefix;
  data.model = std::move(model);
  return data;
}

TokenizerData read_tokenizer_model(const std::filesystem::path& file) {
  constexpr std::size_t kLargestFile = std::size_t{1} << 25;
  const MappedFile mapped(file);
  const std::string& where = mapped.name();
  if (mapped.bytes().size() > kLargestFile) {
    throw DataError(fmt::format("{}: expected a SentencePiece model of at most {} bytes, got {}", where,
                                kLargestFile, mapped.bytes().size()));
  }
  const std::string_view message(reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size());
  std::vector<ScoredPiece> pieces;
  ModelSettings settings;
  ProtobufFields fields(message, where);
  while (fields.next()) {
    switch (fields.number) {
      case 1:
        pieces.push_back(read_piece(fields.bytes, where));
        break;
      case 2:
        read_trainer(fields.bytes, where, settings);
        break;
      case 3:
        read_normalizer(fields.bytes, where, settings);
        break;
      default:
        break;
    }
  }
  if (pieces.empty())
    throw DataError(fmt::format("{}: expected a SentencePiece model, got no pieces", where));
  check(settings, where);
  TokenizerData data = sentencepiece_tokenizer(pieces, settings.add_dummy_prefix, where);
  if (settings.bos >= 0 && settings.bos < static_cast<std::int64_t>(data.tokens.size())) {
    data.bos = static_cast<std::int32_t>(settings.bos);
    data.before = {data.bos};
  }
  add_end_token(data, settings.eos);
  return data;
}

}  // namespace moba::llm
