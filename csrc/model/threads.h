// A parallel_for over a few threads. The threads spin between the calls of one step and sleep
// between steps.
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

  // While a Session exists, the workers spin, so that they start without delay. Only one Session
  // can exist at a time. A second caller waits until the first Session ends.
  class Session {
   public:
    explicit Session(Threads& t);
    ~Session();

   private:
    Threads& t_;
    std::unique_lock<std::mutex> one_;
  };

 private:
  struct Team {
    explicit Team(int n);
    void go(int items, const void* f);
    void work(int thread);
    void take(int thread) noexcept;
    void stop();

    int size() const { return int(workers.size()) + 1; }

    std::vector<std::thread> workers;
    std::mutex one, sleep;
    std::condition_variable wake;
    std::atomic<bool> awake{false}, end{false};
    void (*call)(const void*, int, int) = nullptr;
    const void* f = nullptr;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    struct alignas(64) Range {
      std::atomic<int> next{0};
      int end = 0;
    };
    std::unique_ptr<Range[]> ranges;             // the items of each thread
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
