// A parallel_for over a few threads. After a call, the threads spin for a short time, so that the
// next call starts without delay. Then they sleep: when other programs keep the cores busy, a
// thread that spins may take the core from the thread that it waits for.
//
// Each thread first processes its own range of items, in order, so that one core reads neighbouring
// memory. Then it takes single items from the ranges of other threads. So a thread that another
// program slows down processes fewer items, and the others do not wait for a thread that is not
// scheduled at all. The result of an item must not depend on the thread that computes it.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lamoe {

// The items of one parallel run, divided into a range for each thread.
class ItemRanges {
 public:
  explicit ItemRanges(int threads) : threads_(threads), ranges_(new Range[size_t(threads)]) {}

  // Divides the items 0 to items - 1. No thread may be inside of `take`.
  void divide(int items) {
    for (int t = 0; t < threads_; t++) {
      const auto begin = [&](int i) { return int(int64_t(items) * i / threads_); };
      ranges_[t].next.store(begin(t), std::memory_order_relaxed);
      ranges_[t].end = begin(t + 1);
    }
  }

  // Calls f(item) for the items of the thread's own range, then for those left in the others. Stops
  // when f returns false.
  template <class F>
  void take(int thread, const F& f) {
    for (int k = 0; k < threads_; k++) {
      Range& r = ranges_[(thread + k) % threads_];
      for (int i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;)
        if (!f(i)) return;
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<int> next{0};
    int end = 0;
  };
  const int threads_;
  std::unique_ptr<Range[]> ranges_;
};

class Threads {
 public:
  explicit Threads(int n);
  ~Threads();
  Threads(const Threads&) = delete;
  int size() const { return n_; }

  // Calls f(item, thread) for every item from 0 to items - 1. The caller must hold a Session. If f
  // throws in any thread, items that have not begun are skipped. When all threads have left f, the
  // exception is rethrown here.
  template <class F>
  void run(int items, const F& f) {
    if (items <= 0) return;
    if (n_ == 1 || items == 1) {
      for (int i = 0; i < items; i++) f(i, 0);
      return;
    }
    team_->call = [](const void* g, int i, int t) { (*static_cast<const F*>(g))(i, t); };
    team_->go(items, &f);
  }

  // Wakes the workers, so that they are ready for the first call. Only one Session can exist at a
  // time. A second caller waits until the first Session ends.
  class Session {
   public:
    explicit Session(Threads& t);

   private:
    std::unique_lock<std::mutex> one_;
  };

 private:
  struct Team {
    explicit Team(int n);
    void go(int items, const void* f);
    void work(int thread);
    void take(int thread) noexcept;
    void leave();
    void stop();
    void wake_workers();
    bool may_enter(uint32_t last) const;

    int size() const { return int(workers.size()) + 1; }

    std::vector<std::thread> workers;
    std::mutex one, sleep;
    std::condition_variable work_to_do, all_left;
    uint64_t wakes = 0;  // number of calls of wake_workers; guarded by sleep
    std::atomic<bool> end{false};
    std::atomic<bool> workers_sleep{false}, caller_sleeps{false};  // whom to notify
    void (*call)(const void*, int, int) = nullptr;
    const void* f = nullptr;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    ItemRanges ranges;
    alignas(64) std::atomic<uint32_t> round{0};  // odd while a round is open for workers
    alignas(64) std::atomic<int> inside{0};      // number of workers that may read call, f, ranges
  };
  void renew();

  const int n_;
  // A child of fork() abandons the team without freeing it. The threads do not exist in the child,
  // and the locks are in an unknown state.
  Team* team_;
  std::atomic<unsigned> born_;  // value of the fork counter when this team started
};

}  // namespace lamoe
