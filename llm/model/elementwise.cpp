#include "llm/model/elementwise.h"

#include <cmath>

#include "llm/formats/instruction_set.h"
#include "llm/model/rows.h"
#include "moba/tensor.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "llm/model/elementwise.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

#include "llm/formats/float_vectors-inl.h"
#include "src/exp2-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::llm::HWY_NAMESPACE {
namespace {

/// Calls `body(d, i)` for vectors of tag `d` that cover [0, width).
template <typename Body>
HWY_INLINE void each_vector(std::int64_t width, const Body& body) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= width; i += lanes) body(d, i);
  for (const hn::CappedTag<float, 1> one; i < width; ++i) body(one, i);
}

template <typename In, typename Out>
void normalise(const In* x, const float* weight, std::int64_t width, float eps, Out* out) {
  const hn::ScalableTag<float> d;
  auto sums = hn::Zero(d);
  float sum = 0;
  each_vector(width, [&](auto tag, std::int64_t i) HWY_ATTR {
    const auto v = load(tag, x + i);
    if constexpr (std::is_same_v<decltype(tag), hn::ScalableTag<float>>) {
      sums = hn::MulAdd(v, v, sums);
    } else {
      sum += hn::GetLane(hn::Mul(v, v));
    }
  });
  sum += hn::GetLane(hn::SumOfLanes(d, sums));
  const float scale = 1.0F / std::sqrt(sum / static_cast<float>(width) + eps);
  each_vector(width, [&](auto tag, std::int64_t i) HWY_ATTR {
    store(tag, hn::Mul(hn::Mul(load(tag, x + i), hn::Set(tag, scale)), load(tag, weight + i)), out + i);
  });
}

template <typename T>
void rotate(T* head, const float* cosines, const float* sines, std::int64_t half) {
  each_vector(half, [&](auto tag, std::int64_t i) HWY_ATTR {
    const auto first = load(tag, head + i), second = load(tag, head + half + i);
    const auto cosine = load(tag, cosines + i), sine = load(tag, sines + i);
    store(tag, hn::Sub(hn::Mul(first, cosine), hn::Mul(second, sine)), head + i);
    store(tag, hn::Add(hn::Mul(second, cosine), hn::Mul(first, sine)), head + half + i);
  });
}

/// e^-x for x >= 0.
template <class D>
HWY_INLINE hn::Vec<D> exp_of_minus(D d, hn::Vec<D> x) {
  const auto power = hn::Mul(x, hn::Set(d, -1.44269504F));  // log2(e)
  if constexpr (std::is_same_v<D, cpu::HWY_NAMESPACE::F32>) {
    return cpu::HWY_NAMESPACE::exp2(power);
  } else {
    const auto all = hn::Set(cpu::HWY_NAMESPACE::F32(), hn::GetLane(power));
    return hn::Set(d, hn::GetLane(cpu::HWY_NAMESPACE::exp2(all)));
  }
}

/// gate <- gate / (1 + e^-gate) * up, without an exponential that may overflow.
template <typename T>
void gate(T* gate, const T* up, std::int64_t width) {
  each_vector(width, [&](auto tag, std::int64_t i) HWY_ATTR {
    const auto g = load(tag, gate + i);
    const auto power = exp_of_minus(tag, hn::Abs(g));
    const auto numerator = hn::IfThenElse(hn::Lt(g, hn::Zero(tag)), hn::Mul(g, power), g);
    const auto silu = hn::Div(numerator, hn::Add(hn::Set(tag, 1.0F), power));
    store(tag, hn::Mul(silu, load(tag, up + i)), gate + i);
  });
}

template <typename T>
void add_row(float* x, const T* y, std::int64_t width) {
  each_vector(width, [&](auto tag, std::int64_t i)
                         HWY_ATTR { store(tag, hn::Add(load(tag, x + i), load(tag, y + i)), x + i); });
}

/// The rows of a tensor, in the library's types.
template <typename T>
T* row_of(const at::Tensor& tensor, std::int64_t row) {
  return static_cast<T*>(tensor.data_ptr()) + row * tensor.stride(0);
}

/// Calls `body` with a value of the tensor's type.
template <typename Body>
void with_type_of(const at::Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return body(bfloat16());
    case at::kHalf:
      return body(float16());
    default:
      return body(float());
  }
}

}  // namespace

