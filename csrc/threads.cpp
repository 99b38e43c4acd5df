#include "threads.h"

#include <utility>

namespace lamoe {
namespace {
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
constexpr int kSpins = 4000;  // then give the core away between looks: another program may need it
}  // namespace

Threads::Threads(int n) : ranges_(new Range[size_t(n)]) {
  try {
    for (int i = 1; i < n; i++) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // no more threads to be had
    stop();
    throw;
  }
}

Threads::~Threads() { stop(); }

void Threads::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    end_ = true;
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
}

Threads::Session::Session(Threads& t) : t_(t), one_(t.one_) {
  {
    std::lock_guard<std::mutex> lock(t_.sleep_);
    t_.awake_ = true;
  }
  t_.wake_.notify_all();
}

Threads::Session::~Session() { t_.awake_ = false; }

// A round opens (round_ odd), its items are taken, it closes; then those who came in are waited for. Who enters (inside_) looks at round_ once more:
// either they see it closed and leave, or the caller sees them inside. Both sides write one and then read the other, hence seq_cst.
void Threads::go(int items, const void* f) {
  f_ = f;
  const int n = size();
  for (int t = 0; t < n; t++) {
    ranges_[t].next.store(int(int64_t(items) * t / n), std::memory_order_relaxed);
    ranges_[t].end = int(int64_t(items) * (t + 1) / n);
  }
  round_.fetch_add(1);
  take(0);
  round_.fetch_add(1);
  for (int spins = 0; inside_.load(); spins++) spins < kSpins ? pause() : std::this_thread::yield();
  if (failed_.load(std::memory_order_relaxed)) {
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Threads::take(int thread) noexcept {
  try {
    for (int k = 0, n = size(); k < n; k++) {
      Range& r = ranges_[(thread + k) % n];
      for (int i; !failed_.load(std::memory_order_relaxed) && (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;) call_(f_, i, thread);
    }
  } catch (...) {
    if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
  }
}

void Threads::work(int thread) {
  uint32_t seen = 0;  // the last round that this thread was in
  for (int spins = 0; !end_;) {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (round % 2 && round != seen) {
      inside_.fetch_add(1);
      if (const uint32_t now = round_.load(); now % 2) {
        seen = now;
        take(thread);
      }
      inside_.fetch_sub(1);
      spins = 0;
    } else if (awake_) {
      spins++ < kSpins ? pause() : std::this_thread::yield();
    } else {
      std::unique_lock<std::mutex> lock(sleep_);
      wake_.wait(lock, [&] { return awake_ || end_; });
      spins = 0;
    }
  }
}

}  // namespace lamoe
