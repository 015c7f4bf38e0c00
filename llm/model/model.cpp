#include "llm/model/model.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <utility>

#include "llm/error.h"
#include "llm/formats/dequantise.h"
#include "llm/formats/layer.h"
#include "llm/model/elementwise.h"
#include "llm/model/few_rows.h"
#include "llm/model/linear.h"
#include "llm/model/rope.h"

namespace moba::llm {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return at::kBFloat16;
    case DType::f16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

DType dtype_of(at::ScalarType type) {
  return type == at::kBFloat16 ? DType::bf16 : type == at::kHalf ? DType::f16 : DType::f32;
}

struct Layer {
  at::Tensor attention_norm, mlp_norm;  // [hidden]
  at::Tensor q_norm, k_norm;            // [D], or undefined
  Linear qkv;                           // hidden -> queries, keys, values
  Linear output;                        // Hq * D -> hidden
  Linear gate_up;                       // hidden -> gate, up
  Linear down;                          // intermediate -> hidden
};

Layer load_layer(const Weights& weights, std::int64_t index) {
  const std::string prefix = layer_prefix(index);
  const LayerShape shape = layer_shape(weights.config());
  const auto norm = [&](const NormShape& n) {
    return load_vector(weights, prefix + n.name + ".weight", n.size);
  };
  Layer layer;
  layer.attention_norm = norm(shape.attention_norm);
  layer.mlp_norm = norm(shape.mlp_norm);
  layer.qkv = Linear(weights, prefix, shape.qkv);
  layer.output = Linear(weights, prefix, shape.output);
  layer.gate_up = Linear(weights, prefix, shape.gate_up);
  layer.down = Linear(weights, prefix, shape.down);
  if (!shape.qk_norms.empty()) {
    layer.q_norm = norm(shape.qk_norms[0]);
    layer.k_norm = norm(shape.qk_norms[1]);
  }
  return layer;
}

/// Columns [first_head * D, (first_head + heads) * D) of `tokens` [n, *], as [n, heads, D] for libmoba.
Tensor heads_of(const at::Tensor& tokens, std::int64_t first_head, std::int64_t heads,
                std::int64_t head_dim) {
  const DType dtype = dtype_of(tokens.scalar_type());
  return {.data = static_cast<char*>(tokens.data_ptr()) +
                  static_cast<std::size_t>(first_head * head_dim) * size_of(dtype),
          .dtype = dtype,
          .rank = 3,
          .sizes = {tokens.size(0), heads, head_dim},
          .strides = {tokens.stride(0), head_dim, 1}};
}

/// The activations of one layer, for n tokens.
struct Activations {
  at::Tensor normed;    // [n, hidden], the input of the next product
  at::Tensor qkv;       // [n, (Hq + 2 Hkv) * D]
  at::Tensor attended;  // [n, Hq * D]
  at::Tensor gate_up;   // [n, 2 * intermediate]
  at::Tensor added;     // [n, hidden], what is added to the residual stream

  Activations(std::int64_t n, const ModelConfig& c, at::ScalarType dtype)
      : normed(at::empty({n, c.hidden}, dtype)),
        qkv(at::empty({n, (c.heads + 2 * c.kv_heads) * c.head_dim}, dtype)),
        attended(at::empty({n, c.heads * c.head_dim}, dtype)),
        gate_up(at::empty({n, 2 * c.intermediate}, dtype)),
        added(at::empty({n, c.hidden}, dtype)) {}
};

std::vector<float> floats_of(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.to(at::kFloat);
  const float* first = wide.const_data_ptr<float>();
  return {first, first + wide.numel()};
}

/// A view [n, columns] of memory, which at::from_blob() takes without const.
at::Tensor rows_in(std::span<const float> values, std::int64_t columns) {
  return at::from_blob(const_cast<float*>(values.data()),
                       {static_cast<std::int64_t>(values.size()) / columns, columns}, at::kFloat);
}

at::Tensor last_rows(const at::Tensor& tensor, std::int64_t rows) {
  return tensor.narrow(0, tensor.size(0) - rows, rows);
}

}  // namespace

struct Model::Impl {
  Weights weights;
  Arithmetic arithmetic;
  Rope rope;
  const StoredTensor* embedding = nullptr;  // [vocab, hidden]
  std::vector<Layer> layers;
  at::Tensor norm;  // [hidden]
  Linear head;      // hidden -> vocab

  Impl(const Weights& w, const Arithmetic& a) : weights(w), arithmetic(a), rope(make_rope(w.config())) {}

