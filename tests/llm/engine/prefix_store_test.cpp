#include "llm/engine/prefix_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <numeric>

#include "llm/engine/engine.h"
#include "llm/error.h"
#include "random_model.h"

namespace moba::llm::test {
namespace {

namespace fs = std::filesystem;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kBytes = 1000;

std::string hex(const Sha256Digest& digest) {
  std::string text;
  for (const unsigned byte : digest) {
    text += "0123456789abcdef"[byte / 16];
    text += "0123456789abcdef"[byte % 16];
  }
  return text;
}

TEST(Sha256, DigestsOfTheStandardsExamples) {
  EXPECT_EQ(hex(Sha256().finish()), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hex(Sha256().add("abc").finish()),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hex(Sha256().add("abcdbcdecdefdefgefghfghighijhijkijkljklm").add("klmnlmnomnopnopq").finish()),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

class StoreFolder : public testing::Test {
 protected:
  StoreFolder() : folder_(fs::temp_directory_path() / ("moba-store-test-" + std::to_string(getpid()))) {
    fs::remove_all(folder_);
  }
  ~StoreFolder() override { fs::remove_all(folder_); }

  PrefixStore::Settings settings() {
    return {.folder = folder_, .page_bytes = kBytes, .max_pending = 8, .warn = [this](const auto& line) {
              warnings_.push_back(line);
            }};
  }
  std::vector<fs::path> files() const {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(folder_)) found.push_back(entry.path());
    std::sort(found.begin(), found.end());
    return found;
  }

  fs::path folder_;
  std::vector<std::string> warnings_;
};

using PrefixStoreTest = StoreFolder;

Page page_of(int value) {
  Page page(new std::byte[kBytes], [](const std::byte* bytes) { delete[] bytes; });
  std::fill_n(page.get(), kBytes, static_cast<std::byte>(value));
  return page;
}

const Tokens kFirst{1, 2, 3}, kSecond{4, 5, 6};
const PrefixStore::Key kRoot = PrefixStore::root("full"), kFirstKey = PrefixStore::next(kRoot, kFirst);

/// A time some seconds after a fixed one.
PrefixStore::Time at(int seconds) {
  return PrefixStore::Time(std::chrono::seconds(1'000'000'000 + seconds));
}

void write_two(PrefixStore::Settings settings) {
  PrefixStore store(std::move(settings));
  store.write(kRoot, kFirst, page_of(7), at(0));
  store.write(kFirstKey, kSecond, page_of(8), at(0));
}

TEST_F(PrefixStoreTest, LaterStoreReadsThePages) {
  write_two(settings());
  PrefixStore store(settings());
  EXPECT_EQ(store.pages(), 2);
  std::vector<std::byte> page(kBytes);
  EXPECT_TRUE(store.contains(kFirstKey));
  ASSERT_TRUE(store.read(kRoot, kFirst, page.data()));
  EXPECT_EQ(page, std::vector<std::byte>(kBytes, std::byte{7}));
  ASSERT_TRUE(store.read(kFirstKey, kSecond, page.data()));
  EXPECT_EQ(page, std::vector<std::byte>(kBytes, std::byte{8}));
  EXPECT_FALSE(store.contains(PrefixStore::next(kRoot, kSecond)));
  EXPECT_FALSE(store.contains(PrefixStore::next(PrefixStore::root("moba"), kFirst)));
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(PrefixStoreTest, ChangedByteOfAFileIsNotedOnceAndThePageIsWrittenAgain) {
  write_two(settings());
  const fs::path file = files().front();
  std::vector<std::byte> page(kBytes);
  const auto size = static_cast<std::int64_t>(fs::file_size(file));
  std::string whole(static_cast<std::size_t>(size), '\0');
  std::ifstream(file, std::ios::binary).read(whole.data(), size);
  const bool is_first = whole[0] == 7;
  const PrefixStore::Key& parent = is_first ? kRoot : kFirstKey;
  const Tokens& tokens = is_first ? kFirst : kSecond;
  for (std::int64_t at = 0; at < size; at += at < static_cast<std::int64_t>(kBytes) ? 97 : 1) {
    std::string changed = whole;
    changed[static_cast<std::size_t>(at)] ^= 0x10;
    std::ofstream(file, std::ios::binary) << changed;
    warnings_.clear();
    PrefixStore store(settings());
    EXPECT_FALSE(store.read(parent, tokens, page.data())) << at;
    EXPECT_FALSE(store.contains(PrefixStore::next(parent, tokens)));
    EXPECT_EQ(warnings_.size(), 1U);
  }
  for (const std::string& other :
       {std::string(), whole.substr(0, whole.size() - 1), whole + "x", whole + whole}) {
    std::ofstream(file, std::ios::binary) << other;
    PrefixStore store(settings());
    EXPECT_FALSE(store.read(parent, tokens, page.data()));
    store.write(parent, tokens, page_of(is_first ? 7 : 8), at(0));
  }
  std::string again(whole.size(), '\0');
  std::ifstream(file, std::ios::binary).read(again.data(), size);
  EXPECT_EQ(again, whole);
}

TEST_F(PrefixStoreTest, ForeignAndMissingFilesAreIgnored) {
  write_two(settings());
  std::ofstream(folder_ / "notes.txt") << "mine";
  std::ofstream(folder_ / "0123.page") << "short name";
  PrefixStore store(settings());
  EXPECT_EQ(store.pages(), 2);
  for (const fs::path& file : files())
    if (file.stem().string().size() == 64) fs::remove(file);
  std::vector<std::byte> page(kBytes);
  EXPECT_FALSE(store.read(kRoot, kFirst, page.data()));
  EXPECT_TRUE(warnings_.empty());
  EXPECT_TRUE(fs::exists(folder_ / "notes.txt"));
}

TEST_F(PrefixStoreTest, FolderThatCannotBeWrittenIsNotedOnce) {
  {
    PrefixStore store(settings());
    fs::remove_all(folder_);
    store.write(kRoot, kFirst, page_of(7), at(0));
    store.write(kFirstKey, kSecond, page_of(8), at(0));
  }
  ASSERT_EQ(warnings_.size(), 1U);
  EXPECT_NE(warnings_.front().find("expected a writable file"), std::string::npos);
}

/// A chain of pages of one prompt.
std::vector<PrefixStore::Key> keys_of(int prompt, int pages) {
  std::vector<PrefixStore::Key> keys = {PrefixStore::root("full")};
  for (int i = 0; i < pages; ++i) keys.push_back(PrefixStore::next(keys.back(), Tokens{prompt, i, 0}));
  return keys;
}

void write_prompt(PrefixStore& store, int prompt, int pages, PrefixStore::Time time) {
  const std::vector<PrefixStore::Key> keys = keys_of(prompt, pages);
  for (int i = 0; i < pages; ++i) {
    EXPECT_TRUE(store.write(keys[static_cast<std::size_t>(i)], Tokens{prompt, i, 0}, page_of(prompt),
                            PrefixStore::time_of_page(time, i)));
  }
}

class LimitedStore : public StoreFolder {
 protected:
  /// Room for ten pages.
  PrefixStore::Settings settings() {
    PrefixStore::Settings result = StoreFolder::settings();
    result.max_bytes = 10 * kFileBytes + kFileBytes / 2;
    result.max_pending = 100;
    return result;
  }
  /// Returns how many of the first pages of a prompt are in the folder.
  int stored(int prompt, int pages) {
    PrefixStore store(settings());
    const std::vector<PrefixStore::Key> keys = keys_of(prompt, pages);
    int count = 0;
    while (count < pages && store.contains(keys[static_cast<std::size_t>(count) + 1])) ++count;
    return count;
  }
  std::uint64_t bytes() const {
    std::uint64_t sum = 0;
    for (const fs::path& file : files()) sum += fs::file_size(file);
    return sum;
  }

  static constexpr std::uint64_t kFileBytes = kBytes + 88 + 3 * 4 + 16;  // page, trailer, tokens, checksum
};

TEST_F(LimitedStore, LeastRecentlyUsedPagesGoFirstAndPrefixesFromTheirEnds) {
  {
    PrefixStore store(settings());
    write_prompt(store, 1, 4, at(1));
    write_prompt(store, 2, 4, at(2));
    store.use(keys_of(1, 4), at(3));  // now the more recent
    write_prompt(store, 3, 4, at(4));
  }
  EXPECT_EQ(files().size(), 10U);
  EXPECT_LE(bytes(), settings().max_bytes);
  EXPECT_EQ(fs::file_size(files().front()), kFileBytes);
  EXPECT_EQ(stored(1, 4), 4);
  EXPECT_EQ(stored(2, 4), 2);
  EXPECT_EQ(stored(3, 4), 4);
}

TEST_F(LimitedStore, PromptBeyondTheLimitKeepsItsBegin) {
  {
    PrefixStore store(settings());
    write_prompt(store, 1, 4, at(1));
    write_prompt(store, 2, 30, at(2));
  }
  EXPECT_EQ(stored(1, 4), 0);
  EXPECT_EQ(stored(2, 30), 10);
  {
    PrefixStore store(settings());
    write_prompt(store, 3, 1, at(1));  // older than all that is there
  }
  EXPECT_EQ(stored(3, 1), 0);
}

TEST_F(LimitedStore, PagesThatAreBeingReadStay) {
  {
    PrefixStore store(settings());
    write_prompt(store, 1, 10, at(1));
  }
  std::vector<int> held;
  for (const fs::path& file : files()) {
    held.push_back(open(file.c_str(), O_RDONLY));
    ASSERT_EQ(flock(held.back(), LOCK_SH), 0);
  }
  {
    PrefixStore store(settings());
    write_prompt(store, 2, 3, at(2));
  }
  EXPECT_EQ(stored(1, 10), 10);
  EXPECT_EQ(stored(2, 3), 0);
  for (const int file : held) close(file);
  {
    PrefixStore store(settings());
    write_prompt(store, 2, 3, at(2));
  }
  EXPECT_EQ(stored(1, 10), 7);
  EXPECT_EQ(stored(2, 3), 3);
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(LimitedStore, ProcessesShareTheLimit) {
  {
    PrefixStore first(settings()), second(settings());
    for (int round = 0; round < 8; ++round) {
      write_prompt(first, 10 + round, 2, at(2 * round));
      write_prompt(second, 30 + round, 2, at(2 * round + 1));
    }
  }
  // Each may write a sixteenth, here less than a page, before it looks what the others have written.
  EXPECT_LE(bytes(), settings().max_bytes + 2 * kFileBytes);
  EXPECT_GE(files().size(), 9U);
  EXPECT_EQ(stored(37, 2), 2);
}

TEST_F(LimitedStore, PageThatAnotherProcessWroteIsFound) {
  PrefixStore first(settings());
  {
    PrefixStore second(settings());
    write_prompt(second, 1, 1, at(1));
  }
  const PrefixStore::Key root = PrefixStore::root("full");
  EXPECT_TRUE(first.contains(keys_of(1, 1).back()));
  std::vector<std::byte> page(kBytes);
  EXPECT_TRUE(first.read(root, Tokens{1, 0, 0}, page.data()));
}

TEST_F(PrefixStoreTest, FileInPlaceOfTheFolderThrows) {
  std::ofstream(folder_) << "a file";
  EXPECT_THROW(PrefixStore store(settings()), DataError);
}

Tokens run(Engine& engine, const Tokens& prompt, RequestUsage& usage, AttentionMode mode) {
  Tokens answer;
  Request request;
  request.prompt = prompt;
  request.prefill = request.decode = mode;
  request.moba = {.block_size = 16, .top_k = 3, .sink_blocks = 1};
  request.full_tail = 8;
  request.max_tokens = 20;
  request.on_token = [&](std::int32_t token, std::span<const float>) {
    answer.push_back(token);
    return true;
  };
  request.on_finish = [&](Finish, const RequestUsage& found) { usage = found; };
  engine.submit(std::move(request));
  while (engine.step()) {
  }
  return answer;
}

TEST_F(PrefixStoreTest, LaterEngineContinuesAfterStoredPages) {
  use_threads(1);
  const Model model = random_model(small_config());
  EngineSettings settings;
  settings.block_sizes = {16};
  settings.kv_dtype = DType::f32;
  settings.cache_bytes = std::size_t{1} << 26;
  settings.cache_folder = folder_;
  settings.model_fingerprint = "a model";
  Tokens prompt(400);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<std::int32_t>(i * i % 311);
  for (const AttentionMode mode : {AttentionMode::full, AttentionMode::moba}) {
    RequestUsage usage;
    Tokens expected;
    {
      Engine engine(model, settings);
      expected = run(engine, prompt, usage, mode);
      EXPECT_EQ(usage.cached_tokens, 0);
    }
    {
      Engine engine(model, settings);
      EXPECT_EQ(run(engine, prompt, usage, mode), expected);
      EXPECT_EQ(usage.cached_tokens, 384);  // whole pages of 64
      EXPECT_EQ(engine.statistics().restored_pages, 6);
      EXPECT_EQ(run(engine, prompt, usage, mode), expected);
      EXPECT_EQ(engine.statistics().restored_pages, 6);
    }
    for (const fs::path& file : files()) {
      if (file != files().front()) continue;
      std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
      stream.seekp(100);
      stream.put('!').put('?').put('!');
    }
    {
      Engine engine(model, settings);
      EXPECT_EQ(run(engine, prompt, usage, mode), expected);
    }
    EngineSettings others = settings;
    others.model_fingerprint = "another model";
    others.cache_folder = folder_;
    Engine engine(model, others);
    EXPECT_EQ(run(engine, prompt, usage, mode), expected);
    EXPECT_EQ(usage.cached_tokens, 0);
  }
}

}  // namespace
}  // namespace moba::llm::test
