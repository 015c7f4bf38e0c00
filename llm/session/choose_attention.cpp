#include "llm/session/choose_attention.h"

#include <algorithm>
#include <limits>

namespace moba::llm {
namespace {

AttentionReason reason_for(const AttentionRequest& request) {
  if (request.prefill) return AttentionReason::requested;
  if (request.prompt_tokens <= break_even_length(request.moba)) return AttentionReason::short_prompt;
  return request.trained ? AttentionReason::trained : AttentionReason::not_trained;
}

}  // namespace

std::string_view name_of(AttentionReason reason) {
  switch (reason) {
    case AttentionReason::requested:
      return "requested";
    case AttentionReason::short_prompt:
      return "short prompt";
    case AttentionReason::trained:
      return "trained with MoBA";
    case AttentionReason::not_trained:
      return "not trained with MoBA";
  }
  return "?";
}

std::int64_t break_even_length(const Routing& moba) {
  // Up to block_size * top_k tokens every query reads all of its keys. Twice that is where the gate has
  // earned its cost, in bf16 with AMX: measured 1.4 times with 3 blocks of 512, 1.8 with 4 of 256, 3 with 16
  // of 128.
  constexpr std::int64_t kFactor = 2, kMax = std::numeric_limits<std::int64_t>::max();
  return kFactor * moba.block_size * std::min(moba.top_k, kMax / (kFactor * moba.block_size));
}

AttentionChoice choose_attention(const AttentionRequest& request) {
  const AttentionReason reason = reason_for(request);
  return {.prefill = request.prefill.value_or(reason == AttentionReason::trained ? AttentionMode::moba
                                                                                 : AttentionMode::full),
          .decode = request.decode.value_or(AttentionMode::full),
          .reason = reason};
}

}  // namespace moba::llm
