// Measures the upper limits of this machine, for the utilisation that `lamoe bench` reports: bytes
// read per second, and multiply-adds per second.
#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {

float probe_read(const uint8_t* p, size_t n) {  // n: a multiple of 256
  vf a[4] = {vzero(), vzero(), vzero(), vzero()};
  for (size_t i = 0; i < n; i += 256)
    UNROLL_FOR(j, 4) a[j] = a[j] + vload((const float*)(p + i + 64 * j));
  return vsum(a[0] + a[1] + a[2] + a[3]);
}

namespace {

// Runs n times N independent sums. Operands stay in registers, so only the operation counts.
//
// in_register keeps the optimiser from shortening the loop, and from moving the sums to memory.
// OWN hides the weights too. Else the compiler would share the work before the additions between
// the N sums.
template <int N, bool OWN, class V, class Dot>
INLINE V repeat(long n, V start, vw w, Dot dot, double& done) {
  V acc[N];
  UNROLL_FOR(i, N) acc[i] = start;
  for (long k = 0; k < n; k++) {
    UNROLL_FOR(i, N) {
      if (OWN) in_register(w);
      acc[i] = dot(acc[i], w);
      in_register(acc[i]);
    }
  }
  done = double(n) * N * 16;
  return acc[0];
}

template <class Unit>
float dots(int fmt, long n, double* done) {
  if constexpr (Unit::kAvailable) {
    if (fmt != FP32) {
      *done = Unit::probe(fmt, n);
      return 0.f;
    }
  }
  alignas(64) uint8_t bytes[64];
  std::memset(bytes, 0x3f, 64);  // as floats near 1: denormals would be slow
  asm volatile("" : "+m"(bytes));
  const vw w = wload(bytes), word = wspread(bytes);
  const void* x = bytes;
  if (fmt == INT8) {
    const auto dot = [=](vw acc, vw w) { return dot_int4(acc, w, word); };
    const float sum = vsum(vcvt(repeat<Traits::kProbeInt, true>(n, wset(1), w, dot, *done)));
    *done *= 4;
    return sum;
  }
  if (fmt == BF16) {
    const auto dot = [=](vf acc, vw w) { return dot_bf16(acc, w, x); };
    const float sum = vsum(repeat<Traits::kProbeBf16, false>(n, vset(1.f), w, dot, *done));
    *done *= 2;
    return sum;
  }
  const auto dot = [=](vf acc, vw w) { return dot_f32(acc, w, x); };
  return vsum(repeat<Traits::kProbeFp32, false>(n, vset(1.f), w, dot, *done));
}

}  // namespace

// Returns a value that depends on all products, and sets *done to the multiply-adds.
float probe_dots(int fmt, long n, double* done) { return dots<Tiles>(fmt, n, done); }

}  // namespace LAMOE_ISA
}  // namespace lamoe
