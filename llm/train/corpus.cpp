#include "llm/train/corpus.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <system_error>
#include <utility>

#include "llm/error.h"
#include "llm/formats/fingerprint.h"
#include "llm/formats/json.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/output_file.h"
#include "llm/formats/text_files.h"
#include "llm/train/messages.h"

namespace moba::llm::train {
namespace {

namespace fs = std::filesystem;

constexpr int kVersion = 2;
constexpr const char* kIndex = "index.json";
/// Approximate bytes of one shard.
constexpr std::int64_t kShardBytes = std::int64_t{1} << 30;
constexpr std::int64_t kLogBytes = std::int64_t{64} << 20;

/// The state of a file when it was tokenised.
nlohmann::json stamp_of(const TextFile& source) {
  return {source.path.string(), fs::file_size(source.path),
          fs::last_write_time(source.path).time_since_epoch().count()};
}

/// The tokens of a document, and the ranges that the loss on completions counts.
struct Encoded {
  std::vector<std::int32_t> ids;
  std::vector<TokenRange> completions;
};

Encoded encode_text(const TextTokens& tokens, const std::string& prompt, const std::string& rest) {
  std::vector<std::int32_t> ids = tokens.encode(prompt.empty() ? rest : prompt, true);
  std::int64_t begin = 0;
  if (!prompt.empty()) {
    begin = static_cast<std::int64_t>(ids.size());
    const std::vector<std::int32_t> after = tokens.encode(rest, false);
    ids.insert(ids.end(), after.begin(), after.end());
  }
  const std::int32_t end = tokens.end();
  if (end >= 0 && (ids.empty() || ids.back() != end)) ids.push_back(end);
  const auto count = static_cast<std::int64_t>(ids.size());
  return {std::move(ids), {{begin, count}}};
}

Encoded encode_conversation(const TextTokens& tokens, const JsonValue& line) {
  const Messages messages = read_messages(line);
  try {
    ChatTokens chat = tokens.encode_chat(messages.turns);
    Encoded encoded{std::move(chat.ids), {}};
    for (std::size_t i = 0; i < chat.answers.size(); ++i)
      if (messages.counts[i]) encoded.completions.push_back(chat.answers[i]);
    return encoded;
  } catch (const UsageError& error) {
    throw DataError(fmt::format("{}: {}", line.where(), error.what()));
  }
}

Encoded encode_line(const TextTokens& tokens, std::string_view line, const std::string& where) {
  const nlohmann::json document = parse_json(line, where);
  const JsonValue root(document, where);
  if (const auto text = root.find("text")) return encode_text(tokens, "", text->string());
  if (root.find("messages")) return encode_conversation(tokens, root);
  if (!root.find("prompt")) root.fail("a member 'text', 'messages' or 'prompt'", "none");
  return encode_text(tokens, root.at("prompt").string(), root.at("completion").string());
}

/// Writes the tokens of documents into shards.
class ShardWriter {
 public:
  ShardWriter(fs::path folder, bool is_wide) : folder_(std::move(folder)), is_wide_(is_wide) {}

  void add(const Encoded& document) {
    const auto count = static_cast<std::int64_t>(document.ids.size());
    if (!file_) file_.emplace(folder_ / fmt::format("shard-{:05}.tokens", shards_.size()));
    const std::int64_t place[] = {in_shard_, static_cast<std::int64_t>(document.completions.size())};
    documents_.insert(documents_.end(), std::begin(place), std::end(place));
    completions_.insert(completions_.end(), document.completions.begin(), document.completions.end());
    packed_.clear();
    for (const std::int32_t id : document.ids) {
      const auto value = static_cast<std::uint32_t>(id);
      packed_.append(reinterpret_cast<const char*>(&value), is_wide_ ? 4 : 2);  // little-endian
    }
    file_->write(packed_);
    fingerprint_.add(packed_);
    fingerprint_.add(fingerprinted(document.completions, count));
    in_shard_ += count;
    total_ += count;
    if (in_shard_ * (is_wide_ ? 4 : 2) >= kShardBytes) finish_shard();
  }

  /// Returns the shards that were written, for the index.
  nlohmann::json finish() {
    finish_shard();
    return shards_;
  }
  std::int64_t total() const { return total_; }
  std::string fingerprint() const { return fingerprint_.text(); }

