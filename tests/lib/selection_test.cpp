// Attention to blocks that the caller selects: against the oracle, against the gate's own selection, and
// merged from several calls.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>

#include "backends.h"
#include "moba/cache.h"
#include "selected.h"

namespace moba::test {
namespace {

/// A random case in which the caller selects. Fields of the routing that are not read have no valid value.
struct SelectedCase {
  Case c{};
  Selected selected;
};

SelectedCase selected_case(std::uint64_t seed, const std::function<void(Case&)>& change = {}) {
  Case c = random_case(seed);
  c.routing.block_size = std::min<std::int64_t>(c.routing.block_size, 32);
  if (change) change(c);
  fill(c);
  Selected selected = random_selection(c, seed);
  c.routing.top_k = 0;
  c.routing.sink_blocks = -1;
  return {std::move(c), std::move(selected)};
}

/// Runs attention over the caller's selection, and enters it in the result for the oracle.
Result run_selected(const SelectedCase& s, const Execution& execution) {
  Case c = s.c;
  c.routing.selection = s.selected.view();
  Result result(c);
  Outputs outputs = result.outputs();
  outputs.selection = nullptr;
  attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, c.routing, outputs, execution);
  enter(s.selected, s.c, result);
  return result;
}

struct Differentiated {
  Array dq, dk, dv;
  bool operator==(const Differentiated& other) const {
    return dq.bytes() == other.dq.bytes() && dk.bytes() == other.dk.bytes() && dv.bytes() == other.dv.bytes();
  }
};

Differentiated run_backward(const Case& c, const Array& d_out, const Saved& saved,
                            const Execution& execution) {
  Differentiated d{Array(c.dtype, c.queries(), c.q_heads(), c.head_dim),
                   Array(c.dtype, c.keys(), c.kv_heads, c.head_dim),
                   Array(c.dtype, c.keys(), c.kv_heads, c.head_dim)};
  attention_backward(d_out.view(), c.q.view(), c.k.view(), c.v.view(), saved, c.sequences, c.routing,
                     {d.dq.view(), d.dk.view(), d.dv.view()}, execution);
  return d;
}

Differentiated run_backward(const SelectedCase& s, const Array& d_out, Result& forward,
                            const Execution& execution) {
  Case c = s.c;
  c.routing.selection = s.selected.view();
  return run_backward(c, d_out, {.out = forward.out.view(), .lse = forward.outputs().lse}, execution);
}

double tolerance_of(DType dtype) {
  return dtype == DType::f32 ? 2e-5 : dtype == DType::f64 ? 2e-6 : dtype == DType::bf16 ? 0.1 : 0.01;
}

void check_gradients(const SelectedCase& s, Result& forward, const Execution& execution) {
  const Array d_out = gradient_for(s.c);
  const Differentiated found = run_backward(s, d_out, forward, execution);
  const TrueGradients expected = true_gradients(s.c, forward, d_out);
  const double tolerance = tolerance_of(s.c.dtype);
  check_near(s.c, "dq", found.dq, expected.dq, tolerance);
  check_near(s.c, "dk", found.dk, expected.dk, tolerance);
  check_near(s.c, "dv", found.dv, expected.dv, tolerance);
}

using SelectionOfCaller = EveryBackend;

TEST_P(SelectionOfCaller, MatchesTheOracleOnRandomCases) {
  for (std::uint64_t seed = 7000; seed < 7600 && !HasFailure(); ++seed) {
    const SelectedCase s = selected_case(seed);
    const Result result = run_selected(s, execution());
    EXPECT_TRUE(result.fences_untouched()) << describe(s.c);
    check_attended(s.c, result, exact());
  }
}

TEST_P(SelectionOfCaller, GradientsMatchTheirDefinition) {
  for (std::uint64_t seed = 7600; seed < 7750 && !HasFailure(); ++seed) {
    const SelectedCase s = selected_case(seed, [&](Case& c) {
      c.values = Values::normal;
      c.head_dim = std::min<std::int64_t>(c.head_dim, 17);
      if (exact() && seed % 2 == 0) c.dtype = DType::f64;
    });
    Result forward = run_selected(s, execution());
    check_gradients(s, forward, execution());
  }
}

/// Uses enough tokens and blocks for several key tiles, ranges and rounds of a fast backend.
TEST_P(SelectionOfCaller, MatchesTheOracleOnLongSequences) {
  for (const bool causal : {true, false}) {
    for (const std::int64_t block_size : {1, 48, 300}) {
      const SelectedCase s = selected_case(7800, [&](Case& c) {
        c = plain_case(7800, 400, 600, {.block_size = block_size, .causal = causal});
        c.heads_per_kv = 3;
      });
      Result result = run_selected(s, execution());
      check_attended(s.c, result, exact());
      check_gradients(s, result, execution());
    }
  }
}

TEST_P(SelectionOfCaller, GateSelectionGivesTheSameBits) {
  for (const bool causal : {true, false}) {
    Case c = plain_case(8, 90, 120, {.block_size = 8, .top_k = 4, .causal = causal});
    c.kv_heads = 2;
    c.heads_per_kv = 3;
    fill(c);
    const Array d_out = gradient_for(c);
    Result gated = run_attention(c, execution());
    const Differentiated expected = run_backward(
        c, d_out,
        {.out = gated.out.view(), .lse = gated.outputs().lse, .selection = gated.outputs().selection},
        execution());
    Case given = c;
    given.routing.selection = {
        .blocks = gated.outputs().selection, .heads = c.q_heads(), .width = gated.width};
    Result found(given);
    attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, given.routing,
              {.out = found.out.view(), .lse = found.outputs().lse}, execution());
    found.selection = gated.selection;
    EXPECT_EQ(found, gated);
    const Differentiated d =
        run_backward(given, d_out, {.out = found.out.view(), .lse = found.outputs().lse}, execution());
    // The reference reads the rounded lse of a caller's selection.
    if (!exact()) {
      EXPECT_EQ(d, expected);
    }
  }
}

