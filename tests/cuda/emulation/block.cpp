#include "emulation/block.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/memory.h"

namespace moba::cuda::emulation {
namespace {

constexpr int kBarriers = 16;
constexpr int kNoBarrier = -1;

enum class State { ready, at_collective, at_barrier, at_mbarrier, finished };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  Fiber fiber;
  State state = State::ready;
  const char* name = "";  // of the instruction that it waits at
  void* operands = nullptr;
  void (*body)(void* const*) = nullptr;
  int together = kLanes;  // threads of the collective
  const void* mbarrier = nullptr;
  unsigned fences = 0;
  int barrier = kNoBarrier;
  int expected = 0;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> open;
};

void land(const Copy& copy) {
  std::array<std::byte, 16> bytes{};
  if (copy.bytes > 0) std::memcpy(bytes.data(), copy.from, static_cast<std::size_t>(copy.bytes));
  std::memcpy(copy.to, bytes.data(), bytes.size());
  wrote(copy.to);
}

/// wgmma that was issued, with the operands of its threads.
struct Product {
  void (*body)(void* const*) = nullptr;
  std::vector<std::vector<std::byte>> operands;

  void run() {
    std::array<void*, kWarpgroupThreads> pointers{};
    for (std::size_t i = 0; i < pointers.size(); ++i) pointers[i] = operands[i].data();
    body(pointers.data());
  }
};

/// Operands of one thread of an issued wgmma.
struct Begun {
  const std::byte* operands;
  std::size_t bytes;
  void (*body)(void* const*);
};

struct Warpgroup {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;  // committed, the oldest first
};

struct Mbarrier {
  int arrivals = 0, missing = 0;
  std::int64_t missing_bytes = 0;
  unsigned phase = 0;
};

struct TmaLoad {
  std::function<void()> land;
  const void* barrier;
  std::int64_t bytes;
};

/// Last writer of 16 bytes of shared memory, and the number of its fences before.
struct Mark {
  int thread = -1;
  unsigned fences = 0;
};

/// Runs one block of threads at a time; its fibers and their stacks serve all blocks of all launches.
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
  void begin_product(void* const* threads);
  void commit_products();
  void finish_products(int pending);
  Mbarrier* mbarrier(const void* address);
  void settle(const void* address, Mbarrier& barrier);
  /// Returns the mark of an address in shared memory, else null.
  Mark* mark(const void* address);
  bool has_fenced(const Mark& mark) const { return thread(mark.thread).fences > mark.fences; }
  /// Records a failure on a fiber, where an exception would not be caught.
  void fail_later(const std::string& why) { failure_ = why; }
  const std::function<void()>* kernel = nullptr;
  std::unordered_map<const void*, Mbarrier> mbarriers;
  std::vector<TmaLoad> tma_loads;
  std::map<std::string, int> launches;

 private:
  struct Barrier {
    int arrived = 0, expected = 0;
  };

  void run_block();
  bool step(int warp);
  void run_collective(int first, int count);
  bool have_met(int warp) const;
  void check_alike(int first, int count) const;
  bool land_tma_loads(bool all);
  void check_nothing_pends();
  [[noreturn]] void fail(const std::string& why) const;
  [[noreturn]] void fail_stuck() const;
  static std::string describe(const Thread& thread);

  Thread& thread(int index) const { return *threads_[static_cast<std::size_t>(index)]; }

  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::array<Barrier, kBarriers> barriers_{};
  std::vector<Warpgroup> groups_;
  int running_group_ = 0;  // group of the running collective
  std::vector<Mark> marks_;
  std::size_t shared_bytes_ = 0;
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
    case State::at_mbarrier:
      return "waits for a phase of an mbarrier";
    case State::at_barrier:
      return "waits at barrier " + std::to_string(thread.barrier);
  }
  return "?";
}

/// Reports a deadlock: where the first thread of every warp waits, and which lanes differ from it.
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
    fail_later("barrier " + std::to_string(id) + " is for " + std::to_string(barrier.expected) +
               " threads and for " + std::to_string(expected));
  }
  barrier.expected = expected;
  if (++barrier.arrived < expected) return;
  barrier.arrived = 0;
  for (int i = 0; i < place.threads; ++i) {
    Thread& waiting = thread(i);
    if (waiting.state == State::at_barrier && waiting.barrier == id) waiting.state = State::ready;
  }
}

void Machine::check_alike(int first, int count) const {
  const Thread& leader = thread(first);
  for (int i = 1; i < count; ++i) {
    const Thread& each = thread(first + i);
    if (each.body == leader.body) continue;
    fail("warp " + std::to_string((first + i) / kLanes) + ": lane 0 " + describe(leader) + ", lane " +
         std::to_string(i % kLanes) + " " + describe(each));
  }
}

