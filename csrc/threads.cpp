#include "threads.h"

namespace lamoe {
namespace {
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
constexpr int kSpins = 4000;  // then give the core away between looks: another program may need it
}  // namespace

Threads::Threads(int n) {
  for (int i = 1; i < n; i++) workers_.emplace_back([this, i] { work(i); });
}

Threads::~Threads() {
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

void Threads::go(int items, const void* f) {
  f_ = f;
  items_ = items;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(int(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  take(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire); spins++) spins < kSpins ? pause() : std::this_thread::yield();
}

void Threads::take(int thread) {
  for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) call_(f_, i, thread);
}

void Threads::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; round_.load(std::memory_order_acquire) == seen; spins++) {
      if (end_) return;
      if (awake_) {
        spins < kSpins ? pause() : std::this_thread::yield();
      } else {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return awake_ || end_ || round_.load(std::memory_order_acquire) != seen; });
        spins = 0;
      }
    }
    seen++;
    take(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace lamoe
