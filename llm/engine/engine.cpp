#include "llm/engine/engine.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <list>
#include <tuple>
#include <utility>

#include "llm/engine/prefix_store.h"
#include "llm/engine/prompt_weights.h"
#include "llm/engine/sequence_cache.h"
#include "llm/error.h"
#include "src/stopwatch.h"

namespace moba::llm {
namespace {

/// Maximum logits of one chunk, where those of every token are needed.
constexpr std::int64_t kMaxChunkLogits = std::int64_t{1} << 26;

/// One request in the engine. Its tokens are those of the prompt and of the answer; the cache holds the first
/// of them.
struct Sequence {
  Sequence(Engine::Id number, Request r, std::vector<Routing> moba_layers, const PageFormat& format)
      : id(number),
        request(std::move(r)),
        moba(std::move(moba_layers)),
        tokens(request.prompt),
        prompt_size(static_cast<std::int64_t>(tokens.size())),
        cache(format),
        sampler(request.sampling) {
    usage.prompt_tokens = prompt_size;
  }

  Engine::Id id;
  Request request;
  std::vector<Routing> moba;  // by layer, in mode moba
  std::vector<std::int32_t> tokens;
  std::int64_t prompt_size;
  SequenceCache cache;
  Sampler sampler;
  RequestUsage usage;
  Stopwatch stage;  // since it was queued, started, or given its first logits
  bool is_started = false, has_logits = false;
  std::optional<PrefixCache::Place> prefix;  // after its full pages of the variant; unset: not begun
  std::vector<PrefixStore::Key> keys;        // of the first pages, after the root
  std::int64_t stored = 0;                   // pages that the store has or will write
  PrefixStore::Time begin{};                 // when it was started
  std::int64_t told = 0;                     // tokens whose logits on_prompt_logits has received
  std::optional<PromptWeights> weights;      // of the query that was read last, if on_weights is set

  std::int64_t unread() const { return static_cast<std::int64_t>(tokens.size()) - cache.length(); }
  /// The tokens that are read in chunks: the prompt, and after a preemption all but the last one.
  std::int64_t prefill_end() const {
    return has_logits ? static_cast<std::int64_t>(tokens.size()) - 1 : prompt_size;
  }
  bool is_decoding() const { return has_logits && unread() == 1; }

  std::int64_t tail_begin() const {
    return request.prefill == AttentionMode::full
               ? prompt_size
               : std::max<std::int64_t>(0, prompt_size - request.full_tail);
  }
  AttentionMode mode_at(std::int64_t position) const {
    return position < tail_begin()  ? request.prefill
           : position < prompt_size ? AttentionMode::full
                                    : request.decode;
  }
  /// Where the mode at `position` ends.
  std::int64_t mode_end(std::int64_t position) const {
    for (const std::int64_t end : {tail_begin(), prompt_size}) {
      if (position < end) return end;
    }
    return std::numeric_limits<std::int64_t>::max();
  }
  /// The first position whose mode differs from that of the first token: keys before it depend on the tokens
  /// and the variant alone.
  std::int64_t variant_end() const {
    std::int64_t end = mode_end(0);
    while (end != std::numeric_limits<std::int64_t>::max() && mode_at(end) == mode_at(0)) end = mode_end(end);
    return end;
  }
  /// The settings that the keys of the first tokens depend on.
  std::string variant() const {
    const AttentionMode mode = mode_at(0);
    if (mode == AttentionMode::full) return std::string(name_of(mode));
    if (request.layers.empty())
      return fmt::format("{} top_k {} sink {}", name_of(mode), request.moba.top_k, request.moba.sink_blocks);
    std::string layers = fmt::format("{} by layer", name_of(mode));
    for (const Routing& routing : moba) layers += fmt::format(" {}/{}", routing.top_k, routing.sink_blocks);
    return layers;
  }
};

/// A sequence that a step decodes, and the routings of its token, by layer.
struct Decoding {
  Sequence* sequence;
  std::vector<Routing> routings;
};

}  // namespace

std::string_view name_of(Finish finish) {
  switch (finish) {
    case Finish::end_token:
      return "end_token";
    case Finish::stopped:
      return "stopped";
    case Finish::length:
      return "length";
    case Finish::context:
      return "context";
    case Finish::cancelled:
      return "cancelled";
  }
  return "?";
}

struct Engine::Impl {
  using Sequences = std::list<Sequence>;  // oldest first

