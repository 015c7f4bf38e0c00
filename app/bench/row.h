#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "moba/execution.h"
#include "moba/tensor.h"

/// The settings and results of `moba bench`. Plain data.
namespace moba::bench {

enum class Pass : std::uint8_t { forward, backward, gate, decode };
/// Routing pattern of the queries: each query its own blocks; neighbours the same; nearly all queries block
/// 0.
enum class Pattern : std::uint8_t { independent, clustered, sink };

const char* name_of(Pass pass);
const char* name_of(Pattern pattern);

/// Blocks of `chunk_size` tokens, `topk` of them a query; 0: all.
struct Variant {
  std::int64_t chunk_size = 512, topk = 3;
};

/// Data that several variants are compared on.
struct Setting {
  Pass pass = Pass::forward;
  std::int64_t tokens = 0, heads = 1, kv_heads = 1, head_dim = 128;
  DType dtype = DType::f32;
  Pattern pattern = Pattern::independent;
  /// Share of the queries that is computed, in evenly spread ranges; the time is scaled to all of them.
  double share = 1;
};

/// The number of runs, and the means of computing.
struct Conditions {
  int threads = 1, runs = 5;
  /// Maximum time of a row's timed runs together, estimated from the checked run.
  double budget_seconds = std::numeric_limits<double>::infinity();
  std::uint64_t seed = 0;
  std::size_t workspace_bytes = 0;
};

/// Useful work, and bytes that cannot but be read.
struct Work {
  double attention_flops = 0, gate_flops = 0, read_bytes = 0;
};

struct Ceilings {
  double fma_gflops = 0;
  /// The rate of the CPU's own bf16 products, and their name; 0 where it has none or the row uses none.
  double bf16_gflops = 0;
  std::string bf16_name;
  double read_gb_per_s = 0;
};

struct Row {
  Setting setting;
  Variant variant;
  int threads = 1;
  /// By run, ascending.
  std::vector<double> seconds{};
  /// Medians of the stages, and the most scratch memory of any run.
  Profile stages{};
  Work work{};
  Ceilings ceilings{};
  /// Rows compared with the reference before timing, and how many of them chose another block at a tie
  /// within rounding.
  std::int64_t checked_rows = 0, ties = 0;
  /// Peak of the process, up to the end of this row.
  std::int64_t peak_rss_bytes = 0;

  double median() const { return seconds[seconds.size() / 2]; }
  double gflops() const { return (work.attention_flops + work.gate_flops) / median() / 1e9; }
  /// The ceiling that `fraction_of_peak` is a fraction of: "fma_f32", the name of the bf16 products, or
  /// "read_bandwidth".
  std::string ceiling() const;
  double fraction_of_peak() const;
};

}  // namespace moba::bench
