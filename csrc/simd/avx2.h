// AVX2 with FMA. A vector is two registers of 256 bits. Compiled with -mavxvnni, this file also
// implements the instruction set `avxvnni`, which adds byte dot products to AVX2.
#pragma once
#include <immintrin.h>

#include "simd/common.h"

#define UNROLL UNROLL_LOOP

namespace lamoe {
namespace LAMOE_ISA {

struct vf {
  __m256 a, b;
};
struct vw {
  __m256i a, b;
};

// ---- floats -------------------------------------------------------------------------------------
INLINE vf vset(float x) {
  __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
INLINE vf vzero() { return vset(0.f); }
INLINE vf vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vstore(float* p, vf x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE vf vload_n(const float* p, int n) {
  alignas(32) float t[16] = {};
  std::memcpy(t, p, 4 * (n < 16 ? n : 16));
  return vload(t);
}
INLINE void vstore_n(float* p, vf x, int n) {
  if (n >= 16) return vstore(p, x);
  alignas(32) float t[16];
  vstore(t, x);
  std::memcpy(p, t, 4 * n);
}
INLINE vf operator+(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE vf operator-(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE vf operator*(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE vf operator/(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE vf vfma(vf x, vf y, vf z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE vf vrecip(vf x) { return vset(1.f) / x; }
INLINE vf vmax(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE vf vmin(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE vf vzero_if_less(vf z, vf x, vf y) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NLT_UQ), z.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NLT_UQ), z.b)};
}
INLINE vf vabs(vf x) {
  __m256 m = (__m256)_mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
INLINE vf vround(vf x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
INLINE vf vsqrt(vf x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
// Returns p * 2^n for whole n from -126 to 127. 2^n is built from its exponent bits.
INLINE __m256 pow2_half(__m256 p, __m256 n) {
  return _mm256_mul_ps(p, (__m256)_mm256_slli_epi32(
                              _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vf vpow2(vf p, vf n) { return {pow2_half(p.a, n.a), pow2_half(p.b, n.b)}; }
INLINE float vsum(vf x) {
  alignas(32) float t[16];
  vstore(t, x);
  float s = 0;
  for (int i = 0; i < 16; i++) s += t[i];
  return s;
}
INLINE float vhmax(vf x) {
  alignas(32) float t[16];
  vstore(t, x);
  float s = t[0];
  for (int i = 1; i < 16; i++) s = t[i] > s ? t[i] : s;
  return s;
}
INLINE bool vdiffers(vf x, vf y) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NEQ_UQ),
                                         _mm256_cmp_ps(x.b, y.b, _CMP_NEQ_UQ))) != 0;
}
INLINE vf vcvt(vw x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

// ---- words --------------------------------------------------------------------------------------
INLINE vw wload(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE void wstore(void* p, vw x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
INLINE vw wset(int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  return {v, v};
}
INLINE __m256i half_fields(const uint8_t* p, int shift, int mask) {
  return _mm256_and_si256(_mm256_srl_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                                           _mm_cvtsi32_si128(shift)),
                          _mm256_set1_epi32(mask));
}
INLINE vw wfields(const uint8_t* p, int shift, int mask) {
  return {half_fields(p, shift, mask), half_fields(p + 8, shift, mask)};
}
INLINE vw wor_left(vw x, vw y, int shift) {
  __m128i n = _mm_cvtsi32_si128(shift);
  return {_mm256_or_si256(x.a, _mm256_sll_epi32(y.a, n)),
          _mm256_or_si256(x.b, _mm256_sll_epi32(y.b, n))};
}

// ---- bfloat16 -----------------------------------------------------------------------------------
INLINE __m256 half_bf16(const uint16_t* p) {
  return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE vf vload_bf16(const uint16_t* p) { return {half_bf16(p), half_bf16(p + 8)}; }
// Rounds floats to bfloat16, to nearest even. NaN stays NaN.
INLINE __m256i round_bf16(__m256 x) {
  __m256i u = (__m256i)x, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0),
                            (__m256i)_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
INLINE void vstore_bf16(uint16_t* p, vf x) {
  __m256i t = _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b)), 0xd8);
  _mm256_storeu_si256((__m256i*)p, t);
}
INLINE __m256 dot_half_bf16(__m256 acc, __m256i w, __m256 x0, __m256 x1) {
  acc = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(w, 16), x0, acc);
  return _mm256_fmadd_ps((__m256)_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000))), x1, acc);
}
INLINE vf dot_bf16(vf acc, vw w, const void* x) {
  __m256i u = _mm256_set1_epi32(*(const int32_t*)x);
  __m256 x0 = (__m256)_mm256_slli_epi32(u, 16),
         x1 = (__m256)_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000)));
  return {dot_half_bf16(acc.a, w.a, x0, x1), dot_half_bf16(acc.b, w.b, x0, x1)};
}
INLINE vf dot_f32(vf acc, vw w, const void* x) {
  __m256 v = _mm256_broadcast_ss((const float*)x);
  return {_mm256_fmadd_ps((__m256)w.a, v, acc.a), _mm256_fmadd_ps((__m256)w.b, v, acc.b)};
}

// ---- quantised weights --------------------------------------------------------------------------
INLINE vw wspread(const void* x) { return wset(*(const int32_t*)x); }
#if defined(__AVXVNNI__)
// Inline assembly for the same reason as dot_int8 in avx512.h. {vex} selects the AVX-VNNI encoding.
INLINE vw dot_int8(vw acc, vw w, vw x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.a) : "x"(w.a), "x"(x.a));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.b) : "x"(w.b), "x"(x.b));
  return acc;
}
INLINE vw dot_int4(vw acc, vw w, vw x) { return dot_int8(acc, w, x); }
INLINE vw start_int8(int32_t c) { return wset(2 * c); }
INLINE vw decode_int8(const uint8_t* p) { return wload(p); }
#else
// Adds four byte products to each word. The instruction sums pairs of products in 16 bits, and the
// operands must be small enough that these sums do not saturate.
INLINE __m256i dot4(__m256i acc, __m256i u8, __m256i s8) {
  return _mm256_add_epi32(acc,
                          _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
}
INLINE vw dot_int4(vw acc, vw w, vw x) { return {dot4(acc.a, w.a, x.a), dot4(acc.b, w.b, x.b)}; }
// Codes are signed here. The product is |w| times (x with the sign of w), at most 127 * 127. So the
// sum of a pair stays below 2^15.
INLINE vw dot_int8(vw acc, vw w, vw x) {
  return {dot4(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(x.a, w.a)),
          dot4(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(x.b, w.b))};
}
INLINE vw start_int8(int32_t) { return wset(0); }
INLINE vw decode_int8(const uint8_t* p) {
  vw w = wload(p);
  __m256i m = _mm256_set1_epi8(char(0x80));
  return {_mm256_xor_si256(w.a, m), _mm256_xor_si256(w.b, m)};
}
#endif
INLINE vw dot_int4(vw acc, vw w, const int8_t* x) { return dot_int4(acc, w, wspread(x)); }
INLINE vw dot_int8(vw acc, vw w, const int8_t* x) { return dot_int8(acc, w, wspread(x)); }
INLINE void decode_int4(const uint8_t* p, vw& low, vw& high) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kLevels)),
                mask = _mm256_set1_epi8(15);
  vw x = wload(p);
  low = {_mm256_shuffle_epi8(table, _mm256_and_si256(x.a, mask)),
         _mm256_shuffle_epi8(table, _mm256_and_si256(x.b, mask))};
  high = {_mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask)),
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask))};
}
INLINE __m256 half_scales(const uint8_t* p) {
  __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          e = _mm256_and_si256(c, _mm256_set1_epi32(0x7f));
  __m256i u =
      _mm256_or_si256(_mm256_slli_epi32(_mm256_srli_epi32(c, 7), 31),
                      _mm256_add_epi32(_mm256_slli_epi32(e, 20), _mm256_set1_epi32(112 << 23)));
  return (__m256)_mm256_andnot_si256(_mm256_cmpeq_epi32(e, _mm256_setzero_si256()), u);
}
INLINE vf vscales(const uint8_t* p) { return {half_scales(p), half_scales(p + 8)}; }
INLINE int vquant(int8_t* p, vf x) {
  alignas(32) float t[16];
  vstore(t, vround(x));
  int s = 0;
  for (int i = 0; i < 16; i++) p[i] = int8_t(t[i]), s += p[i];
  return s;
}

