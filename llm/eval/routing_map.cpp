#include "llm/eval/routing_map.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "moba/cache.h"
#include "src/number.h"

namespace moba::llm::eval {
namespace {

constexpr std::int64_t kChunk = 2048;
constexpr std::int64_t kMaxRows = 512;

/// Thrown to end a forward pass whose logits are not needed.
struct LastLayerSeen {};

std::int64_t parts(std::int64_t whole, std::int64_t part) {
  return (whole + part - 1) / part;
}

RoutingMap empty_map(const ModelConfig& config, std::int64_t tokens, const RoutingMapSettings& settings) {
  std::int64_t longest = 1;
  for (const Routing& routing : settings.layers) longest = std::max(longest, routing.block_size);
  RoutingMap map{.tokens = tokens,
                 .block_size = longest,
                 .blocks = parts(tokens, longest),
                 .queries_in_row = 1,
                 .blocks_in_column = 1,
                 .rows = 0,
                 .columns = 0,
                 .layers = {}};
  const std::int64_t cells = std::max<std::int64_t>(1, settings.max_cells / (config.layers * config.heads));
  const auto side = std::max<std::int64_t>(1, std::llround(std::sqrt(static_cast<double>(cells))));
  map.blocks_in_column = parts(map.blocks, side);
  map.columns = parts(map.blocks, map.blocks_in_column);
  map.queries_in_row = parts(tokens, std::clamp<std::int64_t>(cells / map.columns, 1, kMaxRows));
  map.rows = parts(tokens, map.queries_in_row);
  const HeadMap head{.chosen = std::vector<std::uint32_t>(static_cast<std::size_t>(map.rows * map.columns)),
                     .margins = std::vector<Portion>(static_cast<std::size_t>(map.rows))};
  map.layers.assign(static_cast<std::size_t>(config.layers),
                    std::vector<HeadMap>(static_cast<std::size_t>(config.heads), head));
  return map;
}

/// Reads the row of one token and head, in f32.
void load_row(const Tensor& tensor, std::int64_t token, std::int64_t head, std::vector<float>& row) {
  const std::int64_t first = token * tensor.strides[0] + head * tensor.strides[1];
  row.resize(static_cast<std::size_t>(tensor.sizes[2]));
  for (std::size_t d = 0; d < row.size(); ++d) {
    row[d] = static_cast<float>(load(tensor.data, tensor.dtype, first + static_cast<std::int64_t>(d)));
  }
}

/// The mean keys of the complete blocks of one layer, updated while it reads.
class BlockMeans {
 public:
  BlockMeans(std::int64_t block_size, std::int64_t heads, std::int64_t head_dim)
      : block_size_(block_size), width_(heads * head_dim), head_dim_(head_dim) {}

  void append(const Tensor& k) {
    std::vector<float> row;
    for (std::int64_t token = 0; token < k.sizes[0]; ++token) {
      if (length_ % block_size_ == 0) sums_.resize(sums_.size() + static_cast<std::size_t>(width_));
      float* sum = sums_.data() + length_ / block_size_ * width_;
      for (std::int64_t head = 0; head < k.sizes[1]; ++head) {
        load_row(k, token, head, row);
        for (const float value : row) *sum++ += value;
      }
      ++length_;
    }
  }

  /// Returns the score of a complete block.
  float score(const float* q, std::int64_t block, std::int64_t head) const {
    const float* sum = sums_.data() + block * width_ + head * head_dim_;
    float score = 0;
    for (std::int64_t d = 0; d < head_dim_; ++d) score += q[d] * sum[d];
    return score / static_cast<float>(block_size_);
  }

 private:
  std::int64_t block_size_, width_, head_dim_;
  std::int64_t length_ = 0;
  std::vector<float> sums_;  // [blocks, heads, head_dim]
};

Place place_of(std::int64_t block, std::int64_t own) {
  return block == own       ? Place::current
         : block == 0       ? Place::sink
         : block == own - 1 ? Place::recent
                            : Place::far;
}

/// Records one layer's selection for queries [first, first + q.sizes[0]).
class Recorder {
 public:
  Recorder(RoutingMap& map, const Routing& moba) : map_(map), moba_(moba) {}