void rms_norm_rows(const at::Tensor& x, const at::Tensor& weight, float eps, const at::Tensor& out,
                   std::int64_t first, std::int64_t last) {
  with_type_of(out, [&](auto type) HWY_ATTR {
    for (std::int64_t row = first; row < last; ++row) {
      normalise(row_of<float>(x, row), weight.const_data_ptr<float>(), x.size(1), eps,
                row_of<decltype(type)>(out, row));
    }
  });
}

void norm_and_rotate_rows(const at::Tensor& qkv, const HeadsShape& shape, const float* q_norm,
                          const float* k_norm, const float* table, std::int64_t first, std::int64_t last) {
  const std::int64_t dim = shape.head_dim, half = dim / 2;
  with_type_of(qkv, [&](auto type) HWY_ATTR {
    for (std::int64_t row = first; row < last; ++row) {
      const float* cosines = table + row * dim;
      auto* head = row_of<decltype(type)>(qkv, row);
      for (std::int64_t h = 0; h < shape.q_heads + shape.kv_heads; ++h, head += dim) {
        const float* norm = h < shape.q_heads ? q_norm : k_norm;
        if (norm) normalise(head, norm, dim, static_cast<float>(shape.eps), head);
        rotate(head, cosines, cosines + half, half);
      }
    }
  });
}

void swiglu_rows(const at::Tensor& gate_up, std::int64_t first, std::int64_t last) {
  const std::int64_t width = gate_up.size(1) / 2;
  with_type_of(gate_up, [&](auto type) HWY_ATTR {
    for (std::int64_t row = first; row < last; ++row) {
      auto* values = row_of<decltype(type)>(gate_up, row);
      gate(values, values + width, width);
    }
  });
}

// Row by row, so that the norm finds the sums in the first-level cache.
void add_and_rms_norm_rows(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, float eps,
                           const at::Tensor& out, std::int64_t first, std::int64_t last) {
  with_type_of(y, [&](auto type) HWY_ATTR {
    for (std::int64_t row = first; row < last; ++row) {
      add_row(row_of<float>(x, row), row_of<decltype(type)>(y, row), x.size(1));
      rms_norm_rows(x, weight, eps, out, row, row + 1);
    }
  });
}

}  // namespace moba::llm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::llm {
namespace {

HWY_EXPORT(rms_norm_rows);
HWY_EXPORT(norm_and_rotate_rows);
HWY_EXPORT(swiglu_rows);
HWY_EXPORT(add_and_rms_norm_rows);

}  // namespace

void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& out) {
  choose_instruction_set();
  for_rows(x.size(0), x.size(1), [&](std::int64_t first, std::int64_t last) {
    HWY_DYNAMIC_DISPATCH(rms_norm_rows)(x, weight, static_cast<float>(eps), out, first, last);
  });
}

void norm_and_rotate(const at::Tensor& qkv, const HeadsShape& shape, const at::Tensor& q_norm,
                     const at::Tensor& k_norm, const float* table) {
  const float* norms[] = {q_norm.defined() ? q_norm.const_data_ptr<float>() : nullptr,
                          k_norm.defined() ? k_norm.const_data_ptr<float>() : nullptr};
  for_rows(qkv.size(0), qkv.size(1), [&](std::int64_t first, std::int64_t last) {
    HWY_DYNAMIC_DISPATCH(norm_and_rotate_rows)(qkv, shape, norms[0], norms[1], table, first, last);
  });
}

void swiglu(const at::Tensor& gate_up) {
  for_rows(gate_up.size(0), gate_up.size(1) / 2, [&](std::int64_t first, std::int64_t last) {
    HWY_DYNAMIC_DISPATCH(swiglu_rows)(gate_up, first, last);
  });
}

void add_and_rms_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, double eps,
                      const at::Tensor& out) {
  for_rows(x.size(0), x.size(1), [&](std::int64_t first, std::int64_t last) {
    HWY_DYNAMIC_DISPATCH(add_and_rms_norm_rows)(x, y, weight, static_cast<float>(eps), out, first, last);
  });
}

}  // namespace moba::llm
#endif