  const ModelConfig& config() const { return weights.config(); }
  /// The dtype of the activations of `rows` rows.
  at::ScalarType dtype_for(std::int64_t rows, bool by_rows) const {
    return by_rows || rows <= kFewRows ? at::kFloat : scalar_type(arithmetic.dtype);
  }
  at::Tensor embed(std::span<const std::int32_t> tokens) const;
  /// The logits of the last layer's output, normalised.
  std::vector<float> logits(const at::Tensor& normed, bool by_rows) const;
  void multiply(const Linear& linear, const at::Tensor& x, const at::Tensor& y, bool by_rows) const;
  /// Attends one layer, and writes and returns the last `rows` rows of a.attended.
  at::Tensor attend_layer(std::int64_t index, std::int64_t rows, const Activations& a,
                          const std::vector<float>& rope_table, const AttentionFn& attend,
                          bool by_rows) const;
  /// Adds the attention and the MLP of a layer to the residual stream, and normalises it for what comes next.
  void finish_layer(std::int64_t index, const at::Tensor& x, const Activations& a, bool by_rows) const;
  std::vector<float> forward(std::span<const std::int32_t> tokens, const std::vector<float>& rope_table,
                             const AttentionFn& attend, Logits logits, bool by_rows) const;
};

Model Model::load(const Weights& weights, const Arithmetic& arithmetic) {
  const ModelConfig& config = weights.config();
  auto impl = std::make_shared<Impl>(weights, arithmetic);
  const std::string embedding(kEmbeddingName), head(kHeadName);
  impl->embedding = weights.find(embedding + ".weight");
  for (std::int64_t i = 0; i < config.layers; ++i) impl->layers.push_back(load_layer(weights, i));
  impl->norm = load_vector(weights, std::string(kFinalNormName) + ".weight", config.hidden);
  impl->head =
      Linear(weights, "", {{config.tied_embeddings ? embedding : head, config.vocab, config.hidden}});
  Model model;
  model.impl_ = std::move(impl);
  return model;
}

const ModelConfig& Model::config() const {
  return impl_->config();
}
DType Model::dtype() const {
  return impl_->arithmetic.dtype;
}

at::Tensor Model::Impl::embed(std::span<const std::int32_t> tokens) const {
  at::Tensor x = at::empty({static_cast<std::int64_t>(tokens.size()), config().hidden}, at::kFloat);
  float* row = x.mutable_data_ptr<float>();
  for (const std::int32_t token : tokens) {
    if (token < 0 || token >= config().vocab) {
      throw DataError(fmt::format("tokens: expected ids below {} (the rows of the embedding), got {}",
                                  config().vocab, token));
    }
    dequantise(*embedding, token, 1, row);
    row += config().hidden;
  }
  return x;
}

void Model::Impl::multiply(const Linear& linear, const at::Tensor& x, const at::Tensor& y,
                           bool by_rows) const {
  if (by_rows) {
    linear.by_rows(x, y, arithmetic);
  } else {
    linear(x, y, arithmetic);
  }
}

std::vector<float> Model::Impl::logits(const at::Tensor& normed, bool by_rows) const {
  const at::Tensor result = at::empty({normed.size(0), config().vocab}, normed.options());
  multiply(head, normed, result, by_rows);
  return floats_of(result);
}

at::Tensor Model::Impl::attend_layer(std::int64_t index, std::int64_t rows, const Activations& a,
                                     const std::vector<float>& rope_table, const AttentionFn& attend,
                                     bool by_rows) const {
  const ModelConfig& c = config();
  const Layer& layer = layers[static_cast<std::size_t>(index)];
  multiply(layer.qkv, a.normed, a.qkv, by_rows);
  norm_and_rotate(a.qkv, {c.heads, c.kv_heads, c.head_dim, c.norm_eps}, layer.q_norm, layer.k_norm,
                  rope_table.data());
  const at::Tensor attended = last_rows(a.attended, rows);
  attend(index, heads_of(last_rows(a.qkv, rows), 0, c.heads, c.head_dim),
         heads_of(a.qkv, c.heads, c.kv_heads, c.head_dim),
         heads_of(a.qkv, c.heads + c.kv_heads, c.kv_heads, c.head_dim),
         heads_of(attended, 0, c.heads, c.head_dim));
  return attended;
}

