// The intrinsics (those of AMX are in amx.h): sixteen lanes of float (vf) and sixteen 32-bit words
// (vw), on AVX-512, AVX2 or plain C++. A kernel is written once against these and compiled once per
// ISA (CMakeLists.txt sets LAMOE_ISA_AVX512, with or without _AMX, / _AVXVNNI / _AVX2 / none);
// lanes add up in the same order on each (only the sum over the lanes of a vector, vsum, and what
// AMX makes of bfloat16 have orders of their own). A NEON version of this file is all another
// architecture needs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(LAMOE_ISA_AVXVNNI)
#define LAMOE_ISA_AVX2  // and the integer dot products of AVX-512 VNNI, 32 bytes wide
#endif
#if defined(LAMOE_ISA_AVX512) || defined(LAMOE_ISA_AVX2)
#include <immintrin.h>
#endif

#if defined(LAMOE_ISA_AMX)
#define LAMOE_NS amx
#elif defined(LAMOE_ISA_AVX512) && defined(__AVX512BF16__)
#define LAMOE_NS avx512
#elif defined(LAMOE_ISA_AVX512)
#define LAMOE_NS avx512vnni
#elif defined(LAMOE_ISA_AVXVNNI)
#define LAMOE_NS avxvnni
#elif defined(LAMOE_ISA_AVX2)
#define LAMOE_NS avx2
#else
#define LAMOE_NS scalar
#endif

#if defined(LAMOE_ISA_AVX512) || defined(LAMOE_ISA_AVX2)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL  // without vectors it would only keep the compiler busy, for minutes
#endif
#define UNROLL_FOR(i, n) \
  UNROLL                 \
  for (int i = 0; i < (n); i++)
#define INLINE inline __attribute__((always_inline))

