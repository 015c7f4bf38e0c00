#include "oracle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace moba::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
/// Unit roundoff of f32.
constexpr double kUnit = 0x1p-24;

/// Largest relative error of rounding to `dtype`.
double unit_of(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return 0x1p-8;
    case DType::f16:
      return 0x1p-11;
    case DType::f64:
      return 0x1p-53;
    default:
      return kUnit;
  }
}

/// Position of a query and its blocks.
struct Place {
  std::int64_t first_key = 0, keys = 0, position = 0;
};

/// Calls visit(head, packed token, place) for every row.
template <typename Visit>
void for_each_row(const Case& c, Visit&& visit) {
  for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_q.size(); ++s) {
    const std::int64_t q0 = c.sequences.cu_seqlens_q[s], q1 = c.sequences.cu_seqlens_q[s + 1];
    const std::int64_t k0 = c.sequences.cu_seqlens_k[s], k1 = c.sequences.cu_seqlens_k[s + 1];
    for (std::int64_t token = q0; token < q1; ++token) {
      const Place place{k0, k1 - k0, token - q0 + (k1 - k0) - (q1 - q0)};
      for (std::int64_t head = 0; head < c.q_heads(); ++head) visit(head, token, place);
    }
  }
}

/// Mean of a block, with a bound on the rounding error of each element.
struct Mean {
  std::vector<double> value, slack;
};

Mean mean_of(const Case& c, std::int64_t head, std::int64_t begin, std::int64_t end) {
  Mean mean;
  const auto count = static_cast<double>(end - begin);
  const DType dtype = c.dtype == DType::f64 ? DType::f32 : c.dtype;
  for (std::int64_t d = 0; d < c.head_dim; ++d) {
    double sum = 0, magnitude = 0;
    for (std::int64_t j = begin; j < end; ++j) {
      sum += c.k.get(j, head, d);
      magnitude += std::fabs(c.k.get(j, head, d));
    }
    const double exact = sum / count, error = kUnit * (count + 1) * magnitude / count;
    mean.value.push_back(rounded(exact, dtype));
    mean.slack.push_back(rounded(exact + error, dtype) - rounded(exact - error, dtype));
  }
  return mean;
}

struct Score {
  double value = 0, bound = 0;
};

Score score_of(const Case& c, std::int64_t head, std::int64_t token, const Mean& mean) {
  Score score;
  double magnitude = 0;
  for (std::int64_t d = 0; d < c.head_dim; ++d) {
    const auto i = static_cast<std::size_t>(d);
    const double q = c.q.get(token, head, d);
    score.value += q * mean.value[i];
    score.bound += std::fabs(q) * mean.slack[i];
    magnitude += std::fabs(q * mean.value[i]);
  }
  score.bound += kUnit * static_cast<double>(c.head_dim + 1) * magnitude;
  if (std::isnan(score.value)) score.value = -kInfinity;
  if (!std::isfinite(score.value)) score.bound = 0;
  return score;
}

std::vector<std::int32_t> up_to(std::int64_t count) {
  std::vector<std::int32_t> list(static_cast<std::size_t>(count));
  std::iota(list.begin(), list.end(), 0);
  return list;
}

bool contains(const std::vector<std::int32_t>& list, std::int64_t block) {
  return std::find(list.begin(), list.end(), block) != list.end();
}

/// Blocks that a row selects whatever the scores, and the number of others that it selects from
/// [first, last).
struct Duty {
  std::vector<std::int32_t> forced;
  std::int64_t first = 0, last = 0, chosen = 0;
};

Duty duty_of(const Case& c, const Place& place) {
  const Routing& r = c.routing;
  const std::int64_t blocks = place.keys == 0 ? 0 : (place.keys - 1) / r.block_size + 1;
  const std::int64_t own = place.position < 0 ? -1 : place.position / r.block_size;
  Duty duty;
  if (r.causal && own < 0) return duty;
  const std::int64_t candidates = r.causal ? own : blocks;
  duty.forced = up_to(std::min(r.sink_blocks, candidates));
  duty.first = static_cast<std::int64_t>(duty.forced.size());
  duty.last = candidates;
  std::int64_t open = duty.last - duty.first;
  if (r.causal) {
    duty.forced.push_back(static_cast<std::int32_t>(own));
  } else if (r.own_block && own >= duty.first) {
    duty.forced.push_back(static_cast<std::int32_t>(own));
    --open;
  }
  duty.chosen = std::min(r.top_k - static_cast<std::int64_t>(duty.forced.size()), open);
  return duty;
}