void Machine::run_collective(int first, int count) {
  check_alike(first, count);
  std::array<void*, kWarpgroupThreads> operands{};
  for (int i = 0; i < count; ++i) operands[static_cast<std::size_t>(i)] = thread(first + i).operands;
  running_group_ = first / kWarpgroupThreads;
  thread(first).body(operands.data());
  if (!failure_.empty()) fail(std::exchange(failure_, {}));
  for (int i = 0; i < count; ++i) thread(first + i).state = State::ready;
}

bool Machine::have_met(int warp) const {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (thread(warp * kLanes + lane).state != State::at_collective) return false;
  }
  return true;
}

void Machine::begin_product(void* const* threads) {
  const auto* first = static_cast<const Begun*>(threads[0]);
  Product product{.body = first->body, .operands = {}};
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    const auto* each = static_cast<const Begun*>(threads[i]);
    if (each->body != first->body) fail("the threads of a warpgroup begin different products");
    product.operands.emplace_back(each->operands, each->operands + each->bytes);
  }
  Warpgroup& group = groups_[static_cast<std::size_t>(running_group_)];
  group.open.push_back(std::move(product));
  if (!chance()) return;
  for (std::vector<Product>& products : group.groups) {
    for (Product& each : products) each.run();
    products.clear();
  }
  for (Product& each : group.open) each.run();
  group.open.clear();
}

void Machine::commit_products() {
  Warpgroup& group = groups_[static_cast<std::size_t>(running_group_)];
  group.groups.push_back(std::exchange(group.open, {}));
}

void Machine::finish_products(int pending) {
  Warpgroup& group = groups_[static_cast<std::size_t>(running_group_)];
  while (static_cast<int>(group.groups.size()) > pending) {
    for (Product& each : group.groups.front()) each.run();
    group.groups.erase(group.groups.begin());
  }
}

Mbarrier* Machine::mbarrier(const void* address) {
  const auto found = mbarriers.find(address);
  if (found != mbarriers.end()) return &found->second;
  fail_later("an mbarrier is used before it is initialised");
  return nullptr;
}

/// Begins the next phase if this one is complete, and wakes its waiters.
void Machine::settle(const void* address, Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.missing_bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.phase ^= 1U;
  for (int i = 0; i < place.threads; ++i) {
    Thread& waiting = thread(i);
    if (waiting.state == State::at_mbarrier && waiting.mbarrier == address) waiting.state = State::ready;
  }
}

bool Machine::land_tma_loads(bool all) {
  bool landed = false;
  std::erase_if(tma_loads, [&](const TmaLoad& copy) {
    if (!all && chance()) return false;
    copy.land();
    Mbarrier* barrier = mbarrier(copy.barrier);
    if (!failure_.empty()) fail(std::exchange(failure_, {}));
    barrier->missing_bytes -= copy.bytes;
    settle(copy.barrier, *barrier);
    return landed = true;
  });
  return landed;
}

Mark* Machine::mark(const void* address) {
  const auto offset = static_cast<std::size_t>(static_cast<const std::byte*>(address) - place.shared);
  return offset < shared_bytes_ ? &marks_[offset / 16] : nullptr;
}

/// Runs each lane of a warp that can run until it waits; returns false if none could.
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
  if (!have_met(warp)) return moved;
  if (thread(warp * kLanes).together == kLanes) {
    run_collective(warp * kLanes, kLanes);
    return true;
  }
  check_alike(warp * kLanes, kLanes);
  constexpr int kWarps = kWarpgroupThreads / kLanes;
  const int first = warp / kWarps * kWarps;
  for (int other = first; other < first + kWarps; ++other) {
    if (other * kLanes >= place.threads || !have_met(other) ||
        thread(other * kLanes).together != kWarpgroupThreads)
      return moved;
  }
  run_collective(first * kLanes, kWarpgroupThreads);
  return true;
}

void Machine::run_block() {
  std::vector<int> running(static_cast<std::size_t>(place.threads / kLanes));
  std::iota(running.begin(), running.end(), 0);
  for (int i = 0; i < place.threads; ++i) {
    Thread& each = thread(i);
    each.state = State::ready;
    each.groups.clear();
    each.open.clear();
    each.fences = 0;
    each.fiber.start(run_thread);
  }
  barriers_ = {};
  mbarriers.clear();
  groups_.assign(static_cast<std::size_t>(place.threads / kWarpgroupThreads + 1), {});
  std::fill(marks_.begin(), marks_.end(), Mark{});
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
    moved = land_tma_loads(!moved) || moved;
    if (!moved && !running.empty()) fail_stuck();
  }
  check_nothing_pends();
}

void Machine::check_nothing_pends() {
  if (!tma_loads.empty()) fail("ends with copies that were never waited for");
  for (const Warpgroup& group : groups_) {
    if (!group.open.empty() || !group.groups.empty()) fail("ends with products that were never waited for");
  }
  for (int i = 0; i < place.threads; ++i) {
    bool pending = !thread(i).open.empty();
    for (const std::vector<Copy>& group : thread(i).groups) pending = pending || !group.empty();
    if (pending) fail("ends with copies that were never waited for");
  }
}

