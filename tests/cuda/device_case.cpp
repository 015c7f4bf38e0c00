#include "device_case.h"

#include <gtest/gtest.h>

#include <algorithm>
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
