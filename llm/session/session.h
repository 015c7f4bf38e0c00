#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "llm/model/model.h"
#include "llm/session/oracle_gate.h"
#include "moba/attention.h"
#include "moba/cache.h"

namespace moba::llm {

enum class AttentionMode : std::uint8_t {
  full,
  moba,
  moba_naive,  // the same routing through libmoba's reference backend
  oracle,      // the blocks of the most attention mass, in place of the gate's: a measuring tool
};
std::string_view name_of(AttentionMode mode);

/// The attention of a session in prefill and decode.
struct SessionSettings {
  AttentionMode prefill = AttentionMode::full;
  /// full or moba.
  AttentionMode decode = AttentionMode::full;
  /// Blocks, top-k and sink of the layers that are in mode moba.
  Routing moba{.block_size = 256, .top_k = 4, .sink_blocks = 1};
  /// Number of last tokens of a prompt that are read in mode full, for models that were not trained with
  /// MoBA.
  std::int64_t full_tail = 128;
  /// Layers that are in mode full throughout.
  std::vector<LayerRange> full_layers;
  /// The routing of each layer in mode moba, top_k kEverything where it is full; empty: `moba` in all.
  std::vector<Routing> layers;
  /// The storage type of the KV cache: f32, bf16, f16 or i8; unset: the dtype of the model.
  std::optional<DType> kv_dtype;
  /// Tokens read at a time. Bounds memory; the result does not depend on it.
  std::int64_t chunk = 2048;
  /// Threads of the attention; use_threads() sets those of the model.
  int threads = 1;
};

/// Returns the routing of each of `count` layers in mode moba: those of `layers`, where it is empty `moba`,
/// and dense attention with the same blocks in `full_layers`.
std::vector<Routing> layer_routings(const Routing& moba, const std::vector<Routing>& layers,
                                    const std::vector<LayerRange>& full_layers, std::int64_t count);
inline bool is_full(const Routing& routing) {
  return routing.top_k == Routing::kEverything;
}
/// Returns dense attention over the blocks of `routing`.
Routing full_on_blocks_of(const Routing& routing);

/// Throws UsageError for settings that do not fit a model of this shape.
void check(const SessionSettings& settings, const ModelConfig& config);

/// Seconds spent in attention: extending the caches and attending.
struct AttentionSeconds {
  double prefill = 0, decode = 0;
};

/// One conversation: a model, a paged KV cache for each layer, and the attention settings.
class Session {
 public:
  /// Called after each layer of each chunk with the part of the prompt that is read, in tokens. May throw to
  /// abort, after which the session is invalid.
  using Progress = std::function<void(double tokens_read)>;

  /// Throws UsageError as check() does.
  Session(Model model, const SessionSettings& settings);

  /// Reads a prompt, or more of one, and returns the logits [vocab] after its last token; with Logits::all
  /// those after every token, [tokens, vocab]. `tokens` is not empty.
  std::vector<float> prefill(std::span<const std::int32_t> tokens, const Progress& progress = {},
                             Logits logits = Logits::last);
  /// Reads one token in the decode mode and returns the logits [vocab] after it.
  std::vector<float> decode(std::int32_t token);

  /// Truncates the caches to the first `tokens` tokens.
  void rewind(std::int64_t tokens);

  /// Tokens read so far.
  std::int64_t length() const { return length_; }
  AttentionSeconds attention_seconds() const { return seconds_; }
  /// The size of the vocabulary.
  std::int64_t vocab() const { return model_.config().vocab; }

 private:
  struct Step {
    AttentionMode mode;
    Logits logits;
    double& attention_seconds;
    Progress progress;
  };
  std::vector<float> read(std::span<const std::int32_t> tokens, const Step& step);

  Model model_;
  SessionSettings settings_;
  std::vector<Routing> moba_, full_;  // by layer
  std::vector<KvCache> caches_;
  std::vector<OracleGate> oracles_;  // by layer; empty without AttentionMode::oracle
  Parallel parallel_;
  std::int64_t length_ = 0;
  AttentionSeconds seconds_;
};

}  // namespace moba::llm