  void record(HeadMap& head, std::int64_t query, const std::int32_t* selected, std::int64_t width) const {
    const std::int64_t own = query / moba_.block_size, row = query / map_.queries_in_row;
    for (std::int64_t i = 0; i < width && selected[i] >= 0; ++i) {
      const std::int64_t block = selected[i] * moba_.block_size / map_.block_size;
      ++head.chosen[static_cast<std::size_t>(row * map_.columns + block / map_.blocks_in_column)];
      ++head.places[static_cast<std::size_t>(place_of(selected[i], own))];
    }
  }

  void record_margin(HeadMap& head, std::int64_t query, const float* q, std::int64_t kv_head,
                     const BlockMeans& means, std::vector<float>& scores) const {
    const std::int64_t own = query / moba_.block_size;
    const std::int64_t free = moba_.top_k - 1 - moba_.sink_blocks, candidates = own - moba_.sink_blocks;
    if (free < 1 || candidates <= free) return;
    scores.clear();
    for (std::int64_t block = moba_.sink_blocks; block < own; ++block)
      scores.push_back(means.score(q, block, kv_head));
    const auto left_out = scores.begin() + free;
    std::nth_element(scores.begin(), left_out, scores.end(), std::greater<>());
    const float taken = *std::min_element(scores.begin(), left_out);
    head.margins[static_cast<std::size_t>(query / map_.queries_in_row)].add(
        static_cast<double>(taken - *left_out));
  }

 private:
  RoutingMap& map_;
  Routing moba_;
};

}  // namespace

RoutingMap map_routing(const Model& model, std::span<const std::int32_t> tokens,
                       const RoutingMapSettings& settings, const std::function<void(double)>& progress) {
  const ModelConfig& config = model.config();
  const auto total = static_cast<std::int64_t>(tokens.size());
  RoutingMap map = empty_map(config, total, settings);
  Execution execution;
  execution.parallel = openmp(settings.threads);

  std::vector<KvCache> caches;
  std::vector<BlockMeans> means;
  for (const Routing& routing : settings.layers) {
    caches.emplace_back(KvCache::Shape{.kv_heads = config.kv_heads,
                                       .head_dim = config.head_dim,
                                       .block_size = routing.block_size,
                                       .dtype = model.dtype()});
    means.emplace_back(routing.block_size, config.kv_heads, config.head_dim);
  }
  std::vector<std::int32_t> selection;

  for (std::int64_t first = 0; first < total; first += kChunk) {
    const std::int64_t count = std::min(kChunk, total - first);
    const auto attend = [&](std::int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& out) {
      const auto l = static_cast<std::size_t>(layer);
      caches[l].append(k, v);
      means[l].append(k);
      const Routing& moba = settings.layers[l];
      const Recorder recorder(map, moba);
      const std::int64_t width = selection_width(one_sequence(count, first + count), moba);
      selection.resize(static_cast<std::size_t>(config.heads * count * width));
      attention(q, caches[l], 0, moba, {.out = out, .selection = selection.data()}, execution);
      execution.parallel.run(config.heads, [&](std::int64_t head, int) {
        HeadMap& head_map = map.layers[l][static_cast<std::size_t>(head)];
        std::vector<float> scores, query;
        for (std::int64_t i = 0; i < count; ++i) {
          recorder.record(head_map, first + i, selection.data() + (head * count + i) * width, width);
          load_row(q, i, head, query);
          recorder.record_margin(head_map, first + i, query.data(), head * config.kv_heads / config.heads,
                                 means[l], scores);
        }
      });
      if (settings.reads_fully[l])
        attention(q, caches[l], 0, full_on_blocks_of(moba), {.out = out}, execution);
      progress(static_cast<double>(first) +
               static_cast<double>(count * (layer + 1)) / static_cast<double>(config.layers));
      if (layer + 1 == config.layers) throw LastLayerSeen();
    };
    try {
      model.forward(tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)), first,
                    attend, Logits::all);
    } catch (const LastLayerSeen&) {
      continue;
    }
  }
  return map;
}

}  // namespace moba::llm::eval
