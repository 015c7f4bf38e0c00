#include "llm/calibrate/calibration.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>

#include "llm/engine/model_fingerprint.h"
#include "llm/error.h"
#include "llm/session/session.h"
#include "random_model.h"

namespace moba::llm::test {
namespace {

namespace fs = std::filesystem;

class CalibrationFile : public ::testing::Test {
 protected:
  CalibrationFile() : weights_(random_weights(small_config())) {
    fs::create_directories(folder_);
    Calibration calibration{.model = "small",
                            .fingerprint = weights_fingerprint(weights_),
                            .layers = {{.block_size = 32, .top_k = 5, .sink_blocks = 2},
                                       Routing::full(),
                                       {.block_size = 64, .top_k = 1}},
                            .full_tail = 17,
                            .measured = {{"loss", 1.5}}};
    write_calibration(path_, calibration);
  }
  ~CalibrationFile() override { fs::remove_all(folder_); }

  std::string text() const {
    std::stringstream text;
    text << std::ifstream(path_).rdbuf();
    return text.str();
  }
  /// Returns the complaint about the file after a change of its text.
  std::string complaint(const std::string& from, const std::string& to) const {
    std::string changed = text();
    changed.replace(changed.find(from), from.size(), to);
    return complaint(changed);
  }
  std::string complaint(const std::string& content) const {
    const fs::path path = folder_ / "changed.json";
    std::ofstream(path) << content;
    try {
      read_calibration(path, "small.gguf", weights_);
    } catch (const DataError& error) {
      return std::string(error.what()).substr(path.string().size());
    }
    return "";
  }

  fs::path folder_ = fs::temp_directory_path() / ("moba-calibration-test-" + std::to_string(getpid()));
  fs::path path_ = folder_ / "small.moba.json";
  Weights weights_;
};

TEST_F(CalibrationFile, IsReadAsItWasWritten) {
  const Calibration read = read_calibration(path_, "small.gguf", weights_);
  ASSERT_EQ(read.layers.size(), 3U);
  EXPECT_EQ(read.layers[0].block_size, 32);
  EXPECT_EQ(read.layers[0].top_k, 5);
  EXPECT_EQ(read.layers[0].sink_blocks, 2);
  EXPECT_TRUE(is_full(read.layers[1]));
  EXPECT_EQ(read.layers[1].block_size, 64);  // those of the longest blocks
  EXPECT_EQ(read.layers[2].top_k, 1);
  EXPECT_EQ(read.full_tail, 17);
  EXPECT_EQ(read.measured["loss"], 1.5);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 1);
}

TEST_F(CalibrationFile, OfAnotherModelThrows) {
  const Weights other = random_weights(small_config(), 2);
  EXPECT_NE(weights_fingerprint(other), weights_fingerprint(weights_));
  try {
    read_calibration(path_, "other.gguf", other);
    ADD_FAILURE() << "expected an error";
  } catch (const DataError& error) {
    EXPECT_EQ(error.what(),
              path_.string() + ": fingerprint: expected that of other.gguf, got that of another small");
  }
}

TEST_F(CalibrationFile, DamagedFilesThrow) {
  EXPECT_EQ(complaint("\"version\": 1", "\"version\": 2"),
            ": version: expected 1, got 2, which a later version of moba has written");
  EXPECT_EQ(complaint("moba calibration", "calibration"),
            ": format: expected \"moba calibration\", got 'calibration'");
  EXPECT_EQ(complaint("\"top_k\": 5", "\"top_k\": 2"),
            ": layers[0].sink: expected fewer than top_k 2, got 2");
  EXPECT_EQ(complaint("\"block_size\": 32", "\"block_size\": 0"),
            ": layers[0].block_size: expected 1 to 2147483647, got 0");
  EXPECT_EQ(complaint("\"full\"", "\"window\""),
            ": layers[1].attention: expected full or moba, got 'window'");
  EXPECT_EQ(complaint("\"full_tail\": 17", "\"full_tail\": -1"),
            ": full_tail: expected 0 to 2147483647, got -1");
  const std::string whole = text();
  for (std::size_t size = 0; size + 2 < whole.size(); size += 37)
    EXPECT_FALSE(complaint(whole.substr(0, size)).empty()) << size;
}

TEST(CalibrationPath, IsBesideTheModel) {
  EXPECT_EQ(calibration_beside("models/small.Q4_1.gguf"), "models/small.Q4_1.moba.json");
  EXPECT_EQ(calibration_beside(fs::temp_directory_path()), fs::temp_directory_path() / "model.moba.json");
}

}  // namespace
}  // namespace moba::llm::test
