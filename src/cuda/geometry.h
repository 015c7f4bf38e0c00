#pragma once

#include "constants.h"
#include "cuda/ptx/device.h"

/// Geometry of sequences, tiles and tensors in kernels. Tokens, positions and block numbers of a sequence fit
/// 32 bits; everything that is multiplied by heads, by D or by a stride is 64 bits wide.
namespace moba::cuda {

/// Rows of a query tile of the gate and of `attend`'s diagonal work tiles.
constexpr int kTileRows = 128;

MOBA_HOST_DEVICE constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

/// Offset that marks a missing row.
constexpr std::int64_t kNoRow = -1;

/// A tensor [tokens, heads, D].
template <typename T>
struct View {
  T* data = nullptr;
  std::int64_t token_stride = 0, head_stride = 0;  // elements

  MOBA_HOST_DEVICE T* row(std::int64_t token, std::int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

/// Keys or values [pages, tokens of a page, heads, D], or means of blocks where tokens are, and the pages of
/// each sequence.
template <typename T>
struct Pages {
  T* data = nullptr;
  std::int64_t page_stride = 0, token_stride = 0, head_stride = 0;  // elements
  std::int32_t page_tokens = 1;
  const std::int32_t* table = nullptr;  // null: the identity
  std::int64_t table_stride = 0;

  MOBA_HOST_DEVICE T* row(std::int64_t sequence, std::int32_t token, std::int64_t head) const {
    return at(sequence, token, token % page_tokens, head);
  }
  MOBA_HOST_DEVICE T* mean(std::int64_t sequence, std::int32_t block, std::int32_t block_size,
                           std::int64_t head) const {
    const std::int32_t token = (block + 1) * block_size - 1;  // the page where the block ends
    return at(sequence, token, token % page_tokens / block_size, head);
  }

 private:
  MOBA_HOST_DEVICE T* at(std::int64_t sequence, std::int32_t token, std::int64_t in_page,
                         std::int64_t head) const {
    const std::int64_t index = sequence * table_stride + token / page_tokens;
    const std::int64_t page = table == nullptr ? index : table[index];
    return data + page * page_stride + in_page * token_stride + head * head_stride;
  }
};

/// The packed sequences. Every array has `sequences` + 1 entries, from 0.
struct Batch {
  std::int32_t sequences = 0;
  const std::int32_t* q_starts = nullptr;      // queries before each sequence
  const std::int32_t* k_starts = nullptr;      // keys
  const std::int32_t* block_starts = nullptr;  // blocks: block j of sequence s is packed block
                                               // block_starts[s] + j
  const std::int32_t* tile_starts = nullptr;   // query tiles of the slice
};

/// Returns the sequence that item `index` belongs to: the last with start <= index.
MOBA_HOST_DEVICE std::int32_t sequence_of(const std::int32_t* starts, std::int32_t sequences,
                                          std::int32_t index) {
  std::int32_t low = 0, high = sequences - 1;
  while (low < high) {
    const std::int32_t middle = low + (high - low + 1) / 2;
    if (starts[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// Returns the end of the blocks that a token of sequence `s` may select by score: its own block if causal,
/// otherwise that of the sequence.
MOBA_HOST_DEVICE std::int64_t scored_end(const Batch& batch, std::int32_t s, std::int32_t token,
                                         std::int64_t block_size, bool causal) {
  const std::int32_t keys = batch.k_starts[s + 1] - batch.k_starts[s];
  if (!causal) return divide_up(keys, block_size);
  const std::int32_t position = token + keys - batch.q_starts[s + 1];
  return position < 0 ? 0 : position / block_size;
}

/// Keys [begin, end) of a block, counted in its sequence.
struct KeyRange {
  std::int32_t begin = 0, end = 0;

  MOBA_HOST_DEVICE std::int32_t size() const { return end > begin ? end - begin : 0; }
};

/// Token ranges of sequences within their pages.
struct Spans {
  const std::int32_t* begins = nullptr;  // null: 0
  const std::int32_t* ends = nullptr;

  MOBA_HOST_DEVICE KeyRange of(std::int64_t sequence) const {
    return {begins == nullptr ? 0 : begins[sequence], ends[sequence]};
  }
};

MOBA_HOST_DEVICE KeyRange keys_of(std::int32_t block, std::int64_t block_size, std::int32_t keys) {
  const std::int64_t begin = block * block_size, end = begin + block_size;
  return {static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end < keys ? end : keys)};
}

/// The queries of one sequence that belong to the packed tokens [token0, token1), counted in the sequence.
MOBA_HOST_DEVICE KeyRange queries_of(const Batch& batch, std::int32_t sequence, std::int32_t token0,
                                     std::int32_t token1) {
  const std::int32_t begin = batch.q_starts[sequence], end = batch.q_starts[sequence + 1];
  const std::int32_t first = token0 > begin ? token0 : begin, last = token1 < end ? token1 : end;
  return {first - begin, last > first ? last - begin : first - begin};
}

/// Up to kTileRows consecutive rows of one sequence, the same for all heads. A row is a query and one of
/// the `heads_per_kv` query heads of a kv head: row = (token - token0) * heads_per_kv + member. Tiles are cut
/// from the first query of the sequence on, so that a row visits its keys in the same order for any slice.
struct Tile {
  std::int32_t sequence = 0;
  std::int32_t count = 0;      // rows
  std::int32_t first_key = 0;  // packed
  std::int32_t keys = 0;       // of the sequence
  std::int32_t before = 0;     // position of query 0
  std::int64_t first_row = 0;  // of the slice
  std::int64_t from = 0;       // row r is row from + r of the sequence's
  std::int64_t cut = 0;        // where the tile begins, `from` or rows of another slice before it

  MOBA_HOST_DEVICE std::int32_t position_at(std::int64_t sequence_row, std::int64_t heads_per_kv) const {
    return static_cast<std::int32_t>(sequence_row / heads_per_kv) + before;
  }
  /// Position of the query of row r.
  MOBA_HOST_DEVICE std::int32_t position_of(int r, std::int64_t heads_per_kv) const {
    return position_at(from + r, heads_per_kv);
  }
};

/// Number of tiles of a sequence's queries [begin, end).
MOBA_HOST_DEVICE std::int32_t tiles_of(const KeyRange& queries, std::int64_t heads_per_kv) {
  if (queries.begin == queries.end) return 0;
  return static_cast<std::int32_t>(divide_up(queries.end * heads_per_kv, kTileRows) -
                                   queries.begin * heads_per_kv / kTileRows);
}

MOBA_HOST_DEVICE Tile tile_at(const Batch& batch, std::int32_t index, std::int32_t token0,
                              std::int32_t token1, std::int64_t heads_per_kv) {
  const std::int32_t s = sequence_of(batch.tile_starts, batch.sequences, index);
  const KeyRange queries = queries_of(batch, s, token0, token1);
  const std::int64_t begin = queries.begin * heads_per_kv, end = queries.end * heads_per_kv;
  const std::int64_t cut = (begin / kTileRows + index - batch.tile_starts[s]) * kTileRows;
  Tile tile;
  tile.sequence = s;
  tile.first_key = batch.k_starts[s];
  tile.keys = batch.k_starts[s + 1] - batch.k_starts[s];
  tile.before = tile.keys - (batch.q_starts[s + 1] - batch.q_starts[s]);
  tile.cut = cut;
  tile.from = cut > begin ? cut : begin;
  tile.count = static_cast<std::int32_t>((cut + kTileRows < end ? cut + kTileRows : end) - tile.from);
  tile.first_row = (batch.q_starts[s] - token0) * heads_per_kv + tile.from;
  return tile;
}

/// The slot of a partial result: [heads of the slice, rows * ranks].
MOBA_HOST_DEVICE std::int64_t slot_at(std::int64_t head, std::int64_t rows, std::int64_t ranks,
                                      std::uint32_t entry) {
  return head * rows * ranks + entry;
}

/// The element of a mean: [heads of the slice, packed blocks, D].
MOBA_HOST_DEVICE std::int64_t mean_offset(std::int64_t head, std::int64_t max_blocks, std::int64_t block,
                                          std::int64_t head_dim) {
  return (head * max_blocks + block) * head_dim;
}

}  // namespace moba::cuda
