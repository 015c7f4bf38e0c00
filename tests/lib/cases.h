#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "array.h"
#include "moba/attention.h"

namespace moba::test {

/// Distribution of the values of a case.
enum class Values { normal, large, integers, equal, few_keys, specials };

/// One call of the library: shapes, routing and inputs.
struct Case {
  std::uint64_t seed = 0;
  DType dtype = DType::f32;
  std::int64_t kv_heads = 1, heads_per_kv = 1, head_dim = 16;
  Sequences sequences{};
  Routing routing{};
  Values values = Values::normal;
  Layout q_layout = Layout::contiguous, k_layout = Layout::contiguous, v_layout = Layout::contiguous;
  Layout out_layout = Layout::contiguous;
  Array q{}, k{}, v{};

  std::int64_t q_heads() const { return kv_heads * heads_per_kv; }
  std::int64_t queries() const { return sequences.cu_seqlens_q.back(); }
  std::int64_t keys() const { return sequences.cu_seqlens_k.back(); }
};

/// Returns the parameters that reproduce a failing case.
std::string describe(const Case& c);

/// Makes q, k and v from the other fields.
void fill(Case& c);

/// Returns a small case of any kind, the same for the same seed.
Case random_case(std::uint64_t seed);

/// Returns a case of one sequence, of normally distributed values.
Case plain_case(std::uint64_t seed, std::int64_t queries, std::int64_t keys, const Routing& routing);

/// Outputs of a call. Fences around lse and selection detect writes outside of them.
struct Result {
  Array out{};
  std::vector<float> lse{};
  std::vector<std::int32_t> selection{};

  explicit Result(const Case& c);
  Outputs outputs();
  float lse_at(std::int64_t head, std::int64_t token) const;
  /// Returns the selected blocks of a row, up to the first -1.
  std::vector<std::int32_t> row(std::int64_t head, std::int64_t token) const;
  bool fences_untouched() const;
  bool operator==(const Result& other) const;

  std::int64_t queries = 0, width = 0;
};

Result run_attention(const Case& c, const Execution& execution);

}  // namespace moba::test
