#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "app/flags.h"
#include "llm/session/session.h"

// The rows of `moba bench -m`, as llama.cpp's llama-bench has them.
namespace moba::app {

/// A prompt that is read or tokens that are generated, after `depth` tokens of context.
struct ModelTest {
  llm::AttentionMode attention;
  std::int64_t depth = 0;
  /// One of the two is 0.
  std::int64_t prompt = 0, generated = 0;

  std::int64_t tokens() const { return prompt + generated; }
};

/// Returns "pp512" or "tg128 @ d8192".
std::string name_of(const ModelTest& test);

struct ModelRow {
  ModelTest test;
  /// Of each repetition.
  std::vector<double> seconds;
};

/// The columns that all rows share.
struct BenchedModel {
  std::string file, type;
  std::uint64_t bytes = 0;
  std::int64_t parameters = 0;
  int threads = 1;
  /// Settings that have no column in the table.
  Json settings;
};

/// A Markdown table; the same with all values as CSV with a header; a JSON list of rows with the samples.
std::string table_text(const BenchedModel& model, const std::vector<ModelRow>& rows);
std::string csv_text(const BenchedModel& model, const std::vector<ModelRow>& rows);
std::string json_text(const BenchedModel& model, const std::vector<ModelRow>& rows);

}  // namespace moba::app
