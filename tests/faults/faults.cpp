// A library to preload that lets one call of the C library fail, as a full disk or memory would.
//
//   FAULT_CALL    write, fsync, rename, mmap or malloc
//   FAULT_NUMBER  which of these calls fails, counted from 1; 0 counts only
//   FAULT_FOLDER  write, fsync, rename and mmap count for files under it, malloc once a file there was mapped
//   FAULT_COUNT   file that gets a line for each call
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

/// Smaller allocations are not counted: oneDNN uses the descriptions of its products, some of 200 KiB,
/// unchecked.
constexpr std::size_t kLargeAllocation = 1 << 20;

std::atomic<long> count{0};
std::atomic<bool> mapped{false};  // a file under the folder

const char* setting(const char* name) {
  const char* value = getenv(name);
  return value == nullptr ? "" : value;
}

bool is_under_folder(const char* path) {
  const char* folder = setting("FAULT_FOLDER");
  return *folder != '\0' && strncmp(path, folder, strlen(folder)) == 0;
}

bool is_under_folder(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return false;
  path[size] = '\0';
  return is_under_folder(path);
}

/// Counts a call and returns whether it fails.
bool fails(const char* call) {
  if (strcmp(setting("FAULT_CALL"), call) != 0) return false;
  const long number = ++count;
  static const int file = open(setting("FAULT_COUNT"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  [[maybe_unused]] const ssize_t counted = pwrite(file, "\n", 1, 0);
  return number == atol(setting("FAULT_NUMBER"));
}

template <typename Function>
Function next(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

ssize_t write(int file, const void* bytes, size_t size) {
  static const auto real = next<ssize_t (*)(int, const void*, size_t)>("write");
  if (is_under_folder(file) && fails("write")) {
    errno = ENOSPC;
    return -1;
  }
  return real(file, bytes, size);
}

int fsync(int file) {
  static const auto real = next<int (*)(int)>("fsync");
  if (is_under_folder(file) && fails("fsync")) {
    errno = EIO;
    return -1;
  }
  return real(file);
}

int rename(const char* from, const char* to) noexcept {
  static const auto real = next<int (*)(const char*, const char*)>("rename");
  if (is_under_folder(from) && fails("rename")) {
    errno = ENOSPC;
    return -1;
  }
  return real(from, to);
}

void* mmap(void* place, size_t size, int protection, int flags, int file, off_t offset) noexcept {
  static const auto real = next<void* (*)(void*, size_t, int, int, int, off_t)>("mmap");
  if (file >= 0 && is_under_folder(file)) {
    mapped = true;
    if (fails("mmap")) {
      errno = ENOMEM;
      return MAP_FAILED;
    }
  }
  return real(place, size, protection, flags, file, offset);
}

extern void* __libc_malloc(size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  if (size >= kLargeAllocation && mapped && fails("malloc")) {
    errno = ENOMEM;
    return nullptr;
  }
  return __libc_malloc(size);
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
  if (size >= kLargeAllocation && mapped && fails("malloc")) return ENOMEM;
  *memory = __libc_memalign(alignment, size);
  return *memory == nullptr ? ENOMEM : 0;
}

void* aligned_alloc(size_t alignment, size_t size) {
  if (size >= kLargeAllocation && mapped && fails("malloc")) {
    errno = ENOMEM;
    return nullptr;
  }
  return __libc_memalign(alignment, size);
}

}  // extern "C"
