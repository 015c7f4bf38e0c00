#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "call.h"
#include "cpu/sizes.h"

/// The order in which a worker visits the keys that its range of queries attends to.
namespace moba::cpu {

/// One key tile of one block and the rows that attend to it: the rows that selected the block see all of it;
/// rows [own_first, own_last), whose own block it is, see it up to their position.
struct KeyTile {
  std::int64_t first = 0, count = 0;
  std::span<const std::uint32_t> selected{};
  std::int64_t own_first = 0, own_last = 0;
};

/// Iterates over the key tiles of a range in ascending order of their keys.
class KeyTileIterator {
 public:
  KeyTileIterator(const Call& call, const SequenceView& sequence, const Plan& plan, const Range& range,
                  std::size_t max_keys = kKeyTileSize)
      : call_(call),
        sequence_(sequence),
        plan_(plan),
        range_(range),
        max_keys_(static_cast<std::int64_t>(max_keys)) {
    const std::int64_t last = call.own_block(sequence, range.q1 - 1);
    blocks_ = call.routing.causal ? last + 1 : call.blocks(sequence);
  }

  /// Moves to the next key tile that any row attends to; returns false at the end.
  bool next(KeyTile& key_tile) {
    while (at_ >= end_) {
      if (++block_ >= blocks_) return false;
      enter_block();
    }
    key_tile = {at_, std::min(step_, end_ - at_), selected_, own_first_, own_last_};
    key_tile.own_first = std::max(own_first_, (at_ - sequence_.position(range_.q0)) * call_.heads_per_kv);
    at_ += step_;
    return true;
  }

 private:
  void enter_block() {
    const std::int64_t size = call_.routing.block_size;
    selected_ = plan_.rows.size() > 0 ? plan_.rows_of(range_, block_) : std::span<const std::uint32_t>();
    at_ = block_ * size;
    // Rows that selected the block see all of it; its own rows see it up to the last of them.
    end_ = std::min(at_ + std::min(size, sequence_.keys), sequence_.keys);
    own_first_ = own_last_ = 0;
    if (call_.routing.causal) {
      const std::int64_t zero = sequence_.position(range_.q0), tokens = range_.q1 - range_.q0;
      own_first_ = std::clamp<std::int64_t>(at_ - zero, 0, tokens) * call_.heads_per_kv;
      own_last_ = std::clamp<std::int64_t>(end_ - zero, 0, tokens) * call_.heads_per_kv;
    }
    if (selected_.empty()) {
      end_ = own_first_ == own_last_
                 ? at_
                 : sequence_.position(range_.q0 + (own_last_ - 1) / call_.heads_per_kv) + 1;
    }
    // The cuts depend on the block alone, so that a row's sums do not depend on the range that it is in.
    const std::int64_t length = std::max<std::int64_t>(std::min(size, sequence_.keys - at_), 1);
    const std::int64_t key_tiles = (length + max_keys_ - 1) / max_keys_;
    step_ = static_cast<std::int64_t>(
        round_up(static_cast<std::size_t>((length + key_tiles - 1) / key_tiles), kMaxCols));
  }

  const Call& call_;
  const SequenceView& sequence_;
  const Plan& plan_;
  const Range& range_;
  std::int64_t max_keys_;
  std::int64_t blocks_ = 0, block_ = -1, at_ = 0, end_ = 0, step_ = 1, own_first_ = 0, own_last_ = 0;
  std::span<const std::uint32_t> selected_;
};

}  // namespace moba::cpu
