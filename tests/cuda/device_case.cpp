#include "device_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <random>

namespace moba::test {
namespace {

/// Writes a line for tools/gpu_check.py, which compares the outputs of the emulation and of a device: the
/// test, the call, the dtype, and the output's bits.
void keep(const Case& c, const Result& result) {
  const char* file = std::getenv("MOBA_TEST_RESULTS");
  const auto* test = testing::UnitTest::GetInstance()->current_test_info();
  if (file == nullptr || test == nullptr) return;
  static std::ofstream lines(file);
  constexpr const char* kDigits = "0123456789abcdef";
  lines << test->test_suite_name() << '.' << test->name() << ' ' << c.seed << ' ' << name_of(c.dtype) << ' ';
  const Tensor out = result.out.view();
  for (std::int64_t token = 0; token < out.sizes[0]; ++token) {
    for (std::int64_t head = 0; head < out.sizes[1]; ++head) {
      const auto* row =
          static_cast<const std::uint16_t*>(out.data) + token * out.strides[0] + head * out.strides[1];
      for (std::int64_t d = 0; d < out.sizes[2]; ++d) {
        for (int shift : {4, 0, 12, 8}) lines << kDigits[row[d] >> shift & 15];
      }
    }
  }
  lines << '\n';
}

}  // namespace

Result run_on_device(const Case& c, Execution execution) {
  execution.backend = "cuda";
  Result result(c);
  Outputs outputs = result.outputs();
  outputs.out = on_device(outputs.out);
  attention(on_device(c.q.view()), on_device(c.k.view()), on_device(c.v.view()), c.sequences, c.routing,
            outputs, execution);
  keep(c, result);
  return result;
}

Case case_of(std::uint64_t seed, std::int64_t head_dim, const Routing& routing, std::int64_t queries,
             std::int64_t keys) {
  Case c{.seed = seed,
         .dtype = seed % 2 == 0 ? DType::bf16 : DType::f16,
         .heads_per_kv = 2,
         .head_dim = head_dim};
  c.sequences = one_sequence(queries, keys);
  c.routing = routing;
  fill(c);
  return c;
}

bool attends(const Case& c, const Result& forward, std::int64_t head, std::int64_t query, std::int64_t key) {
  if (key > query) return false;
  if (c.routing.top_k == Routing::kEverything) return true;
  const std::vector<std::int32_t> blocks = forward.row(head, query);
  return std::find(blocks.begin(), blocks.end(), key / c.routing.block_size) != blocks.end();
}

bool row_is_finite(const Array& array, std::int64_t token, std::int64_t head) {
  for (std::int64_t d = 0; d < array.head_dim(); ++d) {
    if (!std::isfinite(array.get(token, head, d))) return false;
  }
  return true;
}

void check_non_finite_forward(std::int64_t head_dim, const Routing& routing) {
  constexpr std::int64_t kTokens = 150, kBad = 70;
  for (const int place : {0, 1, 2}) {  // in q, k, v
    for (const double bad : {std::nan(""), HUGE_VAL}) {
      Case c = case_of(static_cast<std::uint64_t>(place) + 5, head_dim, routing, kTokens, kTokens);
      const std::int64_t bad_head = place == 0 ? 1 : 0;
      (place == 0 ? c.q : place == 1 ? c.k : c.v).set(kBad, bad_head, 3, bad);
      const Result found = run_on_device(c);
      for (std::int64_t head = 0; head < c.q_heads(); ++head) {
        for (std::int64_t query = 0; query < kTokens; ++query) {
          const bool depends =
              place == 0 ? query == kBad && head == bad_head : attends(c, found, head, query, kBad);
          const std::string where =
              describe(c) + " place " + std::to_string(place) + " query " + std::to_string(query);
          if (!depends || place == 2) {
            EXPECT_TRUE(std::isfinite(found.lse_at(head, query))) << where;
          }
          if (!depends) {
            EXPECT_TRUE(row_is_finite(found.out, query, head)) << where;
          } else if (std::isnan(bad) || place == 2) {  // a logit of -inf is a weight of 0
            EXPECT_FALSE(row_is_finite(found.out, query, head)) << where;
          }
        }
      }
    }
  }
}

Case random_device_case(std::uint64_t seed) {
  Case c = random_case(seed);
  std::mt19937_64 random(seed * 2 + 1);
  const auto one_of = [&]<typename T>(std::initializer_list<T> list) {
    return list.begin()[random() % list.size()];
  };
  c.dtype = one_of({DType::bf16, DType::f16});
  c.head_dim = one_of({64, 64, 96, 128, 256});
  c.kv_heads = std::min<std::int64_t>(c.kv_heads, 2);
  for (Layout* layout : {&c.q_layout, &c.k_layout, &c.v_layout, &c.out_layout}) {
    if (*layout == Layout::padded || *layout == Layout::heads_first) *layout = Layout::aligned;
  }
  fill(c);
  return c;
}

}  // namespace moba::test
