// Loops that measure the upper limits of this machine: bytes read per second, and multiply-adds per
// second. `lamoe bench` reports its utilisation relative to them.
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

// Adds n products to each of N independent sums. Operands stay in registers, so the time is that of
// the operation alone.
//
// in_register keeps the optimiser from shortening the loop, and from moving the sums to memory. OWN
// hides the weights from the optimiser too. Otherwise it would compute the products once and share
// them between the N sums.
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
  std::memset(bytes, 0x3f, 64);  // floats near 1, because denormals would be slow
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

// Returns a value that depends on all products. Sets *done to the number of multiply-adds.
float probe_dots(int fmt, long n, double* done) { return dots<Tiles>(fmt, n, done); }

}  // namespace LAMOE_ISA
}  // namespace lamoe