class SelectionCheck {
 public:
  SelectionCheck(const Case& c, const Result& result) : case_(c), result_(result) {}

  std::int64_t run() {
    for_each_row(case_, [&](std::int64_t head, std::int64_t token, const Place& place) {
      if (!failed_) check(head, token, place);
    });
    return swaps_;
  }

 private:
  void fail(std::int64_t head, std::int64_t token, const std::string& why) {
    failed_ = true;
    ADD_FAILURE() << describe(case_) << "\nhead " << head << ", token " << token << ": " << why
                  << "; selected " << testing::PrintToString(result_.row(head, token));
  }

  const std::vector<Mean>& means(const Place& place, std::int64_t head) {
    if (place.first_key != first_key_ || place.keys != keys_) {
      first_key_ = place.first_key;
      keys_ = place.keys;
      means_.assign(static_cast<std::size_t>(case_.kv_heads), {});
      for (std::int64_t h = 0; h < case_.kv_heads; ++h) {
        for (std::int64_t begin = 0; begin < keys_; begin += case_.routing.block_size) {
          const std::int64_t end = std::min(keys_, begin + std::min(keys_, case_.routing.block_size));
          means_[static_cast<std::size_t>(h)].push_back(
              mean_of(case_, h, first_key_ + begin, first_key_ + end));
          if (end == keys_) break;
        }
      }
    }
    return means_[static_cast<std::size_t>(head / case_.heads_per_kv)];
  }

  void check(std::int64_t head, std::int64_t token, const Place& place) {
    const std::vector<std::int32_t> row = result_.row(head, token);
    const Duty duty = duty_of(case_, place);
    if (std::adjacent_find(row.begin(), row.end(), std::greater_equal<>()) != row.end())
      return fail(head, token, "not ascending");
    const auto expected = static_cast<std::int64_t>(duty.forced.size()) + duty.chosen;
    if (static_cast<std::int64_t>(row.size()) != expected)
      return fail(head, token, std::to_string(expected) + " blocks expected");
    for (const std::int32_t block : duty.forced) {
      if (!contains(row, block)) return fail(head, token, "lacks forced block " + std::to_string(block));
    }
    std::vector<std::int32_t> open;
    for (std::int64_t block = duty.first; block < duty.last; ++block) {
      if (!contains(duty.forced, block)) open.push_back(static_cast<std::int32_t>(block));
    }
    for (const std::int32_t block : row) {
      if (!contains(open, block) && !contains(duty.forced, block))
        return fail(head, token, "block " + std::to_string(block) + " is none it may see");
    }
    if (duty.chosen == static_cast<std::int64_t>(open.size())) return;
    check_choice(head, token, place, row, open, duty.chosen);
  }

  void check_choice(std::int64_t head, std::int64_t token, const Place& place,
                    const std::vector<std::int32_t>& row, const std::vector<std::int32_t>& open,
                    std::int64_t chosen) {
    const std::vector<Mean>& mean = means(place, head);
    std::vector<Score> scores(mean.size());
    for (const std::int32_t block : open) {
      const auto b = static_cast<std::size_t>(block);
      scores[b] = score_of(case_, head, token, mean[b]);
    }
    std::vector<std::int32_t> best = open;
    std::sort(best.begin(), best.end(), [&](std::int32_t a, std::int32_t b) {
      const double left = scores[static_cast<std::size_t>(a)].value;
      const double right = scores[static_cast<std::size_t>(b)].value;
      return left != right ? left > right : a > b;
    });
    best.resize(static_cast<std::size_t>(chosen));

    for (const std::int32_t taken : open) {
      if (!contains(row, taken) || contains(best, taken)) continue;
      ++swaps_;
      for (const std::int32_t missed : best) {
        if (contains(row, missed)) continue;
        const auto t = static_cast<std::size_t>(taken), m = static_cast<std::size_t>(missed);
        const bool explained =
            scores[t].value != scores[m].value
                ? scores[m].value - scores[t].value <= scores[m].bound + scores[t].bound
                : taken > missed ||
                      (scores[t].bound > 0 && !same_keys(place, head / case_.heads_per_kv, taken, missed));
        if (!explained)
          return fail(head, token,
                      "takes block " + std::to_string(taken) + " with score " +
                          testing::PrintToString(scores[t].value) + " and misses block " +
                          std::to_string(missed) + " with " + testing::PrintToString(scores[m].value));
      }
    }
  }

