// What the machine can do at most, for the benchmarks' shares of it: bytes read per second, and dot-product instructions per second.
#include "kernels.h"

namespace lamoe {
namespace LAMOE_NS {

float probe_read(const uint8_t* p, size_t n) {  // n: a multiple of 256
  vf a[4] = {vzero(), vzero(), vzero(), vzero()};
  for (size_t i = 0; i < n; i += 256)
    UNROLL for (int j = 0; j < 4; j++) a[j] = a[j] + vload((const float*)(p + i + 64 * j));
  return vsum(a[0] + a[1] + a[2] + a[3]);
}

// 16 lanes x 16 independent sums, `n` times; the multiply-adds done are in `done`.
float probe_dots(int fmt, long n, double* done) {
  alignas(64) uint8_t w[64];
  alignas(64) int8_t x[64] = {};
  for (int i = 0; i < 64; i++) w[i] = 0x3f, x[i] = 0x3f;  // as floats near 1: denormals would be slow
  const vw v = wload(w);
  float sum = 0;
  if (fmt == INT8) {
    vw acc[16];
    UNROLL for (int i = 0; i < 16; i++) acc[i] = wset(i);
    for (long k = 0; k < n; k++) UNROLL for (int i = 0; i < 16; i++) acc[i] = dot_int4(acc[i], v, x);
    for (int i = 0; i < 16; i++) sum += vsum(vcvt(acc[i]));
  } else {
    vf acc[16];
    UNROLL for (int i = 0; i < 16; i++) acc[i] = vset(float(i));
    for (long k = 0; k < n; k++) UNROLL for (int i = 0; i < 16; i++) acc[i] = fmt == BF16 ? dot_bf16(acc[i], v, x) : dot_f32(acc[i], v, x);
    for (int i = 0; i < 16; i++) sum += vsum(acc[i]);
  }
  *done = double(n) * 16 * 16 * (fmt == INT8 ? 4 : fmt == BF16 ? 2 : 1);
  return sum;
}

}  // namespace LAMOE_NS
}  // namespace lamoe