TEST_P(SelectionOfCaller, SharedRowsGiveTheBitsOfRepeatedOnes) {
  for (std::uint64_t seed = 7900; seed < 7960; ++seed) {
    const SelectedCase shared = selected_case(seed, [](Case& c) {
      c.kv_heads = 2;
      c.heads_per_kv = 6;
      c.values = Values::normal;
    });
    Selected all(shared.c.q_heads(), shared.c.queries(), shared.selected.width, 0);
    for (std::int64_t head = 0; head < all.heads; ++head) {
      for (std::int64_t token = 0; token < all.tokens; ++token)
        std::copy_n(shared.selected.row(head * shared.selected.heads / all.heads, token), all.width,
                    all.row(head, token));
    }
    const SelectedCase repeated{shared.c, all};
    Result a = run_selected(shared, execution()), b = run_selected(repeated, execution());
    EXPECT_EQ(a, b) << describe(shared.c);
    const Array d_out = gradient_for(shared.c);
    EXPECT_EQ(run_backward(shared, d_out, a, execution()), run_backward(repeated, d_out, b, execution()))
        << describe(shared.c);
  }
}

TEST_P(SelectionOfCaller, AnyThreadsAndWorkspaceGiveTheSameBits) {
  for (std::uint64_t seed = 7960; seed < 7980; ++seed) {
    const SelectedCase s = selected_case(seed, [](Case& c) { c.values = Values::normal; });
    const Array d_out = gradient_for(s.c);
    Result expected = run_selected(s, execution());
    const Differentiated gradients = run_backward(s, d_out, expected, execution());
    for (const int threads : {2, 7}) {
      const Execution parallel{.backend = GetParam(), .parallel = std_threads(threads)};
      EXPECT_EQ(run_selected(s, parallel), expected) << describe(s.c);
      EXPECT_EQ(run_backward(s, d_out, expected, parallel), gradients) << describe(s.c);
    }
    for (std::size_t budget = std::size_t{1} << 20; budget > 0; budget /= 2) {
      const Execution tight{.backend = GetParam(), .parallel = serial(), .workspace_bytes = budget};
      try {
        ASSERT_EQ(run_selected(s, tight), expected) << describe(s.c) << ", " << budget;
        ASSERT_EQ(run_backward(s, d_out, expected, tight), gradients) << describe(s.c) << ", " << budget;
      } catch (const Error& error) {
        ASSERT_NE(std::string(error.what()).find("workspace_bytes"), std::string::npos) << error.what();
      }
    }
  }
}

