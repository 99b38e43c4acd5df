// Runs the items of a training kernel on several threads.
//
// If torch's OpenMP runtime is in the process, its threads are used. Two teams of threads would
// compete for the cores, because the threads of OpenMP spin for a while after each of torch's own
// operations. Without OpenMP, a team of model/threads.h runs the items.
//
// Each thread first takes the items of its own range in order, then single items of other ranges.
// The result of an item must not depend on the thread that computes it.
#pragma once
#include <cstddef>

namespace lamoe {

class Parallel {
 public:
  explicit Parallel(int threads) : threads_(threads < 1 ? 1 : threads) {}
  int threads() const { return threads_; }

  // Calls f(item, thread) for every item from 0 to items - 1, with 0 <= thread < threads().
  // f must not throw.
  template <class F>
  void operator()(int items, const F& f) const {
    if (items > 0)
      go(items, [](const void* g, int i, int t) { (*static_cast<const F*>(g))(i, t); }, &f);
  }

  // Memory that is kept between calls, aligned to 64 bytes, with undefined content. `shared` has
  // several slots for all threads; `own` has one slot per thread. A later call for the same slot
  // with more bytes invalidates the memory. Call only outside of the parallel part of an operation.
  void* shared(int slot, size_t bytes) const;
  // Returns the slots of all threads as one allocation: slot t begins at t * stride, where stride
  // is `bytes` rounded up to a multiple of 4096, plus 64.
  struct Own {
    char* data;
    size_t stride;
    template <class T>
    T* at(int thread, size_t offset = 0) const {
      return (T*)(data + thread * stride + offset);
    }
  };
  Own own(size_t bytes) const;

  // Holds the memory of `shared` and `own` while an operation runs. Operations of other threads of
  // the program wait.
  class Lock {
   public:
    Lock();
    ~Lock();
    Lock(const Lock&) = delete;
  };

 private:
  void go(int items, void (*call)(const void*, int, int), const void* f) const;
  int threads_;
};

// Bytes that `shared` and `own` hold.
size_t kept_bytes();

// The name of the runtime whose threads run the items: "openmp" or "own".
const char* parallel_runtime();

}  // namespace lamoe
