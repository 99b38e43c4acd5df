// Prefetching, scores and masking for absorbed attention, shared by attention.cpp and
// attention_ints.cpp.
#pragma once
#include <limits>

#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

template <int E>
INLINE vf dot_unit(vf acc, vw w, const void* x) {
  return E == FP32 ? dot_f32(acc, w, x) : dot_bf16(acc, w, x);
}

// Prefetches memory during a computation, one cache line of 64 bytes per call.
class Ahead {
 public:
  explicit Ahead(const Prefetch& p) : p_(p) {}
  INLINE void next() {
    if (p_.next < p_.next_end) __builtin_prefetch(p_.next, 0, 2), p_.next += 64;
  }
  INLINE void next(int lines) {
    for (; lines > 0; lines--) next();
  }
  // Prefetches memory that is needed after the next tile. Call it only in loops that are not bound
  // by loads: in score loops this prefetch costs more than it gains.
  INLINE void later() {
    if (p_.later < p_.later_end) __builtin_prefetch(p_.later, 0, 2), p_.later += 64;
  }
  INLINE void later(int lines) {
    for (; lines > 0; lines--) later();
  }

 private:
  Prefetch p_;
};

// Computes the scores of N cache rows for 16 lanes: s[row][lane] = row times packed query. Each row
// has `units` units of four bytes.
template <int E, int N>
void score_rows(const uint8_t* rows, size_t stride, const uint8_t* q, int units, float* s,
                Ahead& ahead) {
  vf acc[N];
  UNROLL_FOR(i, N) acc[i] = vzero();
  for (int u = 0; u < units; u++) {
    const vw w = wload(q + size_t(u) * 64);
    ahead.next();
    UNROLL_FOR(i, N) acc[i] = dot_unit<E>(acc[i], w, rows + i * stride + size_t(u) * 4);
  }
  UNROLL_FOR(i, N) vstore(s + kLanes * i, acc[i]);
}

// Computes the scores of n rows, N at a time. The remaining rows follow in smaller groups.
template <int E, int N = Traits::kScoreRows>
void vector_scores(const uint8_t* rows, size_t stride, const uint8_t* q, int units, int n, float* s,
                   Ahead& ahead) {
  for (; n >= N; n -= N, rows += N * stride, s += kLanes * N)
    score_rows<E, N>(rows, stride, q, units, s, ahead);
  if constexpr (N > 1) {
    if (n) vector_scores<E, N / 2>(rows, stride, q, units, n, s, ahead);
  }
}

template <int E, class Unit = Tiles>
void key_scores(const uint8_t* keys, size_t stride, const uint8_t* q, int key_bytes, int n,
                float* s, Ahead& ahead) {
  if constexpr (E == BF16 && Unit::kAvailable) {
    if (Unit::fits(key_bytes / 2))
      return Unit::template scores<false>(keys, stride, q, key_bytes / 64, n, s, ahead);
  }
  vector_scores<E>(keys, stride, q, key_bytes / 4, n, s, ahead);
}

// Sets the score to minus infinity where a row comes after the last visible row of a lane.
inline void mask(float (*s)[kLanes], int n, int first, const Lanes& lanes) {
  int least = lanes.last[0];
  for (int i = 1; i < lanes.count; i++) least = std::min(least, lanes.last[i]);
  for (int t = std::max(least - first + 1, 0); t < n; t++)
    for (int i = 0; i < lanes.count; i++)
      if (first + t > lanes.last[i]) s[t][i] = -INFINITY;
}

}  // namespace
}  // namespace LAMOE_ISA
}  // namespace lamoe