namespace lamoe {
// The 16 levels of an int4 code, +64 so that they are unsigned; docs/LOG.md says how they were
// found.
alignas(16) constexpr uint8_t kLevels[16] = {1,  12, 23, 32, 40, 48, 54,  60,
                                             65, 71, 76, 82, 89, 97, 106, 120};

INLINE float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
INLINE uint16_t float_to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 64);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
// A group's scale: sign, 4 bits of exponent, 3 of mantissa; relative to its matrix's scale. 0 is
// zero.
INLINE float scale_value(uint8_t code) {
  if (!(code & 0x7f)) return 0.f;
  uint32_t u = uint32_t(code & 0x80) << 24 | ((uint32_t(code & 0x7f) << 20) + (112u << 23));
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

namespace LAMOE_NS {

#if defined(LAMOE_ISA_AVX512)
struct vf {
  __m512 v;
};
struct vw {
  __m512i v;
};
INLINE vf vzero() { return {_mm512_setzero_ps()}; }
INLINE vf vset(float x) { return {_mm512_set1_ps(x)}; }
INLINE vf vload(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE vf vload_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(n >= 16 ? 0xffff : (1u << n) - 1, p)};
}
INLINE void vstore(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
INLINE void vstore_n(float* p, vf a, int n) {
  _mm512_mask_storeu_ps(p, n >= 16 ? 0xffff : (1u << n) - 1, a.v);
}
INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE vf vfma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE vf vunless_less(vf a, vf x, vf y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_NLT_UQ), a.v)};
}  // 0 where x < y, else a
INLINE vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
INLINE vf vround(vf a) { return {_mm512_roundscale_ps(a.v, 0)}; }
INLINE vf vpow2(vf p, vf n) { return {_mm512_scalef_ps(p.v, n.v)}; }
INLINE float vsum(vf a) { return _mm512_reduce_add_ps(a.v); }
INLINE float vhmax(vf a) { return _mm512_reduce_max_ps(a.v); }
INLINE bool vdiffers(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ) != 0; }
INLINE vf vcvt(vw a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE vw wload(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE void wstore(void* p, vw a) { _mm512_storeu_si512(p, a.v); }
INLINE vw wset(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE vw wfields(const uint8_t* p, int shift,
                  int mask) {  // sixteen bytes, each (byte >> shift) & mask
  return {
      _mm512_and_si512(_mm512_srl_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)),
                                        _mm_cvtsi32_si128(shift)),
                       _mm512_set1_epi32(mask))};
}
INLINE vw wor_left(vw a, vw b, int shift) {
  return {_mm512_or_si512(a.v, _mm512_sll_epi32(b.v, _mm_cvtsi32_si128(shift)))};
}
INLINE vf vload_bf16(const uint16_t* p) {
  return {
      (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)};
}
#if defined(__AVX512BF16__)
INLINE __m256i to_bf16(vf a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
INLINE void vstore_bf16(uint16_t* p, vf a, vf b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
}  // 32 of them
// acc + sum over the two halves of each word, as bfloat16 pairs; acc + w * x. x is broadcast from 4
// bytes.
INLINE vf dot_bf16(vf acc, vw w, const void* x) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(*(const int32_t*)x))};
}
#else
INLINE __m256i to_bf16(vf a) {  // the upper halves, rounded; NaN stays NaN
  const __m512i u = (__m512i)a.v,
                odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q),
                                                     _mm512_set1_epi32(0x7fc0)));
}
INLINE vf dot_bf16(vf acc, vw w, const void* x) {
  const __m512i u = _mm512_set1_epi32(*(const int32_t*)x),
                high = _mm512_set1_epi32(int(0xffff0000));
  acc.v =
      _mm512_fmadd_ps((__m512)_mm512_slli_epi32(w.v, 16), (__m512)_mm512_slli_epi32(u, 16), acc.v);
  return {_mm512_fmadd_ps((__m512)_mm512_and_si512(w.v, high), (__m512)_mm512_and_si512(u, high),
                          acc.v)};
}
#endif
INLINE void vstore_bf16(uint16_t* p, vf a) { _mm256_storeu_si256((__m256i*)p, to_bf16(a)); }
INLINE vf dot_f32(vf acc, vw w, const void* x) {
  return {_mm512_fmadd_ps((__m512)w.v, _mm512_set1_ps(*(const float*)x), acc.v)};
}
INLINE vw wspread(const void* x) {
  return {_mm512_set1_epi32(*(const int32_t*)x)};
}  // four bytes in every word
// acc + sum over four unsigned bytes of w times four signed bytes of x. The int4 levels are at most
// 120, int8 codes go to 255. As assembly: through the intrinsic gcc 12 copies each sum to another
// register and back in a loop, which costs up to a third of the speed.
INLINE vw dot_int8(vw acc, vw w, vw x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
  return acc;
}
INLINE vw dot_int8(vw acc, vw w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*(const int32_t*)x));
  return acc;
}
INLINE vw dot_int4(vw acc, vw w, vw x) { return dot_int8(acc, w, x); }
INLINE vw dot_int4(vw acc, vw w, const int8_t* x) { return dot_int8(acc, w, x); }
INLINE vw start_int8(int32_t c) { return {_mm512_set1_epi32(2 * c)}; }
INLINE vw decode_int8(const uint8_t* p) { return wload(p); }
INLINE void decode_int4(const uint8_t* p, vw& low, vw& high) {  // 64 bytes of nibbles -> levels
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kLevels)),
                mask = _mm512_set1_epi8(15);
  __m512i x = _mm512_loadu_si512(p);
  low.v = _mm512_shuffle_epi8(table, _mm512_and_si512(x, mask));
  high.v = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), mask));
}
INLINE vf vscales(const uint8_t* p) {  // sixteen group scales
  __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)),
          e = _mm512_and_si512(c, _mm512_set1_epi32(0x7f));
  __m512i u =
      _mm512_or_si512(_mm512_slli_epi32(_mm512_srli_epi32(c, 7), 31),
                      _mm512_add_epi32(_mm512_slli_epi32(e, 20), _mm512_set1_epi32(112 << 23)));
  return {(__m512)_mm512_maskz_mov_epi32(_mm512_test_epi32_mask(e, e), u)};
}
INLINE int vquant(int8_t* p,
                  vf a) {  // sixteen floats from -127 to 127 -> nearest signed bytes; their sum
  __m512i x = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
  return _mm512_reduce_add_epi32(x);
}
// Sixty-four bytes: (byte >> shift) & mask, a | b << shift, and sixteen of them (quarter 0 to 3) as
// floats.
INLINE vw bfields(const uint8_t* p, int shift, int mask) {
  return {_mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift)),
                           _mm512_set1_epi8(char(mask)))};
}
INLINE vw bor_left(vw a, vw b, int shift) {
  return {_mm512_or_si512(a.v, _mm512_sll_epi16(b.v, _mm_cvtsi32_si128(shift)))};
}
// Thirty-two nibbles f of sixteen bytes, low half first -> base * (f + 1) / 16.
INLINE void vfactors(const uint8_t* p, float base, float* out) {
  __m256i y = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  y = _mm256_or_si256(_mm256_and_si256(y, _mm256_set1_epi16(15)),
                      _mm256_and_si256(_mm256_slli_epi16(y, 4), _mm256_set1_epi16(15 << 8)));
  const vf one = vset(1.f), share = vset(1.f / 16), b = vset(base);
  vstore(out, b * ((vf{_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(y)))} + one) *
                   share));
  vstore(out + 16,
         b * ((vf{_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(y, 1)))} + one) *
              share));
}
// The same nibbles as bytes, f + 1.
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
INLINE vf bfloats(vw a) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(a.v, Q)))};
}
// acc + sum over four signed bytes of w times four unsigned bytes of x, these at most kMostByte.
constexpr int kMostByte = 255;
INLINE vw dot_bytes(vw acc, vw w, const void* x) { return dot_int8(acc, wspread(x), w); }
INLINE int32_t wsum(vw a) { return _mm512_reduce_add_epi32(a.v); }
INLINE vw wround(vf a) { return {_mm512_cvtps_epi32(a.v)}; }
// Sixty-four codes of N bits, less the middle one, times the factor (1 to 16) of their sixteen,
// over 2^(N-4): signed bytes. Halves go down and up by turns, beginning with up where `up` is 1.
template <int N>
INLINE vw bscale(vw code, const uint8_t* f, int up) {
  const __m512i at = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi8(1), 1)),
      _mm256_inserti128_si256(_mm256_set1_epi8(2), _mm_set1_epi8(3), 1), 1);
  const __m512i by = _mm512_mask_shuffle_epi8(_mm512_set1_epi8(1), 0x5555555555555555,
                                              _mm512_set1_epi32(*(const int32_t*)f), at);
  const __m512i c = _mm512_sub_epi8(code.v, _mm512_set1_epi8(1 << (N - 1))),
                add = _mm512_set1_epi16(N == 4 ? 0
                                        : up   ? 1
                                               : 1 << 8);
  const __m512i x = _mm512_maddubs_epi16(by, _mm512_unpacklo_epi8(c, add)),
                y = _mm512_maddubs_epi16(by, _mm512_unpackhi_epi8(c, add));
  return {_mm512_packs_epi16(_mm512_srai_epi16(x, N - 4), _mm512_srai_epi16(y, N - 4))};
}
// Sixteen words as a 4 x 4 matrix, transposed; and four rows of 64 bytes so turned, `stride` apart
// -> per column, sixteen at a time, its four bytes side by side.
INLINE vw bturn(vw a) {
  return {_mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a.v)};
}
INLINE void bquads(const int8_t* r, size_t stride, vw* out) {
  const __m512i a = wload(r).v, b = wload(r + stride).v, c = wload(r + 2 * stride).v,
                d = wload(r + 3 * stride).v;
  const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d),
                ab2 = _mm512_unpackhi_epi8(a, b), cd2 = _mm512_unpackhi_epi8(c, d);
  out[0].v = _mm512_unpacklo_epi16(ab, cd), out[1].v = _mm512_unpackhi_epi16(ab, cd);
  out[2].v = _mm512_unpacklo_epi16(ab2, cd2), out[3].v = _mm512_unpackhi_epi16(ab2, cd2);
}
// Two rows of 16 bf16 -> 16 words (a low half, b high half).
INLINE vw interleave_bf16(const uint16_t* a, const uint16_t* b) {
  __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a)),
          y = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
  return {_mm512_or_si512(x, _mm512_slli_epi32(y, 16))};
}
INLINE vw pair_bf16(vf a, vf b) {
  __m512i x = _mm512_cvtepu16_epi32(to_bf16(a)), y = _mm512_cvtepu16_epi32(to_bf16(b));
  return {_mm512_or_si512(x, _mm512_slli_epi32(y, 16))};
}