void Model::Impl::finish_layer(std::int64_t index, const at::Tensor& x, const Activations& a,
                               bool by_rows) const {
  const ModelConfig& c = config();
  const Layer& layer = layers[static_cast<std::size_t>(index)];
  multiply(layer.output, a.attended, a.added, by_rows);
  add_and_rms_norm(x, a.added, layer.mlp_norm, c.norm_eps, a.normed);

  multiply(layer.gate_up, a.normed, a.gate_up, by_rows);
  swiglu(a.gate_up);
  multiply(layer.down, a.gate_up.narrow(1, 0, c.intermediate), a.added, by_rows);
  const bool is_last = index + 1 == c.layers;
  const at::Tensor& next_norm = is_last ? norm : layers[static_cast<std::size_t>(index + 1)].attention_norm;
  add_and_rms_norm(x, a.added, next_norm, c.norm_eps, a.normed);
}

std::vector<float> Model::Impl::forward(std::span<const std::int32_t> tokens,
                                        const std::vector<float>& rope_table, const AttentionFn& attend,
                                        Logits logits_of, bool by_rows) const {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const ModelConfig& c = config();
  const auto n = static_cast<std::int64_t>(tokens.size());
  const std::int64_t answered = logits_of == Logits::all    ? n
                                : logits_of == Logits::last ? std::min<std::int64_t>(n, 1)
                                                            : 0;

  at::Tensor x = embed(tokens);  // the residual stream, in f32
  Activations a(n, c, dtype_for(n, by_rows));
  rms_norm(x, layers.front().attention_norm, c.norm_eps, a.normed);

  for (std::int64_t l = 0; l < c.layers; ++l) {
    const bool is_last = l + 1 == c.layers;  // past its keys and values computes only the tokens with logits
    if (is_last) x = last_rows(x, answered);
    const at::Tensor attended = attend_layer(l, x.size(0), a, rope_table, attend, by_rows);
    if (x.size(0) == 0) return {};
    if (is_last) {
      a = Activations(answered, c, dtype_for(answered, by_rows));
      a.attended.copy_(attended);
    }
    finish_layer(l, x, a, by_rows);
  }
  return logits(a.normed, by_rows);
}

std::vector<float> Model::forward(std::span<const std::int32_t> tokens, std::int64_t first,
                                  const AttentionFn& attend, Logits logits) const {
  const auto count = static_cast<std::int64_t>(tokens.size());
  return impl_->forward(tokens, rope_rows(impl_->rope, first, count), attend, logits, /*by_rows=*/false);
}

std::vector<float> Model::embed(std::span<const std::int32_t> tokens) const {
  return floats_of(impl_->embed(tokens));
}

void Model::run_layers(std::span<float> residual, std::int64_t first, std::int64_t begin, std::int64_t end,
                       const AttentionFn& attend) const {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const ModelConfig& c = config();
  const at::Tensor x = rows_in(residual, c.hidden);
  const std::int64_t n = x.size(0);
  const Activations a(n, c, impl_->dtype_for(n, /*by_rows=*/false));
  const std::vector<float> rope_table = rope_rows(impl_->rope, first, n);
  rms_norm(x, impl_->layers[static_cast<std::size_t>(begin)].attention_norm, c.norm_eps, a.normed);
  for (std::int64_t l = begin; l < end; ++l) {
    impl_->attend_layer(l, n, a, rope_table, attend, /*by_rows=*/false);
    impl_->finish_layer(l, x, a, /*by_rows=*/false);
  }
}

std::vector<float> Model::attention_output(std::int64_t layer, std::span<const float> attended) const {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const ModelConfig& c = config();
  const at::Tensor x = rows_in(attended, c.heads * c.head_dim);
  const at::ScalarType dtype = impl_->dtype_for(x.size(0), /*by_rows=*/false);
  const at::Tensor y = at::empty({x.size(0), c.hidden}, dtype);
  impl_->multiply(impl_->layers[static_cast<std::size_t>(layer)].output, x.to(dtype), y, /*by_rows=*/false);
  return floats_of(y);
}

std::vector<float> Model::logits(std::span<const float> residual) const {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const at::Tensor x = rows_in(residual, config().hidden);
  const at::Tensor normed = at::empty_like(x, impl_->dtype_for(x.size(0), /*by_rows=*/false));
  rms_norm(x, impl_->norm, config().norm_eps, normed);
  return impl_->logits(normed, /*by_rows=*/false);
}

std::vector<float> Model::decode(std::span<const std::int32_t> tokens,
                                 std::span<const std::int64_t> positions, const AttentionFn& attend) const {
  return impl_->forward(tokens, rope_rows(impl_->rope, positions), attend, Logits::all, /*by_rows=*/true);
}

void use_threads(int threads) {
  at::set_num_threads(threads);
}

}  // namespace moba::llm
