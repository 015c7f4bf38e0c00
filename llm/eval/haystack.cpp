#include "llm/eval/haystack.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "llm/error.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/text_files.h"

namespace moba::llm::eval {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLicences = "/usr/share/common-licenses";
constexpr std::size_t kMaxBytes = std::size_t{64} << 20;

/// Returns /usr/lib/python3.11 or the like; the last in alphabetical order.
fs::path python_library() {
  fs::path found;
  std::error_code ignored;
  for (const fs::path& path : fs::directory_iterator("/usr/lib", ignored)) {
    if (path.filename().string().starts_with("python3.") && fs::exists(path / "argparse.py"))
      found = std::max(found, path);
  }
  if (!found.empty()) return found;
  throw DataError("--data: expected files or folders with text, got no paths and no Python in /usr/lib");
}

/// A text with what it is made of.
struct Collection {
  std::string text;
  std::size_t files = 0;
};

/// Joins texts of files in random order, only those with `extension` unless it is empty.
Collection collect(const std::vector<fs::path>& paths, std::string_view extension, std::int64_t seed) {
  std::vector<TextFile> files = find_text_files(paths);
  if (!extension.empty())
    std::erase_if(files, [&](const TextFile& file) { return file.path.extension() != extension; });
  Random{seed}.shuffle(files);
  Collection found;
  for (const TextFile& file : files) {
    const MappedFile mapped(file.path);
    const std::string_view text = text_in(file, mapped).substr(0, kMaxBytes - found.text.size());
    if (text.empty()) continue;
    found.text += text;
    if (!text.ends_with('\n')) found.text += '\n';
    ++found.files;
    if (found.text.size() >= kMaxBytes) break;
  }
  return found;
}

std::string names_of(const std::vector<fs::path>& paths) {
  std::string names;
  for (const fs::path& path : paths) names += (names.empty() ? "" : ", ") + path.string();
  return names;
}

}  // namespace

Haystack Haystack::open(std::vector<fs::path> paths, std::int64_t seed) {
  Haystack haystack;
  const auto add = [&](Collection collection, const std::string& name) {
    if (collection.files == 0) return;
    haystack.source_ +=
        fmt::format("{}{} ({} files, {:.1f} MiB)", haystack.source_.empty() ? "" : " and ", name,
                    collection.files, static_cast<double>(collection.text.size()) / (1 << 20));
    haystack.texts_.push_back(std::move(collection.text));
  };
  if (paths.empty()) {
    const fs::path python = python_library();
    add(collect({python}, ".py", seed), python.string() + ", Python's standard library");
    if (fs::exists(kLicences))
      add(collect({kLicences}, "", seed), fmt::format("{}, Debian's licences", kLicences));
  } else {
    add(collect(paths, "", seed), names_of(paths));
  }
  if (haystack.texts_.empty())
    throw DataError(fmt::format("--data {}: expected files with text, got none", names_of(paths)));
  return haystack;
}

std::vector<std::int32_t> Haystack::take(const Tokenizer& tokenizer, std::int64_t tokens,
                                         Random& random) const {
  const auto wanted = static_cast<std::size_t>(tokens);
  // A text that would repeat itself leaves its share to the longest one.
  constexpr std::size_t kBytesPerToken = 8;
  const std::string* text =
      &texts_[texts_.size() == 1 ? 0 : static_cast<std::size_t>(random.below(std::ssize(texts_)))];
  if (text->size() < kBytesPerToken * wanted) {
    text = &*std::max_element(texts_.begin(), texts_.end(),
                              [](const std::string& a, const std::string& b) { return a.size() < b.size(); });
  }
  const auto at = static_cast<std::size_t>(random.below(std::ssize(*text)));
  const std::size_t begin = (text->find('\n', at) + 1) % text->size();
  for (std::size_t bytes = 4 * wanted;; bytes *= 2) {
    std::string part = text->substr(begin, bytes);
    if (part.size() < bytes) part += text->substr(0, std::min(begin, bytes - part.size()));
    std::vector<std::int32_t> ids = tokenizer.encode(part, /*add_special=*/false, /*parse_special=*/false);
    if (ids.size() >= wanted) return ids;
    if (part.size() < bytes) {
      throw DataError(
          fmt::format("--data {}: expected at least {} tokens of text, got {}", source_, tokens, ids.size()));
    }
  }
}

std::vector<std::string> Haystack::words() const {
  const auto is_letter = [](char c) { return c >= 'a' && c <= 'z'; };
  const auto is_part = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
  std::set<std::string> words;
  for (const std::string& text : texts_) {
    for (auto begin = text.begin(); begin != text.end();) {
      begin = std::find_if(begin, text.end(), is_part);
      const auto end = std::find_if_not(begin, text.end(), is_part);
      if (end - begin >= 4 && end - begin <= 12 && std::all_of(begin, end, is_letter))
        words.emplace(begin, end);
      begin = end;
    }
  }
  return {words.begin(), words.end()};
}

}  // namespace moba::llm::eval
