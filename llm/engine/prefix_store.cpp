#include "llm/engine/prefix_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <system_error>
#include <utility>

#include "llm/error.h"
#include "llm/formats/fingerprint.h"
#include "llm/formats/output_file.h"

namespace moba::llm {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kExtension = ".page", kUnfinished = ".tmp";
/// Unfinished files of a process that was killed.
constexpr std::chrono::hours kAbandoned{1};

/// What follows the page in its file; then its tokens and the checksum of all before.
struct Trailer {
  std::array<char, 8> magic{'M', 'O', 'B', 'A', 'P', 'A', 'G', 'E'};
  std::uint32_t version = 1, tokens = 0;
  std::uint64_t page_bytes = 0;
  PrefixStore::Key parent{}, key{};
};
static_assert(sizeof(Trailer) == 88);

std::string_view bytes_of(const void* data, std::size_t size) {
  return {static_cast<const char*>(data), size};
}

std::string trailer_of(const PrefixStore::Key& parent, const PrefixStore::Key& key,
                       std::span<const std::int32_t> tokens, const std::byte* page, std::size_t page_bytes) {
  Trailer trailer;
  trailer.tokens = static_cast<std::uint32_t>(tokens.size());
  trailer.page_bytes = page_bytes;
  trailer.parent = parent;
  trailer.key = key;
  std::string text(bytes_of(&trailer, sizeof(trailer)));
  text += bytes_of(tokens.data(), tokens.size_bytes());
  Fingerprint checksum;
  checksum.add(bytes_of(page, page_bytes));
  checksum.add(text);
  return text + checksum.text();
}

std::optional<PrefixStore::Key> key_of(const fs::path& file) {
  PrefixStore::Key key{};
  const std::string name = file.stem().string();
  if (file.extension() != kExtension || name.size() != 2 * key.size()) return std::nullopt;
  for (std::size_t i = 0; i < name.size(); ++i) {
    const std::size_t digit = std::string_view("0123456789abcdef").find(name[i]);
    if (digit == std::string_view::npos) return std::nullopt;
    key[i / 2] = static_cast<std::uint8_t>(key[i / 2] << 4 | digit);
  }
  return key;
}

/// Reads exactly `size` bytes. Returns false if there are fewer.
bool read_bytes(int file, void* to, std::size_t size) {
  auto* next = static_cast<char*>(to);
  while (size > 0) {
    const ssize_t count = ::read(file, next, std::min(size, std::size_t{1} << 30));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    next += count;
    size -= static_cast<std::size_t>(count);
  }
  return true;
}

struct File {
  explicit File(const fs::path& path) : number(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~File() {
    if (number >= 0) close(number);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int number;
};

}  // namespace

PrefixStore::Key PrefixStore::next(const Key& parent, std::span<const std::int32_t> tokens) {
  return Sha256().add(std::as_bytes(std::span(parent))).add(std::as_bytes(tokens)).finish();
}

PrefixStore::PrefixStore(Settings settings) : settings_(std::move(settings)) {
  std::error_code error;
  fs::create_directories(settings_.folder, error);
  if (!error) {
    const auto now = fs::file_time_type::clock::now();
    for (fs::directory_iterator entry(settings_.folder, error), end; !error && entry != end;
         entry.increment(error)) {
      if (const auto key = key_of(entry->path())) known_.insert(*key);
      std::error_code ignored;
      if (entry->path().extension() == kUnfinished && now - entry->last_write_time(ignored) > kAbandoned)
        fs::remove(entry->path(), ignored);
    }
  }
  if (error) {
    throw DataError(fmt::format("{}: expected a folder, got {}", settings_.folder.string(), error.message()));
  }
  thread_ = std::thread([this] { run(); });
}

PrefixStore::~PrefixStore() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

fs::path PrefixStore::path_of(const Key& key) const {
  return settings_.folder / (hex(key) + std::string(kExtension));
}

bool PrefixStore::contains(const Key& key) const {
  const std::lock_guard lock(mutex_);
  return known_.contains(key);
}

std::int64_t PrefixStore::pages() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::int64_t>(known_.size() - pending_.size());
}

bool PrefixStore::read(const Key& parent, std::span<const std::int32_t> tokens, std::byte* page) {
  const Key key = next(parent, tokens);
  const fs::path path = path_of(key);
  const File file(path);
  if (file.number >= 0) {
    const bool is_whole = read_bytes(file.number, page, settings_.page_bytes);
    const std::string expected =
        is_whole ? trailer_of(parent, key, tokens, page, settings_.page_bytes) : std::string();
    std::string found(expected.size() + 1, '\0');
    const ssize_t size = is_whole ? ::read(file.number, found.data(), found.size()) : -1;
    if (size == static_cast<ssize_t>(expected.size()) && found.starts_with(expected)) return true;
    if (settings_.warn)
      settings_.warn(
          fmt::format("{}: expected a page of this cache, got another content; ignored", path.string()));
  }
  const std::lock_guard lock(mutex_);
  known_.erase(key);
  return false;
}

void PrefixStore::write(const Key& parent, std::span<const std::int32_t> tokens, const Page& page) {
  const Key key = next(parent, tokens);
  {
    const std::lock_guard lock(mutex_);
    if (unreleased_ >= settings_.max_pending || !known_.insert(key).second) return;
    ++unreleased_;
    pending_.push_back({parent, key, {tokens.begin(), tokens.end()}, page});
  }
  changed_.notify_one();
}

void PrefixStore::release_written() {
  std::vector<Page> written;
  const std::lock_guard lock(mutex_);
  written.swap(written_);
  unreleased_ -= written.size();
}

void PrefixStore::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return is_stopping_ || !pending_.empty(); });
    if (pending_.empty()) return;
    const Job& job = pending_.front();  // stays until it is written
    lock.unlock();
    const bool stored = store(job);
    lock.lock();
    if (!stored) known_.erase(job.key);
    written_.push_back(std::move(pending_.front().page));
    pending_.pop_front();
  }
}

/// Writes a page; returns whether it is in the folder.
bool PrefixStore::store(const Job& job) {
  const fs::path path = path_of(job.key);
  const fs::path unfinished = path.string() + fmt::format(".{}{}", getpid(), kUnfinished);
  try {
    OutputFile file(unfinished);
    file.write(job.page.get(), settings_.page_bytes);
    file.write(trailer_of(job.parent, job.key, job.tokens, job.page.get(), settings_.page_bytes));
    file.finish();
    fs::rename(unfinished, path);
    return true;
  } catch (const std::exception& error) {  // a full disk
    std::error_code ignored;
    fs::remove(unfinished, ignored);
    if (!std::exchange(has_failed_, true) && settings_.warn)
      settings_.warn(fmt::format("{}; pages are not stored while this lasts", error.what()));
    return false;
  }
}

}  // namespace moba::llm
