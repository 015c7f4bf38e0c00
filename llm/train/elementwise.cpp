#include "llm/train/elementwise.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "llm/model/rows.h"
#include "src/constants.h"
#include "src/number.h"

namespace moba::llm::train {
namespace {

/// Rows whose share of a sum over tokens is summed separately.
constexpr std::int64_t kRowsOfSum = 256;

/// e^x to 2 units in the last place, in arithmetic that the compiler can vectorise: 2^n times a polynomial in
/// the remainder, |r| <= ln(2) / 2. NaN stays NaN.
[[gnu::always_inline]] inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
  const float shifted = x * kLog2E + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::uint32_t bits = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  return p * std::bit_cast<float>(bits);
}

[[gnu::always_inline]] inline float sigmoid(float x) {
  return 1.0f / (1.0f + exponential(-x));
}

MOBA_CLONES void load_f32(const bfloat16* from, std::int64_t width, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) to[i] = float_of(from[i]);
}

MOBA_CLONES void store_f32(const float* from, std::int64_t width, bfloat16* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) to[i] = to_bfloat16(from[i]);
}

MOBA_CLONES float sum_of_squares(const float* x, std::int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
  return sum;
}

float inverse_rms(const float* x, std::int64_t width, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, width) / static_cast<float>(width) + eps);
}

MOBA_CLONES void normalise(const float* x, const float* weight, float inverse, std::int64_t width,
                           float* out) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) out[i] = x[i] * inverse * weight[i];
}

/// Returns the coefficient of x in the norm's derivative: mean(x * weight * dy) * inverse^2.
MOBA_CLONES float projection(const float* x, const float* weight, const float* dy, std::int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) sum += x[i] * weight[i] * dy[i];
  return sum / static_cast<float>(width);
}

MOBA_CLONES void add_norm_gradient(const float* x, const float* weight, const float* dy, float inverse,
                                   float along, std::int64_t width, float* dx, float* d_weight) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) {
    const float unit = x[i] * inverse;
    d_weight[i] += dy[i] * unit;
    dx[i] += inverse * (weight[i] * dy[i] - unit * along);
  }
}

MOBA_CLONES void gated(const float* gate, const float* up, std::int64_t width, float* out) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

MOBA_CLONES void gated_backward(float* gate, float* up, float* d_out, std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) {
    const float g = gate[i], u = up[i], d = d_out[i];
    const float s = sigmoid(g), silu = g * s;
    gate[i] = d * u * (s + silu * (1.0f - s));
    up[i] = d * silu;
    d_out[i] = silu * u;
  }
}

MOBA_CLONES void sum_rows(const float* x, const float* y, std::int64_t width, float* out) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) out[i] = x[i] + y[i];
}

MOBA_CLONES float largest(const float* x, std::int64_t width) {
  float max_logit = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : max_logit)
  for (std::int64_t i = 0; i < width; ++i) max_logit = x[i] > max_logit ? x[i] : max_logit;
  return max_logit;
}

MOBA_CLONES float exponentials(float* x, std::int64_t width, float max_logit) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) {
    x[i] = exponential(x[i] - max_logit);
    sum += x[i];
  }
  return sum;
}

MOBA_CLONES void scale_row(float* x, std::int64_t width, float factor) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) x[i] *= factor;
}

/// A row as floats, in place or in scratch memory that store() writes back.
template <typename T>
class Row {
 public:
  explicit Row(std::int64_t width) : width_(width) {
    if constexpr (!std::is_same_v<T, float>) scratch_.resize(static_cast<std::size_t>(width));
  }

  /// Returns a row to be overwritten.
  float* uninitialised(T* row) {
    if constexpr (std::is_same_v<T, float>) return row;
    return scratch_.data();
  }
  float* load(T* row) {
    if constexpr (std::is_same_v<T, float>) return row;
    load_f32(reinterpret_cast<const bfloat16*>(row), width_, scratch_.data());
    return scratch_.data();
  }
  const float* load(const T* row) { return load(const_cast<T*>(row)); }
  void store(T* row) {
    if constexpr (!std::is_same_v<T, float>) {
      store_f32(scratch_.data(), width_, reinterpret_cast<bfloat16*>(row));
    }
  }