  Impl(Model m, const EngineSettings& s);

  void check(const Request& request) const;
  bool step();
  void finish(Sequences& list, Sequences::iterator sequence, Finish reason);
  std::int64_t max_tokens() const;

  void admit();
  bool fits(Sequence& sequence);
  bool reserve(Sequence& sequence, std::int64_t tokens);
  void preempt(Sequences::iterator sequence);
  void release(Sequence& sequence);

  std::vector<Routing> routings(const Sequence& sequence, std::int64_t tokens) const;
  void decode_all();
  std::vector<float> decode(std::span<const Decoding> batch);
  void prefill_one(double decode_seconds);
  Sequence* next_prefill();
  std::int64_t prefix_end(const Sequence& sequence) const;
  void adopt_prefix(Sequence& sequence);
  void adopt(Sequence& sequence, std::span<const Page> pages, const PrefixCache::Place& after);
  std::int64_t full_pages(const Sequence& sequence) const;
  PrefixCache::Place& place_of(Sequence& sequence);
  void store_pages(Sequence& sequence);
  bool restore_prefix(Sequence& sequence, double decode_seconds);
  const PrefixStore::Key& parent_key(Sequence& sequence, std::int64_t page) const;
  std::span<const std::int32_t> tokens_of(const Sequence& sequence, std::int64_t first,
                                          std::int64_t last) const;
  void prefill(Sequence& sequence, std::int64_t tokens);
  void attend_last(Sequence& sequence, const Tensor& q, const PageLayout& layout, const PagedSequence& view,
                   const Routing& routing, const Tensor& out, const Execution& execution);
  void advance(Sequence& sequence, std::int64_t tokens);
  void sample(Sequence& sequence, std::span<const float> logits);

