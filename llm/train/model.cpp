#include "llm/train/model.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <random>
#include <utility>

#include "llm/formats/dequantise.h"
#include "llm/formats/layer.h"
#include "llm/model/elementwise.h"
#include "llm/model/rope.h"
#include "llm/train/elementwise.h"
#include "src/stopwatch.h"

namespace moba::llm::train {
namespace {

/// Logits in memory at a time: 64 MiB of f32.
constexpr std::int64_t kLogits = std::int64_t{1} << 24;

/// d += left^T right, `d` in f32: [n, a]^T [n, b].
void accumulate(const at::Tensor& d, const at::Tensor& left, const at::Tensor& right, double scale = 1) {
  if (left.scalar_type() == at::kFloat) {
    d.addmm_(left.t(), right, 1, scale);
  } else {
    d.add_(at::mm(left.t(), right), scale);
  }
}

/// A low-rank addition to the rows [row, row + B's rows) of a linear layer.
struct Adapter {
  std::int64_t row;
  double scale;
  at::Tensor a, b;      // [rank, inputs], [outputs, rank], in the working dtype
  at::Tensor d_a, d_b;  // f32

  void add_to(const at::Tensor& y, const at::Tensor& x) const {
    y.narrow(1, row, b.size(0)).addmm_(at::mm(x, a.t()), b.t(), 1, scale);
  }

  void backward_parameters(const at::Tensor& x, const at::Tensor& dy) const {
    const at::Tensor d = dy.narrow(1, row, b.size(0));
    accumulate(d_b, d, at::mm(x, a.t()), scale);
    accumulate(d_a, at::mm(d, b), x, scale);
  }

  void add_gradient_to(const at::Tensor& dx, const at::Tensor& dy) const {
    dx.addmm_(at::mm(dy.narrow(1, row, b.size(0)), b), a, 1, scale);
  }
};

/// y = x W^T + b.
struct Linear {
  at::Tensor weight, bias;      // [outputs, inputs], [outputs] or undefined, in the working dtype
  at::Tensor d_weight, d_bias;  // f32; undefined if they are not trained
  std::vector<Adapter> adapters;

  void operator()(const at::Tensor& x, at::Tensor y) const {
    if (bias.defined()) {
      at::addmm_out(y, bias, x, weight.t());
    } else {
      at::mm_out(y, x, weight.t());
    }
    for (const Adapter& adapter : adapters) adapter.add_to(y, x);
  }

  void backward_parameters(const at::Tensor& x, const at::Tensor& dy) const {
    if (d_weight.defined()) accumulate(d_weight, dy, x);
    if (d_bias.defined()) d_bias.add_(dy.sum(0, false, at::kFloat));
    for (const Adapter& adapter : adapters) adapter.backward_parameters(x, dy);
  }

  void backward_input(const at::Tensor& dy, at::Tensor dx) const {
    at::mm_out(dx, dy, weight);
    for (const Adapter& adapter : adapters) adapter.add_gradient_to(dx, dy);
  }
};

struct Norm {
  at::Tensor weight, d_weight;
};

struct Layer {
  Norm attention_norm, mlp_norm;
  Norm q_norm, k_norm;  // undefined if the model has none
  Linear qkv, output, gate_up, down;
};

/// The activations that a layer's backward pass reads besides its input.
struct Saved {
  at::Tensor qkv;                       // [n, (Hq + 2 Hkv) D], normalised and rotated
  at::Tensor raw_qk;                    // [n, (Hq + Hkv) D], before; only if heads are normalised
  at::Tensor attended;                  // [n, Hq D]
  at::Tensor lse;                       // [Hq n]
  at::Tensor selection;                 // [Hq n K], for routings that are not dense
  at::Tensor residual_after_attention;  // [n, H], after attention
  at::Tensor gate_up;                   // [n, 2 I]
};

bool is_dense(const Routing& routing) {
  return routing.top_k == Routing::kEverything;
}

bool all_finite(const at::Tensor& x) {
  const auto* first = x.const_data_ptr<float>();
  return std::all_of(first, first + x.numel(), [](float value) { return std::isfinite(value); });
}

}  // namespace

double bytes_needed(const ModelConfig& config, const ModelSettings& settings) {
  const auto number = [](std::int64_t value) { return static_cast<double>(value); };
  double layer = 0;
  for (const LinearShape& linear : linears_of(config))
    layer += number(linear.outputs) * number(linear.inputs);
  const double embeddings = (config.tied_embeddings ? 1 : 2) * number(config.vocab) * number(config.hidden);
  const double parameters = embeddings + number(config.layers) * (layer + 2 * number(config.hidden));
  const double wide = number(2 * config.heads + 2 * config.kv_heads) * number(config.head_dim) +
                      2 * number(config.intermediate);
  const double kept =
      (settings.recompute ? 1 : number(config.layers)) *
      (wide * number(static_cast<std::int64_t>(size_of(settings.dtype))) + 4 * number(config.hidden));
  const double streams = 4 * number(config.layers) * number(config.hidden);
  return (settings.lora ? 4 : 16) * parameters + number(settings.max_tokens) * (kept + streams);
}

struct Model::Impl {
  ModelConfig config;
  ModelSettings settings;
  Layout layout, adapter_layout;
  at::Tensor values, gradients;            // flat, f32; gradients only where weights are trained
  at::Tensor adapters, adapter_gradients;  // likewise
  at::Tensor working, working_adapters;    // the matrices in the working dtype; `values` itself where f32