// ---- low-bit cache rows -------------------------------------------------------------------------
INLINE vw bfields(const uint8_t* p, int shift, int mask) {
  __m128i n = _mm_cvtsi32_si128(shift);
  __m256i m = _mm256_set1_epi8(char(mask));
  vw x = wload(p);
  return {_mm256_and_si256(_mm256_srl_epi16(x.a, n), m),
          _mm256_and_si256(_mm256_srl_epi16(x.b, n), m)};
}
INLINE vw bor_left(vw x, vw y, int shift) {
  __m128i n = _mm_cvtsi32_si128(shift);
  return {_mm256_or_si256(x.a, _mm256_sll_epi16(y.a, n)),
          _mm256_or_si256(x.b, _mm256_sll_epi16(y.b, n))};
}
INLINE void vfactors(const uint8_t* p, float base, float* out) {
  __m256i y = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  y = _mm256_or_si256(_mm256_and_si256(y, _mm256_set1_epi16(15)),
                      _mm256_and_si256(_mm256_slli_epi16(y, 4), _mm256_set1_epi16(15 << 8)));
  alignas(32) uint8_t t[32];
  _mm256_store_si256((__m256i*)t, y);
  for (int i = 0; i < 32; i++) out[i] = base * (float(t[i] + 1) * (1.f / 16));
}
INLINE void bfactors(const uint8_t* p, uint8_t* out) {
  const __m256i y = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),
                low = _mm256_and_si256(y, _mm256_set1_epi16(15));
  _mm256_storeu_si256(
      (__m256i*)out,
      _mm256_add_epi8(_mm256_or_si256(low, _mm256_and_si256(_mm256_slli_epi16(y, 4),
                                                            _mm256_set1_epi16(15 << 8))),
                      _mm256_set1_epi8(1)));
}
template <int Q>
INLINE vf bfloats(vw x) {
  __m128i b = _mm256_extracti128_si256(Q < 2 ? x.a : x.b, Q % 2);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}
