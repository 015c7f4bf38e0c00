// The CPU backend's instruction sets, matrix units and two gates, which must select the same blocks.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "moba/attention.h"

namespace moba::test {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::int64_t kQueries = 2000;
#else
constexpr std::int64_t kQueries = 125'000;
#endif
constexpr std::int64_t kHeads = 8, kDepth = 32, kBlocks = 640;

/// Sets an environment variable during a test.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() { unsetenv(name_); }

 private:
  const char* name_;
};

/// Queries of all kinds: ordinary, huge in one place, tiny, zero, not finite.
std::vector<float> queries() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<std::size_t>(kQueries * kHeads * kDepth));
  for (float& x : q) x = normal(random);
  for (std::size_t row = 0; row < q.size() / kDepth; ++row) {
    float* values = q.data() + row * kDepth;
    switch (row % 16) {
      case 1:
        values[row % kDepth] *= 1e4F;
        break;
      case 2:
        values[row % kDepth] = 3e38F;
        break;
      case 3:
        for (int i = 0; i < kDepth; ++i) values[i] *= 1e-30F;
        break;
      case 4:
        for (int i = 0; i < kDepth; ++i) values[i] = 0;
        break;
      case 5:
        values[row % kDepth] = std::numeric_limits<float>::infinity();
        break;
      case 6:
        values[row % kDepth] = std::numeric_limits<float>::quiet_NaN();
        break;
      case 7:
        for (int i = 0; i < kDepth; ++i) values[i] = static_cast<float>(static_cast<int>(row + i) % 3 - 1);
        break;
      default:
        break;
    }
  }
  return q;
}

/// Keys that make blocks of one token, so each is its own mean: ordinary ones, equal ones, neighbours a bit
/// apart, outliers, NaN.
std::vector<float> keys() {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> k(static_cast<std::size_t>(kBlocks * kDepth));
  for (float& x : k) x = normal(random);
  const auto row = [&](std::int64_t block) { return k.data() + block * kDepth; };
  for (std::int64_t block = 100; block < 200; ++block) std::copy_n(row(block % 7), kDepth, row(block));
  for (std::int64_t block = 200; block < 300; ++block) {
    std::copy_n(row(3), kDepth, row(block));
    row(block)[block % kDepth] = std::nextafter(row(block)[block % kDepth], 10.0F);
  }
  for (std::int64_t block = 300; block < 320; ++block) row(block)[block % kDepth] *= 1e5F;
  for (std::int64_t block = 320; block < 330; ++block)
    row(block)[0] = std::numeric_limits<float>::quiet_NaN();
  for (std::int64_t i = 330 * kDepth; i < 340 * kDepth; ++i) k[static_cast<std::size_t>(i)] = 0;
  return k;
}

std::vector<std::int32_t> select(const std::vector<float>& q, const std::vector<float>& k, const char* gate,
                                 const Routing& routing, std::int64_t key_count) {
  const Environment environment("MOBA_CPU_GATE", gate);
  const Sequences sequences = one_sequence(kQueries, key_count);
  std::vector<std::int32_t> selection(
      static_cast<std::size_t>(kHeads * kQueries * selection_width(sequences, routing)));
  select_blocks(view(q.data(), {kQueries, kHeads, kDepth}), view(k.data(), {key_count, 1, kDepth}), sequences,
                routing, selection.data(), {.backend = "cpu"});
  return selection;
}

TEST(CpuGate, Int8SelectsTheBlocksOfF32OnAMillionRows) {
  const std::vector<float> q = queries(), k = keys();
  const Routing routing{.block_size = 1, .top_k = 5, .sink_blocks = 1, .causal = false, .own_block = true};
  EXPECT_TRUE(select(q, k, "f32", routing, kBlocks) == select(q, k, "int8", routing, kBlocks));
}

TEST(CpuGate, Int8SelectsTheBlocksOfF32WhenCausal) {
  const std::vector<float> q = queries();
  std::vector<float> k;
  for (int copy = 0; static_cast<std::int64_t>(k.size()) < kQueries * kDepth; ++copy) {
    const std::vector<float> more = keys();
    k.insert(k.end(), more.begin(), more.end());
  }
  const Routing routing{.block_size = kQueries / 200, .top_k = 9};
  EXPECT_TRUE(select(q, k, "f32", routing, kQueries) == select(q, k, "int8", routing, kQueries));
}

