// Bad arguments: every error names its function and argument, and leaves the outputs alone.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "cases.h"
#include "moba/cache.h"

namespace moba::test {
namespace {

/// A good call, to be spoilt in one place.
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
  std::function<void(Call&)> spoil;
};

std::vector<BadCall> bad_calls() {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max() / 2;
  return {
      {"q has rank 2", [](Call& c) { c.q.rank = 2; }},
      {"k has rank 4", [](Call& c) { c.k.rank = 4; }},
      {"q is null", [](Call& c) { c.q.data = nullptr; }},
      {"v is null", [](Call& c) { c.v.data = nullptr; }},
      {"k is bf16; q is f32", [](Call& c) { c.k.dtype = DType::bf16; }},
      {"v is f16; k is f32", [](Call& c) { c.v.dtype = DType::f16; }},
      {"q is i8", [](Call& c) { c.q.dtype = DType::i8; }},
      {"k is on another device", [](Call& c) { c.k.device = Device::cuda; }},
      {"q has sizes [-1, 1, 16]", [](Call& c) { c.q.sizes[0] = -1; }},
      {"q has sizes [12, 0, 16]", [](Call& c) { c.q.sizes[1] = 0; }},
      {"k has sizes [12, 1, 0]", [](Call& c) { c.k.sizes[2] = 0; }},
      {"k has head_dim 8; q has 16", [](Call& c) { c.k.sizes[2] = c.v.sizes[2] = 8; }},
      {"v has sizes [11, 1, 16]", [](Call& c) { c.v.sizes[0] = 11; }},
      {"q has stride 2 in its last dimension", [](Call& c) { c.q.strides[2] = 2; }},
      {"q has sizes [12, 1, 16] and strides beyond", [](Call& c) { c.q.strides[0] = kHuge; }},
      {"k has sizes [4611686018427387903, 1, 16] and strides beyond", [](Call& c) { c.k.sizes[0] = kHuge; }},
      {"q is not aligned", [](Call& c) { c.q.data = static_cast<std::byte*>(c.q.data) + 2; }},
      {"k has 3 heads; 8 query heads need a divisor of 8",
       [](Call& c) {
         c.q.sizes[1] = 8;
         c.k.sizes[1] = c.v.sizes[1] = 3;
       }},
      {"sequences.q is empty", [](Call& c) { c.c.sequences = {}; }},
      {"sequences.k has 1 entries; sequences.q has 2", [](Call& c) { c.c.sequences.k = {12}; }},
      {"sequences.q starts at 1",
       [](Call& c) {
         c.c.sequences.q = {1, 12};
       }},
      {"sequences.k falls from 9 to 3 at entry 2",
       [](Call& c) {
         c.c.sequences = {{0, 4, 8, 12}, {0, 9, 3, 12}};
       }},
      {"sequences.k ends at 11; k has 12 tokens",
       [](Call& c) {
         c.c.sequences.k = {0, 11};
       }},
      {"block_size is 0", [](Call& c) { c.c.routing.block_size = 0; }},
      {"top_k is -3", [](Call& c) { c.c.routing.top_k = -3; }},
      {"sink_blocks is 2; 0 to 1", [](Call& c) { c.c.routing.sink_blocks = 2; }},
      {"sink_blocks is -1", [](Call& c) { c.c.routing.sink_blocks = -1; }},
      {"own_block is set for causal", [](Call& c) { c.c.routing.own_block = true; }},
      {"scale is", [](Call& c) { c.c.routing.scale = std::numeric_limits<float>::infinity(); }},
      {"out is null", [](Call& c) { c.outputs.out.data = nullptr; }},
      {"out has rank 0", [](Call& c) { c.outputs.out = {}; }},
      {"out is bf16; q is f32", [](Call& c) { c.outputs.out.dtype = DType::bf16; }},
      {"out has sizes [12, 1, 8]", [](Call& c) { c.outputs.out.sizes[2] = 8; }},
      {"out has strides that lead to the same element twice", [](Call& c) { c.outputs.out.strides[0] = 0; }},
      {"out has strides that lead to the same element twice", [](Call& c) { c.outputs.out.strides[0] = 15; }},
      {"out shares memory with q", [](Call& c) { c.outputs.out = c.q; }},
      {"out shares memory with k", [](Call& c) { c.outputs.out.data = static_cast<float*>(c.k.data) + 3; }},
      {"out shares memory with v", [](Call& c) { c.outputs.out = c.v; }},
      {"lse is not aligned",
       [](Call& c) { c.outputs.lse = reinterpret_cast<float*>(reinterpret_cast<char*>(c.outputs.lse) + 1); }},
      {"selection is not aligned",
       [](Call& c) {
         c.outputs.selection =
             reinterpret_cast<std::int32_t*>(reinterpret_cast<char*>(c.outputs.selection) + 2);
       }},
      {"workspace_bytes is 0", [](Call& c) { c.execution.workspace_bytes = 0; }},
      {"parallel has 0 threads", [](Call& c) { c.execution.parallel.threads = 0; }},
      {"parallel has 4 threads and no run", [](Call& c) { c.execution.parallel = {.threads = 4}; }},
      {"scratch has only allocate",
       [](Call& c) { c.execution.scratch.allocate = [](std::size_t) -> void* { return nullptr; }; }},
      {"scratch has only release", [](Call& c) { c.execution.scratch.release = [](void*, std::size_t) {}; }},
      {"backend is \"gpu\"; this build has", [](Call& c) { c.execution.backend = "gpu"; }},
  };
}

/// Runs what must throw, and returns the message.
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

TEST(Checks, BadCallsNameTheArgumentAndWriteNothing) {
  for (const BadCall& bad : bad_calls()) {
    Call call;
    const Result unwritten = call.result;
    bad.spoil(call);
    expect_message(message_of([&] { call.run(); }), std::string("attention: ") + bad.message);
    EXPECT_TRUE(call.result == unwritten) << bad.message;
  }
}

TEST(Checks, TheGoodCallPasses) {
  Call call;
  EXPECT_NO_THROW(call.run());
  EXPECT_FALSE(call.result == Result(call.c));
}

TEST(Checks, BothEndsOfAReversedViewCount) {
  Call call;
  Array reversed(DType::f32, 12, 1, 16, Layout::reversed);
  call.q = reversed.view();
  call.outputs.out = reversed.slice(0, 12);
  EXPECT_NE(message_of([&] { call.run(); }), "no error");
}

TEST(Checks, SelectBlocksChecksToo) {
  const Case c = plain_case(1, 12, 12, {.block_size = 4, .top_k = 2});
  expect_message(message_of([&] { select_blocks(c.q.view(), c.k.view(), c.sequences, c.routing, nullptr); }),
                 "select_blocks: selection is null");
  expect_message(message_of([&] {
                   std::int32_t block = 0;
                   select_blocks({}, c.k.view(), c.sequences, c.routing, &block);
                 }),
                 "select_blocks: q has rank 0");
}

struct BadBackward {
  const char* message;
  std::function<void(Tensor& d_out, Saved& saved, Gradients& gradients)> spoil;
};

TEST(Checks, BadBackwardCallsNameTheArgument) {
  const std::vector<BadBackward> calls = {
      {"d_out has sizes", [](Tensor& d_out, Saved&, Gradients&) { d_out.sizes[0] = 3; }},
      {"saved.out has rank 0", [](Tensor&, Saved& saved, Gradients&) { saved.out = {}; }},
      {"saved.lse is null", [](Tensor&, Saved& saved, Gradients&) { saved.lse = nullptr; }},
      {"dq is null", [](Tensor&, Saved&, Gradients& g) { g.dq.data = nullptr; }},
      {"dk has sizes", [](Tensor&, Saved&, Gradients& g) { g.dk.sizes[0] = 5; }},
      {"dv shares memory with dk", [](Tensor&, Saved&, Gradients& g) { g.dv = g.dk; }},
      {"dq shares memory with d_out", [](Tensor& d_out, Saved&, Gradients& g) { g.dq = d_out; }},
      {"dk has strides", [](Tensor&, Saved&, Gradients& g) { g.dk.strides[0] = 0; }},
  };
  Call call;
  call.run();
  for (const BadBackward& bad : calls) {
    Array d_out = call.c.q, dq = call.c.q, dk = call.c.k, dv = call.c.v;
    Tensor d_out_view = d_out.view();
    Saved saved{.out = call.outputs.out, .lse = call.outputs.lse};
    Gradients gradients{dq.view(), dk.view(), dv.view()};
    bad.spoil(d_out_view, saved, gradients);
    expect_message(message_of([&] {
                     attention_backward(d_out_view, call.q, call.k, call.v, saved, call.c.sequences,
                                        call.c.routing, gradients);
                   }),
                   std::string("attention_backward: ") + bad.message);
  }
}

TEST(Checks, ColumnsOfOneMatrixAreApart) {
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
  expect_message(message(), "attention_backward: dv shares memory with dk");
}

TEST(Checks, CacheShapes) {
  const auto message = [](const KvCache::Shape& shape) { return message_of([&] { KvCache cache(shape); }); };
  expect_message(message({.kv_heads = 0}), "KvCache: kv_heads is 0");
  expect_message(message({.head_dim = -4}), "KvCache: head_dim is -4");
  expect_message(message({.block_size = 0}), "KvCache: block_size is 0");
  expect_message(message({.sequences = 0}), "KvCache: sequences is 0");
  expect_message(message({.dtype = DType::f64}), "KvCache: dtype is f64");
  expect_message(message({.kv_heads = std::int64_t{1} << 40, .head_dim = std::int64_t{1} << 40}),
                 "KvCache: kv_heads is");
}

TEST(Checks, CacheCalls) {
  KvCache cache({.kv_heads = 2, .head_dim = 8, .block_size = 4, .sequences = 3});
  Array keys(DType::f32, 5, 2, 8), narrow(DType::f32, 5, 2, 4), one_head(DType::f32, 5, 1, 8);
  Array wide(DType::f64, 5, 2, 8), shorter(DType::f32, 4, 2, 8);
  const auto append = [&](const Array& k, const Array& v, std::int64_t sequence) {
    return message_of([&] { cache.append(k.view(), v.view(), sequence); });
  };
  expect_message(append(narrow, narrow, 0), "KvCache::append: k has head_dim 4; the cache has 8");
  expect_message(append(one_head, one_head, 0), "KvCache::append: k has 1 heads; the cache has 2");
  expect_message(append(wide, wide, 0), "KvCache::append: k is f64");
  expect_message(append(keys, shorter, 0), "KvCache::append: v has sizes [4, 2, 8]");
  expect_message(append(keys, keys, 3), "KvCache::append: sequence is 3; the cache has 3");
  expect_message(append(keys, keys, -1), "KvCache::append: sequence is -1");
  expect_message(message_of([&] { cache.truncate(1); }), "KvCache::truncate: tokens is 1");
  EXPECT_EQ(cache.length(), 0);

  Array q(DType::f32, 3, 4, 8), out = q, odd(DType::f32, 3, 3, 8);
  const auto ask = [&](const Array& queries, const Routing& routing, std::int64_t sequence = 0) {
    return message_of([&] { attention(queries.view(), cache, sequence, routing, {.out = out.view()}); });
  };
  expect_message(ask(odd, {.block_size = 4}), "attention: cache has 2 heads; 3 query heads");
  expect_message(ask(q, {.block_size = 8}),
                 "attention: block_size is 8; the cache keeps means of blocks of 4");
  expect_message(ask(q, {.block_size = 4, .causal = false}), "attention: causal is not set");
  expect_message(ask(q, {.block_size = 4}, 7), "attention: sequence is 7");
  EXPECT_EQ(ask(q, Routing::full()), "no error");
  expect_message(
      message_of([&] { decode(q.slice(0, 2), cache, {.block_size = 4}, {.out = out.slice(0, 2)}); }),
      "decode: q has 2 tokens; the cache has 3 sequences");
  expect_message(message_of([&] {
                   std::int32_t block = 0;
                   decode(q.view(), cache, {.block_size = 4}, {.out = out.view(), .selection = &block});
                 }),
                 "decode: selection is set");
}

}  // namespace
}  // namespace moba::test