  Model model;
  EngineSettings settings;
  PageFormat format;
  PagePool pool;
  PrefixCache prefixes;
  std::unique_ptr<PrefixStore> store;  // null without a folder
  std::vector<Routing> full;           // by layer
  Parallel parallel;
  Sequences waiting, running;
  std::vector<std::pair<Id, Finish>> finished;  // in this step
  ChunkSize chunk_size;
  Id next_id = 0;
  EngineStatistics sums;
};

namespace {

DType kv_dtype(const Model& model, const EngineSettings& settings) {
  return settings.kv_dtype.value_or(model.dtype());
}

std::int64_t context_of(const Model& model, const EngineSettings& settings) {
  return settings.context == 0 ? model.config().context : settings.context;
}

std::int64_t max_pages(const PageFormat& format, const EngineSettings& settings) {
  const auto pages = static_cast<std::int64_t>(settings.cache_bytes / format.bytes);
  if (pages < 1) {
    throw UsageError(fmt::format("cache_bytes: expected at least {} (a page of {} tokens), got {}",
                                 format.bytes, format.page_tokens, settings.cache_bytes));
  }
  return pages;
}

void check_counts(const EngineSettings& settings) {
  const auto at_least_one = [](const char* name, std::int64_t value) {
    if (value < 1) throw UsageError(fmt::format("{}: expected at least 1, got {}", name, value));
  };
  if (settings.context < 0)
    throw UsageError(fmt::format("context: expected at least 0, got {}", settings.context));
  for (const std::int64_t block_size : settings.block_sizes) at_least_one("block_sizes", block_size);
  at_least_one("chunk", settings.chunk);
  at_least_one("max_running", settings.max_running);
  at_least_one("max_waiting", settings.max_waiting);
}

const EngineSettings& checked(const EngineSettings& settings, const ModelConfig& config) {
  check_counts(settings);
  SessionSettings layers;
  layers.full_layers = settings.full_layers;
  llm::check(layers, config);
  const auto sizes = static_cast<std::int64_t>(settings.block_sizes.size());
  if (sizes != 1 && sizes != config.layers) {
    throw UsageError(
        fmt::format("block_sizes: expected one, or {} (one for each layer), got {}", config.layers, sizes));
  }
  return settings;
}

}  // namespace

Engine::Impl::Impl(Model m, const EngineSettings& s)
    : model(std::move(m)),
      settings(checked(s, model.config())),
      format(model.config(), settings.block_sizes, kv_dtype(model, settings), context_of(model, settings)),
      pool(format.bytes, max_pages(format, settings)),
      prefixes(format.page_tokens),
      parallel(openmp(settings.threads)) {
  settings.context = context_of(model, settings);
  for (const PageLayout& layer : format.layers)
    full.push_back(full_on_blocks_of({.block_size = layer.block_size}));
  if (!settings.cache_folder.empty()) {
    // Pages that wait to be written cannot be evicted.
    const auto max_pending = static_cast<std::size_t>(std::max<std::int64_t>(pool.max_pages() / 4, 1));
    store = std::make_unique<PrefixStore>(PrefixStore::Settings{.folder = settings.cache_folder,
                                                                .page_bytes = format.bytes,
                                                                .max_bytes = settings.cache_folder_bytes,
                                                                .max_pending = max_pending,
                                                                .warn = s.warn});
  }
}

/// Tokens that a lone request can hold.
std::int64_t Engine::Impl::max_tokens() const {
  const std::int64_t pages = pool.max_pages();
  return pages > settings.context / format.page_tokens ? settings.context : pages * format.page_tokens;
}

void Engine::Impl::check(const Request& request) const {
  const auto refuse = [](const char* name, const std::string& expected, std::int64_t got) {
    throw UsageError(fmt::format("{}: expected {}, got {}", name, expected, got));
  };
  const auto size = static_cast<std::int64_t>(request.prompt.size());
  if (size < 1 || size > max_tokens()) refuse("prompt", fmt::format("1 to {} tokens", max_tokens()), size);
  for (const std::int32_t token : request.prompt) {
    if (token < 0 || token >= model.config().vocab)
      refuse("prompt", fmt::format("token ids below {}", model.config().vocab), token);
  }
  if (request.prefill == AttentionMode::oracle)
    throw UsageError("prefill: expected full, moba or moba-naive, got oracle");
  if (request.decode != AttentionMode::full && request.decode != AttentionMode::moba)
    throw UsageError(fmt::format("decode: expected full or moba, got {}", name_of(request.decode)));
  const std::int64_t layers = format.layer_count();
  if (!request.layers.empty() && static_cast<std::int64_t>(request.layers.size()) != layers)
    refuse("layers", fmt::format("{} routings", layers), static_cast<std::int64_t>(request.layers.size()));
  const bool is_sparse = request.prefill != AttentionMode::full || request.decode != AttentionMode::full;
  for (std::int64_t layer = 0; is_sparse && layer < layers; ++layer) {
    const Routing& moba =
        request.layers.empty() ? request.moba : request.layers[static_cast<std::size_t>(layer)];
    if (moba.block_size != format.block_size(layer))
      refuse("block_size", fmt::format("{} (the engine's)", format.block_size(layer)), moba.block_size);
    if (moba.top_k < 1) refuse("top_k", "at least 1", moba.top_k);
    if (moba.sink_blocks < 0 || moba.sink_blocks >= moba.top_k)
      refuse("sink_blocks", fmt::format("0 to {}, one less than top_k", moba.top_k - 1), moba.sink_blocks);
  }
  if (request.on_weights && request.weight_range < 1)
    refuse("weight_range", "at least 1", request.weight_range);
  if (request.full_tail < 0) refuse("full_tail", "at least 0", request.full_tail);
  if (request.max_tokens.value_or(0) < 0) refuse("max_tokens", "at least 0", *request.max_tokens);
}

bool Engine::Impl::step() {
  ++sums.steps;
  if (store) store->release_written();
  admit();
  const double decode_seconds = seconds_of([&] { decode_all(); });
  prefill_one(decode_seconds);
  return !running.empty() || !waiting.empty();
}

void Engine::Impl::finish(Sequences& list, Sequences::iterator sequence, Finish reason) {
  Sequence& s = *sequence;
  (!s.is_started  ? s.usage.queue_seconds
   : s.has_logits ? s.usage.decode_seconds
                  : s.usage.prefill_seconds) += s.stage.seconds();
  release(s);
  ++sums.finished_requests;
  Sequences ended;
  ended.splice(ended.end(), list, sequence);
  if (s.request.on_finish) s.request.on_finish(reason, s.usage);
}

/// Starts requests in the order of their arrival, where their prompts find room beside all that runs.
void Engine::Impl::admit() {
  while (!waiting.empty() && static_cast<std::int64_t>(running.size()) < settings.max_running) {
    Sequence& next = waiting.front();
    if (!running.empty() && !fits(next)) return;
    if (!next.is_started) {
      next.is_started = true;
      next.begin = PrefixStore::Time::clock::now();
      next.usage.queue_seconds = next.stage.seconds();
      next.stage = {};
    }
    const auto place = std::find_if(running.begin(), running.end(),
                                    [&](const Sequence& other) { return other.id > next.id; });
    running.splice(place, waiting, waiting.begin());
  }
}

bool Engine::Impl::fits(Sequence& sequence) {
  PrefixCache::Place place = prefixes.root(sequence.variant());
  const std::vector<Page> shared = prefixes.match(place, sequence.tokens);
  prefixes.touch(place);
  std::int64_t free = pool.max_pages() - (pool.used() - prefixes.idle_pages());
  for (const Sequence& other : running) {  // what they have yet to read, and a page for the answer
    const auto tokens = static_cast<std::int64_t>(other.tokens.size());
    free -= std::max<std::int64_t>(0, format.pages_for(tokens) - other.cache.pages()) + 1;
  }
  const auto tokens = static_cast<std::int64_t>(sequence.tokens.size());
  return format.pages_for(tokens + 1) - static_cast<std::int64_t>(shared.size()) <= free;
}

/// Gives `sequence` pages for `tokens` more tokens, at the cost of unused prefixes, then of younger requests.
/// So the oldest request always gets what it needs.
bool Engine::Impl::reserve(Sequence& sequence, std::int64_t tokens) {
  while (sequence.cache.capacity() < sequence.cache.length() + tokens) {
    if (Page page = pool.allocate()) {
      sequence.cache.add(std::move(page));
    } else if (prefixes.evict()) {
      ++sums.evicted_pages;
    } else {
      const auto youngest = std::find_if(running.rbegin(), running.rend(),
                                         [](const Sequence& s) { return s.cache.pages() > 0; });
      if (youngest == running.rend() || youngest->id <= sequence.id) return false;
      preempt(std::prev(youngest.base()));
    }
  }
  return true;
}

/// Frees the pages of a request, which is read again when there is room.
void Engine::Impl::preempt(Sequences::iterator sequence) {
  ++sums.preemptions;
  release(*sequence);
  const auto place = std::find_if(waiting.begin(), waiting.end(),
                                  [&](const Sequence& other) { return other.id > sequence->id; });
  waiting.splice(place, running, sequence);
}

/// Frees the pages of a request, of which the prefix cache and the store keep the full ones.
void Engine::Impl::release(Sequence& sequence) {
  if (sequence.prefix) prefixes.touch(*sequence.prefix);
  if (store) {
    store_pages(sequence);
    const auto keys = std::min(sequence.keys.size(), static_cast<std::size_t>(full_pages(sequence)) + 1);
    store->use(std::span(sequence.keys).first(keys), sequence.begin);
  }
  sequence.prefix.reset();
  sequence.cache.clear();
}

/// The routings of the last of `tokens` tokens, by layer. One that covers every block is full, so that the
/// result does not depend on the other sequences of a batch.
std::vector<Routing> Engine::Impl::routings(const Sequence& sequence, std::int64_t tokens) const {
  std::vector<Routing> result = full;
  if (sequence.mode_at(tokens - 1) == AttentionMode::full) return result;
  for (std::size_t layer = 0; layer < result.size(); ++layer) {
    const Routing& moba = sequence.moba[layer];
    const std::int64_t blocks = (tokens + moba.block_size - 1) / moba.block_size;
    if (moba.top_k < blocks) result[layer] = moba;
  }
  return result;
}

namespace {

/// Rows [first, first + count) of a tensor.
Tensor rows_of(const Tensor& t, std::size_t first, std::size_t count) {
  Tensor rows = t;
  rows.data = static_cast<std::byte*>(t.data) +
              static_cast<std::int64_t>(first) * t.strides[0] * static_cast<std::int64_t>(size_of(t.dtype));
  rows.sizes[0] = static_cast<std::int64_t>(count);
  return rows;
}

/// Orders the routings of one layer, whose block size is the engine's.
auto key_of(const Routing& routing) {
  return std::tuple(routing.top_k, routing.sink_blocks);
}

bool comes_before(const std::vector<Routing>& a, const std::vector<Routing>& b) {
  return std::lexicographical_compare(
      a.begin(), a.end(), b.begin(), b.end(),
      [](const Routing& x, const Routing& y) { return key_of(x) < key_of(y); });
}

}  // namespace

/// Reads the last token of every sequence; returns the logits [batch, vocab].
std::vector<float> Engine::Impl::decode(std::span<const Decoding> batch) {
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> positions;
  bool any_weights = false;
  for (const auto& [s, routings] : batch) {
    tokens.push_back(s->tokens.back());
    positions.push_back(s->cache.length());
    s->cache.prepare(1);
    if (!s->weights) continue;
    s->weights->clear();
    any_weights = true;
  }
  std::vector<KeyWeights> weights(any_weights ? batch.size() : 0);
  double seconds = 0;
  const Execution execution{.parallel = parallel};
  std::vector<PagedSequence> views(batch.size());
  std::vector<float> logits = model.decode(
      tokens, positions,
      [&](std::int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
        const ScopedTimer timer(seconds);
        const PageLayout& layout = format.layer(layer);
        for (std::size_t i = 0; i < batch.size(); ++i) {
          Sequence& s = *batch[i].sequence;
          views[i] = s.cache.view(layer, positions[i]);
          append(rows_of(k, i, 1), rows_of(v, i, 1), layout, views[i], execution);
          ++views[i].length;
          if (s.weights) weights[i] = s.weights->layer();
        }
        for (std::size_t first = 0, last = 0; first < batch.size(); first = last) {
          const auto routing_of = [&](std::size_t i) -> const Routing& {
            return batch[i].routings[static_cast<std::size_t>(layer)];
          };
          while (last < batch.size() && key_of(routing_of(last)) == key_of(routing_of(first))) ++last;
          Outputs outputs{.out = rows_of(out, first, last - first)};
          if (any_weights) outputs.weights = std::span(weights).subspan(first, last - first);
          moba::decode(rows_of(q, first, last - first), layout, std::span(views).subspan(first, last - first),
                       routing_of(first), outputs, execution);
        }
        for (const auto& [s, routings] : batch)
          if (s->weights) s->weights->add_layer();
      });
  for (const auto& [s, routings] : batch) {
    s->usage.attention.decode += seconds;
    advance(*s, 1);
  }
  return logits;
}

void Engine::Impl::decode_all() {
  std::vector<Decoding> batch;
  for (Sequence& sequence : running) {  // reserve() may take younger ones out of the list
    if (sequence.is_decoding() && reserve(sequence, 1))
      batch.push_back({&sequence, routings(sequence, sequence.cache.length() + 1)});
  }
  if (batch.empty()) return;
  std::stable_sort(batch.begin(), batch.end(),
                   [](const Decoding& a, const Decoding& b) { return comes_before(a.routings, b.routings); });
  const std::vector<float> logits = decode(batch);
  const auto vocab = static_cast<std::size_t>(model.config().vocab);
  for (std::size_t i = 0; i < batch.size(); ++i)
    sample(*batch[i].sequence, std::span(logits).subspan(i * vocab, vocab));
}

/// The request whose prompt is read next: every other time the oldest, so that it ends, else the one with
/// the fewest tokens left, so that short ones need not wait for it.
Sequence* Engine::Impl::next_prefill() {
  Sequence* next = nullptr;
  for (Sequence& s : running) {
    if (s.is_decoding()) continue;
    const auto left = [](const Sequence& of) { return of.prefill_end() - of.cache.length(); };
    if (next == nullptr || (sums.steps % 2 == 1 && left(s) < left(*next))) next = &s;
  }
  return next;
}

/// Where the pages end that a sequence may take over.
std::int64_t Engine::Impl::prefix_end(const Sequence& sequence) const {
  if (sequence.request.on_prompt_logits) return 0;
  // The last token of the prompt is read for its logits.
  const std::int64_t last = sequence.has_logits ? sequence.prefill_end() : sequence.prompt_size - 1;
  return std::min(last, sequence.variant_end());
}

/// The pages that are full of tokens of the variant.
std::int64_t Engine::Impl::full_pages(const Sequence& sequence) const {
  return std::min(sequence.cache.length(), sequence.variant_end()) / format.page_tokens;
}

PrefixCache::Place& Engine::Impl::place_of(Sequence& sequence) {
  if (!sequence.prefix) sequence.prefix = prefixes.root(sequence.variant());
  return *sequence.prefix;
}

/// Continues after `pages`, which follow its full ones and end at the place `after`.
void Engine::Impl::adopt(Sequence& sequence, std::span<const Page> pages, const PrefixCache::Place& after) {
  const std::int64_t before = sequence.cache.length();
  sequence.cache.adopt(pages);
  sequence.prefix = after;
  if (sequence.has_logits) return;
  sequence.usage.cached_tokens += sequence.cache.length() - before;
  sums.cached_tokens += sequence.cache.length() - before;
  if (sequence.request.on_progress)
    sequence.request.on_progress(static_cast<double>(sequence.cache.length()), sequence.usage);
}

/// Takes over what other requests have read meanwhile.
void Engine::Impl::adopt_prefix(Sequence& sequence) {
  const std::int64_t first = sequence.cache.length() / format.page_tokens,
                     last = prefix_end(sequence) / format.page_tokens;
  if (last <= first) return;
  PrefixCache::Place place = place_of(sequence);
  const std::vector<Page> pages = prefixes.match(place, tokens_of(sequence, first, last));
  if (pages.empty()) return;
  adopt(sequence, pages, place);
  prefixes.touch(place);
}

/// Returns the key of the page before the given one, or the root.
const PrefixStore::Key& Engine::Impl::parent_key(Sequence& sequence, std::int64_t page) const {
  std::vector<PrefixStore::Key>& keys = sequence.keys;
  if (keys.empty()) {
    std::string way =
        fmt::format("{}\n{}\nkv {} blocks of {} pages of {} x {}\nfull layers", settings.model_fingerprint,
                    sequence.variant(), name_of(format.layers.front().dtype),
                    fmt::join(settings.block_sizes, " "), format.page_tokens, format.bytes);
    for (const std::int64_t layer : layers_in(settings.full_layers)) way += fmt::format(" {}", layer);
    keys.push_back(PrefixStore::root(way));
  }
  while (static_cast<std::int64_t>(keys.size()) <= page) {
    const auto index = static_cast<std::int64_t>(keys.size()) - 1;
    keys.push_back(PrefixStore::next(keys.back(), tokens_of(sequence, index, index + 1)));
  }
  return keys[static_cast<std::size_t>(page)];
}

/// The tokens of pages [first, last).
std::span<const std::int32_t> Engine::Impl::tokens_of(const Sequence& sequence, std::int64_t first,
                                                      std::int64_t last) const {
  return std::span(sequence.tokens)
      .subspan(static_cast<std::size_t>(first * format.page_tokens),
               static_cast<std::size_t>((last - first) * format.page_tokens));
}

/// Reads pages from the folder for as long as a step may take, at least one. Returns whether there may be
/// more.
bool Engine::Impl::restore_prefix(Sequence& sequence, double decode_seconds) {
  if (!store || sequence.cache.length() % format.page_tokens != 0) return false;
  const std::int64_t size = format.page_tokens, first = sequence.cache.length() / size,
                     end = prefix_end(sequence) / size;
  const auto is_stored = [&](std::int64_t page) { return store->contains(parent_key(sequence, page + 1)); };
  const Stopwatch stopwatch;
  std::int64_t page = first;
  bool has_time = true;
  while (has_time && page < end && is_stored(page)) {
    if (!reserve(sequence, (page + 1 - first) * size)) break;
    std::byte* memory = sequence.cache.page(page).get();
    if (!store->read(parent_key(sequence, page), tokens_of(sequence, page, page + 1), memory)) break;
    ++page;
    has_time =
        !settings.max_step_seconds || decode_seconds + stopwatch.seconds() < *settings.max_step_seconds;
  }
  if (page == first) return false;
  sums.restored_pages += page - first;
  std::vector<Page> pages = sequence.cache.copy_pages(first, page);
  PrefixCache::Place place = place_of(sequence);
  prefixes.insert(place, tokens_of(sequence, first, page), pages);
  adopt(sequence, pages, place);
  return !has_time;
}

void Engine::Impl::prefill_one(double decode_seconds) {
  Sequence* next = next_prefill();
  if (next == nullptr) return;
  Sequence& sequence = *next;
  adopt_prefix(sequence);
  if (restore_prefix(sequence, decode_seconds)) return;
  const std::int64_t begin = sequence.cache.length(), end = sequence.prefill_end();
  if (begin == end) return;  // after a preemption

  std::int64_t chunk = settings.chunk;
  const bool delays =
      std::any_of(running.begin(), running.end(), [](const auto& s) { return s.is_decoding(); });
  if (settings.max_step_seconds && delays)
    chunk = std::min(chunk, chunk_size.within(*settings.max_step_seconds - decode_seconds));
  if (sequence.request.on_prompt_logits)
    chunk = std::min(chunk, std::max<std::int64_t>(1, kMaxChunkLogits / model.config().vocab));
  // Whole pages can be shared while the prompt is being read.
  const std::int64_t whole = (begin + chunk) / format.page_tokens * format.page_tokens;
  std::int64_t last = begin + chunk < end && whole > begin ? whole : begin + chunk;
  last = std::min({last, end, sequence.mode_end(begin)});
  reserve(sequence, last - begin);
  last = std::min(last, sequence.cache.capacity());
  if (last > begin) prefill(sequence, last - begin);
}

void Engine::Impl::prefill(Sequence& sequence, std::int64_t tokens) {
  const std::int64_t begin = sequence.cache.length(), end = begin + tokens;
  const AttentionMode mode = sequence.mode_at(begin);
  const Request& request = sequence.request;
  const bool ends = !sequence.has_logits && end == sequence.prompt_size;
  const Logits wanted = request.on_prompt_logits && !sequence.has_logits ? Logits::all
                        : ends                                           ? Logits::last
                                                                         : Logits::none;
  const std::vector<Routing>& routings = mode == AttentionMode::full ? full : sequence.moba;
  Execution execution{.parallel = parallel};
  if (mode == AttentionMode::moba_naive) execution.backend = "reference";
  sequence.cache.prepare(tokens);
  if (request.on_weights && !sequence.weights)
    sequence.weights.emplace(model.config().heads, request.weight_range, sequence.prompt_size);
  if (sequence.weights) sequence.weights->clear();
  if (request.on_progress && begin == sequence.usage.cached_tokens && !sequence.has_logits)
    request.on_progress(static_cast<double>(begin), sequence.usage);
  const Stopwatch stopwatch;
  const std::vector<float> logits = model.forward(
      std::span(sequence.tokens).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(tokens)),
      begin,
      [&](std::int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
        {
          const ScopedTimer timer(sequence.usage.attention.prefill);
          const PageLayout& layout = format.layer(layer);
          PagedSequence view = sequence.cache.view(layer, begin);
          append(k, v, layout, view, execution);
          view.length = end;
          const Routing& routing = routings[static_cast<std::size_t>(layer)];
          if (q.sizes[0] > 1) attention(q, layout, view, routing, {.out = out}, execution);
          if (q.sizes[0] == 1 || (ends && sequence.weights))
            attend_last(sequence, q, layout, view, routing, out, execution);
        }
        if (request.on_progress && !sequence.has_logits) {
          const double share = static_cast<double>(layer + 1) / static_cast<double>(format.layer_count());
          request.on_progress(static_cast<double>(begin) + share * static_cast<double>(tokens),
                              sequence.usage);
        }
      },
      wanted);
  chunk_size.measure(tokens, stopwatch.seconds());
  advance(sequence, tokens);
  if (!sequence.has_logits) sums.prompt_tokens += tokens;
  const auto vocab = static_cast<std::size_t>(model.config().vocab);
  if (wanted == Logits::all && end > sequence.told) {  // some may be known from before a preemption
    const std::int64_t known = std::max<std::int64_t>(sequence.told - begin, 0);
    request.on_prompt_logits(begin + known,
                             std::span(logits).subspan(static_cast<std::size_t>(known) * vocab));
    sequence.told = end;
  }
  if (!ends) return;
  sequence.has_logits = true;
  sequence.usage.prefill_seconds = sequence.stage.seconds();
  sequence.stage = {};
  sample(sequence, std::span(logits).last(vocab));
}

