#include "llm/engine/engine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>
#include <string>

#include "llm/error.h"
#include "random_model.h"

namespace moba::llm::test {
namespace {

using Tokens = std::vector<std::int32_t>;

constexpr std::int64_t kBlock = 16, kPageTokens = 64;

const Model& model() {
  static const Model shared = [] {
    use_threads(1);
    return random_model(small_config());
  }();
  return shared;
}

EngineSettings settings() {
  EngineSettings settings;
  settings.block_sizes = {kBlock};
  settings.kv_dtype = DType::f32;
  settings.cache_bytes = std::size_t{1} << 28;
  return settings;
}

/// Bytes of `pages` pages, from the number that an engine reports for a known size.
std::size_t bytes_of_pages(std::int64_t pages) {
  EngineSettings probe = settings();
  const Engine engine(model(), probe);
  const std::size_t page =
      probe.cache_bytes / static_cast<std::size_t>(engine.statistics().max_pages + 1) + 1;
  return page * static_cast<std::size_t>(pages) + page / 2;
}

Tokens random_tokens(std::uint64_t seed, std::int64_t count) {
  std::mt19937_64 random(seed);
  Tokens tokens;
  for (std::int64_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(small_config().vocab)));
  return tokens;
}

Request request_of(Tokens prompt, std::int64_t max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.moba = {.block_size = kBlock, .top_k = 3, .sink_blocks = 1};
  request.full_tail = 8;
  request.max_tokens = max_tokens;
  return request;
}

/// What a request has received.
struct Outcome {
  Tokens tokens;
  std::optional<Finish> finish;
  RequestUsage usage;
};

/// Sends the events of a request to `outcome`.
Request recorded(Request request, Outcome& outcome) {
  request.on_token = [&outcome](std::int32_t token, std::span<const float>) {
    outcome.tokens.push_back(token);
    return true;
  };
  request.on_finish = [&outcome](Finish finish, const RequestUsage& usage) {
    outcome.finish = finish;
    outcome.usage = usage;
  };
  return request;
}

Outcome run_alone(Engine& engine, const Request& request) {
  Outcome outcome;
  engine.submit(recorded(request, outcome));
  while (engine.step()) {
  }
  return outcome;
}

/// The answer that a Session gives, which has neither pages nor batches.
Tokens answer_of_session(const Request& request, const std::vector<LayerRange>& full_layers = {}) {
  SessionSettings alone;
  alone.prefill = request.prefill;
  alone.decode = request.decode;
  alone.moba = request.moba;
  alone.full_tail = request.full_tail;
  alone.full_layers = full_layers;
  alone.layers = request.layers;
  alone.kv_dtype = DType::f32;
  Session session(model(), alone);
  Sampler sampler(request.sampling);
  std::vector<float> logits = session.prefill(request.prompt);
  Tokens answer;
  while (static_cast<std::int64_t>(answer.size()) < *request.max_tokens) {
    answer.push_back(sampler(logits));
    logits = session.decode(answer.back());
  }
  return answer;
}

/// Requests with common prefixes in all attention modes.
std::vector<Request> mixed_requests() {
  std::vector<Request> requests;
  std::mt19937_64 random(5);
  const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  for (int i = 0; i < 48; ++i) {
    Tokens prompt = random_tokens(static_cast<std::uint64_t>(i % 4), 64 * below(5) + below(40));
    const Tokens question = random_tokens(100 + static_cast<std::uint64_t>(i), 1 + below(90));
    prompt.insert(prompt.end(), question.begin(), question.end());
    Request request = request_of(std::move(prompt), 1 + below(30));
    if (i % 3 == 1) request.prefill = AttentionMode::moba;
    if (i % 6 >= 4) request.prefill = request.decode = AttentionMode::moba;
    if (i % 5 == 0) request.moba.top_k = 2;
    requests.push_back(std::move(request));
  }
  return requests;
}

TEST(Engine, LoneRequestGivesTheAnswerOfASession) {
  Engine engine(model(), settings());
  for (const Request& request : mixed_requests()) {
    const Outcome outcome = run_alone(engine, request);
    EXPECT_EQ(outcome.tokens, answer_of_session(request));
    EXPECT_EQ(outcome.finish, Finish::length);
    EXPECT_EQ(outcome.usage.prompt_tokens, static_cast<std::int64_t>(request.prompt.size()));
    EXPECT_EQ(outcome.usage.generated_tokens, *request.max_tokens);
  }
}

TEST(Engine, FullLayersGiveTheAnswerOfASession) {
  EngineSettings with_full = settings();
  with_full.full_layers = {{0, 0}, {2, 2}};
  Engine engine(model(), with_full);
  for (Request request : mixed_requests()) {
    request.prefill = request.decode = AttentionMode::moba;
    EXPECT_EQ(run_alone(engine, request).tokens, answer_of_session(request, with_full.full_layers));
  }
}

/// Blocks of 8 and 24 tokens in layers with MoBA, so that pages hold 72; the second one is full.
std::vector<Routing> different_layers() {
  Routing full = Routing::full();
  full.block_size = 24;
  return {{.block_size = 8, .top_k = 5, .sink_blocks = 2}, full, {.block_size = 24, .top_k = 2}};
}

TEST(Engine, LayersWithTheirOwnRoutingGiveTheAnswerOfASession) {
  EngineSettings with = settings();
  with.block_sizes = {8, 24, 24};
  Engine engine(model(), with);
  EXPECT_EQ(engine.statistics().page_tokens, 72);
  std::vector<Outcome> outcomes(mixed_requests().size());
  std::size_t next = 0;
  for (Request request : mixed_requests()) {  // together, with prefixes and batches in common
    request.layers = different_layers();
    engine.submit(recorded(request, outcomes[next++]));
  }
  while (engine.step()) {
  }
  next = 0;
  bool differs = false;
  for (Request request : mixed_requests()) {
    const Tokens uniform = answer_of_session(request);
    request.layers = different_layers();
    EXPECT_EQ(outcomes[next].tokens, answer_of_session(request));
    differs |= outcomes[next++].tokens != uniform;
  }
  EXPECT_TRUE(differs);
  EXPECT_GT(engine.statistics().cached_tokens, 0);
}

/// One schedule: random settings, arrivals and cancellations, with or without pages in `folder`. `answers`
/// are those of the requests alone. Returns the number of pages that were read from the folder.
std::int64_t run_schedule(std::uint64_t seed, const std::vector<Request>& requests,
                          const std::vector<Tokens>& answers, const std::filesystem::path& folder) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  EngineSettings with = settings();
  with.chunk = std::int64_t{16} << below(6);
  with.max_running = 1 + below(12);
  if (below(2) == 0) with.max_step_seconds = 1e-4 * static_cast<double>(1 + below(30));
  if (below(2) == 0) with.cache_bytes = bytes_of_pages(7 + below(12));
  if (below(3) > 0) {
    with.cache_folder = folder;
    with.model_fingerprint = "schedules";
    if (below(2) == 0) with.cache_folder_bytes = bytes_of_pages(10 + below(20));
    with.warn = [](const std::string& line) { ADD_FAILURE() << line; };
  }
  Engine engine(model(), with);