#if defined(__AVXVNNI__)
INLINE vw dot_bytes(vw acc, vw w, const void* x) { return dot_int8(acc, wspread(x), w); }
#else
INLINE vw dot_bytes(vw acc, vw w, const void* x) { return dot_int4(acc, wspread(x), w); }
#endif
INLINE int32_t wsum(vw x) {
  alignas(32) int32_t t[16];
  wstore(t, x);
  int32_t s = 0;
  for (int i = 0; i < 16; i++) s += t[i];
  return s;
}
INLINE vw wround(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
template <int N>
INLINE __m256i half_scale(__m256i code, __m256i f, int first, int up) {
  const __m256i at = _mm256_inserti128_si256(_mm256_set1_epi16(short(0x8000 + first)),
                                             _mm_set1_epi16(short(0x8001 + first)), 1);
  const __m256i by = _mm256_or_si256(_mm256_shuffle_epi8(f, at), _mm256_set1_epi16(1 << 8));
  const __m256i c = _mm256_sub_epi8(code, _mm256_set1_epi8(1 << (N - 1))),
                add = _mm256_set1_epi16(N == 4 ? 0
                                        : up   ? 1
                                               : 1 << 8);
  const __m256i x = _mm256_maddubs_epi16(by, _mm256_unpacklo_epi8(c, add)),
                y = _mm256_maddubs_epi16(by, _mm256_unpackhi_epi8(c, add));
  return _mm256_packs_epi16(_mm256_srai_epi16(x, N - 4), _mm256_srai_epi16(y, N - 4));
}
template <int N>
INLINE vw bscale(vw code, const uint8_t* f, int up) {
  const __m256i v = _mm256_set1_epi32(*(const int32_t*)f);
  return {half_scale<N>(code.a, v, 0, up), half_scale<N>(code.b, v, 2, up)};
}
INLINE vw btranspose(vw x) {
  alignas(32) int32_t t[16], u[16];
  wstore(t, x);
  for (int i = 0; i < 16; i++) u[i] = t[i % 4 * 4 + i / 4];
  return wload(u);
}
INLINE void bquads(const int8_t* r, size_t stride, vw* out) {
  const vw a = wload(r), b = wload(r + stride), c = wload(r + 2 * stride),
           d = wload(r + 3 * stride);
  auto half = [](__m256i a, __m256i b, __m256i c, __m256i d, __m256i* to) {
    const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d),
                  ab2 = _mm256_unpackhi_epi8(a, b), cd2 = _mm256_unpackhi_epi8(c, d);
    to[0] = _mm256_unpacklo_epi16(ab, cd), to[1] = _mm256_unpackhi_epi16(ab, cd),
    to[2] = _mm256_unpacklo_epi16(ab2, cd2), to[3] = _mm256_unpackhi_epi16(ab2, cd2);
  };
  __m256i x[4], y[4];
  half(a.a, b.a, c.a, d.a, x), half(a.b, b.b, c.b, d.b, y);
  for (int k = 0; k < 4; k++) out[k] = {x[k], y[k]};
}
INLINE vw interleave_bf16(const uint16_t* x, const uint16_t* y) {
  auto half = [](const uint16_t* x, const uint16_t* y) {
    return _mm256_or_si256(
        _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)),
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)y)), 16));
  };
  return {half(x, y), half(x + 8, y + 8)};
}
INLINE vw pair_bf16(vf x, vf y) {
  return {_mm256_or_si256(round_bf16(x.a), _mm256_slli_epi32(round_bf16(y.a), 16)),
          _mm256_or_si256(round_bf16(x.b), _mm256_slli_epi32(round_bf16(y.b), 16))};
}
INLINE void vstore_bf16(uint16_t* p, vf a, vf b) { vstore_bf16(p, a), vstore_bf16(p + 16, b); }

