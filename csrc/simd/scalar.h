// Every vector operation in plain C++. This file runs on every CPU, and it is the readable
// definition of each operation.
#pragma once
#include "simd/common.h"

#define UNROLL

namespace lamoe {
namespace LAMOE_ISA {

struct vf {
  float v[16];
};
struct vw {
  int32_t v[16];
};

#define EACH for (int i = 0; i < 16; i++)

// ---- floats -------------------------------------------------------------------------------------
INLINE vf vset(float x) {
  vf r;
  EACH r.v[i] = x;
  return r;
}
INLINE vf vzero() { return vset(0.f); }
INLINE vf vload(const float* p) {
  vf r;
  std::memcpy(r.v, p, 64);
  return r;
}
INLINE vf vload_n(const float* p, int n) {
  vf r = vzero();
  std::memcpy(r.v, p, 4 * (n < 16 ? n : 16));
  return r;
}
INLINE void vstore(float* p, vf a) { std::memcpy(p, a.v, 64); }
INLINE void vstore_n(float* p, vf a, int n) { std::memcpy(p, a.v, 4 * (n < 16 ? n : 16)); }
INLINE vf operator+(vf a, vf b) {
  EACH a.v[i] += b.v[i];
  return a;
}
INLINE vf operator-(vf a, vf b) {
  EACH a.v[i] -= b.v[i];
  return a;
}
INLINE vf operator*(vf a, vf b) {
  EACH a.v[i] *= b.v[i];
  return a;
}
INLINE vf operator/(vf a, vf b) {
  EACH a.v[i] /= b.v[i];
  return a;
}
INLINE vf vfma(vf a, vf b, vf c) {
  EACH c.v[i] += a.v[i] * b.v[i];
  return c;
}
INLINE vf vrecip(vf a) { return vset(1.f) / a; }
INLINE vf vmax(vf a, vf b) {
  EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
INLINE vf vmin(vf a, vf b) {
  EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
INLINE vf vzero_if_less(vf a, vf x, vf y) {
  EACH a.v[i] = x.v[i] < y.v[i] ? 0.f : a.v[i];
  return a;
}
INLINE vf vabs(vf a) {
  EACH a.v[i] = std::fabs(a.v[i]);
  return a;
}
INLINE vf vround(vf a) {
  EACH a.v[i] = std::nearbyintf(a.v[i]);
  return a;
}
INLINE vf vsqrt(vf a) {
  EACH a.v[i] = std::sqrt(a.v[i]);
  return a;
}
INLINE vf vpow2(vf p, vf n) {
  EACH p.v[i] = std::ldexp(p.v[i], int(n.v[i]));
  return p;
}
INLINE float vsum(vf a) {
  float s = 0;
  EACH s += a.v[i];
  return s;
}
INLINE float vhmax(vf a) {
  float s = a.v[0];
  EACH s = a.v[i] > s ? a.v[i] : s;
  return s;
}
INLINE bool vdiffers(vf a, vf b) {
  bool d = false;
  EACH d |= !(a.v[i] == b.v[i]);
  return d;
}
INLINE vf vcvt(vw a) {
  vf r;
  EACH r.v[i] = float(a.v[i]);
  return r;
}

// ---- words --------------------------------------------------------------------------------------
INLINE vw wload(const void* p) {
  vw r;
  std::memcpy(r.v, p, 64);
  return r;
}
INLINE void wstore(void* p, vw a) { std::memcpy(p, a.v, 64); }
INLINE vw wset(int32_t x) {
  vw r;
  EACH r.v[i] = x;
  return r;
}
INLINE vw wfields(const uint8_t* p, int shift, int mask) {
  vw r;
  EACH r.v[i] = p[i] >> shift & mask;
  return r;
}
INLINE vw wor_left(vw a, vw b, int shift) {
  EACH a.v[i] |= b.v[i] << shift;
  return a;
}

// ---- bfloat16 -----------------------------------------------------------------------------------
INLINE vf vload_bf16(const uint16_t* p) {
  vf r;
  EACH r.v[i] = bf16_to_float(p[i]);
  return r;
}
INLINE void vstore_bf16(uint16_t* p, vf a) { EACH p[i] = float_to_bf16(a.v[i]); }
INLINE vf dot_bf16(vf acc, vw w, const void* x) {
  const uint16_t* y = (const uint16_t*)x;
  float x0 = bf16_to_float(y[0]), x1 = bf16_to_float(y[1]);
  EACH acc.v[i] += bf16_to_float(uint16_t(w.v[i])) * x0;
  EACH acc.v[i] += bf16_to_float(uint16_t(uint32_t(w.v[i]) >> 16)) * x1;
  return acc;
}
INLINE vf dot_f32(vf acc, vw w, const void* x) {
  float f;
  std::memcpy(&f, x, 4);
  vf u;
  std::memcpy(u.v, w.v, 64);
  EACH acc.v[i] += u.v[i] * f;
  return acc;
}

// ---- quantised weights --------------------------------------------------------------------------
INLINE vw wspread(const void* x) {
  int32_t v;
  std::memcpy(&v, x, 4);
  return wset(v);
}
INLINE vw dot_int8(vw acc, vw w, vw x) {
  EACH for (int j = 0; j < 4; j++) acc.v[i] +=
      int32_t(uint32_t(w.v[i]) >> (8 * j) & 255) * int8_t(uint32_t(x.v[i]) >> (8 * j) & 255);
  return acc;
}
INLINE vw dot_int8(vw acc, vw w, const int8_t* x) {
  EACH for (int j = 0; j < 4; j++) acc.v[i] += int32_t(uint32_t(w.v[i]) >> (8 * j) & 255) * x[j];
  return acc;
}
INLINE vw dot_int4(vw acc, vw w, vw x) { return dot_int8(acc, w, x); }
INLINE vw dot_int4(vw acc, vw w, const int8_t* x) { return dot_int8(acc, w, x); }
INLINE vw start_int8(int32_t c) { return wset(2 * c); }
INLINE vw decode_int8(const uint8_t* p) { return wload(p); }
INLINE void decode_int4(const uint8_t* p, vw& low, vw& high) {
  uint8_t a[64], b[64];
  for (int i = 0; i < 64; i++) a[i] = kLevels[p[i] & 15], b[i] = kLevels[p[i] >> 4];
  low = wload(a), high = wload(b);
}
INLINE vf vscales(const uint8_t* p) {
  vf r;
  EACH r.v[i] = scale_value(p[i]);
  return r;
}
INLINE int vquant(int8_t* p, vf x) {
  float t[16];
  vstore(t, vround(x));
  int s = 0;
  for (int i = 0; i < 16; i++) p[i] = int8_t(t[i]), s += p[i];
  return s;
}

// ---- low-bit cache rows -------------------------------------------------------------------------
INLINE vw bfields(const uint8_t* p, int shift, int mask) {
  uint8_t t[64];
  for (int i = 0; i < 64; i++) t[i] = uint8_t(p[i] >> shift & mask);
  return wload(t);
}
INLINE vw bor_left(vw a, vw b, int shift) {
  EACH a.v[i] |= int32_t(uint32_t(b.v[i]) << shift);
  return a;
}
INLINE void bfactors(const uint8_t* p, uint8_t* out) {
  for (int i = 0; i < 32; i++) out[i] = uint8_t((p[i / 2] >> (i % 2 ? 4 : 0) & 15) + 1);
}
INLINE void vfactors(const uint8_t* p, float base, float* out) {
  for (int i = 0; i < 32; i++)
    out[i] = base * (float((p[i / 2] >> (i % 2 ? 4 : 0) & 15) + 1) * (1.f / 16));
}
template <int Q>
INLINE vf bfloats(vw a) {
  uint8_t t[64];
  wstore(t, a);
  vf r;
  EACH r.v[i] = float(t[16 * Q + i]);
  return r;
}
INLINE vw dot_bytes(vw acc, vw w, const void* x) { return dot_int8(acc, wspread(x), w); }
INLINE int32_t wsum(vw a) {
  int32_t s = 0;
  EACH s += a.v[i];
  return s;
}
INLINE vw wround(vf a) {
  vw r;
  EACH r.v[i] = int32_t(std::nearbyintf(a.v[i]));
  return r;
}
template <int N>
INLINE vw bscale(vw code, const uint8_t* f, int up) {
  uint8_t t[64];
  wstore(t, code);
  for (int i = 0; i < 64; i++)
    t[i] = uint8_t(((t[i] - (1 << (N - 1))) * f[i / 16] + (N == 4 ? 0 : (i + up) % 2)) >> (N - 4));
  return wload(t);
}
INLINE vw btranspose(vw a) {
  vw r;
  EACH r.v[i] = a.v[i % 4 * 4 + i / 4];
  return r;
}
INLINE void bquads(const int8_t* r, size_t stride, vw* out) {
  for (int k = 0; k < 4; k++) {
    uint8_t t[64];
    for (int i = 0; i < 64; i++)
      t[i] = uint8_t(r[size_t(i % 4) * stride + i / 16 * 16 + 4 * k + i / 4 % 4]);
    out[k] = wload(t);
  }
}
INLINE vw interleave_bf16(const uint16_t* a, const uint16_t* b) {
  vw r;
  EACH r.v[i] = int32_t(uint32_t(a[i]) | uint32_t(b[i]) << 16);
  return r;
}
INLINE vw pair_bf16(vf a, vf b) {
  vw r;
  EACH r.v[i] = int32_t(uint32_t(float_to_bf16(a.v[i])) | uint32_t(float_to_bf16(b.v[i])) << 16);
  return r;
}
INLINE void vstore_bf16(uint16_t* p, vf a, vf b) { vstore_bf16(p, a), vstore_bf16(p + 16, b); }
#undef EACH
INLINE void transpose_words(const void* in, size_t in_stride, void* out, size_t stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++)
      std::memcpy((uint8_t*)out + stride * j + 4 * i, (const uint8_t*)in + in_stride * i + 4 * j,
                  4);
}

template <class V>
INLINE void in_register(V& x) {
#if defined(__SSE2__)
  typedef float quarter __attribute__((vector_size(16)));
  quarter t[4];
  std::memcpy(t, &x, 64);
  asm volatile("" : "+x"(t[0]), "+x"(t[1]), "+x"(t[2]), "+x"(t[3]));
  std::memcpy(&x, t, 64);
#else
  // There is no vector register to name, so x goes through memory. The measured rate is therefore
  // a lower bound.
  asm volatile("" : "+m"(x));
#endif
}

struct Traits {
  // The CPU features that these kernels need, separated by spaces. dispatch.cpp checks them.
  static constexpr const char* kCpuFeatures = "";

  // Constants of linear.cpp. A micro-kernel keeps the sums of all its rows in registers.
  static constexpr int kIntRows = 8;  // rows of an INT8 / INT4 micro-kernel for one tile of weights
  static constexpr int kPairTiles = 1;    // decoded tiles that share each load of an activation
  static constexpr int kPairRows = 8;     // rows of a micro-kernel for kPairTiles decoded tiles
  static constexpr int kUnitTiles = 2;    // tiles of an FP32 / BF16 micro-kernel
  static constexpr int kUnitRows = 6;     // rows of an FP32 / BF16 micro-kernel
  static constexpr int kDecodeRows = 16;  // fewest rows for which tiles are decoded into scratch
  // Cache level that weights are prefetched to, as the argument of __builtin_prefetch: 3 is L1, 2
  // is L2. On Intel CPUs L2 is better, because a line on its way to L1 occupies one of the few
  // buffers that all loads share.
  static constexpr int kPrefetchLevel = 3;

  // Constants of attention.cpp and attention_ints.cpp.
  static constexpr int kScoreRows = 4;  // cache rows whose scores are summed at once
  static constexpr int kOutLanes = 4;   // lanes whose outputs are summed at once
  static constexpr int kMaxByte = 255;  // largest unsigned operand of dot_bytes

  // Constants of probe.cpp: numbers of independent sums, enough to hide the latency of an
  // operation.
  static constexpr int kProbeInt = 8, kProbeBf16 = 2, kProbeFp32 = 2;
};
using Tiles = NoTiles;

}  // namespace LAMOE_ISA
}  // namespace lamoe
