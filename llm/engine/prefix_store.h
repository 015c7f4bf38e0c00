#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <limits>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "llm/engine/page_pool.h"
#include "llm/engine/sha256.h"

namespace moba::llm {

/// Cached pages in a folder, one file a page, for an engine that starts later. A page's key is the SHA-256 of
/// its tokens and of the key of the page before, which for the first page is that of the way to read it. A
/// file appears under its final name when it is complete, and is read only if its checksum, key and tokens
/// are as expected. Several processes may share a folder. A file's time of change tells when its page was
/// last used; a page counts as used later than its continuations, which are of no use without it. A thread of
/// its own writes; the members are for one other thread.
class PrefixStore {
 public:
  struct Settings {
    std::filesystem::path folder;
    std::size_t page_bytes = 0;
    /// Maximum bytes of all pages in the folder. Where a page does not fit, those that were used before it
    /// are removed, the oldest first, but none that a process is reading.
    std::uint64_t max_bytes = std::numeric_limits<std::uint64_t>::max();
    /// Maximum pages that wait to be written. Further ones are not stored.
    std::size_t max_pending = 1;
    /// Receives a line about a file that is ignored, and about the first one that cannot be written, from
    /// either thread.
    std::function<void(const std::string&)> warn{};
  };
  using Key = Sha256Digest;
  using Time = std::chrono::time_point<std::chrono::system_clock, std::chrono::nanoseconds>;

  /// Creates the folder, and finds the pages in it. Throws DataError.
  explicit PrefixStore(Settings settings);
  /// Waits until all pages are written.
  ~PrefixStore();
  PrefixStore(const PrefixStore&) = delete;
  PrefixStore& operator=(const PrefixStore&) = delete;

  static Key root(std::string_view way_to_read) { return Sha256().add(way_to_read).finish(); }
  static Key next(const Key& parent, std::span<const std::int32_t> tokens);

  /// Returns the time of the page `index` of a prompt that is used at `time`.
  static Time time_of_page(Time time, std::int64_t index) { return time - std::chrono::microseconds(index); }

  /// Returns whether there may be a page with this key.
  bool contains(const Key& key);
  /// Reads the page of `tokens` after the page `parent` into `page`. Returns false if it is missing or
  /// invalid.
  bool read(const Key& parent, std::span<const std::int32_t> tokens, std::byte* page);
  /// Queues a page to be written, unless it is there. Its content must not change any more. Returns false if
  /// too many wait.
  bool write(const Key& parent, std::span<const std::int32_t> tokens, const Page& page, Time used);
  /// Notes that the pages of a prompt are used. `keys`: the root and those of the first pages.
  void use(std::span<const Key> keys, Time time);
  /// Lets go of pages that are written.
  void release_written();
  /// Returns the number of pages in the folder.
  std::int64_t pages() const;

 private:
  /// A page to be written, or without memory one that was used.
  struct Job {
    Key parent{}, key{};
    std::vector<std::int32_t> tokens{};
    Page page{};
    Time used{};
  };
  struct File {
    std::filesystem::path path;
    std::uint64_t bytes = 0;
    Time used;
  };

  void run();
  bool store(const Job& job);
  std::vector<File> scan();
  bool make_room(std::uint64_t bytes, Time used);
  bool remove(const File& file);
  std::filesystem::path path_of(const Key& key) const;

  Settings settings_;
  mutable std::mutex mutex_;  // of what follows, up to the thread
  std::condition_variable changed_;
  std::set<Key> known_;    // written, or pending
  std::set<Key> damaged_;  // their files are to be written again
  std::deque<Job> pending_;
  std::int64_t pending_pages_ = 0;
  std::vector<Page> written_;  // for release_written(): a PagePool is not thread-safe
  std::size_t unreleased_ = 0;
  bool is_stopping_ = false;
  // Of the thread:
  bool has_failed_ = false, is_scanned_ = false;
  std::uint64_t folder_bytes_ = 0, written_bytes_ = 0;  // when it was last scanned, and since
  std::thread thread_;
};

}  // namespace moba::llm
