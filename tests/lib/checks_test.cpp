// Invalid arguments: every error names its function and argument, and leaves the outputs unchanged.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "cases.h"
#include "moba/cache.h"

namespace moba::test {
namespace {

/// A valid call; each test makes one argument invalid.
struct Call {
  Case c = plain_case(1, 12, 12, {.block_size = 4, .top_k = 2});
  Result result{c};
  Tensor q = c.q.view(), k = c.k.view(), v = c.v.view();
  Outputs outputs = result.outputs();
  Execution execution{.parallel = serial()};

  void run() { attention(q, k, v, c.sequences, c.routing, outputs, execution); }
};

struct BadCall {
  const char* message;
  std::function<void(Call&)> invalidate;
};

std::vector<BadCall> bad_calls() {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max() / 2;
  return {
      {"q: expected rank 3, [tokens, heads, head_dim], got rank 2", [](Call& c) { c.q.rank = 2; }},
      {"k: expected rank 3, [tokens, heads, head_dim], got rank 4", [](Call& c) { c.k.rank = 4; }},
      {"q: expected [12, 1, 16] elements, got null", [](Call& c) { c.q.data = nullptr; }},
      {"v: expected [12, 1, 16] elements, got null", [](Call& c) { c.v.data = nullptr; }},
      {"k: expected the dtype of q, f32, got bf16", [](Call& c) { c.k.dtype = DType::bf16; }},
      {"v: expected the dtype of k, f32, got f16", [](Call& c) { c.v.dtype = DType::f16; }},
      {"q: expected f32, bf16, f16 or f64, got i8", [](Call& c) { c.q.dtype = DType::i8; }},
      {"k: expected the device of q, got another", [](Call& c) { c.k.device = Device::cuda; }},
      {"q: expected sizes of at least 0, got [-1, 1, 16]", [](Call& c) { c.q.sizes[0] = -1; }},
      {"q: expected at least one head and a head_dim of at least 1, got sizes [12, 0, 16]",
       [](Call& c) { c.q.sizes[1] = 0; }},
      {"k: expected at least one head and a head_dim of at least 1, got sizes [12, 1, 0]",
       [](Call& c) { c.k.sizes[2] = 0; }},
      {"k: expected head_dim 16 (that of q), got 8", [](Call& c) { c.k.sizes[2] = c.v.sizes[2] = 8; }},
      {"v: expected the sizes of k, [12, 1, 16], got [11, 1, 16]", [](Call& c) { c.v.sizes[0] = 11; }},
      {"q: expected stride 1 in the last dimension, got 2", [](Call& c) { c.q.strides[2] = 2; }},
      {"q: expected sizes and strides within 64 bits, got sizes [12, 1, 16] and strides beyond",
       [](Call& c) { c.q.strides[0] = kHuge; }},
      {"k: expected sizes and strides within 64 bits, got sizes [4611686018427387903, 1, 16] and strides "
       "beyond",
       [](Call& c) { c.k.sizes[0] = kHuge; }},
      {"q: expected alignment to f32, got an unaligned pointer",
       [](Call& c) { c.q.data = static_cast<std::byte*>(c.q.data) + 2; }},
      {"k: expected a number of heads that divides 8 (the query heads), got 3",
       [](Call& c) {
         c.q.sizes[1] = 8;
         c.k.sizes[1] = c.v.sizes[1] = 3;
       }},
      {"cu_seqlens_q: expected at least one entry (0), got an empty list",
       [](Call& c) { c.c.sequences = {}; }},
      {"cu_seqlens_k: expected 2 entries (as cu_seqlens_q), got 1",
       [](Call& c) { c.c.sequences.cu_seqlens_k = {12}; }},
      {"cu_seqlens_q: expected to start at 0, got 1",
       [](Call& c) {
         c.c.sequences.cu_seqlens_q = {1, 12};
       }},
      {"cu_seqlens_k: expected never to decrease, got 3 after 9 at entry 2",
       [](Call& c) {
         c.c.sequences = {{0, 4, 8, 12}, {0, 9, 3, 12}};
       }},
      {"cu_seqlens_k: expected to end at 12 (the tokens of k), got 11",
       [](Call& c) {
         c.c.sequences.cu_seqlens_k = {0, 11};
       }},
      {"block_size: expected at least 1, got 0", [](Call& c) { c.c.routing.block_size = 0; }},
      {"top_k: expected at least 1, got -3", [](Call& c) { c.c.routing.top_k = -3; }},
      {"sink_blocks: expected 0 to 1 for top_k 2, got 2", [](Call& c) { c.c.routing.sink_blocks = 2; }},
      {"sink_blocks: expected 0 to 1 for top_k 2, got -1", [](Call& c) { c.c.routing.sink_blocks = -1; }},
      {"own_block: expected false for causal routing", [](Call& c) { c.c.routing.own_block = true; }},
      {"scale: expected a finite number, got inf",
       [](Call& c) { c.c.routing.scale = std::numeric_limits<float>::infinity(); }},
      {"out: expected [12, 1, 16] elements, got null", [](Call& c) { c.outputs.out.data = nullptr; }},
      {"out: expected rank 3, [tokens, heads, head_dim], got rank 0", [](Call& c) { c.outputs.out = {}; }},
      {"out: expected the dtype of q, f32, got bf16", [](Call& c) { c.outputs.out.dtype = DType::bf16; }},
      {"out: expected the sizes of q, [12, 1, 16], got [12, 1, 8]",
       [](Call& c) { c.outputs.out.sizes[2] = 8; }},
      {"out: expected distinct elements, got strides that lead to the same element twice",
       [](Call& c) { c.outputs.out.strides[0] = 0; }},
      {"out: expected distinct elements, got strides that lead to the same element twice",
       [](Call& c) { c.outputs.out.strides[0] = 15; }},
      {"out: expected memory of its own, got memory shared with q", [](Call& c) { c.outputs.out = c.q; }},
      {"out: expected memory of its own, got memory shared with k",
       [](Call& c) { c.outputs.out.data = static_cast<float*>(c.k.data) + 3; }},
      {"out: expected memory of its own, got memory shared with v", [](Call& c) { c.outputs.out = c.v; }},
      {"lse: expected alignment to f32, got an unaligned pointer",
       [](Call& c) { c.outputs.lse = reinterpret_cast<float*>(reinterpret_cast<char*>(c.outputs.lse) + 1); }},
      {"selection: expected alignment to int32, got an unaligned pointer",
       [](Call& c) {
         c.outputs.selection =
             reinterpret_cast<std::int32_t*>(reinterpret_cast<char*>(c.outputs.selection) + 2);
       }},
      {"selection_stride: expected 0 or at least 2 (the width of the selection), got 1",
       [](Call& c) { c.outputs.selection_stride = 1; }},
      {"workspace_bytes: expected at least 1 or unset, got 0",
       [](Call& c) { c.execution.workspace_bytes = 0; }},
      {"parallel.threads: expected at least 1, got 0", [](Call& c) { c.execution.parallel.threads = 0; }},
      {"parallel.run: expected a function for 4 threads, got none",
       [](Call& c) { c.execution.parallel = {.threads = 4}; }},
      {"scratch.release: expected both of allocate and release, or neither, got allocate alone",
       [](Call& c) { c.execution.scratch.allocate = [](std::size_t) -> void* { return nullptr; }; }},
      {"scratch.allocate: expected both of allocate and release, or neither, got release alone",
       [](Call& c) { c.execution.scratch.release = [](void*, std::size_t) {}; }},
      {"backend: expected one of this build (", [](Call& c) { c.execution.backend = "gpu"; }},
  };
}

/// Returns the message of the error that `call` throws.
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void expect_message(const std::string& found, const std::string& expected) {
  EXPECT_EQ(found.substr(0, expected.size()), expected) << found;
  EXPECT_EQ(found.find('\n'), std::string::npos) << found;
}

TEST(Checks, InvalidCallsThrowAndWriteNothing) {
  for (const BadCall& bad : bad_calls()) {
    Call call;
    const Result unwritten = call.result;
    bad.invalidate(call);
    expect_message(message_of([&] { call.run(); }), std::string("attention: ") + bad.message);
    EXPECT_TRUE(call.result == unwritten) << bad.message;
  }
}

TEST(Checks, ValidCallPasses) {
  Call call;
  EXPECT_NO_THROW(call.run());
  EXPECT_FALSE(call.result == Result(call.c));
}

TEST(Checks, OverlapOfAReversedViewThrows) {
  Call call;
  Array reversed(DType::f32, 12, 1, 16, Layout::reversed);
  call.q = reversed.view();
  call.outputs.out = reversed.slice(0, 12);
  EXPECT_NE(message_of([&] { call.run(); }), "no error");
}

TEST(Checks, InvalidSelectBlocksArgumentsThrow) {
  const Case c = plain_case(1, 12, 12, {.block_size = 4, .top_k = 2});
  expect_message(message_of([&] { select_blocks(c.q.view(), c.k.view(), c.sequences, c.routing, nullptr); }),
                 "select_blocks: selection: expected [Hq, Tq, selection_width()] int32, got null");
  expect_message(message_of([&] {
                   std::int32_t block = 0;
                   select_blocks({}, c.k.view(), c.sequences, c.routing, &block);
                 }),
                 "select_blocks: q: expected rank 3, [tokens, heads, head_dim], got rank 0");
}

struct BadBackward {
  const char* message;
  std::function<void(Tensor& d_out, Saved& saved, Gradients& gradients)> invalidate;
};

TEST(Checks, InvalidBackwardArgumentsThrow) {
  const std::vector<BadBackward> calls = {
      {"d_out: expected the sizes of q, ", [](Tensor& d_out, Saved&, Gradients&) { d_out.sizes[0] = 3; }},
      {"saved.out: expected rank 3, [tokens, heads, head_dim], got rank 0",
       [](Tensor&, Saved& saved, Gradients&) { saved.out = {}; }},
      {"saved.lse: expected [Hq, Tq] f32, got null",
       [](Tensor&, Saved& saved, Gradients&) { saved.lse = nullptr; }},
      {"dq: expected [12, 1, 16] elements, got null",
       [](Tensor&, Saved&, Gradients& g) { g.dq.data = nullptr; }},
      {"dk: expected the sizes of k, ", [](Tensor&, Saved&, Gradients& g) { g.dk.sizes[0] = 5; }},
      {"dv: expected memory of its own, got memory shared with dk",
       [](Tensor&, Saved&, Gradients& g) { g.dv = g.dk; }},
      {"dq: expected memory of its own, got memory shared with d_out",
       [](Tensor& d_out, Saved&, Gradients& g) { g.dq = d_out; }},
      {"dk: expected distinct elements, got strides",
       [](Tensor&, Saved&, Gradients& g) { g.dk.strides[0] = 0; }},
  };
  Call call;
  call.run();
  for (const BadBackward& bad : calls) {
    Array d_out = call.c.q, dq = call.c.q, dk = call.c.k, dv = call.c.v;
    Tensor d_out_view = d_out.view();
    Saved saved{.out = call.outputs.out, .lse = call.outputs.lse};
    Gradients gradients{dq.view(), dk.view(), dv.view()};
    bad.invalidate(d_out_view, saved, gradients);
    expect_message(message_of([&] {
                     attention_backward(d_out_view, call.q, call.k, call.v, saved, call.c.sequences,
                                        call.c.routing, gradients);
                   }),
                   std::string("attention_backward: ") + bad.message);
  }
}

TEST(Checks, OnlyOverlappingColumnsOfOneMatrixThrow) {
  Call call;
  call.run();
  const std::int64_t tokens = call.q.sizes[0], heads = call.q.sizes[1], kv_heads = call.k.sizes[1],
                     dim = call.q.sizes[2];
  const std::int64_t row = (heads + 2 * kv_heads) * dim;
  std::vector<float> together(static_cast<std::size_t>(tokens * row));
  const auto columns = [&](std::int64_t first, std::int64_t count) {
    return view(together.data() + first * dim, {tokens, count, dim}, {row, dim, 1});
  };
  const Saved saved{.out = call.outputs.out, .lse = call.outputs.lse};
  Gradients gradients{columns(0, heads), columns(heads, kv_heads), columns(heads + kv_heads, kv_heads)};
  const auto message = [&] {
    return message_of([&] {
      attention_backward(call.q, call.q, call.k, call.v, saved, call.c.sequences, call.c.routing, gradients);
    });
  };
  EXPECT_EQ(message(), "no error");
  gradients.dv = columns(heads + kv_heads - 1, kv_heads);
  expect_message(message(), "attention_backward: dv: expected memory of its own, got memory shared with dk");
}

TEST(Checks, InvalidCacheShapeThrows) {
  const auto message = [](const KvCache::Shape& shape) { return message_of([&] { KvCache cache(shape); }); };
  expect_message(message({.kv_heads = 0}), "KvCache: kv_heads: expected at least 1, got 0");
  expect_message(message({.head_dim = -4}), "KvCache: head_dim: expected at least 1, got -4");
  expect_message(message({.block_size = 0}), "KvCache: block_size: expected at least 1, got 0");
  expect_message(message({.sequences = 0}), "KvCache: sequences: expected at least 1, got 0");
  expect_message(message({.dtype = DType::f64}), "KvCache: dtype: expected f32, bf16, f16 or i8, got f64");
  expect_message(message({.kv_heads = std::int64_t{1} << 40, .head_dim = std::int64_t{1} << 40}),
                 "KvCache: kv_heads: expected kv_heads x head_dim of at most ");
}

TEST(Checks, InvalidPagedCallThrows) {
  const PageLayout good{.kv_heads = 2, .head_dim = 8, .block_size = 4, .page_tokens = 4};
  const auto size = [](PageLayout layout) { return message_of([&] { page_bytes(layout); }); };
  EXPECT_EQ(page_bytes(good), 2 * 2 * 8 * 4 * sizeof(float));
  PageLayout layout = good;
  layout.page_tokens = 0;
  expect_message(size(layout), "page_bytes: page_tokens: expected 1 to 16777216, got 0");
  layout = good;
  layout.offset = 8;
  expect_message(size(layout), "page_bytes: offset: expected a multiple of 64, got 8");
  layout = good;
  layout.dtype = DType::f64;
  expect_message(size(layout), "page_bytes: dtype: expected f32, bf16, f16 or i8, got f64");

  alignas(64) std::byte page[512];
  std::byte* const pages[2] = {page, page + 8};
  float means[64] = {};
  Array keys(DType::f32, 5, 2, 8);
  const auto append = [&](const PagedSequence& sequence) {
    return message_of([&] { moba::append(keys.view(), keys.view(), good, sequence); });
  };
  expect_message(append({.length = -1}), "append: sequence.length: expected 0 to 2147483647 tokens, got -1");
  expect_message(append({.length = std::numeric_limits<std::int64_t>::max()}),
                 "append: sequence.length: expected 0 to 2147483647 tokens, got 9223372036854775807 and 5");
  expect_message(append({.pages = {pages, 1}, .means = means}),
                 "append: sequence.pages: expected at least 2 for 5 tokens, got 1");
  expect_message(append({.pages = pages, .means = means}),
                 "append: sequence.pages: expected alignment to 64 bytes, got a null or unaligned page 1");
  std::byte* const twice[2] = {page, page};
  expect_message(append({.pages = twice}), "append: sequence.means: expected f32 values, got a null");

  const PagedSequence sequence{.length = 5, .pages = twice, .means = means};
  Array q(DType::f32, 2, 2, 8);
  const auto decode = [&](const Routing& routing) {
    return message_of([&] { moba::decode(q.view(), good, {&sequence, 1}, routing, {.out = q.view()}); });
  };
  expect_message(decode({.block_size = 8, .top_k = 1}),
                 "decode: block_size: expected 4 (the cache's), got 8");
  expect_message(decode(Routing::full()),
                 "decode: q: expected 1 tokens (one for each sequence of the cache), got 2");
}

TEST(Checks, InvalidCacheCallThrows) {
  KvCache cache({.kv_heads = 2, .head_dim = 8, .block_size = 4, .sequences = 3});
  Array keys(DType::f32, 5, 2, 8), narrow(DType::f32, 5, 2, 4), one_head(DType::f32, 5, 1, 8);
  Array wide(DType::f64, 5, 2, 8), shorter(DType::f32, 4, 2, 8);
  const auto append = [&](const Array& k, const Array& v, std::int64_t sequence) {
    return message_of([&] { cache.append(k.view(), v.view(), sequence); });
  };
  expect_message(append(narrow, narrow, 0), "KvCache::append: k: expected head_dim 8 (the cache's), got 4");
  expect_message(append(one_head, one_head, 0), "KvCache::append: k: expected 2 heads (the cache's), got 1");
  expect_message(append(wide, wide, 0), "KvCache::append: k: expected f32, bf16 or f16, got f64");
  expect_message(append(keys, shorter, 0),
                 "KvCache::append: v: expected the sizes of k, [5, 2, 8], got [4, 2, 8]");
  expect_message(append(keys, keys, 3), "KvCache::append: sequence: expected 0 to 2, got 3");
  expect_message(append(keys, keys, -1), "KvCache::append: sequence: expected 0 to 2, got -1");
  expect_message(message_of([&] { cache.truncate(1); }),
                 "KvCache::truncate: tokens: expected 0 to 0 (those held), got 1");
  EXPECT_EQ(cache.length(), 0);

  Array q(DType::f32, 3, 4, 8), out = q, odd(DType::f32, 3, 3, 8);
  const auto ask = [&](const Array& queries, const Routing& routing, std::int64_t sequence = 0) {
    return message_of([&] { attention(queries.view(), cache, sequence, routing, {.out = out.view()}); });
  };
  expect_message(ask(odd, {.block_size = 4}),
                 "attention: cache: expected a number of heads that divides 3 (the query heads), got 2");
  expect_message(ask(q, {.block_size = 8}), "attention: block_size: expected 4 (the cache's), got 8");
  expect_message(ask(q, {.block_size = 4, .causal = false}),
                 "attention: causal: expected true (a cache takes causal queries only), got false");
  expect_message(ask(q, {.block_size = 4}, 7), "attention: sequence: expected 0 to 2, got 7");
  EXPECT_EQ(ask(q, Routing::full()), "no error");
  expect_message(
      message_of([&] { decode(q.slice(0, 2), cache, {.block_size = 4}, {.out = out.slice(0, 2)}); }),
      "decode: q: expected 3 tokens (one for each sequence of the cache), got 2");
  expect_message(message_of([&] {
                   std::int32_t block = 0;
                   decode(q.view(), cache, {.block_size = 4}, {.out = out.view(), .selection = &block});
                 }),
                 "decode: selection: expected null (attention on the cache selects), got a pointer");
}

}  // namespace
}  // namespace moba::test
