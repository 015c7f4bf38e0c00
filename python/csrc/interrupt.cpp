#include "interrupt.h"

#include <dlfcn.h>

namespace moba::pytorch {
namespace {

/// Functions of Python's stable ABI, found in the process: one build serves every Python, and programs
/// without.
struct Python {
  struct Object;

  int (*ensure_gil)() = find<int (*)()>("PyGILState_Ensure");
  void (*release_gil)(int) = find<void (*)(int)>("PyGILState_Release");
  int (*run_handlers)() = find<int (*)()>("PyErr_CheckSignals");
  void (*fetch)(Object**, Object**, Object**) = find<void (*)(Object**, Object**, Object**)>("PyErr_Fetch");
  void (*restore)(Object*, Object*, Object*) = find<void (*)(Object*, Object*, Object*)>("PyErr_Restore");

  bool is_present() const { return ensure_gil && release_gil && run_handlers && fetch && restore; }

  template <typename Function>
  static Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

const Python& python() {
  static const Python functions;
  return functions;
}

/// The exception of a handler; guarded by Python's global lock.
struct Raised {
  Python::Object *type = nullptr, *value = nullptr, *traceback = nullptr;
} raised;

}  // namespace

bool Interrupt::run_handlers() {
  if (std::this_thread::get_id() != caller_) return false;
  const Clock::time_point now = Clock::now();
  if (now - last_ < kInterval || !python().is_present()) return false;
  last_ = now;
  const int gil = python().ensure_gil();
  const bool is_raised = python().run_handlers() != 0;
  if (is_raised) python().fetch(&raised.type, &raised.value, &raised.traceback);
  python().release_gil(gil);
  return is_raised;
}

}  // namespace moba::pytorch

/// Raises in Python what a signal handler raised during the last call, if anything. Called with Python's
/// global lock.
extern "C" __attribute__((visibility("default"))) void moba_raise_interrupt() {
  using namespace moba::pytorch;
  if (raised.type == nullptr) return;
  const Raised last = raised;
  raised = {};
  python().restore(last.type, last.value, last.traceback);
}
