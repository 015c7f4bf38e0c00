#include "llm/formats/text_files.h"

#include <fmt/format.h>

#include <algorithm>

#include "llm/error.h"

namespace moba::llm {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> files_in(const fs::path& folder, const fs::path& besides) {
  std::vector<fs::path> files;
  const auto options = fs::directory_options::skip_permission_denied;
  for (fs::recursive_directory_iterator entry(folder, options), end; entry != end; ++entry) {
    const bool is_hidden = entry->path().filename().string().starts_with('.');
    const bool is_besides = !besides.empty() && entry->is_directory() && fs::equivalent(*entry, besides);
    if (entry->is_directory() && (is_hidden || is_besides)) {
      entry.disable_recursion_pending();
    } else if (entry->is_regular_file() && !is_hidden) {
      files.push_back(entry->path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

std::vector<TextFile> find_text_files(const std::vector<fs::path>& paths, const fs::path& besides) {
  std::vector<TextFile> files;
  for (const fs::path& path : paths) {
    if (!fs::exists(path)) {
      throw DataError(fmt::format("--data {}: expected a file or a folder, got none", path.string()));
    }
    if (!fs::is_directory(path)) {
      files.push_back({path, true});
      continue;
    }
    for (const fs::path& file : files_in(path, besides)) files.push_back({file, false});
  }
  return files;
}

std::string_view text_in(const TextFile& file, const MappedFile& mapped) {
  const std::string_view text(reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size());
  const char* wrong = text.empty()                                ? "an empty one"
                      : text.find('\0') != std::string_view::npos ? "a binary one: it holds a zero byte"
                                                                  : nullptr;
  if (wrong == nullptr) return text;
  if (!file.is_named) return {};
  throw DataError(fmt::format("--data {}: expected a text file, got {}", mapped.name(), wrong));
}

}  // namespace moba::llm
