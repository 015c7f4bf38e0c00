#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

// The element-wise part of a training step between its matrix products, forward and backward, each in one
// pass over memory. `n` tokens, `H` hidden, `I` intermediate, `V` vocabulary. The residual stream, its
// gradient, norms' weights and all gradients of parameters are f32; operands and results of matrix products
// have the working dtype, f32 or bf16. The order of sums over tokens does not depend on the number of
// threads.
namespace moba::llm::train {

/// out = x / rms(x) * weight: `x` [n, H] f32, `out` [n, H] in the working dtype.
void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& out);

/// Adds the gradients for `dy` [n, H] to `dx` [n, H] and, if it is defined, to `d_weight` [H].
void rms_norm_backward(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& dy,
                       const at::Tensor& dx, const at::Tensor& d_weight);

/// Computes the gradient through the norm of every head: `heads` [n, h * D] is the input of the norm;
/// `d_heads` [n, h * D], the gradient of its output, becomes that of its input. Adds to `d_weight` [D] if it
/// is defined.
void head_norm_backward(const at::Tensor& heads, const at::Tensor& weight, double eps,
                        const at::Tensor& d_heads, const at::Tensor& d_weight);

/// out = silu(first half of each row) * second half: `gate_up` [n, 2 I], `out` [n, I].
void swiglu(const at::Tensor& gate_up, const at::Tensor& out);

/// Replaces `d_out` [n, I] by the output of swiglu(), and `gate_up` by its gradient.
void swiglu_backward(const at::Tensor& gate_up, const at::Tensor& d_out);

/// out = x + y: `x` and `out` [n, H] f32, `y` in the working dtype.
void residual_add(const at::Tensor& x, const at::Tensor& y, const at::Tensor& out);

/// out = x, from f32 to bf16.
void convert(const at::Tensor& x, const at::Tensor& out);

/// out[t] = table[tokens[t]]: `table` [V, H] and `out` [n, H] f32.
void embed(const at::Tensor& table, std::span<const std::int32_t> tokens, const at::Tensor& out);
/// Adds each row of `d_out` [n, H] to its token's row of `d_table` [V, H].
void embed_backward(const at::Tensor& d_out, std::span<const std::int32_t> tokens, const at::Tensor& d_table);

/// Replaces `logits` [c, V] by scale * d(-log softmax at the target) / d(logits) and writes the unscaled -log
/// softmax to `losses` [c]. For a target of -1 both are 0.
void cross_entropy(const at::Tensor& logits, std::span<const std::int32_t> targets, float scale,
                   std::span<float> losses);

}  // namespace moba::llm::train