/// Decodes the last row of `q`: into `out` if it is the only one, else for its weights alone.
void Engine::Impl::attend_last(Sequence& sequence, const Tensor& q, const PageLayout& layout,
                               const PagedSequence& view, const Routing& routing, const Tensor& out,
                               const Execution& execution) {
  const auto last = static_cast<std::size_t>(q.sizes[0]) - 1;
  Outputs outputs{.out = rows_of(out, last, 1)};
  std::vector<std::byte> unused;
  if (last > 0) {
    unused.resize(static_cast<std::size_t>(out.sizes[1] * out.sizes[2]) * size_of(out.dtype));
    outputs.out.data = unused.data();
    outputs.out.strides = {out.sizes[1] * out.sizes[2], out.sizes[2], 1};
  }
  KeyWeights weights;
  const bool is_weighted = sequence.weights && view.length >= sequence.prompt_size;
  if (is_weighted) {
    weights = sequence.weights->layer();
    outputs.weights = {&weights, 1};
  }
  moba::decode(rows_of(q, last, 1), layout, {&view, 1}, routing, outputs, execution);
  if (is_weighted) sequence.weights->add_layer();
}

/// Counts tokens that were read, and caches pages that they have filled.
void Engine::Impl::advance(Sequence& sequence, std::int64_t tokens) {
  const std::int64_t before = full_pages(sequence);
  sequence.cache.advance(tokens);
  const std::int64_t pages = full_pages(sequence);
  if (pages == before) return;
  std::vector<Page> cached = sequence.cache.copy_pages(before, pages);
  prefixes.insert(place_of(sequence), tokens_of(sequence, before, pages), cached);
  sequence.cache.replace(before, cached);
  if (store) store_pages(sequence);
}

