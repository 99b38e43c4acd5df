#include "train/parallel.h"

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

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

// Denormal numbers count as zero while an object of this class exists. They are too small to matter
// in training, and arithmetic with them is up to a hundred times slower. The products of matrix
// units ignore them in any case.
class NoDenormals {
#if defined(__SSE2__)
 public:
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// One parallel run. Every thread calls `work` once.
struct Job {
  void (*call)(const void*, int, int);
  const void* f;
  ItemRanges ranges;
  std::atomic<int> entered{0};

  void work() {
    const NoDenormals mode;
    (void)mode;
    const int thread = entered.fetch_add(1, std::memory_order_relaxed);
    ranges.take(thread, [&](int i) {
      call(f, i, thread);
      return true;
    });
  }
};

constexpr size_t kHugePage = 2 << 20;

struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  char* at_least(size_t bytes) {
    if (bytes <= size) return data;
    std::free(data);
    data = nullptr, size = 0;
    // Large buffers are in huge pages, because a core remembers the places of few small pages.
    const size_t page = bytes >= kHugePage ? kHugePage : 4096;
    bytes = (bytes + bytes / 8 + page - 1) / page * page;
    void* p = nullptr;
    if (posix_memalign(&p, page, bytes)) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (page == kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
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
  const int threads = items == 1 ? 1 : threads_;
  Job job{call, f, ItemRanges(threads)};
  job.ranges.divide(items);
  if (threads == 1) {
    job.work();
  } else if (openmp()) {
    openmp()([](void* p) { ((Job*)p)->work(); }, &job, unsigned(threads), 0);
  } else {
    Threads& workers = team(threads);
    Threads::Session awake(workers);
    workers.run(threads, [&](int, int) { job.work(); });
  }
}

size_t kept_bytes() {
  std::lock_guard<std::mutex> lock(running);
  size_t sum = own_slots.size;
  for (const Buffer& b : shared_slots) sum += b.size;
  return sum;
}

const char* parallel_runtime() { return openmp() ? "openmp" : "own"; }

}  // namespace lamoe
