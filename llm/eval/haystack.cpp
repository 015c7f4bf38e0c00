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

std::string names_of(const std::vector<fs::path>& paths) {
  std::string names;
  for (const fs::path& path : paths) names += (names.empty() ? "" : ", ") + path.string();
  return names;
}

}  // namespace

Haystack Haystack::open(std::vector<fs::path> paths, std::int64_t seed) {
  const bool is_default = paths.empty();
  if (is_default) paths = {python_library()};
  std::vector<TextFile> files = find_text_files(paths);
  if (is_default) std::erase_if(files, [](const TextFile& file) { return file.path.extension() != ".py"; });
  Random{seed}.shuffle(files);

  Haystack haystack;
  std::size_t used = 0;
  for (const TextFile& file : files) {
    const MappedFile mapped(file.path);
    const std::string_view text = text_in(file, mapped).substr(0, kMaxBytes - haystack.text_.size());
    if (text.empty()) continue;
    haystack.text_ += text;
    if (!text.ends_with('\n')) haystack.text_ += '\n';
    ++used;
    if (haystack.text_.size() >= kMaxBytes) break;
  }
  if (used == 0)
    throw DataError(fmt::format("--data {}: expected files with text, got none", names_of(paths)));
  haystack.source_ = fmt::format("{}{} ({} files, {:.1f} MiB)", names_of(paths),
                                 is_default ? ", Python's standard library" : "", used,
                                 static_cast<double>(haystack.text_.size()) / (1 << 20));
  return haystack;
}

std::vector<std::int32_t> Haystack::take(const Tokenizer& tokenizer, std::int64_t tokens,
                                         Random& random) const {
  const auto at = static_cast<std::size_t>(random.below(static_cast<std::int64_t>(text_.size())));
  const std::size_t begin = (text_.find('\n', at) + 1) % text_.size();
  const auto wanted = static_cast<std::size_t>(tokens);
  for (std::size_t bytes = 4 * wanted;; bytes *= 2) {
    std::string text = text_.substr(begin, bytes);
    if (text.size() < bytes) text += text_.substr(0, std::min(begin, bytes - text.size()));
    std::vector<std::int32_t> ids = tokenizer.encode(text, /*add_special=*/false, /*parse_special=*/false);
    if (ids.size() >= wanted) return ids;
    if (text.size() < bytes) {
      throw DataError(
          fmt::format("--data {}: expected at least {} tokens of text, got {}", source_, tokens, ids.size()));
    }
  }
}

std::vector<std::string> Haystack::words() const {
  const auto is_letter = [](char c) { return c >= 'a' && c <= 'z'; };
  const auto is_part = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
  std::set<std::string> words;
  for (auto begin = text_.begin(); begin != text_.end();) {
    begin = std::find_if(begin, text_.end(), is_part);
    const auto end = std::find_if_not(begin, text_.end(), is_part);
    if (end - begin >= 4 && end - begin <= 12 && std::all_of(begin, end, is_letter))
      words.emplace(begin, end);
    begin = end;
  }
  return {words.begin(), words.end()};
}

}  // namespace moba::llm::eval
