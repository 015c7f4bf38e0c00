#include "device_case.h"

#include <algorithm>
#include <random>

namespace moba::test {

Result run_on_device(const Case& c, Execution execution) {
  execution.backend = "cuda";
  Result result(c);
  Outputs outputs = result.outputs();
  outputs.out = on_device(outputs.out);
  attention(on_device(c.q.view()), on_device(c.k.view()), on_device(c.v.view()), c.sequences, c.routing,
            outputs, execution);
  return result;
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
