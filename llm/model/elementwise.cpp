#include "llm/model/elementwise.h"

#include <ATen/ops/silu.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "llm/model/rows.h"

namespace moba::llm {
namespace {

MOBA_CLONES void normalise(const float* x, const float* weight, std::int64_t width, float eps, float* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

MOBA_CLONES void rotate(float* head, const float* cosines, const float* sines, std::int64_t half) {
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cosines[i] - second * sines[i];
    head[half + i] = second * cosines[i] + first * sines[i];
  }
}

/// Calls `body(float*)` on `width` elements, converted from and to 16 bits if necessary.
template <typename T, typename Body>
void as_floats(T* values, std::int64_t width, std::vector<float>& scratch, const Body& body) {
  if constexpr (std::is_same_v<T, float>) {
    body(values);
  } else {
    scratch.assign(values, values + width);
    body(scratch.data());
    for (std::int64_t i = 0; i < width; ++i) values[i] = static_cast<T>(scratch[static_cast<std::size_t>(i)]);
  }
}

template <typename T>
void rms_norm_rows(const at::Tensor& x, const float* weight, float eps, const at::Tensor& out,
                   std::int64_t first, std::int64_t last) {
  const std::int64_t width = x.size(1);
  std::vector<float> scratch(static_cast<std::size_t>(width));
  for (std::int64_t row = first; row < last; ++row) {
    const T* from = x.const_data_ptr<T>() + row * x.stride(0);
    T* to = out.mutable_data_ptr<T>() + row * out.stride(0);
    if constexpr (std::is_same_v<T, float>) {
      normalise(from, weight, width, eps, to);
    } else {
      std::copy(from, from + width, to);
      as_floats(to, width, scratch, [&](float* values) { normalise(values, weight, width, eps, values); });
    }
  }
}

template <typename T>
void norm_and_rotate_rows(const at::Tensor& qkv, const HeadsShape& shape, const float* q_norm,
                          const float* k_norm, const float* table, std::int64_t first, std::int64_t last) {
  const std::int64_t dim = shape.head_dim, half = dim / 2;
  std::vector<float> scratch;
  for (std::int64_t row = first; row < last; ++row) {
    const float* cosines = table + row * dim;
    for (std::int64_t h = 0; h < shape.q_heads + shape.kv_heads; ++h) {
      const float* norm = h < shape.q_heads ? q_norm : k_norm;
      T* head = qkv.mutable_data_ptr<T>() + row * qkv.stride(0) + h * dim;
      as_floats(head, dim, scratch, [&](float* values) {
        if (norm) normalise(values, norm, dim, static_cast<float>(shape.eps), values);
        rotate(values, cosines, cosines + half, half);
      });
    }
  }
}

/// Calls `body` with a value of the tensor's C++ type.
template <typename Body>
void with_type_of(const at::Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return body(at::BFloat16());
    case at::kHalf:
      return body(at::Half());
    default:
      return body(float());
  }
}

}  // namespace

void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& out) {
  with_type_of(x, [&](auto type) {
    for_rows(x.size(0), x.size(1), [&](std::int64_t first, std::int64_t last) {
      rms_norm_rows<decltype(type)>(x, weight.const_data_ptr<float>(), static_cast<float>(eps), out, first,
                                    last);
    });
  });
}

void norm_and_rotate(const at::Tensor& qkv, const HeadsShape& shape, const at::Tensor& q_norm,
                     const at::Tensor& k_norm, const float* table) {
  const float* norms[] = {q_norm.defined() ? q_norm.const_data_ptr<float>() : nullptr,
                          k_norm.defined() ? k_norm.const_data_ptr<float>() : nullptr};
  with_type_of(qkv, [&](auto type) {
    for_rows(qkv.size(0), qkv.size(1), [&](std::int64_t first, std::int64_t last) {
      norm_and_rotate_rows<decltype(type)>(qkv, shape, norms[0], norms[1], table, first, last);
    });
  });
}

void swiglu(const at::Tensor& gate_up) {
  const std::int64_t width = gate_up.size(1) / 2;
  // A few rows at a time stay in the core's cache between the two steps.
  for_rows(gate_up.size(0), width, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; row += rows_per_task(width)) {
      const at::Tensor rows = gate_up.narrow(0, row, std::min(rows_per_task(width), last - row));
      at::Tensor gate = rows.narrow(1, 0, width);
      at::silu_(gate).mul_(rows.narrow(1, width, width));
    }
  });
}

}  // namespace moba::llm
