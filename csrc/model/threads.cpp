#include "model/threads.h"

#include <pthread.h>

#include <chrono>
#include <utility>

namespace lamoe {
namespace {
using Clock = std::chrono::steady_clock;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Bounded spinning: again() waits for a moment and returns false when the time is up. The bound is
// longer than the serial work between two rounds, and much shorter than a time slice of the
// scheduler. It is a time, not a count, because a pause takes 4 to 140 cycles, depending on the
// CPU.
class Spin {
 public:
  bool again() {
    pause();
    if (++spins_ % kSpinsPerClock) return true;
    const auto now = Clock::now();
    if (spins_ == kSpinsPerClock) end_ = now + kBound;
    return now < end_;
  }

 private:
  static constexpr uint32_t kSpinsPerClock = 64;
  static constexpr std::chrono::microseconds kBound{100};
  uint32_t spins_ = 0;
  Clock::time_point end_;
};

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

Threads::Team::Team(int n) : ranges(n) {
  try {
    for (int i = 1; i < n; i++) workers.emplace_back([this, i] { work(i); });
  } catch (...) {  // the system refuses another thread
    stop();
    throw;
  }
}

void Threads::Team::stop() {
  end = true;
  wake_workers();
  for (auto& w : workers) w.join();
}

// Ends the sleep of all workers. They spin again, even if the round that they were woken for is
// closed by then: the next one follows soon.
void Threads::Team::wake_workers() {
  {
    std::lock_guard<std::mutex> lock(sleep);
    workers_sleep = false;
    wakes++;
  }
  work_to_do.notify_all();
}

Threads::Session::Session(Threads& t) {
  if (t.born_ != forks) t.renew();
  one_ = std::unique_lock<std::mutex>(t.team_->one);
  if (t.team_->workers_sleep.load()) t.team_->wake_workers();
}

// Runs one round. `round` becomes odd (open), all threads take items, and `round` becomes even
// (closed). Then the caller waits until no worker is inside. A worker first increments `inside` and
// then reads `round` again. Either the worker sees that the round is closed and leaves, or the
// caller sees the worker inside. Both sides write one variable and then read the other, so the
// accesses must be seq_cst.
//
// The same holds for sleep. A worker sets `workers_sleep` and then reads `round` once more; the
// caller changes `round` and then reads `workers_sleep`. Either the worker sees the new round, or
// the caller sees that it must wake workers. At the end of a round, `caller_sleeps` and `inside`
// are such a pair.
void Threads::Team::go(int items, const void* function) {
  f = function;
  ranges.divide(items);
  round.fetch_add(1);
  if (workers_sleep.load()) wake_workers();
  take(0);
  round.fetch_add(1);
  for (Spin spin; inside.load() && spin.again();) {
  }
  if (inside.load()) {
    std::unique_lock<std::mutex> lock(sleep);
    caller_sleeps.store(true);
    all_left.wait(lock, [&] { return !inside.load(); });
    caller_sleeps.store(false);
  }
  if (failed.load(std::memory_order_relaxed)) {
    failed.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error, nullptr));
  }
}

void Threads::Team::take(int thread) noexcept {
  try {
    ranges.take(thread, [&](int i) {
      if (failed.load(std::memory_order_relaxed)) return false;
      call(f, i, thread);
      return true;
    });
  } catch (...) {
    if (!failed.exchange(true, std::memory_order_relaxed)) error = std::current_exception();
  }
}

void Threads::Team::leave() {
  inside.fetch_sub(1);
  if (!caller_sleeps.load()) return;
  {
    std::lock_guard<std::mutex> lock(sleep);
  }
  all_left.notify_one();
}

// `last` is the number of the last round that this thread entered.
bool Threads::Team::may_enter(uint32_t last) const {
  const uint32_t now = round.load();
  return now % 2 && now != last;
}

void Threads::Team::work(int thread) {
  uint32_t last = 0;
  while (!end) {
    for (Spin spin; !may_enter(last) && spin.again();) {
    }
    if (may_enter(last)) {
      inside.fetch_add(1);
      if (const uint32_t now = round.load(); now % 2) {
        last = now;
        take(thread);
      }
      leave();
    } else {
      std::unique_lock<std::mutex> lock(sleep);
      workers_sleep.store(true);
      if (end || may_enter(last)) continue;
      work_to_do.wait(lock, [&, before = wakes] { return wakes != before; });
    }
  }
}

}  // namespace lamoe
