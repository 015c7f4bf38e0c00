#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "llm/engine/engine.h"

namespace moba::app {

/// A request and the receiver of the error that ends it instead of Request::on_finish.
struct EngineJob {
  llm::Request request;
  std::function<void(const std::string& message)> on_error{};
};

/// Thrown for a job once the engine has stopped.
class EngineStopped : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Runs an engine on a thread of its own, which calls the receivers of the requests' events. The members are
/// callable by any thread but that one.
class EngineThread {
 public:
  using Id = std::int64_t;

  /// Takes up to `capacity` unfinished requests, which the engine's queue must have room for.
  EngineThread(llm::Engine engine, std::int64_t capacity, int threads);
  /// Cancels every request and waits for the thread.
  ~EngineThread();
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  /// Queues jobs, all or none. Throws QueueFull if they do not fit, EngineStopped after stop() or an error of
  /// the engine.
  std::vector<Id> submit(std::vector<EngineJob> jobs);
  /// Ends requests, unless they have finished.
  void cancel(std::span<const Id> ids);
  /// Cancels every request and takes no more. Does not wait.
  void stop();

  /// Returns the engine's statistics after its last step.
  llm::EngineStatistics statistics() const;
  std::int64_t capacity() const { return capacity_; }
  /// Returns the error that ended the engine, or "".
  std::string error() const;

 private:
  struct Command {
    Id id;
    std::optional<EngineJob> job;  // unset: cancel
  };

  void run(int threads);
  void obey(std::vector<Command> commands);
  void start(Id id, EngineJob job);
  void forget(Id id);
  void fail(const std::string& message);

  llm::Engine engine_;
  std::int64_t capacity_;
  // Of the engine's thread: the requests that it runs.
  struct Running {
    llm::Engine::Id id;
    std::function<void(const std::string&)> on_error;
  };
  std::map<Id, Running> running_;

  mutable std::mutex mutex_;  // of the rest
  std::condition_variable changed_;
  std::vector<Command> inbox_;
  Id next_id_ = 0;
  std::int64_t unfinished_ = 0;
  bool is_stopping_ = false;
  std::string error_;
  llm::EngineStatistics statistics_;
  std::thread thread_;
};

}  // namespace moba::app