INLINE void transpose_8_words(const uint8_t* in, size_t in_stride, uint8_t* out, size_t stride) {
  __m256i a[8], b[8];
  UNROLL_FOR(i, 8) a[i] = _mm256_loadu_si256((const __m256i*)(in + in_stride * i));
  UNROLL_FOR(i, 4) {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  UNROLL_FOR(j, 2) {
    const int i = 4 * j;
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLL_FOR(i, 4) {
    _mm256_storeu_si256((__m256i*)(out + stride * i),
                        _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
    _mm256_storeu_si256((__m256i*)(out + stride * (4 + i)),
                        _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
  }
}
INLINE void transpose_words(const void* in, size_t in_stride, void* out, size_t stride) {
  const uint8_t* from = (const uint8_t*)in;
  uint8_t* to = (uint8_t*)out;
  UNROLL_FOR(i, 2)
    UNROLL_FOR(j, 2)
      transpose_8_words(from + in_stride * 8 * i + 32 * j, in_stride, to + stride * 8 * j + 32 * i,
                        stride);
}

template <class V>
INLINE void in_register(V& x) {
  asm volatile("" : "+x"(x.a), "+x"(x.b));
}

struct Traits {  // scalar.h documents each constant
#if defined(__AVXVNNI__)
  static constexpr const char* kCpuFeatures = "avx2 fma avxvnni";
  static constexpr int kPrefetchLevel = 2, kMaxByte = 255;
#else
  static constexpr const char* kCpuFeatures = "avx2 fma";
  // _mm256_maddubs_epi16 adds two products in 16 bits. Larger bytes than 127 could saturate the
  // sum.
  static constexpr int kPrefetchLevel = 3, kMaxByte = 127;
#endif
  static constexpr int kIntRows = 8, kPairTiles = 1, kPairRows = 8, kDecodeRows = 16;
  // The sums of 6 rows take 12 of the sixteen registers.
  static constexpr int kUnitTiles = 1, kUnitRows = 6;
  static constexpr int kScoreRows = 4, kOutLanes = 4;
  // Each sum takes two of the sixteen registers. BF16 operands need more registers than the others.
  static constexpr int kProbeInt = 6, kProbeBf16 = 5, kProbeFp32 = 6;
};
using Tiles = NoTiles;

}  // namespace LAMOE_ISA
}  // namespace lamoe
