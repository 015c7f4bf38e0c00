#include "cases.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <sstream>

namespace moba::test {
namespace {

constexpr std::size_t kFence = 4;
constexpr float kUnwrittenLse = -12345.0F;
constexpr std::int32_t kUnwrittenBlock = -77;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  double normal() { return normal_(engine_); }
  template <typename T>
  T one_of(std::initializer_list<T> list) {
    return list.begin()[between(0, static_cast<std::int64_t>(list.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

double special(Random& random) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return random.one_of({std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity});
}

double number(Values values, Random& random) {
  switch (values) {
    case Values::large:
      return 6 * random.normal();
    case Values::integers:
      return static_cast<double>(random.between(-2, 2));
    case Values::equal:
      return 0.5;
    case Values::normal:
    case Values::few_keys:
    case Values::specials:
      return random.normal();
  }
  return 0;
}

void fill(Array& array, Values values, double special_share, Random& random) {
  for (std::int64_t token = 0; token < array.tokens(); ++token) {
    for (std::int64_t head = 0; head < array.heads(); ++head) {
      for (std::int64_t d = 0; d < array.head_dim(); ++d) {
        const bool is_special = special_share > 0 && random.chance(special_share);
        array.set(token, head, d, is_special ? special(random) : number(values, random));
      }
    }
  }
}

/// Repeats the first few tokens, so that whole blocks have equal means.
void repeat_tokens(Array& array, std::int64_t period) {
  for (std::int64_t token = period; token < array.tokens(); ++token) {
    for (std::int64_t head = 0; head < array.heads(); ++head) {
      for (std::int64_t d = 0; d < array.head_dim(); ++d)
        array.set(token, head, d, array.get(token - period, head, d));
    }
  }
}

Sequences random_sequences(Random& random) {
  Sequences sequences{{0}, {0}};
  const std::int64_t count = random.one_of({1, 1, 1, 2, 3, 4});
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t keys = random.one_of<std::int64_t>(
        {0, 1, random.between(1, 12), random.between(1, 40), random.between(1, 70)});
    std::int64_t queries = keys;
    if (random.chance(0.25)) queries = random.between(0, keys);
    if (random.chance(0.1)) queries = keys + random.between(0, 5);
    sequences.cu_seqlens_q.push_back(sequences.cu_seqlens_q.back() + static_cast<std::int32_t>(queries));
    sequences.cu_seqlens_k.push_back(sequences.cu_seqlens_k.back() + static_cast<std::int32_t>(keys));
  }
  return sequences;
}

Routing random_routing(Random& random) {
  Routing routing;
  routing.causal = random.chance(0.7);
  routing.block_size = random.one_of<std::int64_t>({1, 2, 3, 4, 5, 8, 11, 16, 17, 32, 64, 1000});
  routing.top_k = random.one_of<std::int64_t>({1, 2, 2, 3, 3, 4, 5, 8, 50, Routing::kEverything});
  routing.own_block = !routing.causal && random.chance(0.5);
  const std::int64_t forced = routing.causal || routing.own_block ? 1 : 0;
  if (random.chance(0.3))
    routing.sink_blocks = random.between(0, std::min<std::int64_t>(routing.top_k - forced, 4));
  if (random.chance(0.3)) routing.scale = random.one_of({1.0F, 0.3F, -0.5F, 0.0F});
  return routing;
}

template <typename T>
std::string joined(const std::vector<T>& list) {
  std::ostringstream text;
  for (const T& item : list) text << (&item == list.data() ? "" : " ") << item;
  return text.str();
}

}  // namespace

std::string describe(const Case& c) {
  std::ostringstream text;
  text << "seed " << c.seed << ": " << moba::name_of(c.dtype) << ", Hq " << c.q_heads() << ", Hkv "
       << c.kv_heads << ", D " << c.head_dim << ", q starts [" << joined(c.sequences.cu_seqlens_q)
       << "], k starts [" << joined(c.sequences.cu_seqlens_k) << "], B " << c.routing.block_size << ", K "
       << c.routing.top_k << ", sinks " << c.routing.sink_blocks
       << (c.routing.causal ? ", causal" : ", not causal") << (c.routing.own_block ? ", own block" : "")
       << ", values " << static_cast<int>(c.values) << ", layouts " << name_of(c.q_layout) << " "
       << name_of(c.k_layout) << " " << name_of(c.v_layout) << " " << name_of(c.out_layout);
  if (c.routing.scale) text << ", scale " << *c.routing.scale;
  return text.str();
}

void fill(Case& c) {
  Random random(c.seed + 1);
  c.q = Array(c.dtype, c.queries(), c.q_heads(), c.head_dim, c.q_layout);
  c.k = Array(c.dtype, c.keys(), c.kv_heads, c.head_dim, c.k_layout);
  c.v = Array(c.dtype, c.keys(), c.kv_heads, c.head_dim, c.v_layout);
  const bool specials = c.values == Values::specials, in_q = random.chance(0.5);
  fill(c.q, c.values, specials && in_q ? 0.01 : 0, random);
  fill(c.k, c.values, specials && !in_q ? 0.005 : 0, random);
  fill(c.v, Values::normal, 0, random);
  if (c.values == Values::few_keys) repeat_tokens(c.k, random.between(1, 2 * c.routing.block_size));
}

Case random_case(std::uint64_t seed) {
  Random random(seed);
  Case c{.seed = seed};
  c.dtype = random.one_of({DType::f32, DType::f32, DType::bf16, DType::f16});
  c.kv_heads = random.one_of<std::int64_t>({1, 1, 2, 3});
  c.heads_per_kv = random.one_of<std::int64_t>({1, 1, 3, 8});
  c.head_dim = random.one_of<std::int64_t>({1, 2, 7, 16, 17, 32, 40, 64, 80});
  c.sequences = random_sequences(random);
  c.routing = random_routing(random);
  c.values = random.one_of({Values::normal, Values::normal, Values::normal, Values::large, Values::integers,
                            Values::equal, Values::few_keys, Values::specials});
  if (c.values == Values::specials && c.routing.scale == 0.0F) c.routing.scale.reset();  // 0 x inf is NaN
  const auto layout = [&] {
    return random.one_of({Layout::contiguous, Layout::padded, Layout::heads_first, Layout::reversed});
  };
  c.q_layout = layout();
  c.k_layout = random.chance(0.1) ? Layout::shared_heads : layout();
  c.v_layout = random.chance(0.1) ? Layout::shared_heads : layout();
  c.out_layout = layout();
  fill(c);
  return c;
}

Case plain_case(std::uint64_t seed, std::int64_t queries, std::int64_t keys, const Routing& routing) {
  Case c{.seed = seed, .sequences = one_sequence(queries, keys), .routing = routing};
  fill(c);
  return c;
}

Result::Result(const Case& c)
    : out(c.dtype, c.queries(), c.q_heads(), c.head_dim, c.out_layout),
      queries(c.queries()),
      width(selection_width(c.sequences, c.routing)) {
  const auto rows = static_cast<std::size_t>(c.q_heads() * queries);
  lse.assign(rows + 2 * kFence, kUnwrittenLse);
  selection.assign(rows * static_cast<std::size_t>(width) + 2 * kFence, kUnwrittenBlock);
}

Outputs Result::outputs() {
  return {.out = out.view(), .lse = lse.data() + kFence, .selection = selection.data() + kFence};
}

float Result::lse_at(std::int64_t head, std::int64_t token) const {
  return lse[kFence + static_cast<std::size_t>(head * queries + token)];
}

std::vector<std::int32_t> Result::row(std::int64_t head, std::int64_t token) const {
  const auto begin = selection.begin() + kFence + (head * queries + token) * width;
  return {begin, std::find(begin, begin + width, -1)};
}

bool Result::fences_untouched() const {
  const auto stands = [](const auto& list, auto value) {
    return std::count(list.begin(), list.begin() + kFence, value) == kFence &&
           std::count(list.end() - kFence, list.end(), value) == kFence;
  };
  return out.gaps_untouched() && stands(lse, kUnwrittenLse) && stands(selection, kUnwrittenBlock);
}

bool Result::operator==(const Result& other) const {
  return out.bytes() == other.out.bytes() && selection == other.selection && lse.size() == other.lse.size() &&
         std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
}

Result run_attention(const Case& c, const Execution& execution) {
  Result result(c);
  attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, c.routing, result.outputs(), execution);
  return result;
}

}  // namespace moba::test