/// Runs dense attention on normally distributed values, its f32 products by multiply-adds or by AMX.
std::vector<float> attend_by(const char* units) {
  const Environment environment("MOBA_CPU_F32", units);
  constexpr std::int64_t kTokens = 300, kSize = 96;
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(kTokens * kSize)), out(x.size());
  for (float& value : x) value = normal(random);
  const Tensor tensor = view(x.data(), {kTokens, 1, kSize});
  attention(tensor, tensor, tensor, one_sequence(kTokens), Routing::full(),
            {.out = view(out.data(), {kTokens, 1, kSize})}, {.backend = "cpu"});
  return out;
}

TEST(CpuUnits, F32AsBf16x6MatchesFma) {
  const std::vector<float> fma = attend_by("fma"), amx = attend_by("amx");
  std::ifstream cpuinfo("/proc/cpuinfo");
  const std::string flags(std::istreambuf_iterator<char>(cpuinfo), {});
  const bool has_amx = cpu_target() == "AVX3" && flags.find("amx_bf16") != std::string::npos;
  EXPECT_EQ(fma != amx, has_amx);  // the variable took effect
  for (std::size_t i = 0; i < fma.size(); ++i) EXPECT_NEAR(fma[i], amx[i], 2e-6);
}

TEST(CpuUnits, F32AsBf16x6GradientsMatchFma) {
  constexpr std::int64_t kKeys = 1100, kSize = 40;
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  const auto numbers = [&](std::int64_t rows) {
    std::vector<float> x(static_cast<std::size_t>(rows * kSize));
    for (float& value : x) value = normal(random);
    return x;
  };
  for (const std::int64_t queries : {kKeys, std::int64_t{170}}) {
    std::vector<float> q = numbers(2 * queries), k = numbers(kKeys), v = numbers(kKeys),
                       d_out = numbers(2 * queries), out(q.size()),
                       lse(static_cast<std::size_t>(2 * queries));
    const auto rows = [](std::vector<float>& x, std::int64_t count, std::int64_t heads) {
      return view(x.data(), {count, heads, kSize});
    };
    const Sequences sequences = one_sequence(queries, kKeys);
    for (const bool causal : {true, false}) {
      attention(rows(q, queries, 2), rows(k, kKeys, 1), rows(v, kKeys, 1), sequences, Routing::full(causal),
                {.out = rows(out, queries, 2), .lse = lse.data()}, {.backend = "cpu"});
      const auto gradients = [&](const char* units) {
        const Environment environment("MOBA_CPU_F32", units);
        std::vector<float> dq(q.size()), dk(k.size()), dv(v.size());
        attention_backward(rows(d_out, queries, 2), rows(q, queries, 2), rows(k, kKeys, 1), rows(v, kKeys, 1),
                           {.out = rows(out, queries, 2), .lse = lse.data()}, sequences,
                           Routing::full(causal),
                           {.dq = rows(dq, queries, 2), .dk = rows(dk, kKeys, 1), .dv = rows(dv, kKeys, 1)},
                           {.backend = "cpu"});
        dq.insert(dq.end(), dk.begin(), dk.end());
        dq.insert(dq.end(), dv.begin(), dv.end());
        return dq;
      };
      const std::vector<float> fma = gradients("fma"), amx = gradients("amx");
      for (std::size_t i = 0; i < fma.size(); ++i)
        ASSERT_NEAR(fma[i], amx[i], 1e-5 + 1e-5 * std::abs(fma[i]));
    }
  }
}

TEST(CpuTarget, MobaCpuTargetSelectsTheInstructionSet) {
  const char* forced = std::getenv("MOBA_CPU_TARGET");
  if (forced == nullptr) {
    EXPECT_FALSE(cpu_target().empty());
  } else {
    EXPECT_EQ(cpu_target(), forced);
  }
}

}  // namespace
}  // namespace moba::test
