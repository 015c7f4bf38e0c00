#include "llm/session/session_memory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "llm/error.h"

namespace moba::llm {
namespace {

namespace fs = std::filesystem;

/// A root folder with the files that the kernel has there.
class AvailableMemory : public ::testing::Test {
 protected:
  AvailableMemory() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    root_ = fs::temp_directory_path() / (std::string("moba-") + test->name() + std::to_string(getpid()));
    write("proc/meminfo", "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n");
  }
  ~AvailableMemory() override { fs::remove_all(root_); }

  void write(const std::string& file, const std::string& text) const {
    fs::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text;
  }

  std::int64_t available() const { return available_memory(root_); }

 private:
  fs::path root_;
};

TEST_F(AvailableMemory, IsThatOfTheMachineWithoutGroups) {
  EXPECT_EQ(available(), 1000 * 1024);
  write("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(available(), 1000 * 1024);
  write("sys/fs/cgroup/memory.max", "max\n");
  write("sys/fs/cgroup/memory.current", "5000\n");
  EXPECT_EQ(available(), 1000 * 1024);
}

TEST_F(AvailableMemory, IsWhatGroupsOfVersion2LeaveWithoutTheirCache) {
  write("proc/self/cgroup", "0::/service/job\n");
  write("sys/fs/cgroup/service/job/memory.max", "300000\n");
  write("sys/fs/cgroup/service/job/memory.current", "100000\n");
  EXPECT_EQ(available(), 200000);
  write("sys/fs/cgroup/service/job/memory.stat", "anon 1\ninactive_file 50000\n");
  EXPECT_EQ(available(), 250000);
  write("sys/fs/cgroup/service/memory.max", "200000\n");
  write("sys/fs/cgroup/service/memory.current", "100000\n");
  EXPECT_EQ(available(), 100000);
  write("sys/fs/cgroup/service/memory.current", "900000\n");
  EXPECT_EQ(available(), 0);
}

TEST_F(AvailableMemory, IsWhatGroupsOfVersion1Leave) {
  write("proc/self/cgroup", "5:cpu,cpuacct:/job\n4:memory:/elsewhere\n0::/\n");
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "300000\n");  // the container's root is the job's group
  write("sys/fs/cgroup/memory/memory.usage_in_bytes", "100000\n");
  write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 20000\n");
  EXPECT_EQ(available(), 220000);
}

std::string complaint(const SessionMemory& memory, std::int64_t tokens, std::int64_t available) {
  try {
    check_memory("m.gguf", memory, tokens, available);
  } catch (const DataError& error) {
    return error.what();
  }
  return "";
}

TEST(CheckMemory, NamesTheTokensThatFit) {
  constexpr std::int64_t kGiB = std::int64_t{1} << 30;
  const SessionMemory memory{.fixed = kGiB, .token = kGiB / 1024};
  EXPECT_EQ(complaint(memory, 1024, 2 * kGiB), "");
  EXPECT_EQ(
      complaint(memory, 1025, 2 * kGiB),
      "m.gguf: expected at most 1024 tokens of prompt and answer in 2.00 GiB of memory, got 1025 tokens");
  EXPECT_EQ(complaint(memory, 0, kGiB / 2),
            "m.gguf: expected weights and working memory of at most 0.50 GiB, got 1.00 GiB");
}

}  // namespace
}  // namespace moba::llm
