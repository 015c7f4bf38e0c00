#include "selection.h"

#include <algorithm>
#include <string>

#include "errors.h"

namespace moba {
namespace {

/// Calls visit(sequence, query, row of the selection) for every row of the slice.
template <typename Visit>
void for_each_row(const Call& call, const SliceSelection& selection, Visit&& visit) {
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

/// Checks the `width` entries of a row of the selection `name`.
void check_row(const char* name, const Call& call, const SequenceView& s, std::int64_t query,
               std::int64_t head, const std::int32_t* row, std::int64_t width) {
  const std::int64_t own = call.routing.causal ? call.own_block(s, query) : -1;
  const std::int64_t visible = call.routing.causal ? own + 1 : call.blocks(s);
  const auto refuse_row = [&](const std::string& expected, const std::string& got) {
    refuse(name, "expected ", expected, " for head ", head, ", token ", s.q_begin + query, ", got ", got);
  };
  const auto block = [](std::int64_t number) { return "block " + std::to_string(number); };
  std::int64_t last = -1, i = 0;
  for (; i < width && row[i] != -1; ++i) {
    if (row[i] < 0 || row[i] >= visible)
      refuse_row("blocks below " + std::to_string(visible) + " (those that the query may see) or -1",
                 block(row[i]));
    if (row[i] <= last) refuse_row("ascending blocks", block(row[i]) + " after " + block(last));
    last = row[i];
  }
  if (own >= 0 && last != own)
    refuse_row(block(own) + " (the query's own) as the last", last < 0 ? "no block" : block(last));
  for (; i < width; ++i) {
    if (row[i] != -1) refuse_row("-1 alone after a -1", block(row[i]));
  }
}

void check_rows(const char* name, const Call& call, const SelectionRows& rows, std::int64_t width) {
  for (std::int64_t head = 0; head < call.q_heads / rows.heads_per_row; ++head) {
    for (const SequenceView& s : call.sequences) {
      for (std::int64_t query = 0; query < s.queries; ++query) {
        const std::int32_t* row = rows.of(head * rows.heads_per_row, s.q_begin + query);
        check_row(name, call, s, query, head, row, width);
      }
    }
  }
}

/// Entries of a row in scratch memory.
std::int64_t scratch_stride(const Call& call) {
  if (call.is_selected()) return 0;
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

SelectionRows selected_rows(const CallShape& call) {
  const Selection& selection = call.routing.selection;
  return {.blocks = const_cast<std::int32_t*>(selection.blocks),
          .tokens = call.tokens,
          .stride = selection.stride == 0 ? selection.width : selection.stride,
          .heads_per_row = call.q_heads / selection.heads};
}

SelectionRows rows_in(std::int32_t* blocks, const CallShape& call, const WorkSlice& slice,
                      std::int64_t stride) {
  return {blocks, slice.head0 * call.heads_per_kv, slice.token0, slice.tokens(), stride};
}

std::size_t selection_bytes(const Call& call, const WorkSlice& slice) {
  const std::int64_t rows = slice.heads() * call.heads_per_kv * slice.tokens();
  return static_cast<std::size_t>(rows * scratch_stride(call)) * sizeof(std::int32_t);
}

SliceSelection new_selection(const Call& call, const WorkSlice& slice, Scratch& scratch) {
  const std::int64_t rows = slice.heads() * call.heads_per_kv * slice.tokens(), stride = scratch_stride(call);
  SliceSelection selection{slice, {}, {scratch, rows * stride}};
  selection.rows = rows_in(selection.storage.data(), call, slice, stride);
  if (call.needs_scores() || call.routing.causal) return selection;
  for_each_row(call, selection, [](const SequenceView& s, std::int64_t /*query*/, std::int32_t* row) {
    row[0] = s.keys > 0 ? 0 : -1;
  });
  return selection;
}

void write_unscored_selection(const Call& call, const SliceSelection& selection) {
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

void check_selection(const Call& call) {
  if (call.is_selected()) check_rows("selection", call, selected_rows(call), call.routing.selection.width);
}

void check_selection(const Call& call, const Saved& saved) {
  if (saved.selection != nullptr && call.needs_scores())
    check_rows("saved.selection", call, rows_in(saved, call), call.selection_width);
}

}  // namespace moba