  struct Sent {
    std::size_t request;
    Engine::Id id;
    bool cancelled = false;
  };
  constexpr std::size_t kRequests = 14;
  std::vector<Sent> sent;
  std::vector<Outcome> outcomes(kRequests);
  bool busy = true;
  for (int step = 0; sent.size() < kRequests || busy; ++step) {
    if (step == 100000) {
      ADD_FAILURE() << "the engine does not get on";
      return 0;
    }
    while (sent.size() < kRequests && below(4) == 0) {
      const auto which = static_cast<std::size_t>(below(static_cast<std::int64_t>(requests.size())));
      Request request = recorded(requests[which], outcomes[sent.size()]);
      if (below(3) == 0) {
        request.weight_range = 1 + below(100);
        request.on_weights = [](std::span<const float> weights) {
          const float sum = std::accumulate(weights.begin(), weights.end(), 0.0F);
          EXPECT_TRUE(sum > 0 && sum < 1.001F) << sum;
        };
      }
      sent.push_back({which, engine.submit(std::move(request))});
    }
    if (!sent.empty() && below(40) == 0) {
      Sent& victim = sent[static_cast<std::size_t>(below(static_cast<std::int64_t>(sent.size())))];
      victim.cancelled = true;
      engine.cancel(victim.id);
    }
    busy = engine.step();
  }
  for (std::size_t i = 0; i < sent.size(); ++i) {
    const Tokens& expected = answers[sent[i].request];
    const Outcome& found = outcomes[i];
    EXPECT_TRUE(found.finish) << i;
    if (found.finish == Finish::cancelled) {
      EXPECT_TRUE(sent[i].cancelled);
      EXPECT_TRUE(found.tokens.size() <= expected.size() &&
                  std::equal(found.tokens.begin(), found.tokens.end(), expected.begin()))
          << i;
    } else {
      EXPECT_EQ(found.tokens, expected) << i;
    }
  }
  const EngineStatistics end = engine.statistics();
  EXPECT_EQ(end.used_pages, end.cached_pages);
  EXPECT_EQ(end.running + end.waiting, 0);
  return end.restored_pages;
}

