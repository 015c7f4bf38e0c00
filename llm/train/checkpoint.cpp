#include "llm/train/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <system_error>

#include "llm/error.h"
#include "llm/formats/dequantise.h"
#include "llm/formats/output_file.h"
#include "llm/formats/safetensors.h"
#include "llm/formats/write_safetensors.h"

namespace moba::llm::train {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step-";
constexpr std::size_t kDigits = 8;
/// Suffix of a checkpoint that is being written or removed.
constexpr const char* kHalfDone = ".part";
constexpr const char* kLast = "last";

bool is_checkpoint(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.size() == kPrefix.size() + kDigits && name.starts_with(kPrefix) &&
         name.find_first_not_of("0123456789", kPrefix.size()) == std::string::npos;
}

/// Creates a link, atomically replacing any file of its name.
void link(const fs::path& target, const fs::path& name) {
  const fs::path half_done = name.string() + kHalfDone;
  fs::remove(half_done);
  fs::create_symlink(target, half_done);
  fs::rename(half_done, name);
}

std::string full_name(const Section& section, const Layout::Entry& entry) {
  return section.name + "/" + entry.name;
}

}  // namespace

std::vector<fs::path> Checkpoints::all() const {
  std::vector<fs::path> found;
  if (fs::is_directory(folder_)) {
    for (const auto& entry : fs::directory_iterator(folder_)) {
      if (entry.is_directory() && is_checkpoint(entry.path())) found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::optional<fs::path> Checkpoints::newest() const {
  const std::vector<fs::path> found = all();
  if (found.empty()) return std::nullopt;
  return found.back();
}

std::int64_t Checkpoints::count() const {
  return static_cast<std::int64_t>(all().size());
}

void Checkpoints::tidy() const {
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kPrefix) && name.ends_with(kHalfDone)) fs::remove_all(entry.path());
  }
}

void Checkpoints::save(std::int64_t step, std::int64_t keep,
                       const std::function<void(const fs::path&)>& write) const {
  const std::string name = fmt::format("{}{:0{}}", kPrefix, step, kDigits);
  const fs::path half_done = folder_ / (name + kHalfDone), place = folder_ / name;
  try {
    fs::remove_all(half_done);
    fs::create_directory(half_done);
    write(half_done);
    sync_folder(half_done);
    fs::rename(half_done, place);
    sync_folder(folder_);

    link(name, folder_ / kLast);
    for (const auto& entry : fs::directory_iterator(place)) {
      const fs::path file = entry.path().filename();
      if (!fs::exists(fs::symlink_status(folder_ / file))) link(fs::path(kLast) / file, folder_ / file);
    }
    const std::vector<fs::path> found = all();
    for (std::size_t i = 0; i + static_cast<std::size_t>(keep) < found.size(); ++i) {
      const fs::path going = found[i].string() + kHalfDone;
      fs::rename(found[i], going);
      fs::remove_all(going);
    }
  } catch (const fs::filesystem_error& error) {
    std::error_code ignored;
    fs::remove_all(half_done, ignored);
    throw DataError(
        fmt::format("{}: expected a writable folder, got {}", place.string(), error.code().message()));
  } catch (const DataError&) {
    std::error_code ignored;
    fs::remove_all(half_done, ignored);
    throw;
  }
}

void write_sections(const fs::path& path, const std::vector<Section>& sections) {
  std::vector<NamedTensor> tensors;
  for (const Section& section : sections) {
    for (const Layout::Entry& entry : section.layout->entries()) {
      tensors.push_back({full_name(section, entry), entry.shape,
                         section.values.subspan(static_cast<std::size_t>(entry.offset),
                                                static_cast<std::size_t>(entry.count))});
    }
  }
  write_safetensors(path, tensors);
}

void read_sections(const fs::path& path, const std::vector<Section>& sections) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  for (const Section& section : sections) {
    for (const Layout::Entry& entry : section.layout->entries()) {
      const std::string name = full_name(section, entry);
      const auto stored = std::find_if(file.tensors.begin(), file.tensors.end(),
                                       [&](const StoredTensor& tensor) { return tensor.name == name; });
      const auto fail = [&](const std::string& found) {
        throw DataError(fmt::format("{}: expected tensor {} [{}], got {}", path.string(), name,
                                    fmt::join(entry.shape, ", "), found));
      };
      if (stored == file.tensors.end()) fail("none");
      if (stored->shape != entry.shape) fail(fmt::format("[{}]", fmt::join(stored->shape, ", ")));
      const std::int64_t rows = entry.shape.size() > 1 ? entry.shape[0] : 1;
      dequantise(*stored, 0, rows, section.values.data() + entry.offset);
    }
  }
}

}  // namespace moba::llm::train