  bool same_keys(const Place& place, std::int64_t head, std::int64_t a, std::int64_t b) const {
    const std::int64_t size = case_.routing.block_size;
    if ((std::max(a, b) + 1) * size > place.keys) return false;
    for (std::int64_t i = 0; i < size; ++i) {
      for (std::int64_t d = 0; d < case_.head_dim; ++d) {
        if (case_.k.get(place.first_key + a * size + i, head, d) !=
            case_.k.get(place.first_key + b * size + i, head, d))
          return false;
      }
    }
    return true;
  }

  const Case& case_;
  const Result& result_;
  std::int64_t swaps_ = 0;
  bool failed_ = false;
  std::int64_t first_key_ = -1, keys_ = -1;
  std::vector<std::vector<Mean>> means_;
};

/// Returns whether both are the same NaN or infinity, or differ by at most `tolerance`.
bool is_near(double found, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(found);
  if (std::isinf(expected)) return found == expected;
  return std::fabs(found - expected) <= tolerance;
}

/// Returns the largest finite difference.
template <typename Real>
double worst(const std::vector<Real>& found, const std::vector<double>& expected) {
  double max_error = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double error = std::fabs(static_cast<double>(found[i]) - expected[i]);
    if (std::isfinite(error)) max_error = std::max(max_error, error);
  }
  return max_error;
}

float scale_of(const Case& c) {
  return c.routing.scale.value_or(1 / std::sqrt(static_cast<float>(c.head_dim)));
}

/// Bound on the f32 error of a logit: some sqrt(D) roundings of the largest sum of |q k|, and a few of its
/// scale.
double logit_rounding(const Case& c) {
  double max_sum = 0;
  for_each_row(c, [&](std::int64_t head, std::int64_t token, const Place& place) {
    for (std::int64_t j = place.first_key; j < place.first_key + place.keys; ++j) {
      double magnitude = 0;
      for (std::int64_t d = 0; d < c.head_dim; ++d)
        magnitude += std::fabs(c.q.get(token, head, d) * c.k.get(j, head / c.heads_per_kv, d));
      if (std::isfinite(magnitude)) max_sum = std::max(max_sum, magnitude);
    }
  });
  return kUnit * (4 + 2 * std::sqrt(static_cast<double>(c.head_dim))) * max_sum * std::fabs(scale_of(c));
}

}  // namespace