/// Splits causal attention into the queries' own blocks and two lists of past blocks, as context parallelism
/// does: the merged results, and the gradients that each call computes from them, are those of one call.
TEST_P(SelectionOfCaller, MergedCallsMatchOneCall) {
  constexpr std::int64_t kTokens = 96, kBlock = 8;
  Case c = plain_case(9, kTokens, kTokens, {.block_size = kBlock, .top_k = 5});
  c.kv_heads = 2;
  c.heads_per_kv = 2;
  fill(c);
  const Array d_out = gradient_for(c);
  Result whole = run_attention(c, execution());

  // Own blocks: causal. Even past blocks and odd ones: not causal, often none.
  std::vector<Selected> parts;
  std::vector<Case> cases;
  for (const int part : {0, 1, 2}) {
    Selected selected(c.q_heads(), kTokens, part == 0 ? 1 : 4, 0);
    Case of_part = c;
    of_part.routing.causal = part == 0;
    for_each_row(c, c.q_heads(), [&](std::int64_t head, std::int64_t token, std::int64_t own, std::int64_t) {
      std::int32_t* to = selected.row(head, token);
      for (const std::int32_t block : whole.row(head, token)) {
        if (part == 0 ? block == own : block != own && block % 2 == part - 1) *to++ = block;
      }
    });
    parts.push_back(selected);
    cases.push_back(of_part);
  }
  std::vector<Result> results;
  for (std::size_t part = 0; part < 3; ++part)
    results.push_back(run_selected({cases[part], parts[part]}, execution()));

  Result merged(c);
  for (std::int64_t head = 0; head < c.q_heads(); ++head) {
    for (std::int64_t token = 0; token < kTokens; ++token) {
      double sum = 0;
      for (const Result& result : results) sum += std::exp(double{result.lse_at(head, token)});
      merged.outputs().lse[head * kTokens + token] = static_cast<float>(std::log(sum));
      for (std::int64_t d = 0; d < c.head_dim; ++d) {
        double out = 0;
        for (const Result& result : results)
          out += std::exp(double{result.lse_at(head, token)}) / sum * result.out.get(token, head, d);
        merged.out.set(token, head, d, out);
        EXPECT_NEAR(out, whole.out.get(token, head, d), 2e-6);
      }
      EXPECT_NEAR(merged.lse_at(head, token), whole.lse_at(head, token), 2e-6);
    }
  }
  std::vector<Differentiated> gradients;
  for (std::size_t part = 0; part < 3; ++part)
    gradients.push_back(run_backward({cases[part], parts[part]}, d_out, merged, execution()));
  const Differentiated expected = run_backward(
      c, d_out, {.out = whole.out.view(), .lse = whole.outputs().lse, .selection = whole.outputs().selection},
      execution());
  const auto check = [&](Array Differentiated::*gradient) {
    for (std::int64_t token = 0; token < kTokens; ++token) {
      for (std::int64_t head = 0; head < (expected.*gradient).heads(); ++head) {
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          double sum = 0;
          for (const Differentiated& part : gradients) sum += (part.*gradient).get(token, head, d);
          ASSERT_NEAR(sum, (expected.*gradient).get(token, head, d), 1e-5);
        }
      }
    }
  };
  check(&Differentiated::dq);
  check(&Differentiated::dk);
  check(&Differentiated::dv);
}

TEST_P(SelectionOfCaller, EmptyRowsGiveZero) {
  SelectedCase s = selected_case(1, [](Case& c) { c = plain_case(1, 20, 30, {.causal = false}); });
  for (const std::int64_t width : {0, 3}) {
    s.selected = Selected(1, 20, width, 0);
    Result result = run_selected(s, execution());
    const Array d_out = gradient_for(s.c);
    const Differentiated d = run_backward(s, d_out, result, execution());
    for (std::int64_t token = 0; token < 20; ++token)
      EXPECT_EQ(result.lse_at(0, token), -std::numeric_limits<float>::infinity());
    EXPECT_EQ(largest(result.out), 0);
    EXPECT_EQ(largest(d.dq) + largest(d.dk) + largest(d.dv), 0);
  }
}