/// Gives the store the pages that it does not have, as far as it takes them.
void Engine::Impl::store_pages(Sequence& sequence) {
  for (std::int64_t& page = sequence.stored; page < full_pages(sequence); ++page) {
    if (store->contains(parent_key(sequence, page + 1))) continue;
    if (!store->write(parent_key(sequence, page), tokens_of(sequence, page, page + 1),
                      sequence.cache.page(page), PrefixStore::time_of_page(sequence.begin, page)))
      return;
  }
}

/// Draws the next token, and ends the request if it was the last.
void Engine::Impl::sample(Sequence& sequence, std::span<const float> logits) {
  const Request& request = sequence.request;
  const auto end = [&](Finish reason) {
    const auto place =
        std::find_if(running.begin(), running.end(), [&](const Sequence& s) { return s.id == sequence.id; });
    finish(running, place, reason);
  };
  if (request.max_tokens == 0) return end(Finish::length);
  const std::int32_t token = sequence.sampler(logits);
  if (std::find(request.end_tokens.begin(), request.end_tokens.end(), token) != request.end_tokens.end())
    return end(Finish::end_token);
  sequence.tokens.push_back(token);
  ++sequence.usage.generated_tokens;
  ++sums.generated_tokens;
  if (sequence.weights) request.on_weights(sequence.weights->average());
  if (request.on_token && !request.on_token(token, logits)) return end(Finish::stopped);
  if (sequence.cache.length() == max_tokens()) return end(Finish::context);
  if (sequence.usage.generated_tokens == request.max_tokens) return end(Finish::length);
}