TEST(Engine, SchedulesDoNotChangeAnswers) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("moba-schedules-" + std::to_string(getpid()));
  std::int64_t restored = 0;
  const std::vector<Request> requests = mixed_requests();
  std::vector<Tokens> answers;
  answers.reserve(requests.size());
  for (const Request& request : requests) answers.push_back(answer_of_session(request));
  for (std::uint64_t seed = 0; seed < 300 && !::testing::Test::HasFailure(); ++seed)
    restored += run_schedule(seed, requests, answers, folder);
  std::filesystem::remove_all(folder);
  EXPECT_GT(restored, 100);
}

TEST(Engine, WeightsAreThoseOfTheLastQueryWhateverTheChunks) {
  const Tokens prompt = random_tokens(1, 100);
  std::vector<std::vector<float>> expected;
  for (const std::int64_t chunk : {128, 7, 1, 99}) {
    EngineSettings with = settings();
    with.chunk = chunk;
    Engine engine(model(), with);
    for (int repeat = 0; repeat < 2; ++repeat) {  // the second time with a cached prefix
      Request request = request_of(prompt, 5);
      std::vector<std::vector<float>> found;
      std::size_t tokens = 0;
      request.weight_range = 30;
      request.on_weights = [&](std::span<const float> weights) {
        EXPECT_EQ(weights.size(), 4U);
        found.emplace_back(weights.begin(), weights.end());
      };
      Outcome outcome;
      request = recorded(request, outcome);
      request.on_token = [&](std::int32_t, std::span<const float>) { return ++tokens == found.size(); };
      engine.submit(std::move(request));
      while (engine.step()) {
      }
      ASSERT_EQ(found.size(), 5U);
      // The first query sees the prompt alone, the next ones the answer, too.
      EXPECT_NEAR(std::accumulate(found[0].begin(), found[0].end(), 0.0F), 1, 1e-5);
      EXPECT_LT(std::accumulate(found[4].begin(), found[4].end(), 0.0F), 0.9999F);
      if (expected.empty()) expected = found;
      for (std::size_t i = 0; i < 5; ++i) {
        for (std::size_t range = 0; range < 4; ++range)
          EXPECT_NEAR(found[i][range], expected[i][range], 1e-5);
      }
    }
  }
}

TEST(Engine, PrefixesAreReadOnce) {
  Engine engine(model(), settings());
  const Tokens document = random_tokens(1, 5 * kPageTokens);
  const auto ask = [&](std::uint64_t question, AttentionMode mode) {
    Tokens prompt = document;
    const Tokens text = random_tokens(question, 20);
    prompt.insert(prompt.end(), text.begin(), text.end());
    Request request = request_of(prompt, 4);
    request.prefill = mode;
    return run_alone(engine, request).usage.cached_tokens;
  };
  EXPECT_EQ(ask(10, AttentionMode::full), 0);
  EXPECT_EQ(ask(11, AttentionMode::full), 5 * kPageTokens);
  EXPECT_EQ(ask(12, AttentionMode::moba), 0);  // other keys from the second layer on
  EXPECT_EQ(ask(13, AttentionMode::moba), 5 * kPageTokens);
  EXPECT_EQ(ask(13, AttentionMode::full), 5 * kPageTokens);
}

