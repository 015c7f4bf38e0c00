#include "selection.h"

#include <algorithm>

#include "errors.h"

namespace moba {
namespace {

/// Calls visit(sequence, query, row of the selection) for every row of the slice.
template <typename Visit>
void for_each_row(const Call& call, const Selection& selection, Visit&& visit) {
  const WorkSlice& slice = selection.slice;
  for (std::int64_t q_head = slice.head0 * call.heads_per_kv; q_head < slice.head1 * call.heads_per_kv;
       ++q_head) {
    for (const SequenceView& s : call.sequences) {
      const auto [first, last] = slice.queries_of(s);
      for (std::int64_t query = first; query < last; ++query)
        visit(s, query, selection.of(q_head, s.q_begin + query));
    }
  }
}

void check_row(const Call& call, const SequenceView& s, std::int64_t query, const std::int32_t* row) {
  const std::int64_t own = call.routing.causal ? call.own_block(s, query) : call.blocks(s);
  const std::int64_t visible = call.routing.causal ? own + 1 : own;
  std::int64_t last = -1;
  for (std::int64_t i = 0; i < call.selection_width; ++i) {
    if (row[i] < 0) {
      last = visible;  // nothing may follow
      continue;
    }
    if (row[i] >= visible || row[i] <= last || (i == call.width() && row[i] != own)) {
      refuse("saved.selection", "expected ascending blocks that query ", query, " may see, got block ",
             row[i]);
    }
    last = row[i];
  }
}

/// Entries of a row in scratch memory.
std::int64_t scratch_stride(const Call& call) {
  return call.needs_scores() ? call.selection_width : call.listed_width();
}

}  // namespace

SelectionRows rows_in(const Outputs& outputs, const CallShape& call) {
  const std::int64_t stride = outputs.selection_stride == 0 ? call.selection_width : outputs.selection_stride;
  return {outputs.selection, 0, 0, call.tokens, stride};
}

SelectionRows rows_in(const Saved& saved, const CallShape& call) {
  return rows_in(Outputs{.selection = const_cast<std::int32_t*>(saved.selection),
                         .selection_stride = saved.selection_stride},
                 call);
}

SelectionRows rows_in(std::int32_t* blocks, const CallShape& call, const WorkSlice& slice,
                      std::int64_t stride) {
  return {blocks, slice.head0 * call.heads_per_kv, slice.token0, slice.tokens(), stride};
}

std::size_t selection_bytes(const Call& call, const WorkSlice& slice) {
  const std::int64_t rows = slice.heads() * call.heads_per_kv * slice.tokens();
  return static_cast<std::size_t>(rows * scratch_stride(call)) * sizeof(std::int32_t);
}

Selection new_selection(const Call& call, const WorkSlice& slice, Scratch& scratch) {
  const std::int64_t rows = slice.heads() * call.heads_per_kv * slice.tokens(), stride = scratch_stride(call);
  Selection selection{slice, {}, {scratch, rows * stride}};
  selection.rows = rows_in(selection.storage.data(), call, slice, stride);
  if (call.needs_scores() || call.routing.causal) return selection;
  for_each_row(call, selection, [](const SequenceView& s, std::int64_t /*query*/, std::int32_t* row) {
    row[0] = s.keys > 0 ? 0 : -1;
  });
  return selection;
}

void write_unscored_selection(const Call& call, const Selection& selection) {
  const std::int64_t block_size = call.requested.block_size;
  for_each_row(call, selection, [&](const SequenceView& s, std::int64_t query, std::int32_t* row) {
    const std::int64_t last = call.routing.causal ? s.position(query) : s.keys - 1;
    const std::int64_t end = last < 0 ? 0 : last / block_size + 1,
                       begin = call.is_dense || end == 0 ? 0 : end - 1;
    for (std::int64_t block = begin; block < end; ++block)
      row[block - begin] = static_cast<std::int32_t>(block);
    std::fill(row + (end - begin), row + selection.rows.stride, -1);
  });
}

void check_saved_selection(const Call& call, const Saved& saved) {
  if (saved.selection == nullptr || !call.needs_scores()) return;
  const WorkSlice all{0, call.kv_heads, 0, call.tokens};
  for_each_row(call, {all, rows_in(saved, call), {}},
               [&](const SequenceView& s, std::int64_t query, const std::int32_t* row) {
                 check_row(call, s, query, row);
               });
}

}  // namespace moba
