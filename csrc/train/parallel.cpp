#include "train/parallel.h"

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "model/threads.h"

namespace lamoe {
namespace {

// The entry point of the OpenMP runtimes of GCC and LLVM for a parallel region.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMpParallel find_openmp() {
#if defined(__linux__) || defined(__APPLE__)
  return (OpenMpParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
#else
  return nullptr;
#endif
}

OpenMpParallel openmp() {
  static const OpenMpParallel found = find_openmp();
  return found;
}

struct Job {
  struct alignas(64) Range {
    std::atomic<int> next;
    int end;
  };
  void (*call)(const void*, int, int);
  const void* f;
  int threads;
  std::atomic<int> entered{0};
  std::unique_ptr<Range[]> ranges;

  void work() {
    const int t = entered.fetch_add(1, std::memory_order_relaxed);
    for (int k = 0; k < threads; k++) {
      Range& r = ranges[(t + k) % threads];
      for (int i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;) call(f, i, t);
    }
  }
};

struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  char* at_least(size_t bytes) {
    if (bytes <= size) return data;
    std::free(data);
    data = nullptr, size = 0;
    bytes = (bytes + bytes / 8 + 4095) / 4096 * 4096;
    void* p = nullptr;
    if (posix_memalign(&p, 4096, bytes)) throw std::bad_alloc();
    data = (char*)p, size = bytes;
    return data;
  }
};

std::mutex running;
constexpr int kSlots = 8;
Buffer shared_slots[kSlots], own_slots;

// The team of threads without OpenMP. Only one operation runs at a time (Lock).
Threads& team(int n) {
  static std::unique_ptr<Threads> threads;
  if (!threads || threads->size() != n) threads.reset(new Threads(n));
  return *threads;
}

}  // namespace

Parallel::Lock::Lock() { running.lock(); }
Parallel::Lock::~Lock() { running.unlock(); }

void* Parallel::shared(int slot, size_t bytes) const { return shared_slots[slot].at_least(bytes); }

Parallel::Own Parallel::own(size_t bytes) const {
  // The extra cache line keeps the slots of two threads from sharing cache sets.
  const size_t stride = (bytes + 4095) / 4096 * 4096 + 64;
  return {own_slots.at_least(stride * size_t(threads_)), stride};
}

void Parallel::go(int items, void (*call)(const void*, int, int), const void* f) const {
  if (!openmp()) {
    Threads& threads = team(threads_);
    Threads::Session awake(threads);
    threads.run(items, [&](int i, int t) { call(f, i, t); });
    return;
  }
  Job job;
  job.call = call, job.f = f, job.threads = threads_;
  job.ranges.reset(new Job::Range[size_t(threads_)]);
  for (int t = 0; t < threads_; t++) {
    job.ranges[t].next.store(int(int64_t(items) * t / threads_), std::memory_order_relaxed);
    job.ranges[t].end = int(int64_t(items) * (t + 1) / threads_);
  }
  openmp()([](void* p) { ((Job*)p)->work(); }, &job, unsigned(threads_), 0);
}

size_t kept_bytes() {
  std::lock_guard<std::mutex> lock(running);
  size_t sum = own_slots.size;
  for (const Buffer& b : shared_slots) sum += b.size;
  return sum;
}

const char* parallel_runtime() { return openmp() ? "openmp" : "own"; }

}  // namespace lamoe