 private:
  /// Returns the beginnings and ends of completions without an end that is the document's, so that the
  /// fingerprint of prompts with completions is that of earlier versions, whose runs resume.
  static std::string fingerprinted(const std::vector<TokenRange>& completions, std::int64_t count) {
    std::string text;
    for (const auto& [begin, end] : completions) {
      text += fmt::format("{}{}", text.empty() ? "" : ",", begin);
      if (end != count) text += fmt::format(",{}", end);
    }
    return text;
  }

  void finish_shard() {
    if (!file_) return;
    file_->finish();
    file_.reset();
    write_file(folder_ / fmt::format("shard-{:05}.documents", shards_.size()),
               {reinterpret_cast<const char*>(documents_.data()), documents_.size() * sizeof(std::int64_t)});
    write_file(
        folder_ / fmt::format("shard-{:05}.completions", shards_.size()),
        {reinterpret_cast<const char*>(completions_.data()), completions_.size() * sizeof(TokenRange)});
    shards_.push_back(
        {{"tokens", in_shard_}, {"documents", documents_.size() / 2}, {"completions", completions_.size()}});
    documents_.clear();
    completions_.clear();
    in_shard_ = 0;
  }

  fs::path folder_;
  bool is_wide_;
  std::optional<OutputFile> file_;
  std::vector<std::int64_t> documents_;  // of each its first token and its number of completions
  std::vector<TokenRange> completions_;
  std::string packed_;
  nlohmann::json shards_ = nlohmann::json::array();
  std::int64_t in_shard_ = 0, total_ = 0;
  Fingerprint fingerprint_;
};

/// Adds the documents of a file; returns false if it has none or is binary. `unanswered` becomes the first
/// line, of any file, whose document has no completion.
bool add_file(const TextFile& source, const TextTokens& tokens, ShardWriter& writer,
              std::string& unanswered) {
  const MappedFile file(source.path);
  const std::string_view text = text_in(source, file);
  if (text.empty()) return false;
  if (source.path.extension() != ".jsonl") {
    writer.add(encode_text(tokens, "", std::string(text)));
    return true;
  }
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = fmt::format("--data {}:{}", file.name(), number);
    const Encoded document = encode_line(tokens, line, where);
    if (document.completions.empty() && unanswered.empty()) unanswered = where;
    writer.add(document);
  }
  return true;
}

void build(const std::vector<TextFile>& sources, const nlohmann::json& key, const TextTokens& tokens,
           const fs::path& cache, const Corpus::Log& log) {
  const fs::path half_done = cache.string() + ".part";
  fs::remove_all(half_done);
  fs::create_directories(half_done);
  ShardWriter writer(half_done, tokens.vocab_size() > 65536);
  std::string unanswered;
  std::int64_t left_out = 0, logged = 0;
  for (const TextFile& source : sources) {
    if (!add_file(source, tokens, writer, unanswered)) ++left_out;
    if (writer.total() - logged >= kLogBytes) {
      logged = writer.total();
      log(fmt::format("tokenised {} Mi tokens", logged >> 20));
    }
  }
  nlohmann::json index = key;
  index["shards"] = writer.finish();
  index["fingerprint"] = writer.fingerprint();
  if (!unanswered.empty()) index["unanswered"] = unanswered;
  write_file(half_done / kIndex, index.dump() + "\n");
  fs::remove_all(cache);
  fs::rename(half_done, cache);
  sync_folder(cache.parent_path());
  if (left_out > 0) log(fmt::format("--data: left out {} empty or binary files", left_out));
}

}  // namespace

struct Corpus::Impl {
  struct Shard {
    std::unique_ptr<MappedFile> tokens;
    bool is_wide;
  };
  std::vector<Shard> shards;
  std::vector<Document> documents;
  std::vector<TokenRange> completions;
  std::int64_t tokens = 0;
  std::string fingerprint;