/// Rows of head 1, token 21 of a sequence of 30 tokens in blocks of 4: the own block is 5.
TEST_P(SelectionOfCaller, InvalidRowsThrow) {
  struct Bad {
    bool causal;
    std::vector<std::int32_t> row;
    const char* why;
  };
  const std::vector<Bad> all = {
      {true,
       {0, 6, -1},
       "expected blocks below 6 (those that the query may see) or -1 for head 1, token 21, got block 6"},
      {true,
       {-2, 1, 5},
       "expected blocks below 6 (those that the query may see) or -1 for head 1, token 21, got block -2"},
      {true, {3, 1, 5}, "expected ascending blocks for head 1, token 21, got block 1 after block 3"},
      {true, {1, 1, 5}, "expected ascending blocks for head 1, token 21, got block 1 after block 1"},
      {true, {1, 2, 3}, "expected block 5 (the query's own) as the last for head 1, token 21, got block 3"},
      {true,
       {-1, -1, -1},
       "expected block 5 (the query's own) as the last for head 1, token 21, got no block"},
      {true, {5, -1, 2}, "expected -1 alone after a -1 for head 1, token 21, got block 2"},
      {false,
       {0, 1, 8},
       "expected blocks below 8 (those that the query may see) or -1 for head 1, token 21, got block 8"},
      {false, {7, 6, -1}, "expected ascending blocks for head 1, token 21, got block 6 after block 7"},
  };
  for (const Bad& bad : all) {
    Case c = plain_case(1, 30, 30, {.block_size = 4, .causal = bad.causal});
    c.heads_per_kv = 4;
    fill(c);
    Selected selected(2, 30, 3, 1);
    for_each_row(c, 2, [&](std::int64_t head, std::int64_t token, std::int64_t own, std::int64_t) {
      *selected.row(head, token) = static_cast<std::int32_t>(own);
    });
    std::copy(bad.row.begin(), bad.row.end(), selected.row(1, 21));
    const auto check = [&](const std::string& function, const std::function<void()>& call) {
      try {
        call();
        ADD_FAILURE() << "no error: " << bad.why;
      } catch (const Error& error) {
        EXPECT_EQ(error.what(), function + ": selection: " + bad.why);
      }
    };
    const Array d_out = gradient_for(c);
    Result result(c);
    const Result untouched = result;
    c.routing.selection = selected.view();
    const Outputs outputs{.out = result.out.view(), .lse = result.outputs().lse};
    check("attention", [&] {
      attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, c.routing, outputs, execution());
    });
    check("attention_backward", [&] {
      run_backward(c, d_out, {.out = result.out.view(), .lse = result.outputs().lse}, execution());
    });
    EXPECT_EQ(result, untouched) << "outputs were written";
  }
}

TEST_P(SelectionOfCaller, InvalidSelectionsThrow) {
  Case c = plain_case(1, 12, 12, {.block_size = 4});
  c.heads_per_kv = 4;
  fill(c);
  Selected selected(4, 12, 3, 0);
  for_each_row(c, 4, [&](std::int64_t head, std::int64_t token, std::int64_t own, std::int64_t) {
    *selected.row(head, token) = static_cast<std::int32_t>(own);
  });
  const auto error_of = [&](const std::function<void(Selection&, Outputs&)>& change) -> std::string {
    Result result(c);
    Routing routing = c.routing;
    routing.selection = selected.view();
    Outputs outputs{.out = result.out.view()};
    change(routing.selection, outputs);
    try {
      attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, routing, outputs, execution());
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of([](Selection&, Outputs&) {}), "");
  EXPECT_EQ(error_of([](Selection& s, Outputs&) { s.heads = 3; }),
            "attention: selection.heads: expected a divisor of 4 (the query heads), got 3");
  EXPECT_EQ(error_of([](Selection& s, Outputs&) { s.heads = -1; }),
            "attention: selection.heads: expected a divisor of 4 (the query heads), got -1");
  EXPECT_EQ(error_of([](Selection& s, Outputs&) { s.width = -1; }),
            "attention: selection.width: expected 0 to 2147483647, got -1");
  EXPECT_EQ(error_of([](Selection& s, Outputs&) { s.stride = 2; }),
            "attention: selection.stride: expected 0 or at least 3 (the width), got 2");
  EXPECT_EQ(error_of([](Selection& s, Outputs&) { s.blocks = nullptr; }),
            "attention: selection.blocks: expected [4, 12, 3] int32, got null");
  EXPECT_EQ(error_of([&](Selection&, Outputs& outputs) { outputs.selection = selected.blocks.data(); }),
            "attention: selection: expected null (the caller selects), got a pointer");
  Routing routing = c.routing;
  routing.selection = selected.view();
  EXPECT_THROW(select_blocks(c.q.view(), c.k.view(), c.sequences, routing, selected.blocks.data()), Error);
}

