#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "call.h"

/// Software prefetching of the CPU kernels. All of them prefetch a few cache lines at a time between
/// products.
namespace moba::cpu {

constexpr std::size_t kCacheLine = 64;

/// Prefetches the cache lines of [from, from + bytes): for writing if kWrite, into the caches that kLocality
/// names as __builtin_prefetch does. Always inlined, as its callers must be: GCC takes a function that only
/// prefetches for one without effect, and drops its calls.
template <int kWrite, int kLocality>
[[gnu::always_inline]] inline void prefetch_lines(const void* from, std::size_t bytes) {
  const auto* line = static_cast<const std::byte*>(from);
  for (std::size_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(line + at, kWrite, kLocality);
}

/// Prefetches into all cache levels, for data that is read within a few hundred cycles.
[[gnu::always_inline]] inline void prefetch_l1(const void* from, std::size_t bytes) {
  prefetch_lines<0, 3>(from, bytes);
}

/// Prefetches into the second-level cache.
[[gnu::always_inline]] inline void prefetch_l2(const void* from, std::size_t bytes) {
  prefetch_lines<0, 2>(from, bytes);
}

/// Prefetches into the second-level cache for writing.
[[gnu::always_inline]] inline void prefetch_l2_for_write(const void* from, std::size_t bytes) {
  prefetch_lines<1, 2>(from, bytes);
}

/// A range of prefetch steps, spread evenly over the products of a tile: `step` of them after each product.
struct PrefetchBudget {
  std::int64_t next = 0, end = 0, step = 0;

  void reset(std::int64_t first, std::int64_t last, std::int64_t steps) {
    next = first;
    end = last;
    step = (last - first + steps - 1) / steps;
  }
};

/// Prefetches rows into the second-level cache while products are computed, a few lines at a time: all at
/// once they would take every line-fill buffer of the core and stall the products' own loads.
class RowPrefetcher {
 public:
  /// `rows`: addresses, each of `bytes` bytes, in an array that outlives the use.
  void begin(const std::byte* const* rows, std::size_t count, std::size_t bytes) {
    next_ = rows;
    last_ = rows + count;
    bytes_ = bytes;
    at_ = 0;
  }
  void advance(int lines) {
    for (; lines > 0 && next_ != last_; --lines) {
      __builtin_prefetch(*next_ + at_, 0, 2);
      at_ += 64;
      if (at_ < bytes_) continue;
      at_ = 0;
      ++next_;
    }
  }

 private:
  const std::byte *const *next_ = nullptr, *const *last_ = nullptr;
  std::size_t bytes_ = 0, at_ = 0;
};

/// Prefetches the keys and values of the next key tile into the second-level cache, a few rows at a time,
/// while the current one is processed.
class KvPrefetcher {
 public:
  void begin(const Call& call, const SequenceView& sequence, std::int64_t head, std::int64_t first,
             std::int64_t count) {
    call_ = &call;
    sequence_ = &sequence;
    head_ = head;
    next_ = first;
    end_ = first + count;
  }
  std::int64_t left() const { return end_ - next_; }
  void advance(std::int64_t rows) {
    for (rows = std::min(rows, left()); rows > 0;) {
      const Rows keys = call_->keys(*sequence_, head_, next_),
                 values = call_->values(*sequence_, head_, next_);
      const std::int64_t run = std::min({rows, keys.count, values.count});
      prefetch_rows(keys, call_->k.dtype, run);
      prefetch_rows(values, call_->v.dtype, run);
      next_ += run;
      rows -= run;
    }
  }

 private:
  void prefetch_rows(const Rows& rows, DType dtype, std::int64_t count) const {
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    for (std::int64_t row = 0; row < count; ++row) {
      prefetch_l2(rows.data + row * rows.stride * size, static_cast<std::size_t>(call_->head_dim * size));
    }
  }

  const Call* call_ = nullptr;
  const SequenceView* sequence_ = nullptr;
  std::int64_t head_ = 0, next_ = 0, end_ = 0;
};

}  // namespace moba::cpu
