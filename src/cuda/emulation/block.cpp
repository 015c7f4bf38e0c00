#include "cuda/emulation/block.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulation/fiber.h"

namespace moba::cuda::emulation {
namespace {

constexpr int kBarriers = 16;
constexpr int kNoBarrier = -1;

enum class State { ready, at_collective, at_barrier, finished };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  Fiber fiber;
  State state = State::ready;
  const char* name = "";  // of what it waits at
  void* operands = nullptr;
  void (*body)(void* const*) = nullptr;
  int barrier = kNoBarrier;
  int expected = 0;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> open;
};

void land(const Copy& copy) {
  std::array<std::byte, 16> bytes{};
  if (copy.bytes > 0) std::memcpy(bytes.data(), copy.from, static_cast<std::size_t>(copy.bytes));
  std::memcpy(copy.to, bytes.data(), bytes.size());
}

/// One block of threads at a time; its fibers and their stacks serve all blocks of all launches.
class Machine {
 public:
  Machine() {
    const char* seed = std::getenv("MOBA_EMULATION_SEED");
    if (seed != nullptr) random_.seed(std::strtoull(seed, nullptr, 10));
  }

  void run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
           const std::function<void()>& kernel);

  Place place;
  Thread& current() { return *threads_[static_cast<std::size_t>(place.thread)]; }
  bool chance() { return (random_() & 1U) != 0; }
  void arrive(int id, int expected);
  const std::function<void()>* kernel = nullptr;

 private:
  struct Barrier {
    int arrived = 0, expected = 0;
  };

  void run_block();
  bool step(int warp);
  void run_collective(int warp);
  [[noreturn]] void fail(const std::string& why) const;
  [[noreturn]] void fail_stuck() const;
  static std::string describe(const Thread& thread);

  Thread& thread(int index) const { return *threads_[static_cast<std::size_t>(index)]; }

  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::array<Barrier, kBarriers> barriers_{};
  std::string failure_;
  const char* name_ = "";
};

Machine& machine() {
  thread_local Machine instance;
  return instance;
}

void run_thread() {
  Machine& m = machine();
  (*m.kernel)();
  Thread& self = m.current();
  self.state = State::finished;
  self.fiber.leave(true);
}

void wait(Thread& self) {
  self.fiber.leave(false);
}

void Machine::fail(const std::string& why) const {
  throw std::logic_error("kernel " + std::string(name_) + ", block (" + std::to_string(place.block.x) + ", " +
                         std::to_string(place.block.y) + ", " + std::to_string(place.block.z) + "): " + why);
}

std::string Machine::describe(const Thread& thread) {
  switch (thread.state) {
    case State::ready:
      return "runs";
    case State::finished:
      return "has ended";
    case State::at_collective:
      return std::string("waits at ") + thread.name;
    case State::at_barrier:
      return "waits at barrier " + std::to_string(thread.barrier);
  }
  return "?";
}

/// Nobody can go on: says where the first thread of every warp waits, and which lanes differ from it.
void Machine::fail_stuck() const {
  std::string text = "no thread can go on;";
  for (int first = 0; first < place.threads; first += kLanes) {
    const std::string leader = describe(thread(first));
    text += " warp " + std::to_string(first / kLanes) + " " + leader;
    for (int lane = 1; lane < kLanes; ++lane) {
      const std::string other = describe(thread(first + lane));
      if (other == leader) continue;
      text += ", but lane " + std::to_string(lane) + " " + other;
      break;
    }
    text += ";";
  }
  fail(text);
}

void Machine::arrive(int id, int expected) {
  Barrier& barrier = barriers_[static_cast<std::size_t>(id)];
  if (barrier.arrived > 0 && barrier.expected != expected) {
    // On a fiber: what is thrown here would find nobody to catch it.
    failure_ = "barrier " + std::to_string(id) + " is for " + std::to_string(barrier.expected) +
               " threads and for " + std::to_string(expected);
  }
  barrier.expected = expected;
  if (++barrier.arrived < expected) return;
  barrier.arrived = 0;
  for (int i = 0; i < place.threads; ++i) {
    Thread& waiting = thread(i);
    if (waiting.state == State::at_barrier && waiting.barrier == id) waiting.state = State::ready;
  }
}

void Machine::run_collective(int warp) {
  const Thread& leader = thread(warp * kLanes);
  std::array<void*, kLanes> operands{};
  for (int lane = 0; lane < kLanes; ++lane) {
    Thread& each = thread(warp * kLanes + lane);
    if (each.body != leader.body) {
      fail("warp " + std::to_string(warp) + ": lane 0 " + describe(leader) + ", lane " +
           std::to_string(lane) + " " + describe(each));
    }
    operands[static_cast<std::size_t>(lane)] = each.operands;
  }
  leader.body(operands.data());
  for (int lane = 0; lane < kLanes; ++lane) thread(warp * kLanes + lane).state = State::ready;
}