TEST(Engine, AnswersAreCachedForTheNextTurn) {
  Engine engine(model(), settings());
  const Tokens prompt = random_tokens(1, 100);
  const Outcome first = run_alone(engine, request_of(prompt, 60));
  Tokens next = prompt;
  next.insert(next.end(), first.tokens.begin(), first.tokens.end());
  next.push_back(7);
  EXPECT_EQ(run_alone(engine, request_of(next, 4)).usage.cached_tokens, 2 * kPageTokens);
}

TEST(Engine, RequestsOfOneDocumentShareItWhileItIsRead) {
  EngineSettings with = settings();
  with.chunk = kPageTokens;
  Engine engine(model(), with);
  std::vector<Outcome> outcomes(4);
  for (std::size_t i = 0; i < outcomes.size(); ++i) {
    Tokens prompt = random_tokens(1, 6 * kPageTokens);
    prompt.push_back(static_cast<std::int32_t>(i));
    engine.submit(recorded(request_of(prompt, 2), outcomes[i]));
  }
  while (engine.step()) {
  }
  EXPECT_EQ(engine.statistics().prompt_tokens, 6 * kPageTokens + 4);
}

TEST(Engine, CancelFreesPagesAtOnce) {
  Engine engine(model(), settings());
  Outcome running, waiting, other;
  EngineSettings with = settings();
  with.max_running = 2;
  engine = Engine(model(), with);
  const Engine::Id a = engine.submit(recorded(request_of(random_tokens(1, 40), 500), running));
  engine.submit(recorded(request_of(random_tokens(2, 40), 30), other));
  const Engine::Id c = engine.submit(recorded(request_of(random_tokens(3, 40), 500), waiting));
  for (int i = 0; i < 10; ++i) engine.step();
  EXPECT_EQ(engine.statistics().used_pages, 2);
  engine.cancel(a);
  EXPECT_EQ(engine.statistics().used_pages, 1);
  EXPECT_EQ(running.finish, Finish::cancelled);
  engine.cancel(c);
  EXPECT_EQ(waiting.finish, Finish::cancelled);
  EXPECT_TRUE(waiting.tokens.empty());
  engine.cancel(a);  // has finished
  while (engine.step()) {
  }
  EXPECT_EQ(other.tokens.size(), 30U);
  EXPECT_EQ(engine.statistics().used_pages, 1);  // its first page, in the prefix cache
  EXPECT_EQ(engine.statistics().cached_pages, 1);
}

TEST(Engine, OldPrefixesAreEvictedWithinTheLimit) {
  EngineSettings with = settings();
  with.cache_bytes = bytes_of_pages(6);
  Engine engine(model(), with);
  ASSERT_EQ(engine.statistics().max_pages, 6);
  const auto ask = [&](std::uint64_t document) {
    return run_alone(engine, request_of(random_tokens(document, 2 * kPageTokens + 1), 3)).usage.cached_tokens;
  };
  EXPECT_EQ(ask(1), 0);
  EXPECT_EQ(ask(2), 0);
  EXPECT_EQ(ask(1), 2 * kPageTokens);
  EXPECT_EQ(ask(3), 0);  // in place of the end of the second
  EXPECT_EQ(ask(1), 2 * kPageTokens);
  EXPECT_EQ(ask(2), kPageTokens);
  EXPECT_GT(engine.statistics().evicted_pages, 0);
  EXPECT_LE(engine.statistics().used_pages, 6);
}

TEST(Engine, PreemptedRequestsGiveTheSameAnswer) {
  EngineSettings with = settings();
  with.cache_bytes = bytes_of_pages(7);
  Engine engine(model(), with);
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 3; ++i) requests.push_back(request_of(random_tokens(i, 60), 150));
  requests[1].prefill = requests[1].decode = AttentionMode::moba;
  std::vector<Outcome> outcomes(3);
  for (std::size_t i = 0; i < 3; ++i) engine.submit(recorded(requests[i], outcomes[i]));
  while (engine.step()) {
  }
  EXPECT_GT(engine.statistics().preemptions, 0);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(outcomes[i].tokens, answer_of_session(requests[i]));
}