Engine::Engine(Model model, const EngineSettings& settings)
    : impl_(std::make_unique<Impl>(std::move(model), settings)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

Engine::Id Engine::submit(Request request) {
  impl_->check(request);
  if (static_cast<std::int64_t>(impl_->waiting.size()) >= impl_->settings.max_waiting) {
    throw QueueFull(fmt::format("queue: expected at most {} waiting requests, got one more",
                                impl_->settings.max_waiting));
  }
  std::vector<Routing> moba =
      layer_routings(request.moba, request.layers, impl_->settings.full_layers, impl_->format.layer_count());
  impl_->waiting.emplace_back(impl_->next_id, std::move(request), std::move(moba), impl_->format);
  return impl_->next_id++;
}

void Engine::cancel(Id id) {
  for (Impl::Sequences* list : {&impl_->waiting, &impl_->running}) {
    const auto found =
        std::find_if(list->begin(), list->end(), [&](const Sequence& s) { return s.id == id; });
    if (found != list->end()) return impl_->finish(*list, found, Finish::cancelled);
  }
}

bool Engine::step() {
  return impl_->step();
}

EngineStatistics Engine::statistics() const {
  EngineStatistics result = impl_->sums;
  result.running = static_cast<std::int64_t>(impl_->running.size());
  result.waiting = static_cast<std::int64_t>(impl_->waiting.size());
  result.used_pages = impl_->pool.used();
  result.cached_pages = impl_->prefixes.pages();
  result.max_pages = impl_->pool.max_pages();
  result.page_tokens = impl_->format.page_tokens;
  if (impl_->store) result.stored_pages = impl_->store->pages();
  return result;
}

std::int64_t Engine::max_prompt() const {
  return impl_->max_tokens();
}
const Model& Engine::model() const {
  return impl_->model;
}

}  // namespace moba::llm
