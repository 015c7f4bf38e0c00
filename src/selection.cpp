#include "selection.h"

#include <algorithm>

#include "errors.h"

namespace moba {
namespace {

/// Calls visit(sequence, query, packed token, query head, row of the selection) for every row of a slice.
template <typename Visit>
void for_each_row(const Call& call, const Selection& selection, Visit&& visit) {
  const WorkSlice& slice = selection.slice;
  for (std::int64_t head = slice.head0; head < slice.head1; ++head) {
    for (const SequenceView& s : call.sequences) {
      const auto [first, last] = slice.queries_of(s);
      for (std::int64_t query = first; query < last; ++query) {
        std::int32_t* rows = selection.of(head, s.q_begin + query);
        for (std::int64_t g = 0; g < call.heads_per_kv; ++g) {
          visit(s, query, head * call.heads_per_kv + g, rows + g * selection.width);
        }
      }
    }
  }
}

/// Checks a row of a public list: ascending blocks, own block included, padded with -1.
void check_row(const Call& call, const SequenceView& s, std::int64_t query, const std::int32_t* row,
               std::int64_t width) {
  const std::int64_t own = call.routing.causal ? call.own_block(s, query) : call.blocks(s);
  std::int64_t count = 0, last = -1;
  for (std::int64_t i = 0; i < width && row[i] >= 0; ++i) {
    if (call.routing.causal && row[i] == own) continue;
    if (row[i] >= own || row[i] <= last || count == call.width()) {
      refuse("saved.selection", "expected ascending blocks that query ", query, " may see, got block ",
             row[i]);
    }
    last = row[i];
    ++count;
  }
}

}  // namespace

void write_selection(const Call& call, const Selection& selection, std::int32_t* out) {
  const std::int64_t width = call.selection_width, block_size = call.requested.block_size;
  const bool causal = call.routing.causal;
  for_each_row(
      call, selection,
      [&](const SequenceView& s, std::int64_t query, std::int64_t q_head, const std::int32_t* row) {
        std::int32_t* to = out + (q_head * call.tokens + s.q_begin + query) * width;
        const std::int64_t p = s.position(query), own = p < 0 ? -1 : p / block_size;
        std::int64_t count = 0;
        if (call.is_dense) {
          const std::int64_t seen = causal ? own + 1 : s.keys == 0 ? 0 : (s.keys - 1) / block_size + 1;
          for (; count < seen; ++count) to[count] = static_cast<std::int32_t>(count);
        } else {
          for (; count < selection.width && row[count] >= 0; ++count) to[count] = row[count];
          if (causal && own >= 0) to[count++] = static_cast<std::int32_t>(own);
        }
        std::fill(to + count, to + width, -1);
      });
}

void check_saved_selection(const Call& call, const std::int32_t* saved) {
  if (saved == nullptr || call.is_dense || call.width() == 0) return;
  const std::int64_t width = call.selection_width;
  for (std::int64_t head = 0; head < call.q_heads; ++head) {
    for (const SequenceView& s : call.sequences) {
      for (std::int64_t query = 0; query < s.queries; ++query) {
        check_row(call, s, query, saved + (head * call.tokens + s.q_begin + query) * width, width);
      }
    }
  }
}

Selection read_selection(const Call& call, const WorkSlice& slice, const std::int32_t* saved,
                         Scratch& scratch) {
  Selection selection{slice, call.heads_per_kv, call.width(), {}};
  const std::int64_t width = call.selection_width;
  selection.blocks =
      Buffer<std::int32_t>(scratch, slice.heads() * slice.tokens() * call.heads_per_kv * selection.width);
  if (selection.width == 0) return selection;
  for_each_row(call, selection,
               [&](const SequenceView& s, std::int64_t query, std::int64_t q_head, std::int32_t* row) {
                 std::int64_t count = 0;
                 if (call.is_dense) {
                   if (s.keys > 0) row[count++] = 0;
                 } else {
                   const std::int32_t* from = saved + (q_head * call.tokens + s.q_begin + query) * width;
                   const std::int64_t own = call.routing.causal ? call.own_block(s, query) : -1;
                   for (std::int64_t i = 0; i < width && from[i] >= 0; ++i) {
                     if (from[i] != own) row[count++] = from[i];
                   }
                 }
                 std::fill(row + count, row + selection.width, -1);
               });
  return selection;
}

}  // namespace moba
