// What the machine can do at most, for the benchmarks' shares of it: bytes read per second, and
// dot-product instructions per second.
#include "cpu/kernels.h"
#if defined(LAMOE_ISA_AMX)
#include "simd/amx.h"
#endif

namespace lamoe {
namespace LAMOE_NS {

float probe_read(const uint8_t* p, size_t n) {  // n: a multiple of 256
  vf a[4] = {vzero(), vzero(), vzero(), vzero()};
  for (size_t i = 0; i < n; i += 256)
    UNROLL_FOR(j, 4) a[j] = a[j] + vload((const float*)(p + i + 64 * j));
  return vsum(a[0] + a[1] + a[2] + a[3]);
}

namespace {

// From here on the compiler does not know the value of x, and x is in registers: a loop with it can
// neither be shortened nor keep copies in memory (sums that are added up after a loop were stored
// in every turn of it, which was a third to two thirds of the time without AVX-512). kSums: as many
// as hide the latency and leave room for the operands (one register for activations, two for
// weights; bfloat16: two and four, taken apart).
#if defined(LAMOE_ISA_AVX512)
template <class V>
INLINE void hide(V& x) {
  asm volatile("" : "+v"(x.v));
}
constexpr int kSumsInt = 16, kSumsBf16 = 16, kSumsF32 = 16;
#elif defined(LAMOE_ISA_AVX2)
template <class V>
INLINE void hide(V& x) {
  asm volatile("" : "+x"(x.a), "+x"(x.b));
}
constexpr int kSumsInt = 6, kSumsBf16 = 5, kSumsF32 = 6;  // of two registers each, out of sixteen
#else
template <class V>
INLINE void hide(V& x) {
#if defined(__SSE2__)
  typedef float quarter __attribute__((vector_size(16)));
  quarter t[4];
  std::memcpy(t, &x, 64);
  asm volatile("" : "+x"(t[0]), "+x"(t[1]), "+x"(t[2]), "+x"(t[3]));
  std::memcpy(&x, t, 64);
#else
  asm volatile("" : "+m"(x));  // in no registers that could be named: a lower bound
#endif
}
constexpr int kSumsInt = 8, kSumsBf16 = 2, kSumsF32 = 2;
#endif

// `n` times N sums, none of which waits for another. The operands stay where they are, so only the
// operation itself counts. OWN: each has weights of its own as far as the compiler knows, or it
// would do all that comes before the addition once for all sums.
template <int N, bool OWN, class V, class Dot>
INLINE V repeat(long n, V start, vw w, Dot dot, double& done) {
  V acc[N];
  UNROLL_FOR(i, N) acc[i] = start;
  for (long k = 0; k < n; k++)
    UNROLL_FOR(i, N) {
      if (OWN) hide(w);
      acc[i] = dot(acc[i], w);
      hide(acc[i]);
    }
  done = double(n) * N * 16;
  return acc[0];
}

}  // namespace

// 16 lanes of dot products of format fmt, out of registers; the multiply-adds done are in `done`.
float probe_dots(int fmt, long n, double* done) {
  alignas(64) uint8_t bytes[64];
  std::memset(bytes, 0x3f, 64);  // as floats near 1: denormals would be slow
  asm volatile("" : "+m"(bytes));
  const vw w = wload(bytes), word = wspread(bytes);
  const void* x = bytes;
  float sum;
#if defined(LAMOE_ISA_AMX)
  if (fmt != FP32) {
    TileShapes shapes;
    for (int i = 0; i < 8; i++) shapes.set(i, 16, 64);
    shapes.load();
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(), tile_zero<4>(), tile_zero<5>(),
        tile_zero<6>(), tile_zero<7>();
    for (long k = 0; k < n; k++)
      if (fmt == INT8)
        tile_ss<0, 4, 6>(), tile_ss<1, 4, 7>(), tile_ss<2, 5, 6>(), tile_ss<3, 5, 7>();
      else
        tile_bf16<0, 4, 6>(), tile_bf16<1, 4, 7>(), tile_bf16<2, 5, 6>(), tile_bf16<3, 5, 7>();
    *done = double(n) * 4 * 16 * 16 * (fmt == INT8 ? 64 : 32);
    return 0.f;
  }
#endif
  if (fmt == INT8) {
    sum = vsum(vcvt(repeat<kSumsInt, true>(
        n, wset(1), w, [=](vw acc, vw w) { return dot_int4(acc, w, word); }, *done)));
    *done *= 4;
  } else if (fmt == BF16) {
    sum = vsum(repeat<kSumsBf16, false>(
        n, vset(1.f), w, [=](vf acc, vw w) { return dot_bf16(acc, w, x); }, *done));
    *done *= 2;
  } else {
    sum = vsum(repeat<kSumsF32, false>(
        n, vset(1.f), w, [=](vf acc, vw w) { return dot_f32(acc, w, x); }, *done));
  }
  return sum;
}

}  // namespace LAMOE_NS
}  // namespace lamoe
