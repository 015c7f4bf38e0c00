#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "llm/engine/chunk_size.h"
#include "llm/engine/page_pool.h"
#include "llm/engine/prefix_cache.h"
#include "llm/model/model.h"
#include "llm/session/sampler.h"
#include "llm/session/session.h"
#include "moba/attention.h"
#include "moba/cache.h"

namespace moba::llm {

/// Settings that all requests of an engine share.
struct EngineSettings {
  /// The block size of every request's routing: one for all layers, or one for each.
  std::vector<std::int64_t> block_sizes{256};
  /// Layers that are in mode full throughout.
  std::vector<LayerRange> full_layers{};
  /// The storage type of the KV cache: f32, bf16, f16 or i8; unset: the dtype of the model.
  std::optional<DType> kv_dtype{};
  /// Maximum tokens of prompt and answer together; 0: the model's context.
  std::int64_t context = 0;
  /// Maximum tokens of a prompt read in a step.
  std::int64_t chunk = 2048;
  /// Maximum seconds of a step while a request decodes, which the chunks adapt to; unset: no limit.
  std::optional<double> max_step_seconds{};
  /// Maximum requests that are read or decoded at a time, and that wait.
  std::int64_t max_running = 8, max_waiting = 64;
  /// Maximum bytes of KV cache pages, of running requests and of finished ones together.
  std::size_t cache_bytes = std::size_t{4} << 30;
  /// A folder that keeps the pages of prompts for later engines; empty: none. An engine reads the pages of
  /// others with equal settings and the same `model_fingerprint`.
  std::filesystem::path cache_folder{};
  /// Maximum bytes of the files in this folder, those of other engines included: the least recently used are
  /// removed.
  std::uint64_t cache_folder_bytes = std::numeric_limits<std::uint64_t>::max();
  std::string model_fingerprint{};
  /// Receives a line about a file of this folder that is ignored or cannot be written, also from another
  /// thread.
  std::function<void(const std::string&)> warn{};
  /// Threads of the attention; use_threads() sets those of the model.
  int threads = 1;
};

enum class Finish : std::uint8_t {
  end_token,  // one of Request::end_tokens
  stopped,    // on_token returned false
  length,     // max_tokens
  context,    // the context, or the memory of the cache, is full
  cancelled,
};
std::string_view name_of(Finish finish);

/// The cost of a request.
struct RequestUsage {
  /// Prompt tokens; how many of them came from the prefix cache; tokens of the answer.
  std::int64_t prompt_tokens = 0, cached_tokens = 0, generated_tokens = 0;
  /// Seconds in the queue, then to the first logits, then to the end.
  double queue_seconds = 0, prefill_seconds = 0, decode_seconds = 0;
  /// Seconds in attention, in decode those of the batches that it was in.
  AttentionSeconds attention{};
};

/// A prompt with its settings and the receivers of its events, which run inside Engine::step() and must not
/// call the engine. An exception of theirs leaves step() and makes the engine invalid.
struct Request {
  std::vector<std::int32_t> prompt;
  AttentionMode prefill = AttentionMode::full;
  /// full or moba.
  AttentionMode decode = AttentionMode::full;
  /// Top-k and sink of the layers that are in mode moba. The block sizes are the engine's.
  Routing moba{.block_size = 256, .top_k = 4, .sink_blocks = 1};
  /// The routing of each layer in mode moba, top_k kEverything where it is full; empty: `moba` in all.
  std::vector<Routing> layers{};
  /// Number of last tokens of the prompt that are read in mode full where prefill is not.
  std::int64_t full_tail = 128;
  Sampling sampling{};
  /// Maximum tokens of the answer, 0 included; unset: up to an end token or the context.
  std::optional<std::int64_t> max_tokens{};
  std::vector<std::int32_t> end_tokens{};

  /// Receives the part of the prompt that is read, in tokens, before the first chunk, after each layer of
  /// each chunk, and after pages were found in a cache. Of `usage`, the tokens are known.
  std::function<void(double tokens_read, const RequestUsage& usage)> on_progress{};
  /// Receives the logits [n, vocab] after n tokens of the prompt, from `first` on, in order. With it, the
  /// whole prompt is computed: the prefix cache is not read.
  std::function<void(std::int64_t first, std::span<const float> logits)> on_prompt_logits{};
  /// Receives each token of the answer with the logits [vocab] that it was drawn from; returns whether to
  /// continue.
  std::function<bool(std::int32_t token, std::span<const float> logits)> on_token{};
  std::function<void(Finish finish, const RequestUsage& usage)> on_finish{};

  /// Receives, before each token of the answer, the attention weights of the query that it was drawn from: of
  /// every `weight_range` tokens of the prompt [ceil(prompt / weight_range)], averaged over layers and heads.
  /// The rest up to 1 is the weight of the answer. Unset: they are not computed.
  std::function<void(std::span<const float> weights)> on_weights{};
  std::int64_t weight_range = 256;
};

/// Thrown for a request when max_waiting requests wait.
class QueueFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The state of an engine, and its sums since it began.
struct EngineStatistics {
  std::int64_t running = 0, waiting = 0;
  std::int64_t used_pages = 0, cached_pages = 0, max_pages = 0, page_tokens = 0;
  std::int64_t prompt_tokens = 0, cached_tokens = 0, generated_tokens = 0;
  std::int64_t finished_requests = 0, steps = 0, evicted_pages = 0, preemptions = 0;
  /// Pages in the folder, and those that were read from it.
  std::int64_t stored_pages = 0, restored_pages = 0;
};

/// Runs requests on one model in turns (continuous batching): a step advances every decoding request by one
/// token, and one other request by a chunk of its prompt. Keys and values lie in pages that requests with
/// equal prefixes share. A request's tokens do not depend on the others beyond the rounding of its prefill.
/// Not thread-safe.
class Engine {
 public:
  using Id = std::int64_t;

  /// Throws UsageError for settings that do not fit the model, or a cache of less than one page.
  Engine(Model model, const EngineSettings& settings);
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  /// Queues a request. Throws UsageError for one that is invalid or can never fit, QueueFull for one too
  /// many.
  Id submit(Request request);
  /// Ends a request, whose pages are freed at once, unless it has finished.
  void cancel(Id id);
  /// Does one step. Returns whether any request is left.
  bool step();

  EngineStatistics statistics() const;
  /// Returns the longest prompt that the engine takes, in tokens.
  std::int64_t max_prompt() const;
  const Model& model() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moba::llm