  at::Tensor embedding, d_embedding;
  std::vector<Layer> layers;
  Norm norm;
  Linear head;

  std::vector<float> rope_table, inverse_rope_table;  // rotary tables, [positions, D]
  std::vector<float> table, inverse_table;            // of this batch, [n, D]

  std::vector<at::Tensor> stream;  // the residual stream before each layer and after the last, [n, H]
  std::vector<Saved> saved;        // one per layer, or one for all if they are recomputed
  at::Tensor normed, d_working;    // [n, H], working dtype
  at::Tensor d;                    // [n, H], gradient of the residual stream
  at::Tensor hidden, d_qkv, d_attended, logits;
  Parallel parallel;
  double attention_seconds = 0;

  Impl(const ModelConfig& shape, const ModelSettings& with);
  at::ScalarType working_type() const { return settings.dtype == DType::bf16 ? at::kBFloat16 : at::kFloat; }
  bool trains_all() const { return !settings.lora; }

  static at::Tensor part(const at::Tensor& flat, const Layout& of, const std::string& name);
  Norm norm_of(const std::string& prefix, const NormShape& shape) const;
  Linear linear_of(const std::string& prefix, const std::vector<LinearShape>& group);
  void bind();
  void allocate();
  void refresh();

  Saved& saved_of(std::size_t layer) { return saved[settings.recompute ? 0 : layer]; }
  at::Tensor rows(const at::Tensor& buffer, const Batch& batch) const {
    return buffer.narrow(0, 0, batch.size());
  }
  HeadsShape heads_shape() const { return {config.heads, config.kv_heads, config.head_dim, config.norm_eps}; }
  Tensor heads_of(const at::Tensor& tokens, std::int64_t first_head, std::int64_t heads) const;
  void start(const Batch& batch);
  void attend(const Batch& batch, const Routing& routing, Saved& kept);
  void attend_backward(const Batch& batch, const Routing& routing, const Saved& kept);
  void rotate(const at::Tensor& qkv, const Layer& layer, bool back) const;
  void add_to_stream(const at::Tensor& x, const Linear& linear, const at::Tensor& input, at::Tensor out);
  void attention_half(const Batch& batch, std::size_t l, const Routing& routing);
  void mlp_first_half(const Batch& batch, std::size_t l);
  void mlp_second_half(const Batch& batch, std::size_t l);
  void mlp_backward(const Batch& batch, std::size_t l);
  void attention_backward_half(const Batch& batch, std::size_t l, const Routing& routing);
  std::vector<float> loss(const Batch& batch, float scale);
  at::Tensor d_for_products(const Batch& batch);
};

Model::Impl::Impl(const ModelConfig& shape, const ModelSettings& with)
    : config(shape), settings(with), layout(layout_of(shape)), parallel(openmp(with.threads)) {
  at::set_num_threads(settings.threads);
  values = at::zeros({layout.size()}, at::kFloat);
  if (trains_all()) gradients = at::zeros({layout.size()}, at::kFloat);
  if (settings.lora) {
    for (std::int64_t l = 0; l < config.layers; ++l) {
      for (const LinearShape& linear : linears_of(config)) {
        const std::string last = linear.name.substr(linear.name.find('.') + 1);
        const auto& targets = settings.lora->targets;
        if (std::find(targets.begin(), targets.end(), last) == targets.end()) continue;
        const std::string name = layer_prefix(l) + linear.name;
        adapter_layout.add(name + ".lora_A.weight", {settings.lora->rank, linear.inputs});
        adapter_layout.add(name + ".lora_B.weight", {linear.outputs, settings.lora->rank});
      }
    }
    adapters = at::zeros({adapter_layout.size()}, at::kFloat);
    adapter_gradients = at::zeros({adapter_layout.size()}, at::kFloat);
  }
  bind();
  allocate();
}

at::Tensor Model::Impl::part(const at::Tensor& flat, const Layout& of, const std::string& name) {
  const Layout::Entry& entry = of.at(name);
  return flat.narrow(0, entry.offset, entry.count).view(entry.shape);
}

Norm Model::Impl::norm_of(const std::string& prefix, const NormShape& shape) const {
  const std::string name = prefix + shape.name + ".weight";
  return {part(values, layout, name), trains_all() ? part(gradients, layout, name) : at::Tensor()};
}

Linear Model::Impl::linear_of(const std::string& prefix, const std::vector<LinearShape>& group) {
  Linear linear;
  std::int64_t row = 0;
  const auto merge = [](const at::Tensor& above, const at::Tensor& below) {
    // Adjacent in the flat array: one view over both.
    if (!above.defined()) return below;
    std::vector<std::int64_t> sizes(below.sizes().begin(), below.sizes().end());
    sizes[0] += above.size(0);
    return above.as_strided(sizes, above.strides());
  };
  for (const LinearShape& shape : group) {
    const std::string name = prefix + shape.name;
    const std::string weight = name + ".weight", bias = name + ".bias";
    linear.weight = merge(linear.weight, part(working, layout, weight));
    if (trains_all()) linear.d_weight = merge(linear.d_weight, part(gradients, layout, weight));
    if (shape.has_bias) {
      linear.bias = merge(linear.bias, part(working, layout, bias));
      if (trains_all()) linear.d_bias = merge(linear.d_bias, part(gradients, layout, bias));
    }
    const std::string a = name + ".lora_A.weight", b = name + ".lora_B.weight";
    const auto& entries = adapter_layout.entries();
    if (std::any_of(entries.begin(), entries.end(), [&](const auto& entry) { return entry.name == a; })) {
      linear.adapters.push_back({row, settings.lora->scale(), part(working_adapters, adapter_layout, a),
                                 part(working_adapters, adapter_layout, b),
                                 part(adapter_gradients, adapter_layout, a),
                                 part(adapter_gradients, adapter_layout, b)});
    }
    row += shape.outputs;
  }
  return linear;
}

/// Sets every tensor of the model to its part of the flat arrays.
void Model::Impl::bind() {
  const bool is_f32 = settings.dtype == DType::f32;
  working = is_f32 ? values : at::empty({layout.size()}, working_type());
  if (settings.lora)
    working_adapters = is_f32 ? adapters : at::empty({adapter_layout.size()}, working_type());

  const LinearShape token_embedding{std::string(kEmbeddingName), config.vocab, config.hidden};
  const std::string embedding_name = token_embedding.name + ".weight";
  embedding = part(values, layout, embedding_name);
  if (trains_all()) d_embedding = part(gradients, layout, embedding_name);
  const LayerShape shape = layer_shape(config);
  for (std::int64_t l = 0; l < config.layers; ++l) {
    const std::string prefix = layer_prefix(l);
    Layer& layer = layers.emplace_back();
    layer.attention_norm = norm_of(prefix, shape.attention_norm);
    layer.mlp_norm = norm_of(prefix, shape.mlp_norm);
    if (!shape.qk_norms.empty()) {
      layer.q_norm = norm_of(prefix, shape.qk_norms[0]);
      layer.k_norm = norm_of(prefix, shape.qk_norms[1]);
    }
    layer.qkv = linear_of(prefix, shape.qkv);
    layer.output = linear_of(prefix, shape.output);
    layer.gate_up = linear_of(prefix, shape.gate_up);
    layer.down = linear_of(prefix, shape.down);
  }
  norm = norm_of("", {std::string(kFinalNormName), config.hidden});
  const LinearShape untied_head{std::string(kHeadName), config.vocab, config.hidden};
  head = linear_of("", {config.tied_embeddings ? token_embedding : untied_head});
}

void Model::Impl::allocate() {
  const std::int64_t n = settings.max_tokens, width = config.hidden;
  const std::int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  const auto f32 = [](std::initializer_list<std::int64_t> sizes) { return at::empty(sizes, at::kFloat); };
  const auto work = [&](std::initializer_list<std::int64_t> sizes) {
    return at::empty(sizes, working_type());
  };
  for (std::int64_t l = 0; l <= config.layers; ++l) stream.push_back(f32({n, width}));
  for (std::int64_t l = 0; l < (settings.recompute ? 1 : config.layers); ++l) {
    saved.push_back({.qkv = work({n, q + 2 * kv}),
                     .raw_qk = config.qk_norm ? work({n, q + kv}) : at::Tensor(),
                     .attended = work({n, q}),
                     .lse = f32({config.heads * n}),
                     .selection = {},
                     .residual_after_attention = f32({n, width}),
                     .gate_up = work({n, 2 * config.intermediate})});
  }
  normed = work({n, width});
  d = f32({n, width});
  if (settings.dtype != DType::f32) d_working = work({n, width});
  hidden = work({n, config.intermediate});
  d_qkv = work({n, q + 2 * kv});
  d_attended = work({n, q});
  logits = work({std::min(n, std::max<std::int64_t>(1, kLogits / config.vocab)), config.vocab});
}

/// Updates the working copies.
void Model::Impl::refresh() {
  if (settings.dtype == DType::f32) return;
  working.copy_(values);
  if (settings.lora) working_adapters.copy_(adapters);
}

/// Returns heads [first_head, first_head + heads) of `tokens` [n, *], as [n, heads, D] for libmoba.
Tensor Model::Impl::heads_of(const at::Tensor& tokens, std::int64_t first_head, std::int64_t heads) const {
  return {.data = static_cast<char*>(tokens.data_ptr()) +
                  static_cast<std::size_t>(first_head * config.head_dim) * size_of(settings.dtype),
          .dtype = settings.dtype,
          .rank = 3,
          .sizes = {tokens.size(0), heads, config.head_dim},
          .strides = {tokens.stride(0), config.head_dim, 1}};
}

/// Computes the rotary tables of a batch, and the embedding of its tokens.
void Model::Impl::start(const Batch& batch) {
  std::int64_t max_seqlen = 0;
  for (std::size_t s = 1; s < batch.cu_seqlens.size(); ++s)
    max_seqlen = std::max<std::int64_t>(max_seqlen, batch.cu_seqlens[s] - batch.cu_seqlens[s - 1]);
  const std::int64_t dim = config.head_dim;
  if (static_cast<std::int64_t>(rope_table.size()) < max_seqlen * dim) {
    rope_table = rope_rows(make_rope(config), 0, max_seqlen);
    inverse_rope_table = rope_table;
    for (std::int64_t i = 0; i < max_seqlen * dim; ++i) {
      if (i % dim >= dim / 2) inverse_rope_table[static_cast<std::size_t>(i)] *= -1;
    }
  }
  table.resize(static_cast<std::size_t>(batch.size() * dim));
  inverse_table.resize(table.size());
  for (std::size_t s = 1; s < batch.cu_seqlens.size(); ++s) {
    const std::int64_t first = batch.cu_seqlens[s - 1], count = batch.cu_seqlens[s] - first;
    std::copy_n(rope_table.begin(), count * dim, table.begin() + first * dim);
    std::copy_n(inverse_rope_table.begin(), count * dim, inverse_table.begin() + first * dim);
  }
  embed(embedding, batch.tokens, rows(stream[0], batch));
}

void Model::Impl::attend(const Batch& batch, const Routing& routing, Saved& kept) {
  const ScopedTimer timer(attention_seconds);
  const Sequences sequences{batch.cu_seqlens, batch.cu_seqlens};
  if (!is_dense(routing)) {
    const std::int64_t chosen = config.heads * batch.size() * selection_width(sequences, routing);
    if (!kept.selection.defined() || kept.selection.numel() < chosen)
      kept.selection = at::empty({chosen}, at::kInt);
  }
  Execution execution;
  execution.parallel = parallel;
  const at::Tensor qkv = rows(kept.qkv, batch);
  attention(heads_of(qkv, 0, config.heads), heads_of(qkv, config.heads, config.kv_heads),
            heads_of(qkv, config.heads + config.kv_heads, config.kv_heads), sequences, routing,
            {.out = heads_of(rows(kept.attended, batch), 0, config.heads),
             .lse = kept.lse.mutable_data_ptr<float>(),
             .selection = is_dense(routing) ? nullptr : kept.selection.mutable_data_ptr<std::int32_t>()},
            execution);
}

void Model::Impl::attend_backward(const Batch& batch, const Routing& routing, const Saved& kept) {
  const ScopedTimer timer(attention_seconds);
  const Sequences sequences{batch.cu_seqlens, batch.cu_seqlens};
  Execution execution;
  execution.parallel = parallel;
  const at::Tensor qkv = rows(kept.qkv, batch), gradient = rows(d_qkv, batch);
  const std::int64_t k = config.heads, v = config.heads + config.kv_heads;
  attention_backward(
      heads_of(rows(d_attended, batch), 0, config.heads), heads_of(qkv, 0, config.heads),
      heads_of(qkv, k, config.kv_heads), heads_of(qkv, v, config.kv_heads),
      {.out = heads_of(rows(kept.attended, batch), 0, config.heads),
       .lse = kept.lse.const_data_ptr<float>(),
       .selection = is_dense(routing) ? nullptr : kept.selection.const_data_ptr<std::int32_t>()},
      sequences, routing,
      {heads_of(gradient, 0, config.heads), heads_of(gradient, k, config.kv_heads),
       heads_of(gradient, v, config.kv_heads)},
      execution);
}

/// out = x + linear(input).
void Model::Impl::add_to_stream(const at::Tensor& x, const Linear& linear, const at::Tensor& input,
                                at::Tensor out) {
  if (settings.dtype == DType::f32 && !linear.bias.defined() && linear.adapters.empty()) {
    at::addmm_out(out, x, input, linear.weight.t());
    return;
  }
  const at::Tensor y = normed.narrow(0, 0, x.size(0));
  linear(input, y);
  residual_add(x, y, out);
}

void Model::Impl::attention_half(const Batch& batch, std::size_t l, const Routing& routing) {
  const Layer& layer = layers[l];
  Saved& kept = saved_of(l);
  const at::Tensor x = rows(stream[l], batch), y = rows(normed, batch), qkv = rows(kept.qkv, batch);
  rms_norm(x, layer.attention_norm.weight, config.norm_eps, y);
  layer.qkv(y, qkv);
  if (config.qk_norm) rows(kept.raw_qk, batch).copy_(qkv.narrow(1, 0, kept.raw_qk.size(1)));
  norm_and_rotate(qkv, heads_shape(), layer.q_norm.weight, layer.k_norm.weight, table.data());
  attend(batch, routing, kept);
  add_to_stream(x, layer.output, rows(kept.attended, batch), rows(kept.residual_after_attention, batch));
}

void Model::Impl::mlp_first_half(const Batch& batch, std::size_t l) {
  const at::Tensor y = rows(normed, batch);
  rms_norm(rows(saved_of(l).residual_after_attention, batch), layers[l].mlp_norm.weight, config.norm_eps, y);
  layers[l].gate_up(y, rows(saved_of(l).gate_up, batch));
}

void Model::Impl::mlp_second_half(const Batch& batch, std::size_t l) {
  swiglu(rows(saved_of(l).gate_up, batch), rows(hidden, batch));
  add_to_stream(rows(saved_of(l).residual_after_attention, batch), layers[l].down, rows(hidden, batch),
                rows(stream[l + 1], batch));
}

/// Returns the losses of all tokens; leaves the gradient of the residual stream after the last layer in `d`.
std::vector<float> Model::Impl::loss(const Batch& batch, float scale) {
  const at::Tensor x = rows(stream.back(), batch), y = rows(normed, batch), gradient = rows(d, batch);
  rms_norm(x, norm.weight, config.norm_eps, y);
  std::vector<float> losses(batch.targets.size());
  const std::int64_t step = logits.size(0);
  for (std::int64_t first = 0; first < batch.size(); first += step) {
    const std::int64_t count = std::min(step, batch.size() - first);
    const at::Tensor logits_rows = logits.narrow(0, 0, count);
    at::Tensor read = y.narrow(0, first, count);
    head(read, logits_rows);
    const auto from = static_cast<std::size_t>(first), chunk_size = static_cast<std::size_t>(count);
    cross_entropy(logits_rows, std::span(batch.targets).subspan(from, chunk_size), scale,
                  std::span(losses).subspan(from, chunk_size));
    head.backward_parameters(read, logits_rows);
    at::mm_out(read, logits_rows, head.weight);  // `y` becomes its gradient
  }
  at::Tensor(gradient).zero_();
  rms_norm_backward(x, norm.weight, config.norm_eps, y, gradient, norm.d_weight);
  return losses;
}

/// Returns the stream's gradient in the working dtype.
at::Tensor Model::Impl::d_for_products(const Batch& batch) {
  if (settings.dtype == DType::f32) return rows(d, batch);
  convert(rows(d, batch), rows(d_working, batch));
  return rows(d_working, batch);
}

void Model::Impl::mlp_backward(const Batch& batch, std::size_t l) {
  const Layer& layer = layers[l];
  const at::Tensor gate_up = rows(saved_of(l).gate_up, batch),
                   residual_after_attention = rows(saved_of(l).residual_after_attention, batch);
  const at::Tensor dy = d_for_products(batch), y = rows(normed, batch);
  const at::Tensor h = rows(hidden, batch);
  layer.down.backward_input(dy, h);
  swiglu_backward(gate_up, h);
  layer.down.backward_parameters(h, dy);

  rms_norm(residual_after_attention, layer.mlp_norm.weight, config.norm_eps, y);
  layer.gate_up.backward_parameters(y, gate_up);
  layer.gate_up.backward_input(gate_up, y);
  rms_norm_backward(residual_after_attention, layer.mlp_norm.weight, config.norm_eps, y, rows(d, batch),
                    layer.mlp_norm.d_weight);
}

void Model::Impl::attention_backward_half(const Batch& batch, std::size_t l, const Routing& routing) {
  const Layer& layer = layers[l];
  const Saved& kept = saved_of(l);
  const at::Tensor x = rows(stream[l], batch), y = rows(normed, batch), gradient = rows(d_qkv, batch);
  const at::Tensor dy = d_for_products(batch);
  layer.output.backward_parameters(rows(kept.attended, batch), dy);
  layer.output.backward_input(dy, rows(d_attended, batch));
  attend_backward(batch, routing, kept);
  norm_and_rotate(gradient, heads_shape(), {}, {}, inverse_table.data());
  if (config.qk_norm) {
    const std::int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
    const at::Tensor raw = rows(kept.raw_qk, batch);
    head_norm_backward(raw.narrow(1, 0, q), layer.q_norm.weight, config.norm_eps, gradient.narrow(1, 0, q),
                       layer.q_norm.d_weight);
    head_norm_backward(raw.narrow(1, q, kv), layer.k_norm.weight, config.norm_eps, gradient.narrow(1, q, kv),
                       layer.k_norm.d_weight);
  }
  rms_norm(x, layer.attention_norm.weight, config.norm_eps, y);
  layer.qkv.backward_parameters(y, gradient);
  layer.qkv.backward_input(gradient, y);
  rms_norm_backward(x, layer.attention_norm.weight, config.norm_eps, y, rows(d, batch),
                    layer.attention_norm.d_weight);
}

Model::Model(const ModelConfig& config, const ModelSettings& settings)
    : impl_(std::make_unique<Impl>(config, settings)) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

void Model::initialise(double deviation, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
  auto* values = impl_->values.mutable_data_ptr<float>();
  for (const Layout::Entry& entry : impl_->layout.entries()) {
    float* first = values + entry.offset;
    if (entry.shape.size() > 1) {
      std::generate(first, first + entry.count, [&] { return normal(random); });
    } else {
      std::fill(first, first + entry.count, entry.name.ends_with("norm.weight") ? 1.0f : 0.0f);
    }
  }
  impl_->refresh();
}

void Model::load(const Weights& weights) {
  auto* values = impl_->values.mutable_data_ptr<float>();
  for (const Layout::Entry& entry : impl_->layout.entries()) {
    const StoredTensor& stored = *weights.find(entry.name);
    const bool is_vector = entry.shape.size() == 1;
    std::vector<float> row(static_cast<std::size_t>(is_vector ? entry.count : 0));
    if (is_vector) dequantise(stored, 0, 1, row.data());
    const std::int64_t width = is_vector ? 1 : entry.shape[1];
    for (std::int64_t r = 0; r < entry.shape[0]; ++r) {
      const std::int64_t source = weights.stored_row(entry.name, r);
      float* to = values + entry.offset + r * width;
      if (is_vector) {
        *to = row[static_cast<std::size_t>(source)];
      } else {
        dequantise(stored, source, 1, to);
      }
    }
  }
  impl_->refresh();
}

void Model::initialise_adapters(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  auto* values = impl_->adapters.mutable_data_ptr<float>();
  for (const Layout::Entry& entry : impl_->adapter_layout.entries()) {
    if (entry.name.ends_with("lora_B.weight")) continue;
    const float bound = 1.0f / std::sqrt(static_cast<float>(entry.shape[1]));
    std::uniform_real_distribution<float> uniform(-bound, bound);
    std::generate(values + entry.offset, values + entry.offset + entry.count,
                  [&] { return uniform(random); });
  }
  impl_->refresh();
}

const ModelConfig& Model::config() const {
  return impl_->config;
}
const Layout& Model::layout() const {
  return impl_->layout;
}
double Model::attention_seconds() const {
  return impl_->attention_seconds;
}
void Model::values_changed() {
  impl_->refresh();
}

std::vector<float> Model::merged() const {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  std::vector<float> result(static_cast<std::size_t>(impl_->layout.size()));
  const at::Tensor flat = at::from_blob(result.data(), {impl_->layout.size()}, at::kFloat);
  flat.copy_(impl_->values);
  for (const Layout::Entry& entry : impl_->adapter_layout.entries()) {
    constexpr std::string_view kEnd = ".lora_A.weight";
    if (!entry.name.ends_with(kEnd)) continue;
    const std::string name = entry.name.substr(0, entry.name.size() - kEnd.size());
    at::Tensor weight = Impl::part(flat, impl_->layout, name + ".weight");
    weight.addmm_(Impl::part(impl_->adapters, impl_->adapter_layout, name + ".lora_B.weight"),
                  Impl::part(impl_->adapters, impl_->adapter_layout, entry.name), 1,
                  impl_->settings.lora->scale());
  }
  return result;
}

Parameters Model::trained() {
  const auto span = [](const at::Tensor& tensor) {
    return std::span(tensor.mutable_data_ptr<float>(), static_cast<std::size_t>(tensor.numel()));
  };
  if (impl_->trains_all()) return {&impl_->layout, span(impl_->values), span(impl_->gradients)};
  return {&impl_->adapter_layout, span(impl_->adapters), span(impl_->adapter_gradients)};
}

std::vector<float> Model::forward_backward(const Batch& batch, std::span<const Routing> routings,
                                           float scale) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const std::size_t layers = impl_->layers.size();
  impl_->start(batch);
  for (std::size_t l = 0; l < layers; ++l) {
    impl_->attention_half(batch, l, routings[l]);
    impl_->mlp_first_half(batch, l);
    impl_->mlp_second_half(batch, l);
  }
  std::vector<float> losses = impl_->loss(batch, scale);
  for (std::size_t l = layers; l-- > 0;) {
    if (impl_->settings.recompute && l + 1 < layers) {  // those of the last layer are still in memory
      impl_->attention_half(batch, l, routings[l]);
      impl_->mlp_first_half(batch, l);
    }
    impl_->mlp_backward(batch, l);
    impl_->attention_backward_half(batch, l, routings[l]);
  }
  if (impl_->d_embedding.defined())
    embed_backward(impl_->rows(impl_->d, batch), batch.tokens, impl_->d_embedding);
  return losses;
}

std::string Model::first_non_finite(const Batch& batch, std::span<const Routing> routings) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  impl_->start(batch);
  if (!all_finite(impl_->rows(impl_->stream[0], batch))) return "the embedding";
  for (std::size_t l = 0; l < impl_->layers.size(); ++l) {
    impl_->attention_half(batch, l, routings[l]);
    if (!all_finite(impl_->rows(impl_->saved_of(l).residual_after_attention, batch)))
      return fmt::format("the output of layer {}'s attention", l);
    impl_->mlp_first_half(batch, l);
    impl_->mlp_second_half(batch, l);
    if (!all_finite(impl_->rows(impl_->stream[l + 1], batch)))
      return fmt::format("the output of layer {}'s MLP", l);
  }
  return {};
}

}  // namespace moba::llm::train
