#include "llm/session/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "llm/error.h"
#include "src/stopwatch.h"

namespace moba::llm {

std::string_view name_of(AttentionMode mode) {
  switch (mode) {
    case AttentionMode::full:
      return "full";
    case AttentionMode::moba:
      return "moba";
    case AttentionMode::moba_naive:
      return "moba-naive";
    case AttentionMode::oracle:
      return "oracle";
  }
  return "?";
}

Routing full_on_blocks_of(const Routing& routing) {
  Routing full = Routing::full();
  full.block_size = routing.block_size;
  return full;
}

std::vector<Routing> layer_routings(const Routing& moba, const std::vector<Routing>& layers,
                                    const std::vector<LayerRange>& full_layers, std::int64_t count) {
  std::vector<Routing> routings =
      layers.empty() ? std::vector<Routing>(static_cast<std::size_t>(count), moba) : layers;
  for (const std::int64_t layer : layers_in(full_layers)) {
    Routing& routing = routings[static_cast<std::size_t>(layer)];
    routing = full_on_blocks_of(routing);
  }
  return routings;
}

void check(const SessionSettings& settings, const ModelConfig& config) {
  const auto layers = static_cast<std::int64_t>(settings.layers.size());
  if (layers != 0 && layers != config.layers)
    throw UsageError(fmt::format("layers: expected {} routings, got {}", config.layers, layers));
  for (const LayerRange& range : settings.full_layers) {
    if (range.first < 0 || range.last < range.first || range.last >= config.layers) {
      throw UsageError(fmt::format("--moba-full-layers: expected layers from 0 to {}, got {}-{}",
                                   config.layers - 1, range.first, range.last));
    }
  }
}

Session::Session(Model model, const SessionSettings& settings)
    : model_(std::move(model)), settings_(settings), parallel_(openmp(settings.threads)) {
  const ModelConfig& config = model_.config();
  check(settings_, config);
  moba_ = layer_routings(settings_.moba, settings_.layers, settings_.full_layers, config.layers);
  for (const Routing& routing : moba_) {
    full_.push_back(full_on_blocks_of(routing));
    caches_.emplace_back(KvCache::Shape{.kv_heads = config.kv_heads,
                                        .head_dim = config.head_dim,
                                        .block_size = routing.block_size,
                                        .dtype = settings_.kv_dtype.value_or(model_.dtype())});
  }
  if (settings_.prefill == AttentionMode::oracle) oracles_.resize(caches_.size());
}

std::vector<float> Session::read(std::span<const std::int32_t> tokens, const Step& step) {
  Execution execution;
  execution.parallel = parallel_;
  if (step.mode == AttentionMode::moba_naive) execution.backend = "reference";

  const std::vector<Routing>& routings = step.mode == AttentionMode::full ? full_ : moba_;
  const auto attend = [&](std::int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& out) {
    {
      const ScopedTimer timer(step.attention_seconds);
      KvCache& cache = caches_[static_cast<std::size_t>(layer)];
      cache.append(k, v, 0, execution);
      Routing routing = routings[static_cast<std::size_t>(layer)];
      if (!oracles_.empty()) {
        OracleGate& oracle = oracles_[static_cast<std::size_t>(layer)];
        oracle.append(k);
        if (step.mode == AttentionMode::oracle && !is_full(routing) && q.sizes[0] > 0)
          routing = oracle.select(q, routing, parallel_);
      }
      if (q.sizes[0] == 1) {
        moba::decode(q, cache, routing, {.out = out}, execution);
      } else if (q.sizes[0] > 1) {
        attention(q, cache, 0, routing, {.out = out}, execution);
      }
    }
    if (step.progress) {
      const double share = static_cast<double>(layer + 1) / static_cast<double>(caches_.size());
      step.progress(share * static_cast<double>(tokens.size()));
    }
  };
  std::vector<float> logits = model_.forward(tokens, length_, attend, step.logits);
  length_ += static_cast<std::int64_t>(tokens.size());
  return logits;
}

std::vector<float> Session::prefill(std::span<const std::int32_t> tokens, const Progress& progress,
                                    Logits logits) {
  const auto total = static_cast<std::int64_t>(tokens.size());
  const bool has_tail = settings_.prefill != AttentionMode::full;
  const std::int64_t tail = has_tail ? std::max<std::int64_t>(0, total - settings_.full_tail) : total;
  std::vector<float> result;
  for (std::int64_t first = 0, last = 0; first < total; first = last) {
    last = std::min(first + settings_.chunk, first < tail ? tail : total);
    const Step step{.mode = first < tail ? settings_.prefill : AttentionMode::full,
                    .logits = logits == Logits::last && last < total ? Logits::none : logits,
                    .attention_seconds = seconds_.prefill,
                    .progress = [&](double tokens_read) {
                      if (progress) progress(static_cast<double>(first) + tokens_read);
                    }};
    const std::vector<float> step_logits =
        read(tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first)), step);
    result.insert(result.end(), step_logits.begin(), step_logits.end());
  }
  return result;
}

std::vector<float> Session::decode(std::int32_t token) {
  return read({&token, 1}, {.mode = settings_.decode,
                            .logits = Logits::last,
                            .attention_seconds = seconds_.decode,
                            .progress = {}});
}

void Session::rewind(std::int64_t tokens) {
  for (KvCache& cache : caches_) cache.truncate(tokens);
  for (OracleGate& oracle : oracles_) oracle.truncate(tokens);
  length_ = tokens;
}

}  // namespace moba::llm