#elif defined(LAMOE_ISA_AVX2)
struct vf {
  __m256 a, b;
};
struct vw {
  __m256i a, b;
};
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
INLINE vf vmax(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE vf vmin(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE vf vunless_less(vf z, vf x, vf y) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NLT_UQ), z.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NLT_UQ), z.b)};
}
INLINE vf vabs(vf x) {
  __m256 m = (__m256)_mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
INLINE vf vround(vf x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
INLINE __m256 pow2_half(__m256 p, __m256 n) {  // n from -126 to 127
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
INLINE __m256 half_bf16(const uint16_t* p) {
  return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE vf vload_bf16(const uint16_t* p) { return {half_bf16(p), half_bf16(p + 8)}; }
INLINE __m256i round_bf16(__m256 x) {  // the upper halves, rounded; NaN stays NaN
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
INLINE vw wspread(const void* x) { return wset(*(const int32_t*)x); }
#if defined(LAMOE_ISA_AVXVNNI)
INLINE vw dot_int8(vw acc, vw w, vw x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.a) : "x"(w.a), "x"(x.a));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.b) : "x"(w.b), "x"(x.b));
  return acc;
}
INLINE vw dot_int4(vw acc, vw w, vw x) { return dot_int8(acc, w, x); }
INLINE vw start_int8(int32_t c) { return wset(2 * c); }
INLINE vw decode_int8(const uint8_t* p) { return wload(p); }
#else
INLINE __m256i dot4(__m256i acc, __m256i u8,
                    __m256i s8) {  // the 16-bit pair sums must not saturate
  return _mm256_add_epi32(acc,
                          _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
}
INLINE vw dot_int4(vw acc, vw w, vw x) { return {dot4(acc.a, w.a, x.a), dot4(acc.b, w.b, x.b)}; }
INLINE vw dot_int8(vw acc, vw w,
                   vw x) {  // w is signed here: |w| * (x with w's sign) stays below 2^15
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
#if defined(LAMOE_ISA_AVXVNNI)
constexpr int kMostByte = 255;
INLINE vw dot_bytes(vw acc, vw w, const void* x) { return dot_int8(acc, wspread(x), w); }
#else
constexpr int kMostByte = 127;  // the 16-bit pair sums must not saturate
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
INLINE vw bturn(vw x) {
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

#else
struct vf {
  float v[16];
};
struct vw {
  int32_t v[16];
};
#define EACH for (int i = 0; i < 16; i++)
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
INLINE vf vmax(vf a, vf b) {
  EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
INLINE vf vmin(vf a, vf b) {
  EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
INLINE vf vunless_less(vf a, vf x, vf y) {
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
INLINE vw bfields(const uint8_t* p, int shift, int mask) {
  uint8_t t[64];
  for (int i = 0; i < 64; i++) t[i] = uint8_t(p[i] >> shift & mask);
  return wload(t);
}
INLINE vw bor_left(vw a, vw b, int shift) {
  EACH a.v[i] |= int32_t(uint32_t(b.v[i]) << shift);
  return a;
}  // fields are small: nothing crosses a byte
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
constexpr int kMostByte = 255;
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
INLINE vw bturn(vw a) {
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
#undef EACH
#endif

#if !defined(__AVX512BF16__)
INLINE void vstore_bf16(uint16_t* p, vf a, vf b) {
  vstore_bf16(p, a);
  vstore_bf16(p + 16, b);
}
#endif

// e^x for x <= 88, relative error about 2e-7; 0 for x below -87.
INLINE vf vexp(vf given) {
  const vf least = vset(-87.f),
           x = vmax(least, given) * vset(1.44269504f);  // in this order NaN stays NaN
  vf n = vround(x), f = x - n;
  vf p = vfma(f, vset(1.5403530e-4f), vset(1.3333558e-3f));
  p = vfma(f, p, vset(9.6181291e-3f));
  p = vfma(f, p, vset(5.5504109e-2f));
  p = vfma(f, p, vset(0.24022651f));
  p = vfma(f, p, vset(0.69314718f));
  return vunless_less(vpow2(vfma(f, p, vset(1.f)), n), given, least);
}

}  // namespace LAMOE_NS
}  // namespace lamoe