/// Calls of one token for each of several sequences, one of them empty, in every form of a cache.
SelectedCase decode_case(std::uint64_t seed, DType dtype) {
  return selected_case(seed, [&](Case& c) {
    c.dtype = dtype;
    c.values = Values::normal;
    c.sequences = {{0, 1, 2, 3, 4}, {0, 130, 130, 131, 171}};
    c.routing.causal = true;
    c.routing.own_block = false;
  });
}

/// Calls visit(sequence, first key, keys).
template <typename Visit>
void for_each_sequence(const Case& c, Visit&& visit) {
  for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_k.size(); ++s)
    visit(s, c.sequences.cu_seqlens_k[s], c.sequences.cu_seqlens_k[s + 1] - c.sequences.cu_seqlens_k[s]);
}

/// A cache of the case's keys and values, whose blocks need not be the call's.
KvCache cache_of(const Case& c, std::int64_t block_size) {
  KvCache cache({.kv_heads = c.kv_heads,
                 .head_dim = c.head_dim,
                 .block_size = block_size,
                 .dtype = c.dtype,
                 .sequences = static_cast<std::int64_t>(c.sequences.cu_seqlens_k.size()) - 1});
  for_each_sequence(c, [&](std::size_t s, std::int64_t first, std::int64_t keys) {
    cache.append(c.k.slice(first, keys), c.v.slice(first, keys), static_cast<std::int64_t>(s));
  });
  return cache;
}

/// The same in pages, with the memory that the sequences point to.
struct Pages {
  PageLayout layout{};
  std::vector<std::vector<std::byte*>> pages{};
  std::vector<std::vector<float>> means{};
  std::vector<PagedSequence> sequences{};
  std::vector<std::byte> memory{};
};

Pages pages_of(const Case& c, std::int64_t block_size, std::int64_t page_tokens) {
  Pages p{.layout = {.kv_heads = c.kv_heads,
                     .head_dim = c.head_dim,
                     .block_size = block_size,
                     .page_tokens = page_tokens,
                     .dtype = c.dtype}};
  const std::size_t bytes = page_bytes(p.layout);
  std::size_t count = 0;
  for_each_sequence(c, [&](std::size_t, std::int64_t, std::int64_t keys) {
    count += static_cast<std::size_t>(keys / page_tokens + 1);
  });
  p.memory.resize(count * bytes + 64);
  void* aligned = p.memory.data();
  std::size_t space = p.memory.size();
  auto* next = static_cast<std::byte*>(std::align(64, count * bytes, aligned, space));
  for_each_sequence(c, [&](std::size_t, std::int64_t first, std::int64_t keys) {
    std::vector<std::byte*>& pages = p.pages.emplace_back();
    for (std::int64_t page = 0; page <= keys / page_tokens; ++page, next += bytes) pages.push_back(next);
    p.means.emplace_back(static_cast<std::size_t>((keys / block_size + 1) * c.kv_heads * c.head_dim), 0.0F);
    PagedSequence& sequence =
        p.sequences.emplace_back(PagedSequence{.pages = pages, .means = p.means.back().data()});
    append(c.k.slice(first, keys), c.v.slice(first, keys), p.layout, sequence);
    sequence.length = keys;
  });
  for (std::size_t s = 0; s < p.sequences.size(); ++s)
    p.sequences[s].pages = p.pages[s];  // whose memory stays where it is, unlike the lists
  return p;
}