TEST(Engine, AnswersEndAtTheContextOrTheMemory) {
  EngineSettings with = settings();
  with.context = 50;
  Engine small(model(), with);
  Outcome outcome = run_alone(small, request_of(random_tokens(1, 40), 100));
  EXPECT_EQ(outcome.finish, Finish::context);
  EXPECT_EQ(outcome.tokens.size(), 11U);  // the last one is not read

  with = settings();
  with.cache_bytes = bytes_of_pages(1);
  Engine one_page(model(), with);
  EXPECT_EQ(one_page.max_prompt(), kPageTokens);
  outcome = run_alone(one_page, request_of(random_tokens(1, kPageTokens), 100));
  EXPECT_EQ(outcome.finish, Finish::context);
  EXPECT_EQ(outcome.tokens.size(), 1U);
}

TEST(Engine, AnswersEndAtEndTokensAndOnRequest) {
  Engine engine(model(), settings());
  Request request = request_of(random_tokens(1, 40), 20);
  const Tokens answer = answer_of_session(request);
  request.end_tokens = {answer[6], -1};
  Outcome outcome = run_alone(engine, request);
  const auto first = std::find(answer.begin(), answer.end(), answer[6]);
  EXPECT_EQ(outcome.tokens, Tokens(answer.begin(), first));
  EXPECT_EQ(outcome.finish, Finish::end_token);

  request.end_tokens.clear();
  request = recorded(request, outcome);
  outcome.tokens.clear();
  request.on_token = [&](std::int32_t token, std::span<const float>) {
    outcome.tokens.push_back(token);
    return outcome.tokens.size() < 5;
  };
  engine.submit(request);
  while (engine.step()) {
  }
  EXPECT_EQ(outcome.tokens, Tokens(answer.begin(), answer.begin() + 5));
  EXPECT_EQ(outcome.finish, Finish::stopped);

  request.max_tokens = 0;
  outcome = run_alone(engine, request);
  EXPECT_TRUE(outcome.tokens.empty());
  EXPECT_EQ(outcome.finish, Finish::length);
}

TEST(Engine, SampledAnswersDependOnTheirSeedAlone) {
  Engine engine(model(), settings());
  Request request = request_of(random_tokens(1, 40), 20);
  request.sampling = {.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 3};
  const Tokens expected = answer_of_session(request);
  std::vector<Outcome> outcomes(3);
  for (Outcome& outcome : outcomes) {
    engine.submit(recorded(request, outcome));
    ++request.sampling.seed;
  }
  while (engine.step()) {
  }
  EXPECT_EQ(outcomes[0].tokens, expected);
  EXPECT_NE(outcomes[1].tokens, expected);
}

TEST(Engine, PromptLogitsAreThoseOfASession) {
  EngineSettings with = settings();
  with.chunk = 30;
  Engine engine(model(), with);
  Request request = request_of(random_tokens(1, 100), 0);
  run_alone(engine, request);  // caches a page, which must not be used
  const auto vocab = static_cast<std::size_t>(small_config().vocab);
  std::vector<float> found;
  request.on_prompt_logits = [&](std::int64_t first, std::span<const float> logits) {
    EXPECT_EQ(static_cast<std::size_t>(first) * vocab, found.size());
    found.insert(found.end(), logits.begin(), logits.end());
  };
  run_alone(engine, request);
  SessionSettings alone;
  alone.kv_dtype = DType::f32;
  Session session(model(), alone);
  const std::vector<float> expected = session.prefill(request.prompt, {}, Logits::all);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], 2e-4) << i;
}

TEST(Engine, LongPromptsDoNotStallDecoding) {
  EngineSettings with = settings();
  with.max_step_seconds = 1e-9;  // chunks of the least size
  Engine engine(model(), with);
  Outcome first, second;
  engine.submit(recorded(request_of(random_tokens(1, 5), 41), first));
  engine.step();
  engine.submit(recorded(request_of(random_tokens(2, 900), 1), second));
  for (std::size_t steps = 1; first.tokens.size() < 40; ++steps) {
    engine.step();
    EXPECT_EQ(first.tokens.size(), steps + 1);
  }
  EXPECT_FALSE(second.finish);
  while (engine.step()) {
  }
  EXPECT_EQ(second.tokens.size(), 1U);
}

