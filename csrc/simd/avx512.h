// AVX-512 with VNNI. A vector is one register of 512 bits. The instruction set `avx512` is compiled
// with the bfloat16 instructions, `avx512vnni` without them. amx.h adds tiles to this file.
#pragma once
#include <immintrin.h>

#include "simd/common.h"

#define UNROLL UNROLL_LOOP

namespace lamoe {
namespace LAMOE_ISA {

struct vf {
  __m512 v;
};
struct vw {
  __m512i v;
};

// ---- floats -------------------------------------------------------------------------------------
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
INLINE vf vrecip(vf a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_mul_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(2.f)))};
}
INLINE vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE vf vzero_if_less(vf a, vf x, vf y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_NLT_UQ), a.v)};
}
INLINE vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
INLINE vf vround(vf a) { return {_mm512_roundscale_ps(a.v, 0)}; }
INLINE vf vsqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
INLINE vf vpow2(vf p, vf n) { return {_mm512_scalef_ps(p.v, n.v)}; }
INLINE float vsum(vf a) { return _mm512_reduce_add_ps(a.v); }
INLINE float vhmax(vf a) { return _mm512_reduce_max_ps(a.v); }
INLINE bool vdiffers(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ) != 0; }
INLINE vf vcvt(vw a) { return {_mm512_cvtepi32_ps(a.v)}; }

// ---- words --------------------------------------------------------------------------------------
INLINE vw wload(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE void wstore(void* p, vw a) { _mm512_storeu_si512(p, a.v); }
INLINE vw wset(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE vw wfields(const uint8_t* p, int shift, int mask) {
  return {
      _mm512_and_si512(_mm512_srl_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)),
                                        _mm_cvtsi32_si128(shift)),
                       _mm512_set1_epi32(mask))};
}
INLINE vw wor_left(vw a, vw b, int shift) {
  return {_mm512_or_si512(a.v, _mm512_sll_epi32(b.v, _mm_cvtsi32_si128(shift)))};
}

// ---- bfloat16 -----------------------------------------------------------------------------------
INLINE vf vload_bf16(const uint16_t* p) {
  return {
      (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)};
}
#if defined(__AVX512BF16__)
INLINE __m256i to_bf16(vf a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
INLINE void vstore_bf16(uint16_t* p, vf a, vf b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
}
INLINE vf dot_bf16(vf acc, vw w, const void* x) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(*(const int32_t*)x))};
}
#else
// Rounds floats to bfloat16, to nearest even. NaN stays NaN.
INLINE __m256i to_bf16(vf a) {
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

// ---- quantised weights --------------------------------------------------------------------------
INLINE vw wspread(const void* x) { return {_mm512_set1_epi32(*(const int32_t*)x)}; }
// Inline assembly, because gcc 12 compiles the intrinsic badly in loops. It copies each sum to
// another register and back, which costs up to a third of the speed.
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
INLINE void decode_int4(const uint8_t* p, vw& low, vw& high) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kLevels)),
                mask = _mm512_set1_epi8(15);
  __m512i x = _mm512_loadu_si512(p);
  low.v = _mm512_shuffle_epi8(table, _mm512_and_si512(x, mask));
  high.v = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), mask));
}
INLINE vf vscales(const uint8_t* p) {
  __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)),
          e = _mm512_and_si512(c, _mm512_set1_epi32(0x7f));
  __m512i u =
      _mm512_or_si512(_mm512_slli_epi32(_mm512_srli_epi32(c, 7), 31),
                      _mm512_add_epi32(_mm512_slli_epi32(e, 20), _mm512_set1_epi32(112 << 23)));
  return {(__m512)_mm512_maskz_mov_epi32(_mm512_test_epi32_mask(e, e), u)};
}
INLINE int vquant(int8_t* p, vf a) {
  __m512i x = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
  return _mm512_reduce_add_epi32(x);
}

// ---- low-bit cache rows -------------------------------------------------------------------------
INLINE vw bfields(const uint8_t* p, int shift, int mask) {
  return {_mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift)),
                           _mm512_set1_epi8(char(mask)))};
}
INLINE vw bor_left(vw a, vw b, int shift) {
  return {_mm512_or_si512(a.v, _mm512_sll_epi16(b.v, _mm_cvtsi32_si128(shift)))};
}
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
INLINE vw dot_bytes(vw acc, vw w, const void* x) { return dot_int8(acc, wspread(x), w); }
INLINE int32_t wsum(vw a) { return _mm512_reduce_add_epi32(a.v); }
INLINE vw wround(vf a) { return {_mm512_cvtps_epi32(a.v)}; }
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
INLINE vw btranspose(vw a) {
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
INLINE vw interleave_bf16(const uint16_t* a, const uint16_t* b) {
  __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a)),
          y = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
  return {_mm512_or_si512(x, _mm512_slli_epi32(y, 16))};
}
INLINE vw pair_bf16(vf a, vf b) {
  __m512i x = _mm512_cvtepu16_epi32(to_bf16(a)), y = _mm512_cvtepu16_epi32(to_bf16(b));
  return {_mm512_or_si512(x, _mm512_slli_epi32(y, 16))};
}
#if !defined(__AVX512BF16__)
INLINE void vstore_bf16(uint16_t* p, vf a, vf b) { vstore_bf16(p, a), vstore_bf16(p + 16, b); }
#endif

template <class V>
INLINE void in_register(V& x) {
  asm volatile("" : "+v"(x.v));
}

INLINE void transpose_words(const void* in, size_t in_stride, void* out, size_t stride) {
  __m512i a[16], b[16];
  UNROLL_FOR(i, 16) a[i] = wload((const uint8_t*)in + in_stride * i).v;
  UNROLL_FOR(i, 8) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  UNROLL_FOR(j, 4) {
    const int i = 4 * j;
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Now quarter q of a[4 j + i] holds words 4 j .. 4 j + 3 of output row 4 q + i.
  UNROLL_FOR(i, 4) {
    const __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44),
                  high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44),
                  high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xee);
    uint8_t* to = (uint8_t*)out + i * stride;
    wstore(to, {_mm512_shuffle_i32x4(low, low2, 0x88)});
    wstore(to + 4 * stride, {_mm512_shuffle_i32x4(low, low2, 0xdd)});
    wstore(to + 8 * stride, {_mm512_shuffle_i32x4(high, high2, 0x88)});
    wstore(to + 12 * stride, {_mm512_shuffle_i32x4(high, high2, 0xdd)});
  }
}

struct Avx512Traits {  // scalar.h documents each constant
#if defined(__AVX512BF16__)
  static constexpr const char* kCpuFeatures =
      "avx512f avx512bw avx512vl avx512dq avx512vnni avx512bf16";
  static constexpr int kPrefetchLevel = 3;
#else
  static constexpr const char* kCpuFeatures = "avx512f avx512bw avx512vl avx512dq avx512vnni";
  static constexpr int kPrefetchLevel = 2;  // L2, the better level on Intel CPUs
#endif
  static constexpr int kIntRows = 12, kPairTiles = 2, kPairRows = 6, kUnitTiles = 2, kUnitRows = 12;
  static constexpr int kDecodeRows = 24;
  static constexpr int kScoreRows = 16, kOutLanes = 16;
  static constexpr int kMaxByte = 255;
  static constexpr int kProbeInt = 16, kProbeBf16 = 16, kProbeFp32 = 16;
};
#if !defined(__AMX_TILE__)
using Traits = Avx512Traits;
using Tiles = NoTiles;
#endif

}  // namespace LAMOE_ISA
}  // namespace lamoe
