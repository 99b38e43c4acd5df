// RMS norm, rotary embedding, and conversion of activation rows to the forms in Acts.
#include <limits>

#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {

void put_block(const Acts& a, int row, int block, const float* x) {
  const size_t at = size_t(row) * a.stride + size_t(block) * kBlock;
  if (a.f) std::memcpy(a.f + at, x, kBlock * 4);
  if (a.h)
    for (int j = 0; j < kBlock; j += 16) vstore_bf16(a.h + at + j, vload(x + j));
  if (!a.q) return;
  vf v[4], top = vzero(), bad = vzero();
  for (int j = 0; j < 4; j++) {
    v[j] = vload(x + 16 * j);
    top = vmax(top, vabs(v[j]));
    bad = bad + v[j] * vzero();  // NaN if an element is not finite; the scale s then is NaN too
  }
  const float s = vhmax(top) / 127.f + vsum(bad);
  // 1 / s would overflow if s were below the smallest normal float. The bytes are then zero.
  const bool some = s >= std::numeric_limits<float>::min();
  const float inverse = some ? 1.f / s : 0.f;
  a.s[at / kBlock] = s;
  for (int j = 0; j < 4; j++) {
    const vf scaled = some ? v[j] * vset(inverse) : vzero();
    a.c[at / kGroup + j] = -64 * vquant(a.q + at + 16 * j, scaled);
  }
}

void put_row(const Acts& a, int row, const float* x) {
  const int whole = a.k / kBlock * kBlock;
  for (int j = 0; j < whole; j += kBlock) put_block(a, row, j / kBlock, x + j);
  if (whole < a.k) {
    float rest[kBlock] = {};
    std::memcpy(rest, x + whole, 4 * (a.k - whole));
    put_block(a, row, whole / kBlock, rest);
  }
}

void rms_norm(const float* x, const float* w, float eps, float* out, int n) {
  vf sum = vzero();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    vf v = vload(x + i);
    sum = vfma(v, v, sum);
  }
  if (i < n) {
    vf v = vload_n(x + i, n - i);
    sum = vfma(v, v, sum);
  }
  const vf inv = vset(1.f / std::sqrt(vsum(sum) / n + eps));
  for (i = 0; i < n; i += 16)
    vstore_n(out + i, vload_n(x + i, n - i) * inv * vload_n(w + i, n - i), n - i);
}

void rope(float* x, const float* cos_sin, int r, bool interleaved) {
  const int half = r / 2;
  for (int k = 0; k < half; k++) {
    float& a = x[interleaved ? 2 * k : k];
    float& b = x[interleaved ? 2 * k + 1 : k + half];
    const float u = a * cos_sin[k] - b * cos_sin[half + k];
    const float v = a * cos_sin[half + k] + b * cos_sin[k];
    a = u, b = v;
  }
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
