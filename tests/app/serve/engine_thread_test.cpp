#include "app/serve/engine_thread.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>

#include "random_model.h"

namespace moba::app {
namespace {

using Tokens = std::vector<std::int32_t>;

constexpr std::int64_t kBlock = 16;

llm::Engine make_engine(std::int64_t max_running = 4) {
  static const llm::Model model = [] {
    llm::use_threads(1);
    return llm::test::random_model(llm::test::small_config());
  }();
  llm::EngineSettings settings;
  settings.block_sizes = {kBlock};
  settings.kv_dtype = DType::f32;
  settings.cache_bytes = std::size_t{1} << 26;
  settings.max_running = max_running;
  return llm::Engine(model, settings);
}

/// The end of a job: its answer, or an error.
struct Outcome {
  Tokens tokens;
  std::optional<llm::Finish> finish;
  std::string error;
};

struct Recorded {
  EngineJob job;
  std::future<Outcome> outcome;
};

Recorded recorded(std::uint64_t seed, std::int64_t max_tokens) {
  const auto outcome = std::make_shared<Outcome>();
  const auto promise = std::make_shared<std::promise<Outcome>>();
  Recorded result{{}, promise->get_future()};
  llm::Request& request = result.job.request;
  std::mt19937_64 random(seed);
  for (int i = 0; i < 70; ++i) request.prompt.push_back(static_cast<std::int32_t>(random() % 320));
  request.moba = {.block_size = kBlock, .top_k = 3, .sink_blocks = 1};
  request.max_tokens = max_tokens;
  request.on_token = [outcome](std::int32_t token, std::span<const float>) {
    outcome->tokens.push_back(token);
    return true;
  };
  request.on_finish = [outcome, promise](llm::Finish finish, const llm::RequestUsage&) {
    outcome->finish = finish;
    promise->set_value(*outcome);
  };
  result.job.on_error = [outcome, promise](const std::string& error) {
    outcome->error = error;
    promise->set_value(*outcome);
  };
  return result;
}

std::vector<EngineJob> one(EngineJob job) {
  std::vector<EngineJob> jobs;
  jobs.push_back(std::move(job));
  return jobs;
}

/// Waits for the statistics after the step that ended the last request.
llm::EngineStatistics statistics_at_rest(const EngineThread& engine) {
  llm::EngineStatistics statistics = engine.statistics();
  for (int i = 0; i < 1000 && statistics.running + statistics.waiting > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    statistics = engine.statistics();
  }
  return statistics;
}

constexpr std::int64_t kEndless = 900;

TEST(EngineThread, RequestsOfManyThreadsGetTheAnswersThatTheyGetAlone) {
  constexpr std::uint64_t kThreads = 4, kRequests = 6;
  std::vector<Tokens> expected;
  {
    EngineThread engine(make_engine(), 1, 1);
    for (std::uint64_t seed = 0; seed < kThreads * kRequests; ++seed) {
      Recorded lone = recorded(seed, 8);
      engine.submit(one(std::move(lone.job)));
      expected.push_back(lone.outcome.get().tokens);
    }
  }
  EngineThread engine(make_engine(), kThreads, 1);
  std::vector<std::thread> threads;
  std::vector<Tokens> found(expected.size());
  for (std::uint64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (std::uint64_t i = thread * kRequests; i < (thread + 1) * kRequests; ++i) {
        Recorded request = recorded(i, 8);
        engine.submit(one(std::move(request.job)));
        engine.statistics();
        found[i] = request.outcome.get().tokens;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(found, expected);
  EXPECT_EQ(statistics_at_rest(engine).finished_requests, static_cast<std::int64_t>(expected.size()));
}

TEST(EngineThread, TooManyUnfinishedRequestsThrow) {
  EngineThread engine(make_engine(1), 2, 1);
  Recorded first = recorded(1, kEndless), second = recorded(2, kEndless);
  const auto ids = engine.submit(one(std::move(first.job)));
  std::vector<EngineJob> two = one(recorded(3, 1).job);
  two.push_back(recorded(4, 1).job);
  EXPECT_THROW(engine.submit(std::move(two)), llm::QueueFull);
  engine.submit(one(std::move(second.job)));
  EXPECT_THROW(engine.submit(one(recorded(5, 1).job)), llm::QueueFull);
  engine.cancel(ids);
  EXPECT_EQ(first.outcome.get().finish, llm::Finish::cancelled);
  Recorded third = recorded(6, 1);
  engine.submit(one(std::move(third.job)));  // the place is free as soon as the end is known
}

TEST(EngineThread, CancelledRequestsFreeTheirPages) {
  EngineThread engine(make_engine(), 3, 1);
  std::vector<EngineJob> jobs;
  std::vector<std::future<Outcome>> outcomes;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    Recorded request = recorded(seed, kEndless);
    jobs.push_back(std::move(request.job));
    outcomes.push_back(std::move(request.outcome));
  }
  const auto ids = engine.submit(std::move(jobs));
  engine.cancel(ids);
  engine.cancel(ids);
  for (auto& outcome : outcomes) EXPECT_EQ(outcome.get().finish, llm::Finish::cancelled);
  const llm::EngineStatistics statistics = statistics_at_rest(engine);
  EXPECT_EQ(statistics.used_pages, statistics.cached_pages);
}

TEST(EngineThread, InvalidRequestGetsAnError) {
  EngineThread engine(make_engine(), 2, 1);
  Recorded wrong = recorded(1, 1), right = recorded(2, 1);
  wrong.job.request.prompt = {320};
  engine.submit(one(std::move(wrong.job)));
  engine.submit(one(std::move(right.job)));
  EXPECT_EQ(wrong.outcome.get().error, "prompt: expected token ids below 320, got 320");
  EXPECT_EQ(right.outcome.get().finish, llm::Finish::length);
}

TEST(EngineThread, StopCancelsRequestsAndTakesNoMore) {
  EngineThread engine(make_engine(1), 2, 1);
  Recorded running = recorded(1, kEndless), waiting = recorded(2, kEndless);
  engine.submit(one(std::move(running.job)));
  engine.submit(one(std::move(waiting.job)));
  engine.stop();
  EXPECT_EQ(running.outcome.get().finish, llm::Finish::cancelled);
  EXPECT_EQ(waiting.outcome.get().finish, llm::Finish::cancelled);
  EXPECT_THROW(engine.submit(one(recorded(3, 1).job)), EngineStopped);
}

TEST(EngineThread, ErrorOfTheEngineEndsEveryRequest) {
  EngineThread engine(make_engine(), 3, 1);
  Recorded other = recorded(1, kEndless), failing = recorded(2, 4);
  failing.job.request.on_token = [](std::int32_t, std::span<const float>) -> bool {
    throw std::runtime_error("no memory");
  };
  engine.submit(one(std::move(other.job)));
  engine.submit(one(std::move(failing.job)));
  EXPECT_EQ(failing.outcome.get().error, "engine: no memory");
  EXPECT_EQ(other.outcome.get().error, "engine: no memory");
  EXPECT_EQ(engine.error(), "engine: no memory");
  EXPECT_THROW(engine.submit(one(recorded(3, 1).job)), EngineStopped);
}

}  // namespace
}  // namespace moba::app