 private:
  std::int64_t width_;
  std::vector<float> scratch_;
};

template <typename T>
T* row_of(const at::Tensor& tensor, std::int64_t row) {
  return static_cast<T*>(tensor.data_ptr()) + row * tensor.stride(0);
}

/// Calls `body` with a value of the tensor's C++ type.
template <typename Body>
void with_type_of(const at::Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == at::kBFloat16) return body(at::BFloat16());
  body(float());
}

/// Calls `body(first, last, sums)` for ranges of rows that do not depend on the number of threads, and adds
/// the sums [width] of all, in order, to `total` if it is defined.
template <typename Body>
void sum_over_rows(std::int64_t rows, std::int64_t width, const at::Tensor& total, const Body& body) {
  const std::int64_t parts = (rows + kRowsOfSum - 1) / kRowsOfSum;
  std::vector<float> sums(static_cast<std::size_t>(parts * width), 0.0f);
  at::parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      body(part * kRowsOfSum, std::min(rows, (part + 1) * kRowsOfSum), sums.data() + part * width);
    }
  });
  if (!total.defined()) return;
  float* out = total.mutable_data_ptr<float>();
  for (std::int64_t part = 0; part < parts; ++part) sum_rows(out, sums.data() + part * width, width, out);
}

}  // namespace

void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& out) {
  const std::int64_t width = x.size(1);
  const auto* w = weight.const_data_ptr<float>();
  with_type_of(out, [&](auto type) {
    using T = decltype(type);
    for_rows(x.size(0), width, [&](std::int64_t first, std::int64_t last) {
      Row<T> to(width);
      for (std::int64_t row = first; row < last; ++row) {
        const auto* from = row_of<float>(x, row);
        T* place = row_of<T>(out, row);
        normalise(from, w, inverse_rms(from, width, static_cast<float>(eps)), width, to.uninitialised(place));
        to.store(place);
      }
    });
  });
}

void rms_norm_backward(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& dy,
                       const at::Tensor& dx, const at::Tensor& d_weight) {
  const std::int64_t width = x.size(1);
  const auto* w = weight.const_data_ptr<float>();
  with_type_of(dy, [&](auto type) {
    using T = decltype(type);
    sum_over_rows(x.size(0), width, d_weight, [&](std::int64_t first, std::int64_t last, float* sums) {
      Row<T> gradient(width);
      for (std::int64_t row = first; row < last; ++row) {
        const auto* from = row_of<float>(x, row);
        const float* d = gradient.load(row_of<T>(dy, row));
        const float inverse = inverse_rms(from, width, static_cast<float>(eps));
        const float along = projection(from, w, d, width) * inverse;
        add_norm_gradient(from, w, d, inverse, along, width, row_of<float>(dx, row), sums);
      }
    });
  });
}

void head_norm_backward(const at::Tensor& heads, const at::Tensor& weight, double eps,
                        const at::Tensor& d_heads, const at::Tensor& d_weight) {
  const std::int64_t dim = weight.size(0), count = heads.size(1) / dim;
  const auto* w = weight.const_data_ptr<float>();
  with_type_of(heads, [&](auto type) {
    using T = decltype(type);
    sum_over_rows(heads.size(0), dim, d_weight, [&](std::int64_t first, std::int64_t last, float* sums) {
      Row<T> values(dim), gradient(dim);
      std::vector<float> result(static_cast<std::size_t>(dim));
      for (std::int64_t row = first; row < last; ++row) {
        for (std::int64_t head = 0; head < count; ++head) {
          const float* from = values.load(row_of<T>(heads, row) + head * dim);
          T* place = row_of<T>(d_heads, row) + head * dim;
          float* d = gradient.load(place);
          const float inverse = inverse_rms(from, dim, static_cast<float>(eps));
          const float along = projection(from, w, d, dim) * inverse;
          std::fill(result.begin(), result.end(), 0.0f);
          add_norm_gradient(from, w, d, inverse, along, dim, result.data(), sums);
          std::copy(result.begin(), result.end(), d);
          gradient.store(place);
        }
      }
    });
  });
}

