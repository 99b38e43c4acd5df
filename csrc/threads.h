// A parallel_for over a few threads that spin between calls of one step and sleep between steps. Each thread goes through a range of its own, in
// order (neighbours in memory are then read by one core, one behind the other), and takes single items of the others' ranges when it has done: one
// that another program slows down does fewer, and one that is not there at all is not waited for. What an item computes never depends on who computes it.
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
  int size() const { return int(workers_.size()) + 1; }

  // f(item, thread) for every item from 0 to items - 1. Not from two threads at once: the caller holds a Session. What f throws in any thread
  // is thrown here, once all threads have left f (items that nobody had begun are left out).
  template <class F>
  void run(int items, const F& f) {
    if (items <= 0) return;
    if (workers_.empty() || items == 1) {
      for (int i = 0; i < items; i++) f(i, 0);
      return;
    }
    call_ = [](const void* g, int i, int t) { (*static_cast<const F*>(g))(i, t); };
    go(items, &f);
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
  void go(int items, const void* f);
  void work(int thread);
  void take(int thread) noexcept;
  void stop();

  std::vector<std::thread> workers_;
  std::mutex one_, sleep_;
  std::condition_variable wake_;
  std::atomic<bool> awake_{false}, end_{false};
  void (*call_)(const void*, int, int) = nullptr;
  const void* f_ = nullptr;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  struct alignas(64) Range {
    std::atomic<int> next{0};
    int end = 0;
  };
  std::unique_ptr<Range[]> ranges_;  // one for each thread
  alignas(64) std::atomic<uint32_t> round_{0};  // odd: open, workers may come in
  alignas(64) std::atomic<int> inside_{0};      // workers that may be reading call_, f_, ranges_
};

}  // namespace lamoe