  void add_shard(const fs::path& folder, std::int64_t count, std::int64_t document_count,
                 std::int64_t completion_count, bool is_wide) {
    const std::string stem = fmt::format("shard-{:05}", shards.size());
    auto mapped = std::make_unique<MappedFile>(folder / (stem + ".tokens"));
    const MappedFile places(folder / (stem + ".documents")), ranges(folder / (stem + ".completions"));
    const auto expect = [](const MappedFile& file, std::int64_t bytes) {
      if (static_cast<std::int64_t>(file.bytes().size()) != bytes) {
        throw DataError(fmt::format("{}: expected {} bytes, got {} (remove its folder to tokenise again)",
                                    file.name(), bytes, file.bytes().size()));
      }
    };
    expect(*mapped, count * (is_wide ? 4 : 2));
    expect(places, document_count * 16);
    expect(ranges, completion_count * 16);
    std::size_t completion = completions.size();
    completions.resize(completion + static_cast<std::size_t>(completion_count));
    if (completion_count > 0)
      std::memcpy(completions.data() + completion, ranges.bytes().data(), ranges.bytes().size());
    std::vector<std::int64_t> numbers(static_cast<std::size_t>(document_count) * 2);
    if (!numbers.empty()) std::memcpy(numbers.data(), places.bytes().data(), places.bytes().size());
    for (std::size_t i = 0; i < numbers.size(); i += 2) {
      const std::int64_t end = i + 2 < numbers.size() ? numbers[i + 2] : count;
      const auto own = static_cast<std::size_t>(numbers[i + 1]);
      documents.push_back({shards.size(), numbers[i], end - numbers[i], completion, own});
      completion += own;
    }
    if (completion != completions.size()) {
      throw DataError(
          fmt::format("{}: expected {} completions, got others (remove its folder to tokenise again)",
                      places.name(), completion_count));
    }
    tokens += count;
    shards.push_back({std::move(mapped), is_wide});
  }
};

Corpus Corpus::open(const std::vector<fs::path>& paths, const TextTokens& tokens, const fs::path& cache,
                    bool completion_only, const Log& log) {
  const std::vector<TextFile> sources = find_text_files(paths, cache.parent_path());
  nlohmann::json key{{"version", kVersion},
                     {"tokenizer", tokens.identity()},
                     {"token_bytes", tokens.vocab_size() > 65536 ? 4 : 2},
                     {"files", nlohmann::json::array()}};
  for (const TextFile& source : sources) key["files"].push_back(stamp_of(source));

  const auto is_current = [&] {
    if (!fs::exists(cache / kIndex)) return false;
    nlohmann::json index = load_json(cache / kIndex);
    return std::all_of(key.items().begin(), key.items().end(), [&](const auto& item) {
      return index.value(item.key(), nlohmann::json()) == item.value();
    });
  };
  if (!is_current()) build(sources, key, tokens, cache, log);

  const auto impl = std::make_shared<Impl>();
  const fs::path index_path = cache / kIndex;
  const nlohmann::json document = load_json(index_path);
  const std::string index_name = index_path.string();
  const JsonValue index(document, index_name);
  const JsonValue shards = index.at("shards");
  for (std::size_t s = 0; s < shards.array().size(); ++s) {
    const JsonValue shard = shards.element(s);
    impl->add_shard(cache, shard.at("tokens").integer(), shard.at("documents").integer(),
                    shard.at("completions").integer(), index.at("token_bytes").integer() == 4);
  }
  if (const auto unanswered = index.find("unanswered"); unanswered && completion_only) {
    throw DataError(
        fmt::format("{}: messages: expected an assistant turn to count with --loss completion, got none",
                    unanswered->string()));
  }
  impl->fingerprint = index.at("fingerprint").string();
  if (impl->tokens == 0) throw DataError("--data: expected text files, got none with text in them");
  Corpus corpus;
  corpus.impl_ = impl;
  return corpus;
}

const std::vector<Corpus::Document>& Corpus::documents() const {
  return impl_->documents;
}
std::span<const TokenRange> Corpus::completions(const Document& document) const {
  return std::span(impl_->completions).subspan(document.completion, document.completions);
}
std::int64_t Corpus::tokens() const {
  return impl_->tokens;
}
const std::string& Corpus::fingerprint() const {
  return impl_->fingerprint;
}

void Corpus::read(const Document& document, std::int64_t first, std::int64_t count, std::int32_t* out) const {
  const Impl::Shard& shard = impl_->shards[document.shard];
  const std::byte* bytes = shard.tokens->bytes().data();
  const std::int64_t begin = document.begin + first;
  for (std::int64_t i = 0; i < count; ++i) {
    if (shard.is_wide) {
      std::memcpy(out + i, bytes + (begin + i) * 4, 4);
    } else {
      std::uint16_t id = 0;
      std::memcpy(&id, bytes + (begin + i) * 2, 2);
      out[i] = id;
    }
  }
}

}  // namespace moba::llm::train
