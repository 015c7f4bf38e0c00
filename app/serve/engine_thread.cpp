#include "app/serve/engine_thread.h"

#include <fmt/format.h>

#include <utility>

namespace moba::app {

EngineThread::EngineThread(llm::Engine engine, std::int64_t capacity, int threads)
    : engine_(std::move(engine)), capacity_(capacity), statistics_(engine_.statistics()) {
  thread_ = std::thread([this, threads] { run(threads); });
}

EngineThread::~EngineThread() {
  stop();
  thread_.join();
}

std::vector<EngineThread::Id> EngineThread::submit(std::vector<EngineJob> jobs) {
  const auto count = static_cast<std::int64_t>(jobs.size());
  std::vector<Id> ids;
  {
    const std::lock_guard lock(mutex_);
    if (!error_.empty()) throw EngineStopped(error_);
    if (is_stopping_) throw EngineStopped("engine: it has stopped");
    if (unfinished_ + count > capacity_) {
      throw llm::QueueFull(fmt::format("queue: expected at most {} unfinished requests, got {} and {} more",
                                       capacity_, unfinished_, count));
    }
    unfinished_ += count;
    for (EngineJob& job : jobs) {
      ids.push_back(next_id_);
      inbox_.push_back({next_id_++, std::move(job)});
    }
  }
  changed_.notify_one();
  return ids;
}

void EngineThread::cancel(std::span<const Id> ids) {
  {
    const std::lock_guard lock(mutex_);
    for (const Id id : ids) inbox_.push_back({id, std::nullopt});
  }
  changed_.notify_one();
}

void EngineThread::stop() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_one();
}

llm::EngineStatistics EngineThread::statistics() const {
  const std::lock_guard lock(mutex_);
  return statistics_;
}

std::string EngineThread::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

void EngineThread::run(int threads) {
  llm::use_threads(threads);
  bool has_work = false, is_stopping = false;
  while (!is_stopping) {
    std::vector<Command> commands;
    {
      std::unique_lock lock(mutex_);
      statistics_ = engine_.statistics();
      changed_.wait(lock, [&] { return has_work || is_stopping_ || !inbox_.empty(); });
      commands.swap(inbox_);
      is_stopping = is_stopping_;
    }
    try {
      obey(std::move(commands));
      if (is_stopping) {
        while (!running_.empty()) engine_.cancel(running_.begin()->second.id);
      } else {
        has_work = engine_.step();
      }
    } catch (const std::exception& error) {
      fail(fmt::format("engine: {}", error.what()));
      return;
    }
  }
  const std::lock_guard lock(mutex_);
  statistics_ = engine_.statistics();
}

void EngineThread::obey(std::vector<Command> commands) {
  for (Command& command : commands) {
    if (command.job) {
      start(command.id, std::move(*command.job));
    } else if (const auto found = running_.find(command.id); found != running_.end()) {
      engine_.cancel(found->second.id);
    }
  }
}

void EngineThread::start(Id id, EngineJob job) {
  job.request.on_finish = [this, id, on_finish = std::move(job.request.on_finish)](
                              llm::Finish finish, const llm::RequestUsage& usage) {
    forget(id);
    if (on_finish) on_finish(finish, usage);
  };
  try {
    const llm::Engine::Id engine_id = engine_.submit(std::move(job.request));
    running_.emplace(id, Running{engine_id, std::move(job.on_error)});
  } catch (const std::exception& error) {
    forget(id);
    if (job.on_error) job.on_error(error.what());
  }
}

void EngineThread::forget(Id id) {
  running_.erase(id);
  const std::lock_guard lock(mutex_);
  --unfinished_;
}

/// Ends every request with an error; the engine is invalid.
void EngineThread::fail(const std::string& message) {
  std::vector<Command> commands;
  {
    const std::lock_guard lock(mutex_);
    error_ = message;
    commands.swap(inbox_);
    unfinished_ = 0;
  }
  for (const auto& [id, running] : running_)
    if (running.on_error) running.on_error(message);
  for (const Command& command : commands)
    if (command.job && command.job->on_error) command.job->on_error(message);
}

}  // namespace moba::app
