#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace moba::llm {

// Activations are [n, columns] in f32, bf16 or f16, with any row stride; arithmetic is in f32.

/// out = x / rms(x) * weight, row by row: `x` [n, H] and `weight` [H] in f32.
void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& out);

/// x += y, then rms_norm() of x: `x` [n, H] in f32, and `y` [n, H].
void add_and_rms_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, double eps,
                      const at::Tensor& out);

/// The shape of the heads of one layer, and the epsilon of their norms.
struct HeadsShape {
  std::int64_t q_heads, kv_heads, head_dim;
  double eps;
};

/// In place on `qkv` [n, (Hq + 2 Hkv) * D], queries before keys before values: queries and keys are
/// normalised per head if `q_norm` and `k_norm` [D] are given (both or neither), then rotated by `table` [n,
/// D] of rope_rows().
void norm_and_rotate(const at::Tensor& qkv, const HeadsShape& shape, const at::Tensor& q_norm,
                     const at::Tensor& k_norm, const float* table);

/// In place on `gate_up` [n, 2 I]: the first half of each row becomes silu(first) * second.
void swiglu(const at::Tensor& gate_up);

}  // namespace moba::llm
