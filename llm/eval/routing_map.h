#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "llm/eval/interval.h"
#include "llm/model/model.h"
#include "llm/session/session.h"
#include "moba/attention.h"

namespace moba::llm::eval {

/// The place of a selected block: the query's own; else the first of the text; else the one before the own
/// one; else any other.
enum class Place : std::uint8_t { current, sink, recent, far };
inline constexpr std::size_t kPlaces = 4;

/// The selection of one head.
struct HeadMap {
  /// [rows][columns]: the number of times that a query of the row selected a block of the column.
  std::vector<std::uint32_t> chosen;
  /// Counts over all selected blocks.
  std::array<std::int64_t, kPlaces> places{};
  /// [rows]: the lowest selected score minus the highest rejected one, for queries with more candidates than
  /// top_k. Scores are unscaled products of a query with a block's mean key, in f32.
  std::vector<Portion> margins;
};

/// The selection of every head, queries gathered into rows and blocks into columns.
struct RoutingMap {
  /// `block_size`: that of the layer with the longest blocks; shorter ones are counted where they lie.
  std::int64_t tokens, block_size, blocks;
  std::int64_t queries_in_row, blocks_in_column, rows, columns;
  std::vector<std::vector<HeadMap>> layers;  // [layers][heads]
};

struct RoutingMapSettings {
  /// [layers]: the gate's routing of each layer.
  std::vector<Routing> layers;
  /// [layers]: layers with dense attention; the map records what the gate would select there.
  std::vector<bool> reads_fully;
  int threads = 1;
  /// Limit of rows times columns over all heads.
  std::int64_t max_cells = std::int64_t{3} << 20;
};

/// Reads `tokens` and records what the gate selects. The model is in f32.
RoutingMap map_routing(const Model& model, std::span<const std::int32_t> tokens,
                       const RoutingMapSettings& settings, const std::function<void(double)>& progress);

}  // namespace moba::llm::eval
