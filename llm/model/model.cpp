#include "llm/model/model.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "llm/error.h"
#include "llm/formats/layer.h"
#include "llm/model/elementwise.h"
#include "llm/model/load.h"
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

/// y = x W^T + b.
struct Linear {
  at::Tensor weight;  // [outputs, inputs]
  at::Tensor bias;    // [outputs], or undefined

  void operator()(const at::Tensor& x, at::Tensor& y) const {
    if (bias.defined()) {
      at::addmm_out(y, bias, x, weight.t());
    } else {
      at::mm_out(y, x, weight.t());
    }
  }

  void add_to(at::Tensor& y, const at::Tensor& x) const {
    y.addmm_(x, weight.t());
    if (bias.defined()) y.add_(bias);
  }
};

struct Layer {
  at::Tensor attention_norm, mlp_norm;  // [hidden]
  at::Tensor q_norm, k_norm;            // [D], or undefined
  Linear qkv;                           // hidden -> queries, keys, values
  Linear output;                        // Hq * D -> hidden
  Linear gate_up;                       // hidden -> gate, up
  Linear down;                          // intermediate -> hidden
};

Linear load_linear(const Loader& load, const std::string& prefix, const std::vector<LinearShape>& group) {
  std::vector<Loader::Part> weights, biases;
  for (const LinearShape& linear : group) {
    weights.push_back({prefix + linear.name + ".weight", linear.outputs});
    if (linear.has_bias) biases.push_back({prefix + linear.name + ".bias", linear.outputs});
  }
  return {load.matrix(weights, group.front().inputs), biases.empty() ? at::Tensor() : load.bias(biases)};
}

at::Tensor load_norm(const Loader& load, const std::string& prefix, const NormShape& norm) {
  return load.norm(prefix + norm.name + ".weight", norm.size);
}

Layer load_layer(const Loader& load, const ModelConfig& config, std::int64_t index) {
  const std::string prefix = layer_prefix(index);
  const LayerShape shape = layer_shape(config);
  Layer layer;
  layer.attention_norm = load_norm(load, prefix, shape.attention_norm);
  layer.mlp_norm = load_norm(load, prefix, shape.mlp_norm);
  layer.qkv = load_linear(load, prefix, shape.qkv);
  layer.output = load_linear(load, prefix, shape.output);
  layer.gate_up = load_linear(load, prefix, shape.gate_up);
  layer.down = load_linear(load, prefix, shape.down);
  if (!shape.qk_norms.empty()) {
    layer.q_norm = load_norm(load, prefix, shape.qk_norms[0]);
    layer.k_norm = load_norm(load, prefix, shape.qk_norms[1]);
  }
  return layer;
}

/// Columns [first_head * D, (first_head + heads) * D) of `tokens` [n, *], as [n, heads, D] for libmoba.
Tensor heads_of(const at::Tensor& tokens, DType dtype, std::int64_t first_head, std::int64_t heads,
                std::int64_t head_dim) {
  return {.data = static_cast<char*>(tokens.data_ptr()) +
                  static_cast<std::size_t>(first_head * head_dim) * size_of(dtype),
          .dtype = dtype,
          .rank = 3,
          .sizes = {tokens.size(0), heads, head_dim},
          .strides = {tokens.stride(0), head_dim, 1}};
}

at::Tensor last_rows(const at::Tensor& tensor, std::int64_t rows) {
  return tensor.narrow(0, tensor.size(0) - rows, rows);
}

}  // namespace

struct Model::Impl {
  ModelConfig config;
  DType dtype = DType::f32;
  Rope rope;
  at::Tensor embedding;  // [vocab, hidden]
  std::vector<Layer> layers;
  at::Tensor norm;  // [hidden]
  Linear head;      // hidden -> vocab

  at::Tensor embed(std::span<const std::int32_t> tokens) const;
  std::vector<float> logits(const at::Tensor& x) const;
};

