#include "model/mapped.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>

#ifndef _WIN32
#include <signal.h>
#include <unistd.h>
#endif

namespace lamoe {
namespace {

struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // end 0: not in use
  std::string message;
  Range* next = nullptr;  // the range that was added before this one
};

std::mutex lock;
std::deque<Range> ranges;             // never shrinks, so that addresses and ids stay valid
std::atomic<Range*> newest{nullptr};  // the handler walks from here; it must not take the lock

#ifndef _WIN32
struct sigaction previous;

// Only async-signal-safe calls are allowed here.
void on_sigbus(int number, siginfo_t* info, void*) {
  const bool is_fault = info->si_code > 0;  // otherwise a process has sent the signal
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const Range* r = newest; is_fault && r != nullptr; r = r->next)
    if (r->begin <= address && address < r->end) {
      (void)!write(STDERR_FILENO, r->message.data(), r->message.size());
      _exit(kMappedFileExit);
    }
  sigaction(SIGBUS, &previous, nullptr);
  // The instruction that failed runs again after the return, and a sent signal is sent again.
  if (!is_fault) raise(number);
}

void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_sigbus;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &previous);
}
#else
void install() {}
#endif

}  // namespace

int watch_mapping(const void* begin, size_t bytes, const std::string& message) {
  const std::lock_guard<std::mutex> guard(lock);
  static const bool installed = (install(), true);
  (void)installed;
  size_t id = 0;
  while (id < ranges.size() && ranges[id].end != 0) id++;
  if (id == ranges.size()) {
    ranges.emplace_back();
    ranges.back().next = newest;
    newest = &ranges.back();
  }
  Range& range = ranges[id];
  range.message = message;
  range.begin = reinterpret_cast<uintptr_t>(begin);
  range.end = range.begin + bytes;
  return int(id);
}

void unwatch_mapping(int id) {
  const std::lock_guard<std::mutex> guard(lock);
  ranges.at(id).end = 0;
}

}  // namespace lamoe