/// The packed keys and values of a case as pages of one token each.
struct TokenPages {
  explicit TokenPages(const Case& c) {
    std::int64_t longest = 0;
    for_each_sequence(c, [&](std::size_t, std::int64_t, std::int64_t keys) {
      lengths.push_back(static_cast<std::int32_t>(keys));
      longest = std::max(longest, keys);
    });
    table.resize(lengths.size() * static_cast<std::size_t>(longest));
    for_each_sequence(c, [&](std::size_t s, std::int64_t first, std::int64_t keys) {
      std::iota(table.begin() + static_cast<std::ptrdiff_t>(s) * longest,
                table.begin() + static_cast<std::ptrdiff_t>(s) * longest + keys,
                static_cast<std::int32_t>(first));
    });
    const auto pages_of_one = [](Tensor t) {
      t.rank = 4;
      t.sizes = {t.sizes[0], 1, t.sizes[1], t.sizes[2]};
      t.strides = {t.strides[0], 0, t.strides[1], t.strides[2]};
      return t;
    };
    cache = {.k = pages_of_one(c.k.view()),
             .v = pages_of_one(c.v.view()),
             .page_table = table.data(),
             .table_stride = longest,
             .lengths = lengths.data(),
             .sequences = static_cast<std::int64_t>(lengths.size()),
             .max_seqlen_k = longest};
  }

  std::vector<std::int32_t> lengths{}, table{};
  PagedCache cache{};
};

TEST_P(SelectionOfCaller, DecodedTokensMatchTheOracle) {
  for (std::uint64_t seed = 8000; seed < 8040 && !HasFailure(); ++seed) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const SelectedCase s = decode_case(seed, dtype);
      Case c = s.c;
      c.routing.selection = s.selected.view();
      Result result = run_selected(s, execution());  // for its selection
      const Outputs outputs{.out = result.out.view(), .lse = result.outputs().lse};
      const auto check = [&](const auto& run) {
        std::fill_n(result.outputs().lse, c.q_heads() * c.queries(), -1.0F);
        run();
        EXPECT_TRUE(result.fences_untouched()) << describe(c);
        check_attended(c, result, exact());
      };
      const KvCache cache = cache_of(c, seed % 2 == 0 ? c.routing.block_size : 24);
      check([&] { decode(c.q.view(), cache, c.routing, outputs, execution()); });

      const TokenPages tokens(c);
      check([&] { decode(c.q.view(), tokens.cache, c.routing, outputs, execution()); });
      check([&] {
        attention(c.q.view(), c.sequences.cu_seqlens_q.data(), tokens.cache, c.routing, outputs, execution());
      });

      const Pages pages = pages_of(c, 16, seed % 2 == 0 ? 16 : 40);
      check([&] { decode(c.q.view(), pages.layout, pages.sequences, c.routing, outputs, execution()); });
    }
  }
}

TEST_P(SelectionOfCaller, QueriesOnACacheMatchTheOracle) {
  for (std::uint64_t seed = 8100; seed < 8120 && !HasFailure(); ++seed) {
    const SelectedCase s = selected_case(seed, [&](Case& c) {
      c.values = Values::normal;
      c.sequences = one_sequence(11, 97);
      c.routing.causal = true;
      c.routing.own_block = false;
    });
    Case c = s.c;
    c.routing.selection = s.selected.view();
    Result result = run_selected(s, execution());
    const Outputs outputs{.out = result.out.view(), .lse = result.outputs().lse};
    attention(c.q.view(), cache_of(c, 24), 0, c.routing, outputs, execution());
    check_attended(c, result, exact());
    const Pages pages = pages_of(c, 16, 40);
    attention(c.q.view(), pages.layout, pages.sequences.front(), c.routing, outputs, execution());
    check_attended(c, result, exact());
  }
}

TEST_P(SelectionOfCaller, InvalidRowsOfACacheThrow) {
  SelectedCase s = decode_case(1, DType::f32);
  const std::int32_t own = static_cast<std::int32_t>(129 / s.c.routing.block_size);
  s.selected = Selected(1, 4, 2, 0);
  for (const auto& [token, block] : {std::pair(0, own), std::pair(2, 0)}) *s.selected.row(0, token) = block;
  *s.selected.row(0, 3) = static_cast<std::int32_t>(39 / s.c.routing.block_size) + 1;
  Case c = s.c;
  c.routing.selection = s.selected.view();
  Result result(c);
  const Result untouched = result;
  try {
    decode(c.q.view(), cache_of(c, 16), c.routing, {.out = result.out.view()}, execution());
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::MatchesRegex("decode: selection: expected blocks below .* for head 0, "
                                                    "token 3, got block .*"));
  }
  EXPECT_EQ(result, untouched) << "outputs were written";
}

MOBA_FOR_EVERY_BACKEND(SelectionOfCaller);

}  // namespace
}  // namespace moba::test