Model Model::load(const Weights& weights, const Arithmetic& arithmetic) {
  const ModelConfig& config = weights.config();
  const Loader load(weights, scalar_type(arithmetic.dtype));
  auto impl = std::make_shared<Impl>();
  impl->config = config;
  impl->dtype = arithmetic.dtype;
  impl->rope = make_rope(config);
  const LinearShape embedding{std::string(kEmbeddingName), config.vocab, config.hidden};
  impl->embedding = load_linear(load, "", {embedding}).weight;
  for (std::int64_t i = 0; i < config.layers; ++i) impl->layers.push_back(load_layer(load, config, i));
  impl->norm = load_norm(load, "", {std::string(kFinalNormName), config.hidden});
  const LinearShape head{std::string(kHeadName), config.vocab, config.hidden};
  impl->head.weight = config.tied_embeddings ? impl->embedding : load_linear(load, "", {head}).weight;
  Model model;
  model.impl_ = std::move(impl);
  return model;
}

const ModelConfig& Model::config() const {
  return impl_->config;
}
DType Model::dtype() const {
  return impl_->dtype;
}

at::Tensor Model::Impl::embed(std::span<const std::int32_t> tokens) const {
  at::Tensor x = at::empty({static_cast<std::int64_t>(tokens.size()), config.hidden}, embedding.options());
  const std::size_t row = static_cast<std::size_t>(config.hidden) * size_of(dtype);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    if (tokens[t] < 0 || tokens[t] >= config.vocab) {
      throw DataError(fmt::format("tokens: expected ids below {} (the rows of the embedding), got {}",
                                  config.vocab, tokens[t]));
    }
    std::memcpy(
        static_cast<char*>(x.data_ptr()) + t * row,
        static_cast<const char*>(embedding.const_data_ptr()) + static_cast<std::size_t>(tokens[t]) * row,
        row);
  }
  return x;
}

std::vector<float> Model::Impl::logits(const at::Tensor& x) const {
  at::Tensor normed = at::empty_like(x);
  rms_norm(x, norm, config.norm_eps, normed);
  at::Tensor result = at::empty({x.size(0), config.vocab}, x.options());
  head(normed, result);
  result = result.to(at::kFloat);
  const float* first = result.const_data_ptr<float>();
  return {first, first + result.numel()};
}

std::vector<float> Model::forward(std::span<const std::int32_t> tokens, std::int64_t first,
                                  const AttentionFn& attend, Logits logits) const {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const ModelConfig& c = impl_->config;
  const HeadsShape heads{c.heads, c.kv_heads, c.head_dim, c.norm_eps};
  const auto n = static_cast<std::int64_t>(tokens.size());
  const std::int64_t answered = logits == Logits::all    ? n
                                : logits == Logits::last ? std::min<std::int64_t>(n, 1)
                                                         : 0;

  at::Tensor x = impl_->embed(tokens);
  at::Tensor normed = at::empty_like(x);
  at::Tensor qkv = at::empty({n, (c.heads + 2 * c.kv_heads) * c.head_dim}, x.options());
  at::Tensor attended = at::empty({n, c.heads * c.head_dim}, x.options());
  at::Tensor gate_up = at::empty({n, 2 * c.intermediate}, x.options());
  const std::vector<float> table = rope_rows(impl_->rope, first, n);

  for (std::int64_t l = 0; l < c.layers; ++l) {
    const Layer& layer = impl_->layers[static_cast<std::size_t>(l)];
    rms_norm(x, layer.attention_norm, c.norm_eps, normed);
    layer.qkv(normed, qkv);
    norm_and_rotate(qkv, heads, layer.q_norm, layer.k_norm, table.data());

    if (l + 1 == c.layers) {  // past its keys and values, the last layer computes only the tokens with logits
      x = last_rows(x, answered);
      normed = last_rows(normed, answered);
      attended = last_rows(attended, answered);
      gate_up = last_rows(gate_up, answered);
    }
    attend(l, heads_of(last_rows(qkv, x.size(0)), impl_->dtype, 0, c.heads, c.head_dim),
           heads_of(qkv, impl_->dtype, c.heads, c.kv_heads, c.head_dim),
           heads_of(qkv, impl_->dtype, c.heads + c.kv_heads, c.kv_heads, c.head_dim),
           heads_of(attended, impl_->dtype, 0, c.heads, c.head_dim));
    if (x.size(0) == 0) return {};
    layer.output.add_to(x, attended);

    rms_norm(x, layer.mlp_norm, c.norm_eps, normed);
    layer.gate_up(normed, gate_up);
    swiglu(gate_up);
    layer.down.add_to(x, gate_up.narrow(1, 0, c.intermediate));
  }
  return impl_->logits(x);
}

void use_threads(int threads) {
  at::set_num_threads(threads);
}

}  // namespace moba::llm