template <typename Real>
Attended<Real> attend_densely(const Case& c, const Result& selected) {
  const auto rows = static_cast<std::size_t>(c.q_heads() * c.queries());
  Attended<Real> attended;
  attended.out.resize(rows * static_cast<std::size_t>(c.head_dim));
  attended.lse.resize(rows);
  const Real scale = scale_of(c);
  std::vector<Real> weights;
  for_each_row(c, [&](std::int64_t head, std::int64_t token, const Place& place) {
    const std::int64_t kv_head = head / c.heads_per_kv;
    const std::vector<std::int32_t> blocks = selected.row(head, token);
    weights.assign(static_cast<std::size_t>(place.keys), -std::numeric_limits<Real>::infinity());
    Real largest = -std::numeric_limits<Real>::infinity();
    for (const std::int32_t block : blocks) {
      const std::int64_t begin = block * c.routing.block_size;
      for (std::int64_t j = begin; j < place.keys && j - begin < c.routing.block_size; ++j) {
        if (c.routing.causal && j > place.position) continue;
        Real logit = 0;
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          logit += static_cast<Real>(c.q.get(token, head, d)) *
                   static_cast<Real>(c.k.get(place.first_key + j, kv_head, d));
        }
        weights[static_cast<std::size_t>(j)] = logit * scale;
        if (logit * scale > largest) largest = logit * scale;
      }
    }
    if (largest == -std::numeric_limits<Real>::infinity()) largest = 0;
    Real sum = 0;
    for (Real& weight : weights) sum += weight = std::exp(weight - largest);
    if constexpr (std::is_same_v<Real, float>) {
      for (float& weight : weights) weight = static_cast<float>(rounded(weight, c.dtype));
    }
    const auto row = static_cast<std::size_t>(head * c.queries() + token);
    attended.lse[row] = sum == 0 ? -std::numeric_limits<Real>::infinity() : largest + std::log(sum);
    for (std::int64_t d = 0; d < c.head_dim; ++d) {
      Real out = 0;
      for (std::int64_t j = 0; j < place.keys; ++j) {
        out += weights[static_cast<std::size_t>(j)] *
               static_cast<Real>(c.v.get(place.first_key + j, kv_head, d));
      }
      attended.out[row * static_cast<std::size_t>(c.head_dim) + static_cast<std::size_t>(d)] =
          sum == 0 ? 0 : out / sum;
    }
  });
  return attended;
}

template Attended<double> attend_densely(const Case&, const Result&);
template Attended<float> attend_densely(const Case&, const Result&);

std::int64_t check_selection(const Case& c, const Result& result) {
  return SelectionCheck(c, result).run();
}

void check_attended(const Case& c, const Result& result, Rounding rounding) {
  const Attended<double> truth = attend_densely<double>(c, result);
  double out_allowed = 1e-12 * largest(c.v), lse_allowed = 1e-12;
  if (rounding != Rounding::exact) {
    const Attended<float> plain = attend_densely<float>(c, result);
    const double of_logits = 8 * kUnit + logit_rounding(c);
    out_allowed = 2 * worst(plain.out, truth.out) + of_logits * largest(c.v);
    lse_allowed = 2 * worst(plain.lse, truth.lse) + of_logits;
  }
  // No partial result exceeds the largest value, and their weights add up to 1.
  if (rounding == Rounding::partial) out_allowed += unit_of(c.dtype) / 2 * largest(c.v);
  const double out_unit = unit_of(c.dtype) * 1.001, smallest = c.dtype == DType::f16 ? 0x1p-25 : 0x1p-149;
  for (std::int64_t head = 0; head < c.q_heads(); ++head) {
    for (std::int64_t token = 0; token < c.queries(); ++token) {
      const auto row = static_cast<std::size_t>(head * c.queries() + token);
      const double lse = result.lse_at(head, token), true_lse = truth.lse[row];
      if (!is_near(lse, true_lse, lse_allowed + 4 * kUnit * std::fabs(true_lse))) {
        ADD_FAILURE() << describe(c) << "\nlse of head " << head << ", token " << token << " is " << lse
                      << "; " << true_lse << " is expected, give or take " << lse_allowed;
        return;
      }
      for (std::int64_t d = 0; d < c.head_dim; ++d) {
        const double out = result.out.get(token, head, d);
        const double true_out =
            truth.out[row * static_cast<std::size_t>(c.head_dim) + static_cast<std::size_t>(d)];
        if (is_near(out, true_out, out_allowed + out_unit * std::fabs(true_out) + smallest)) continue;
        ADD_FAILURE() << describe(c) << "\nout of head " << head << ", token " << token << ", element " << d
                      << " is " << out << "; " << true_out << " is expected, give or take " << out_allowed;
        return;
      }
    }
  }
}

std::int64_t check_result(const Case& c, const Result& result, Rounding rounding) {
  EXPECT_TRUE(result.fences_untouched()) << describe(c) << "\nwrote outside its outputs";
  const std::int64_t swaps = check_selection(c, result);
  check_attended(c, result, rounding);
  return swaps;
}

}  // namespace moba::test