TEST(Engine, ShortPromptsOvertakeLongOnes) {
  EngineSettings with = settings();
  with.chunk = 32;
  Engine engine(model(), with);
  Outcome longer, shorter;
  engine.submit(recorded(request_of(random_tokens(1, 900), 1), longer));
  engine.submit(recorded(request_of(random_tokens(2, 40), 1), shorter));
  for (int i = 0; i < 5; ++i) engine.step();
  EXPECT_TRUE(shorter.finish);
  EXPECT_FALSE(longer.finish);
  while (engine.step()) {
  }
  EXPECT_TRUE(longer.finish);
}

std::string message_of(Engine& engine, const Request& request) {
  try {
    engine.submit(request);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

TEST(Engine, InvalidRequestsThrow) {
  EngineSettings with = settings();
  with.max_waiting = 2;
  Engine engine(model(), with);
  const auto with_change = [&](const std::function<void(Request&)>& change) {
    Request request = request_of({1, 2, 3}, 4);
    request.prefill = AttentionMode::moba;
    change(request);
    return message_of(engine, request);
  };
  EXPECT_EQ(with_change([](Request& r) { r.prompt = {}; }), "prompt: expected 1 to 1024 tokens, got 0");
  EXPECT_EQ(with_change([](Request& r) { r.prompt = Tokens(1025); }),
            "prompt: expected 1 to 1024 tokens, got 1025");
  EXPECT_EQ(with_change([](Request& r) {
              r.prompt = {1, 320};
            }),
            "prompt: expected token ids below 320, got 320");
  EXPECT_EQ(with_change([](Request& r) { r.prompt = {-1}; }), "prompt: expected token ids below 320, got -1");
  EXPECT_EQ(with_change([](Request& r) { r.moba.block_size = 8; }),
            "block_size: expected 16 (the engine's), got 8");
  EXPECT_EQ(with_change([](Request& r) { r.moba.top_k = 0; }), "top_k: expected at least 1, got 0");
  EXPECT_EQ(with_change([](Request& r) { r.moba.sink_blocks = 3; }),
            "sink_blocks: expected 0 to 2, one less than top_k, got 3");
  EXPECT_EQ(with_change([](Request& r) { r.max_tokens = -1; }), "max_tokens: expected at least 0, got -1");
  EXPECT_EQ(with_change([](Request& r) { r.full_tail = -1; }), "full_tail: expected at least 0, got -1");
  EXPECT_EQ(with_change([](Request& r) { r.layers.resize(2); }), "layers: expected 3 routings, got 2");
  EXPECT_EQ(with_change([](Request& r) { r.layers = different_layers(); }),
            "block_size: expected 16 (the engine's), got 8");
  EXPECT_EQ(with_change([](Request& r) { r.decode = AttentionMode::moba_naive; }),
            "decode: expected full or moba, got moba-naive");

  const Request good = request_of({1, 2, 3}, 4);
  engine.submit(good);
  engine.submit(good);
  EXPECT_THROW(engine.submit(good), QueueFull);
  EXPECT_FALSE(!engine.step());
  while (engine.step()) {
  }
}

TEST(Engine, InvalidSettingsThrow) {
  EngineSettings with = settings();
  with.cache_bytes = 10;
  EXPECT_THROW(Engine(model(), with), UsageError);
  with = settings();
  with.chunk = 0;
  EXPECT_THROW(Engine(model(), with), UsageError);
  with = settings();
  with.full_layers = {{0, 3}};
  EXPECT_THROW(Engine(model(), with), UsageError);
  for (const std::vector<std::int64_t>& sizes :
       {std::vector<std::int64_t>{}, {16, 16}, {16, 0, 16}, {16, 509, 521}}) {
    with = settings();
    with.block_sizes = sizes;
    EXPECT_THROW(Engine(model(), with), UsageError);
  }
}

TEST(ChunkSize, FollowsTheMeasuredSpeed) {
  ChunkSize size;
  EXPECT_GE(size.within(1), ChunkSize::kMin);
  size.measure(100, 0.1);
  EXPECT_EQ(size.within(0.15), 150);
  EXPECT_EQ(size.within(10), 200);
  EXPECT_EQ(size.within(-1), ChunkSize::kMin);
  size.measure(100, 0);
  EXPECT_EQ(size.within(1), 200);
}

}  // namespace
}  // namespace moba::llm::test
