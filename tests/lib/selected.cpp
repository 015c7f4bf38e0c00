#include "selected.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

namespace moba::test {

Selected random_selection(const Case& c, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto between = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine);
  };
  std::vector<std::int64_t> divisors;
  for (std::int64_t heads = 1; heads <= c.q_heads(); ++heads) {
    if (c.q_heads() % heads == 0) divisors.push_back(heads);
  }
  const std::int64_t heads = divisors[static_cast<std::size_t>(between(0, std::ssize(divisors) - 1))];
  Selected selected(heads, c.queries(), between(c.routing.causal ? 1 : 0, 9), between(0, 3));
  for_each_row(c, heads, [&](std::int64_t head, std::int64_t token, std::int64_t own, std::int64_t seen) {
    std::vector<std::int32_t> blocks(static_cast<std::size_t>(own >= 0 ? seen - 1 : seen));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), engine);
    const std::int64_t most = std::min(std::ssize(blocks), selected.width - (own >= 0 ? 1 : 0));
    blocks.resize(static_cast<std::size_t>(between(0, std::max<std::int64_t>(most, 0))));
    if (own >= 0) blocks.push_back(static_cast<std::int32_t>(own));
    std::sort(blocks.begin(), blocks.end());
    std::copy(blocks.begin(), blocks.end(), selected.row(head, token));
  });
  return selected;
}

void enter(const Selected& selected, const Case& c, Result& result) {
  for (std::int64_t head = 0; head < c.q_heads(); ++head) {
    for (std::int64_t token = 0; token < c.queries(); ++token) {
      const std::int32_t* row = selected.row(head / (c.q_heads() / selected.heads), token);
      std::copy_n(row, result.width,
                  result.outputs().selection + (head * c.queries() + token) * result.width);
    }
  }
}

TrueGradients true_gradients(const Case& c, const Result& result, const Array& d_out) {
  const Attended<double> truth = attend_densely<double>(c, result);
  const auto size = [&](std::int64_t tokens, std::int64_t heads) {
    return static_cast<std::size_t>(tokens * heads * c.head_dim);
  };
  TrueGradients g{std::vector<double>(size(c.queries(), c.q_heads())),
                  std::vector<double>(size(c.keys(), c.kv_heads)),
                  std::vector<double>(size(c.keys(), c.kv_heads))};
  const double scale = c.routing.scale.value_or(1 / std::sqrt(static_cast<float>(c.head_dim)));
  for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_q.size(); ++s) {
    const std::int64_t q0 = c.sequences.cu_seqlens_q[s], q1 = c.sequences.cu_seqlens_q[s + 1];
    const std::int64_t k0 = c.sequences.cu_seqlens_k[s], k1 = c.sequences.cu_seqlens_k[s + 1];
    for (std::int64_t token = q0; token < q1; ++token) {
      for (std::int64_t head = 0; head < c.q_heads(); ++head) {
        const auto row = static_cast<std::size_t>(head * c.queries() + token);
        const std::int64_t kv = head / c.heads_per_kv;
        double delta = 0;
        for (std::int64_t d = 0; d < c.head_dim; ++d)
          delta += d_out.get(token, head, d) *
                   truth.out[row * static_cast<std::size_t>(c.head_dim) + static_cast<std::size_t>(d)];
        for (const std::int32_t block : result.row(head, token)) {
          const std::int64_t begin = k0 + block * c.routing.block_size;
          for (std::int64_t key = begin; key < std::min(begin + c.routing.block_size, k1); ++key) {
            if (c.routing.causal && key - k0 > token - q1 + k1 - k0) continue;
            double logit = 0, dp = 0;
            for (std::int64_t d = 0; d < c.head_dim; ++d) {
              logit += c.q.get(token, head, d) * c.k.get(key, kv, d);
              dp += d_out.get(token, head, d) * c.v.get(key, kv, d);
            }
            const double p = std::exp(scale * logit - truth.lse[row]), ds = scale * p * (dp - delta);
            for (std::int64_t d = 0; d < c.head_dim; ++d) {
              const auto of_q = static_cast<std::size_t>((token * c.q_heads() + head) * c.head_dim + d);
              const auto of_k = static_cast<std::size_t>((key * c.kv_heads + kv) * c.head_dim + d);
              g.dq[of_q] += ds * c.k.get(key, kv, d);
              g.dk[of_k] += ds * c.q.get(token, head, d);
              g.dv[of_k] += p * d_out.get(token, head, d);
            }
          }
        }
      }
    }
  }
  return g;
}

void check_near(const Case& c, const char* name, const Array& found, const std::vector<double>& expected,
                double tolerance) {
  std::size_t i = 0;
  for (std::int64_t token = 0; token < found.tokens(); ++token) {
    for (std::int64_t head = 0; head < found.heads(); ++head) {
      for (std::int64_t d = 0; d < found.head_dim(); ++d, ++i) {
        ASSERT_NEAR(found.get(token, head, d), expected[i], tolerance * (1 + std::fabs(expected[i])))
            << describe(c) << "\n"
            << name << " of token " << token << ", head " << head << ", element " << d;
      }
    }
  }
}

Array gradient_for(const Case& c) {
  Case other = c;
  other.seed = c.seed + 99;
  other.values = Values::normal;
  fill(other);
  return other.q;
}

}  // namespace moba::test
