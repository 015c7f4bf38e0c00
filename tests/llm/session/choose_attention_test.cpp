#include "llm/session/choose_attention.h"

#include <gtest/gtest.h>

namespace moba::llm {
namespace {

using enum AttentionMode;

constexpr Routing kRouting{.block_size = 256, .top_k = 4};

AttentionRequest request(std::int64_t prompt, std::int64_t total, bool trained, std::int64_t full_tail = 0) {
  AttentionRequest request;
  request.prompt_tokens = prompt;
  request.total_tokens = total;
  request.moba = kRouting;
  if (trained) {
    request.trained.emplace().block_size = kRouting.block_size;
    request.trained->top_k = kRouting.top_k;
    request.trained->full_tail = full_tail;
  }
  return request;
}

void expect_choice(const AttentionRequest& request, AttentionMode prefill, AttentionMode decode,
                   AttentionReason reason) {
  const AttentionChoice choice = choose_attention(request);
  EXPECT_EQ(name_of(choice.prefill), name_of(prefill));
  EXPECT_EQ(name_of(choice.decode), name_of(decode));
  EXPECT_EQ(name_of(choice.reason), name_of(reason));
}

TEST(ChooseAttention, BreakEvenIsNotBelowTheSelectedTokens) {
  EXPECT_GE(break_even_length(kRouting), 256 * 4);
  EXPECT_GT(break_even_length({.block_size = 256, .top_k = 16}), break_even_length(kRouting));
  EXPECT_GT(break_even_length(Routing::full()), std::int64_t{1} << 40);
}

TEST(ChooseAttention, TrainedModelReadsLongPromptsWithMoba) {
  const std::int64_t even = break_even_length(kRouting);
  expect_choice(request(even, even, true), full, full, AttentionReason::short_prompt);
  expect_choice(request(even, even + 1, true), full, moba, AttentionReason::short_prompt);
  expect_choice(request(even + 1, even + 1, true), moba, moba, AttentionReason::trained);
}

TEST(ChooseAttention, TrainingWithAFullTailDecodesFully) {
  expect_choice(request(1 << 20, 1 << 20, true, 128), moba, full, AttentionReason::trained);
}

TEST(ChooseAttention, OtherRoutingThanTrainedDecodesFully) {
  AttentionRequest fewer = request(1 << 20, 1 << 20, true);
  fewer.moba.top_k = 3;
  expect_choice(fewer, moba, full, AttentionReason::trained);
  fewer.moba.top_k = 5;
  expect_choice(fewer, moba, moba, AttentionReason::trained);
  fewer.moba.block_size = 128;
  expect_choice(fewer, moba, full, AttentionReason::trained);
}

TEST(ChooseAttention, OtherModelsUseFullAttention) {
  expect_choice(request(100, 200, false), full, full, AttentionReason::short_prompt);
  expect_choice(request(1 << 20, 1 << 21, false), full, full, AttentionReason::not_trained);
}

TEST(ChooseAttention, RequestedModesStay) {
  AttentionRequest both = request(100, 200, false);
  both.prefill = moba_naive;
  both.decode = moba;
  expect_choice(both, moba_naive, moba, AttentionReason::requested);

  AttentionRequest decode = request(1 << 20, 1 << 20, true);
  decode.decode = full;
  expect_choice(decode, moba, full, AttentionReason::trained);
}

TEST(ChooseAttention, DecodeFollowsRequestedFullPrefill) {
  AttentionRequest prefill = request(1 << 20, 1 << 20, true);
  prefill.prefill = full;
  expect_choice(prefill, full, full, AttentionReason::requested);
  prefill.prefill = moba;
  expect_choice(prefill, moba, moba, AttentionReason::requested);
}

}  // namespace
}  // namespace moba::llm