/// Runs every lane of a warp that can run to where it waits next; false when none could.
bool Machine::step(int warp) {
  bool moved = false;
  const bool backwards = chance();
  for (int i = 0; i < kLanes; ++i) {
    const int index = warp * kLanes + (backwards ? kLanes - 1 - i : i);
    if (thread(index).state != State::ready) continue;
    place.thread = index;
    thread(index).fiber.resume();
    if (!failure_.empty()) fail(std::exchange(failure_, {}));
    moved = true;
  }
  bool all = true;
  for (int lane = 0; lane < kLanes; ++lane)
    all = all && thread(warp * kLanes + lane).state == State::at_collective;
  if (all) run_collective(warp);
  return moved || all;
}

void Machine::run_block() {
  std::vector<int> running(static_cast<std::size_t>(place.threads / kLanes));
  std::iota(running.begin(), running.end(), 0);
  for (int i = 0; i < place.threads; ++i) {
    Thread& each = thread(i);
    each.state = State::ready;
    each.groups.clear();
    each.open.clear();
    each.fiber.start(run_thread);
  }
  barriers_ = {};
  while (!running.empty()) {
    std::shuffle(running.begin(), running.end(), random_);
    bool moved = false;
    for (const int warp : running) moved = step(warp) || moved;
    std::erase_if(running, [&](int warp) {
      for (int lane = 0; lane < kLanes; ++lane) {
        if (thread(warp * kLanes + lane).state != State::finished) return false;
      }
      return true;
    });
    if (!moved && !running.empty()) fail_stuck();
  }
  for (int i = 0; i < place.threads; ++i) {
    bool pending = !thread(i).open.empty();
    for (const std::vector<Copy>& group : thread(i).groups) pending = pending || !group.empty();
    if (pending) fail("ends with copies that nobody waited for");
  }
}

void Machine::run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
                  const std::function<void()>& body) {
  name_ = name;
  kernel = &body;
  while (threads_.size() < static_cast<std::size_t>(threads)) threads_.push_back(std::make_unique<Thread>());
  // Exactly as large as asked for, so that AddressSanitizer sees what lies beside it.
  const std::unique_ptr<std::byte, void (*)(std::byte*)> shared(
      static_cast<std::byte*>(::operator new (shared_bytes, std::align_val_t{128})),
      [](std::byte* memory) { ::operator delete (memory, std::align_val_t{128}); });
  place = {.grid = grid, .threads = threads, .shared = shared.get()};

  std::vector<std::uint64_t> order(static_cast<std::size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  std::shuffle(order.begin(), order.end(), random_);
  for (const std::uint64_t index : order) {
    place.block = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                   static_cast<unsigned>(index / grid.x / grid.y)};
    std::memset(place.shared, 0xFF, shared_bytes);
    run_block();
  }
}

}  // namespace

const Place& here() {
  return machine().place;
}

void collective(const char* name, void* operands, void (*body)(void* const* lanes)) {
  Thread& self = machine().current();
  self.name = name;
  self.operands = operands;
  self.body = body;
  self.state = State::at_collective;
  wait(self);
}

void barrier_sync(int id, int threads) {
  Machine& m = machine();
  Thread& self = m.current();
  self.barrier = id;
  self.state = State::at_barrier;
  m.arrive(id, threads);
  wait(self);
}

void barrier_arrive(int id, int threads) {
  machine().arrive(id, threads);
}

void copy_async(void* to, const void* from, int bytes) {
  Machine& m = machine();
  const Copy copy{to, from, bytes};
  if (m.chance()) {
    land(copy);
    m.current().open.push_back({to, from, -1});
  } else {
    m.current().open.push_back(copy);
  }
}

void copy_async_commit() {
  Thread& self = machine().current();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void copy_async_wait(int pending) {
  Thread& self = machine().current();
  while (static_cast<int>(self.groups.size()) > pending) {
    for (const Copy& copy : self.groups.front()) {
      if (copy.bytes >= 0) land(copy);
    }
    self.groups.erase(self.groups.begin());
  }
}

void run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
         const std::function<void()>& kernel) {
  if (threads < kLanes || threads > 1024 || threads % kLanes != 0)
    throw std::logic_error("kernel " + std::string(name) + ": " + std::to_string(threads) +
                           " threads a block");
  machine().run(name, grid, threads, shared_bytes, kernel);
}

}  // namespace moba::cuda::emulation
