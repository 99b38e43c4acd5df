#include "model/threads.h"

#include <pthread.h>

#include <utility>

namespace lamoe {
namespace {
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
constexpr int kSpins = 4000;  // spins of a waiting thread before it yields the core

// A child of fork() has only the thread that called fork(). So its first Session starts a new team.
// The handlers of watch_forks hold this lock during fork(), so a child never inherits it locked.
std::mutex renewing;
std::atomic<unsigned> forks{0};
void watch_forks() {
  static const int once = pthread_atfork([] { renewing.lock(); }, [] { renewing.unlock(); },
                                         [] { forks++, renewing.unlock(); });
  (void)once;
}
}  // namespace

Threads::Threads(int n) : n_(n < 1 ? 1 : n) {
  watch_forks();
  born_ = forks.load();
  team_ = new Team(n_);
}

Threads::~Threads() {
  if (born_ != forks) return;
  team_->stop();
  delete team_;
}

void Threads::renew() {
  std::lock_guard<std::mutex> lock(renewing);
  if (born_ == forks) return;  // another thread has already started the new team
  team_ = new Team(n_);
  born_ = forks.load();
}

Threads::Team::Team(int n) : ranges(new Range[size_t(n)]) {
  try {
    for (int i = 1; i < n; i++) workers.emplace_back([this, i] { work(i); });
  } catch (...) {  // the system refuses another thread
    stop();
    throw;
  }
}

void Threads::Team::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep);
    end = true;
  }
  wake.notify_all();
  for (auto& w : workers) w.join();
}

Threads::Session::Session(Threads& t) : t_(t) {
  if (t.born_ != forks) t.renew();
  one_ = std::unique_lock<std::mutex>(t.team_->one);
  {
    std::lock_guard<std::mutex> lock(t.team_->sleep);
    t.team_->awake = true;
  }
  t.team_->wake.notify_all();
}

Threads::Session::~Session() { t_.team_->awake = false; }

// Runs one round. `round` becomes odd (open), all threads take items, and `round` becomes even
// (closed). Then the caller waits until no worker is inside. A worker first increments `inside` and
// then reads `round` again. Either the worker sees that the round is closed and leaves, or the
// caller sees the worker inside. Both sides write one variable and then read the other, so the
// accesses must be seq_cst.
void Threads::Team::go(int items, const void* function) {
  f = function;
  const int n = size();
  for (int t = 0; t < n; t++) {
    ranges[t].next.store(int(int64_t(items) * t / n), std::memory_order_relaxed);
    ranges[t].end = int(int64_t(items) * (t + 1) / n);
  }
  round.fetch_add(1);
  take(0);
  round.fetch_add(1);
  for (int spins = 0; inside.load(); spins++) spins < kSpins ? pause() : std::this_thread::yield();
  if (failed.load(std::memory_order_relaxed)) {
    failed.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error, nullptr));
  }
}

void Threads::Team::take(int thread) noexcept {
  try {
    for (int k = 0, n = size(); k < n; k++) {
      Range& r = ranges[(thread + k) % n];
      for (int i; !failed.load(std::memory_order_relaxed) &&
                  (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;)
        call(f, i, thread);
    }
  } catch (...) {
    if (!failed.exchange(true, std::memory_order_relaxed)) error = std::current_exception();
  }
}

void Threads::Team::work(int thread) {
  uint32_t seen = 0;  // number of the last round that this thread entered
  for (int spins = 0; !end;) {
    const uint32_t at = round.load(std::memory_order_acquire);
    if (at % 2 && at != seen) {
      inside.fetch_add(1);
      if (const uint32_t now = round.load(); now % 2) {
        seen = now;
        take(thread);
      }
      inside.fetch_sub(1);
      spins = 0;
    } else if (awake) {
      spins++ < kSpins ? pause() : std::this_thread::yield();
    } else {
      std::unique_lock<std::mutex> lock(sleep);
      wake.wait(lock, [&] { return awake || end; });
      spins = 0;
    }
  }
}

}  // namespace lamoe