void Machine::run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
                  const std::function<void()>& body) {
  name_ = name;
  ++launches[name];
  tma_loads.clear();
  kernel = &body;
  while (threads_.size() < static_cast<std::size_t>(threads)) threads_.push_back(std::make_unique<Thread>());
  // Exactly as large as requested, so that AddressSanitizer detects accesses outside.
  const std::unique_ptr<std::byte, void (*)(std::byte*)> shared(
      static_cast<std::byte*>(::operator new (shared_bytes, std::align_val_t{1024})),
      [](std::byte* memory) { ::operator delete (memory, std::align_val_t{1024}); });
  shared_bytes_ = shared_bytes;
  marks_.resize(shared_bytes / 16 + 1);
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
  self.together = kLanes;
  self.state = State::at_collective;
  wait(self);
}

void warpgroup_collective(const char* name, void* operands, void (*body)(void* const* threads)) {
  Thread& self = machine().current();
  self.name = name;
  self.operands = operands;
  self.body = body;
  self.together = kWarpgroupThreads;
  self.state = State::at_collective;
  wait(self);
}

void wgmma_async(const void* operands, std::size_t bytes, void (*body)(void* const* threads)) {
  Begun own{static_cast<const std::byte*>(operands), bytes, body};
  warpgroup_collective("wgmma", &own, [](void* const* threads) { machine().begin_product(threads); });
}

void wgmma_commit() {
  warpgroup_collective("wgmma.commit_group", nullptr, [](void* const*) { machine().commit_products(); });
}

void wgmma_wait(int pending) {
  warpgroup_collective("wgmma.wait_group", &pending, [](void* const* threads) {
    machine().finish_products(*static_cast<int*>(threads[0]));
  });
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

void cp_async(void* to, const void* from, int bytes) {
  Machine& m = machine();
  if (bytes > 0 && !is_device_memory(from)) {
    m.fail_later("a copy reads memory of the host");
    return;
  }
  const Copy copy{to, from, bytes};
  if (m.chance()) {
    land(copy);
    m.current().open.push_back({to, from, -1});
  } else {
    m.current().open.push_back(copy);
  }
}

void cp_async_commit() {
  Thread& self = machine().current();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void cp_async_wait(int pending) {
  Thread& self = machine().current();
  while (static_cast<int>(self.groups.size()) > pending) {
    for (const Copy& copy : self.groups.front()) {
      if (copy.bytes >= 0) land(copy);
    }
    self.groups.erase(self.groups.begin());
  }
}

void mbarrier_init(const void* barrier, int arrivals) {
  machine().mbarriers[barrier] = {.arrivals = arrivals, .missing = arrivals};
}

void mbarrier_arrive(const void* address, std::int64_t announced_bytes) {
  Machine& m = machine();
  Mbarrier* barrier = m.mbarrier(address);
  if (barrier == nullptr) return;
  barrier->missing_bytes += announced_bytes;
  --barrier->missing;
  m.settle(address, *barrier);
}

void mbarrier_wait(const void* address, unsigned parity) {
  Machine& m = machine();
  const Mbarrier* barrier = m.mbarrier(address);
  Thread& self = m.current();
  while (barrier != nullptr && barrier->phase == parity) {
    self.mbarrier = address;
    self.state = State::at_mbarrier;
    wait(self);
  }
}

void tma_load(std::function<void()> land, const void* barrier, std::int64_t bytes) {
  machine().tma_loads.push_back({std::move(land), barrier, bytes});
}

void wrote(const void* shared) {
  Machine& m = machine();
  Mark* mark = m.mark(shared);
  if (mark != nullptr) *mark = {m.place.thread, m.current().fences};
}

void fence_proxy_async() {
  ++machine().current().fences;
}

bool check_fenced(const void* shared) {
  Machine& m = machine();
  const Mark* mark = m.mark(shared);
  if (mark == nullptr) {
    m.fail_later("the async proxy reaches outside of shared memory");
    return false;
  }
  if (mark->thread < 0 || m.has_fenced(*mark)) return true;
  m.fail_later("shared memory that thread " + std::to_string(mark->thread) +
               " wrote is used by the async proxy without a fence");
  return false;
}

int& capability() {
  thread_local int value = 80;
  return value;
}

int& launches_before_failure() {
  thread_local int value = -1;
  return value;
}

bool launch_fails() {
  int& left = launches_before_failure();
  return left >= 0 && left-- == 0;
}

int launches(const char* name) {
  return machine().launches[name];
}

void run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
         const std::function<void()>& kernel) {
  if (threads < kLanes || threads > 1024 || threads % kLanes != 0)
    throw std::logic_error("kernel " + std::string(name) + ": " + std::to_string(threads) +
                           " threads a block");
  machine().run(name, grid, threads, shared_bytes, kernel);
}

}  // namespace moba::cuda::emulation