void swiglu(const at::Tensor& gate_up, const at::Tensor& out) {
  const std::int64_t width = out.size(1);
  with_type_of(out, [&](auto type) {
    using T = decltype(type);
    for_rows(out.size(0), width, [&](std::int64_t first, std::int64_t last) {
      Row<T> gate(width), up(width), to(width);
      for (std::int64_t row = first; row < last; ++row) {
        const T* from = row_of<T>(gate_up, row);
        T* place = row_of<T>(out, row);
        gated(gate.load(from), up.load(from + width), width, to.uninitialised(place));
        to.store(place);
      }
    });
  });
}

void swiglu_backward(const at::Tensor& gate_up, const at::Tensor& d_out) {
  const std::int64_t width = d_out.size(1);
  with_type_of(d_out, [&](auto type) {
    using T = decltype(type);
    for_rows(d_out.size(0), width, [&](std::int64_t first, std::int64_t last) {
      Row<T> gate(width), up(width), d(width);
      for (std::int64_t row = first; row < last; ++row) {
        T* place = row_of<T>(gate_up, row);
        T* d_place = row_of<T>(d_out, row);
        gated_backward(gate.load(place), up.load(place + width), d.load(d_place), width);
        gate.store(place);
        up.store(place + width);
        d.store(d_place);
      }
    });
  });
}

void residual_add(const at::Tensor& x, const at::Tensor& y, const at::Tensor& out) {
  const std::int64_t width = x.size(1);
  with_type_of(y, [&](auto type) {
    using T = decltype(type);
    for_rows(x.size(0), width, [&](std::int64_t first, std::int64_t last) {
      Row<T> other(width);
      for (std::int64_t row = first; row < last; ++row) {
        sum_rows(row_of<float>(x, row), other.load(row_of<const T>(y, row)), width, row_of<float>(out, row));
      }
    });
  });
}

void convert(const at::Tensor& x, const at::Tensor& out) {
  const std::int64_t width = x.size(1);
  for_rows(x.size(0), width, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      store_f32(row_of<float>(x, row), width, row_of<bfloat16>(out, row));
    }
  });
}

void embed(const at::Tensor& table, std::span<const std::int32_t> tokens, const at::Tensor& out) {
  const std::int64_t width = table.size(1);
  for_rows(static_cast<std::int64_t>(tokens.size()), width, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      std::copy_n(row_of<float>(table, tokens[static_cast<std::size_t>(row)]), width,
                  row_of<float>(out, row));
    }
  });
}

void embed_backward(const at::Tensor& d_out, std::span<const std::int32_t> tokens,
                    const at::Tensor& d_table) {
  // Each thread takes a range of columns of all tokens, so that a row's sum has one order.
  at::parallel_for(0, d_table.size(1), 64, [&](std::int64_t first, std::int64_t last) {
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      float* to = row_of<float>(d_table, tokens[t]) + first;
      sum_rows(to, row_of<float>(d_out, static_cast<std::int64_t>(t)) + first, last - first, to);
    }
  });
}

void cross_entropy(const at::Tensor& logits, std::span<const std::int32_t> targets, float scale,
                   std::span<float> losses) {
  const std::int64_t width = logits.size(1);
  with_type_of(logits, [&](auto type) {
    using T = decltype(type);
    for_rows(logits.size(0), width, [&](std::int64_t first, std::int64_t last) {
      Row<T> values(width);
      for (std::int64_t row = first; row < last; ++row) {
        T* place = row_of<T>(logits, row);
        const auto target = static_cast<std::int64_t>(targets[static_cast<std::size_t>(row)]);
        float& loss = losses[static_cast<std::size_t>(row)];
        float* x = values.load(place);
        if (target < 0) {
          loss = 0;
          std::fill_n(x, width, 0.0f);
        } else {
          const float max_logit = largest(x, width), wanted = x[target];
          const float sum = exponentials(x, width, max_logit);
          loss = std::log(sum) - (wanted - max_logit);
          scale_row(x, width, scale / sum);
          x[target] -= scale;
        }
        values.store(place);
      }
    });
  });
}

}  // namespace moba::llm::train
