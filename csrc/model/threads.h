// A parallel_for over a few threads that spin between calls of one step and sleep between steps.
// Each thread goes through a range of its own, in order (neighbours in memory are then read by one
// core, one behind the other), and takes single items of the others' ranges when it has done: one
// that another program slows down does fewer, and one that is not there at all is not waited for.
// What an item computes never depends on who computes it.
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

  // f(item, thread) for every item from 0 to items - 1. Not from two threads at once: the caller
  // holds a Session. What f throws in any thread is thrown here, once all threads have left f
  // (items that nobody had begun are left out).
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

  // While one exists the workers spin, ready at once. One at a time; a second caller waits.
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
    std::unique_ptr<Range[]> ranges;             // one for each thread
    alignas(64) std::atomic<uint32_t> round{0};  // odd: open, workers may come in
    alignas(64) std::atomic<int> inside{0};      // workers that may be reading call, f, ranges
  };
  void renew();

  const int n_;
  Team* team_;  // left to itself, not freed, in a child of fork(): its threads are not there, its
                // locks are in any state
  std::atomic<unsigned> born_;  // forks before this team began
};

}  // namespace lamoe
