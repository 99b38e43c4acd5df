// Products on CPUs with AMX: eight tile registers of up to 16 rows x 64 bytes each, and
// instructions that multiply two of them into a third. For the `amx` table alone. Whoever sets
// shapes does so anew in every call: other code of this thread (torch) uses tiles too.
//   FP32 += pairs of bfloat16 (tdpbf16ps): rows [M][32 elements] x weights [16 pairs][16 outputs],
//   which is how a BF16 matrix lies in memory (ops.h) INT32 += bytes (tdpb..d): rows [M][64] x
//   weights [16 quads][16 outputs]; of INT8 and INT4 weights only [M][16] x [4 quads][16], because
//   each group of 16 inputs has a scale of its own
// A sum of bfloat16 products has another order than vdpbf16ps has, so whether tiles make it is a
// matter of widths alone, never of how many rows there are: a result still depends on its row and
// its weights alone. Sums of bytes are exact, and are those of the avx512 table to the bit.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_NS {

struct TileShapes {  // of the eight registers, for as long as it lives
  TileShapes() = default;
  TileShapes(const TileShapes&) = delete;
  ~TileShapes() { asm volatile("tilerelease" ::: "memory"); }
  INLINE void set(int tile, int rows, int bytes) {
    s_.rows[tile] = uint8_t(rows), s_.bytes[tile] = uint16_t(rows ? bytes : 0);
  }
  INLINE void load() const {
    asm volatile("ldtilecfg %0" : : "m"(s_));
#if defined(LAMOE_SANITIZED)
    now() = s_;
#endif
  }
  // Sanitizers do not look into assembly: both ends of each row that a tile reads or writes are
  // read or written once more for them.
  INLINE static void touch(int tile, const void* p, size_t stride, bool write) {
#if defined(LAMOE_SANITIZED)
    for (int r = 0; r < now().rows[tile]; r++)
      for (int i : {0, now().bytes[tile] - 1}) {
        volatile uint8_t* b = (uint8_t*)p + r * stride + i;
        const uint8_t seen = *b;
        if (write) *b = seen;
      }
#endif
    (void)tile, (void)p, (void)stride, (void)write;
  }

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } s_;
#if defined(LAMOE_SANITIZED)
  static Shapes& now() {
    static thread_local Shapes s;
    return s;
  }
#endif
};

template <int T>
INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
INLINE void tile_load(const void* p, size_t stride) {
  TileShapes::touch(T, p, stride, false);
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* p, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  TileShapes::touch(T, p, stride, true);
}
template <int C, int A, int B>
INLINE void tile_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_ss() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}  // signed bytes
template <int C, int A, int B>
INLINE void tile_su() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}  // B unsigned
template <int C, int A, int B>
INLINE void tile_us() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}  // A unsigned

// out[r] = in[.][r]: sixteen vectors of sixteen words, transposed; rows `stride` bytes apart.
INLINE void turn_words(const void* in, void* out, size_t stride) {
  __m512i a[16], b[16];
  UNROLL_FOR(i, 16) a[i] = wload((const uint8_t*)in + 64 * i).v;
  UNROLL
  for (int i = 0; i < 16; i += 2)
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  UNROLL
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]),
          a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLL_FOR(i, 4) {  // quarter q of a[4 j + i] is words 4 j .. of row 4 q + i
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

// ---- weights in bfloat16
// -------------------------------------------------------------------------------------------------
// Two blocks of up to 16 rows x N tiles of 16 outputs: sums 0 to 3, rows 4 and 5, weights 6 and 7.
template <int M, int N>
INLINE void step_bf16(const uint8_t* x, size_t stride, const uint8_t* w, size_t tile) {
  tile_load<6>(w, 64);
  if (N == 2) tile_load<7>(w + tile, 64);
  tile_load<4>(x, stride);
  tile_bf16<0, 4, 6>();
  if (N == 2) tile_bf16<1, 4, 7>();
  if (M == 2) {
    tile_load<5>(x + 16 * stride, stride);
    tile_bf16<2, 5, 6>();
    if (N == 2) tile_bf16<3, 5, 7>();
  }
}

template <int T>
INLINE void put_tile(float* out, ptrdiff_t ldo, int rows, int n) {
  if (n >= 16) return tile_store<T>(out, size_t(ldo) * 4);
  alignas(64) float t[16 * 16];
  tile_store<T>(t, 64);
  for (int r = 0; r < rows; r++) vstore_n(out + r * ldo, vload(t + 16 * r), n);
}

template <int M, int N>
void block_bf16(const uint8_t* x, size_t stride, int rows, const uint8_t* w, size_t tile, int units,
                float* out, ptrdiff_t ldo, int n) {
  tile_zero<0>(), tile_zero<1>();
  if (M == 2) tile_zero<2>(), tile_zero<3>();
  int u = 0;
  for (; u + 16 <= units; u += 16)
    step_bf16<M, N>(x + 4 * size_t(u), stride, w + 64 * size_t(u), tile);
  if (u < units) {  // what is left of the inputs, filled up with zeros
    alignas(64) uint8_t xs[32 * 64], ws[2 * 1024];
    std::memset(xs, 0, sizeof xs);
    std::memset(ws, 0, sizeof ws);
    for (int r = 0; r < rows; r++)
      std::memcpy(xs + 64 * r, x + r * stride + 4 * size_t(u), 4 * size_t(units - u));
    for (int t = 0; t < N; t++)
      std::memcpy(ws + 1024 * t, w + t * tile + 64 * size_t(u), 64 * size_t(units - u));
    step_bf16<M, N>(xs, 64, ws, 1024);
  }
  const int first = rows < 16 ? rows : 16;
  put_tile<0>(out, ldo, first, n);
  if (N == 2) put_tile<1>(out + 16, ldo, first, n - 16);
  if (M == 2) put_tile<2>(out + 16 * ldo, ldo, rows - 16, n);
  if (M == 2 && N == 2) put_tile<3>(out + 16 * ldo + 16, ldo, rows - 16, n - 16);
}

// out = rows of `units` pairs times `count` tiles of weights, n outputs
inline void linear_bf16(const uint8_t* w, size_t tile, int count, int units, const uint8_t* x,
                        size_t stride, int rows, float* out, ptrdiff_t ldo, int n) {
  TileShapes shapes;
  for (int r = 0; r < rows; r += 32) {
    const int here = rows - r < 32 ? rows - r : 32;
    if (r == 0 || here < 32) {
      for (int i = 0; i < 2; i++) {
        const int m = here - 16 * i < 0 ? 0 : here - 16 * i < 16 ? here - 16 * i : 16;
        shapes.set(2 * i, m, 64), shapes.set(2 * i + 1, m, 64), shapes.set(4 + i, m, 64),
            shapes.set(6 + i, 16, 64);
      }
      shapes.load();
    }
    const uint8_t* y = x + r * stride;
    float* to = out + r * ldo;
    for (int t = 0; t < count; t += 2) {
      const auto go = t + 1 < count ? (here > 16 ? block_bf16<2, 2> : block_bf16<1, 2>)
                                    : (here > 16 ? block_bf16<2, 1> : block_bf16<1, 1>);
      go(y, stride, here, w + t * tile, tile, units, to + 16 * t, ldo, n - 16 * t);
    }
  }
}

// ---- weights of 4 and 8 bits
// ---------------------------------------------------------------------------------------------
template <int FMT>
INLINE vw signed_bytes(vw w) {
  return {_mm512_sub_epi8(w.v, _mm512_set1_epi8(char(FMT == INT8 ? 128 : 64)))};
}

constexpr int kIntRows = 16, kIntMost = 192;  // of a block; at once
INLINE void shape_ints(TileShapes& shapes) {
  for (int i = 0; i < 4; i++) shapes.set(i, kIntRows, 64);
  shapes.set(4, kIntRows, kGroup), shapes.set(6, kGroup / 4, 64);
  shapes.load();
}

// 16 rows and more, 16 at a time (where they do not divide, the last 16 have some of those before:
// the same results), times one tile of 16 outputs. decode(b, to) puts block b there: [4 groups](16
// scales, 4 quads x 16 signed bytes). Each group has a sum of its own, so all of them leave the
// tile registers through memory: while those of one step are made, those of the step before are
// stored, and those before that become float, in the order of micro_int.
template <class Decode>
void linear_ints(const Decode& decode, int blocks, float scale, const Acts& x, int row, int rows,
                 float* out, ptrdiff_t ldo, int n) {
  const size_t steps = size_t(x.stride / kBlock), stride = size_t(x.stride);
  const int parts = (rows + kIntRows - 1) / kIntRows, all = parts * blocks;
  alignas(64) uint8_t decoded[3][kDecodedBlock];
  alignas(64) int32_t sums[2][4][kIntRows * 16];
  alignas(64) float totals[kIntMost / kIntRows][kIntRows * 16];
  std::memset(totals, 0, size_t(parts) * sizeof totals[0]);
  const auto first = [&](int part) { return part + 1 < parts ? part * kIntRows : rows - kIntRows; };
  int b = 0, part = 0, b_add = 0, part_add = 0;
  for (int i = 0; i < all + 2; i++) {
    const bool make = i < all, store = i > 0 && i <= all, add = i > 1;
    if (make && part == 0) decode(b, decoded[b % 3]);
    const int8_t* q = x.q + size_t(row + first(part)) * stride + kBlock * size_t(b);
    const uint8_t *w = decoded[b % 3], *w_add = decoded[b_add % 3];
    vf sum[kIntRows];
    UNROLL_FOR(m, kIntRows) sum[m] = vzero();
    const auto group = [&](auto number) __attribute__((always_inline)) {
      constexpr int g = decltype(number)::value;
      if (add) {
        const vf ws = vload((const float*)(w_add + 320 * g));
        const int32_t* from = sums[i % 2][g];
        UNROLL_FOR(m, kIntRows) sum[m] = vfma(vcvt(wload(from + 16 * m)), ws, sum[m]);
      }
      if (store) tile_store<g>(sums[(i - 1) % 2][g], 64);
      if (make) {
        tile_load<4>(q + kGroup * g, stride);
        tile_load<6>(w + 320 * g + 64, 64);
        tile_zero<g>();
        tile_ss<g, 4, 6>();
      }
    };
    group(std::integral_constant<int, 0>()), group(std::integral_constant<int, 1>()),
        group(std::integral_constant<int, 2>()), group(std::integral_constant<int, 3>());
    if (add) {
      const float* s = x.s + size_t(row + first(part_add)) * steps + b_add;
      float* total = totals[part_add];
      UNROLL_FOR(m, kIntRows)
        vstore(total + 16 * m, vfma(sum[m], vset(s[m * steps]), vload(total + 16 * m)));
      if (++part_add == parts) part_add = 0, b_add++;
    }
    if (make && ++part == parts) part = 0, b++;
  }
  for (int p = 0; p < parts; p++)
    for (int m = 0; m < kIntRows; m++)
      vstore_n(out + (first(p) + m) * ldo, vload(totals[p] + 16 * m) * vset(scale), n);
}

// ---- attention
// -------------------------------------------------------------------------------------------------------------
// n (up to 64) rows of the cache in blocks of 16: sums 0 to 3, rows 4 (a whole block) or 5 (the
// last one), weights 6.
INLINE void shape_rows(TileShapes& shapes, int n) {
  for (int i = 0; i < 4; i++)
    shapes.set(i, n - 16 * i < 0 ? 0 : n - 16 * i < 16 ? n - 16 * i : 16, 64);
  shapes.set(4, 16, 64), shapes.set(5, n % 16, 64), shapes.set(6, 16, 64);
  shapes.load();
}
template <int I, bool INTS>
INLINE void score_block(const uint8_t* rows, size_t stride, int n) {
  if (n >= 16 * (I + 1)) {
    tile_load<4>(rows + 16 * I * stride, stride);
    INTS ? tile_su<I, 4, 6>() : tile_bf16<I, 4, 6>();
  } else if (n > 16 * I) {
    tile_load<5>(rows + 16 * I * stride, stride);
    INTS ? tile_su<I, 5, 6>() : tile_bf16<I, 5, 6>();
  }
}
// s[t][16 lanes] = rows t, 64 `steps` bytes wide, times queries [16 steps][16 lanes] words:
// bfloat16, or signed bytes by unsigned ones into int32
template <bool INTS, class Ahead>
void tile_scores(const uint8_t* rows, size_t stride, const uint8_t* q, int steps, int n, void* s,
                 Ahead& ahead) {
  TileShapes shapes;
  shape_rows(shapes, n);
  tile_zero<0>();
  if (n > 16) tile_zero<1>();
  if (n > 32) tile_zero<2>();
  if (n > 48) tile_zero<3>();
  for (int i = 0; i < steps; i++, rows += 64, q += 1024) {
    tile_load<6>(q, 64);
    score_block<0, INTS>(rows, stride, n), ahead.next(16);
    score_block<1, INTS>(rows, stride, n), ahead.next(16);
    score_block<2, INTS>(rows, stride, n), ahead.next(16);
    score_block<3, INTS>(rows, stride, n), ahead.next(16);
  }
  uint8_t* to = (uint8_t*)s;
  tile_store<0>(to, 64);
  if (n > 16) tile_store<1>(to + 1024, 64);
  if (n > 32) tile_store<2>(to + 2048, 64);
  if (n > 48) tile_store<3>(to + 3072, 64);
}

// The same of signed bytes, whose sums times -64 are `sums`, and queries of `lane`: s[t] = (s[t] +
// step of row t * lane * products) * scale, as score_ints has it
template <class Ahead>
void tile_score_ints(const uint8_t* rows, size_t stride, const float* step, const int32_t* sums,
                     const uint8_t* q, int steps, vf lane, vf scale, int n, float* s,
                     Ahead& ahead) {
  alignas(64) int32_t products[64 * 16];
  tile_scores<true>(rows, stride, q, steps, n, products, ahead);
  for (int t = 0; t < n; t++) {
    const vw sum = {_mm512_add_epi32(wload(products + 16 * t).v, start_int8(sums[t]).v)};
    vstore(s + 16 * t, vfma(vcvt(sum), lane * vset(step[t]), vload(s + 16 * t)) * scale);
  }
}

// o[lane][c] += weights p of n rows, [32 pairs][16 lanes] bfloat16 with zeros beyond n, times the
// rows' elements c < vw (a multiple of 32)
inline void tile_values(int lanes, const uint8_t* rows, size_t stride, const uint8_t* p, int n,
                        float* o, int vw_) {
  alignas(64) uint8_t turned[16 * 128],
      pairs[2][2][1024];  // [rows 0 .., rows 32 ..][columns 0 .., 16 ..][16 pairs][16 columns]
  turn_words(p, turned, 128);
  turn_words(p + 1024, turned + 64, 128);
  TileShapes shapes;
  for (int i = 0; i < 2; i++)
    shapes.set(i, lanes, 64), shapes.set(4 + i, lanes, 64), shapes.set(6 + i, 16, 64);
  shapes.load();
  tile_load<4>(turned, 128);
  tile_load<5>(turned + 64, 128);
  if (n % 32)
    std::memset(
        pairs, 0,
        sizeof pairs);  // rows beyond n weigh nothing, but nothing times what was there may be NaN
  for (int c = 0; c < vw_; c += 32) {
    const uint8_t* r = rows + 2 * size_t(c);
    for (int u = 0; 2 * u < n; u++, r += 2 * stride) {
      const uint16_t *x = (const uint16_t*)r,
                     *y = (const uint16_t*)(2 * u + 1 < n ? r + stride : r);
      wstore(pairs[u / 16][0] + 64 * (u % 16), interleave_bf16(x, y));
      wstore(pairs[u / 16][1] + 64 * (u % 16), interleave_bf16(x + 16, y + 16));
    }
    tile_load<0>(o + c, size_t(vw_) * 4);
    tile_load<1>(o + c + 16, size_t(vw_) * 4);
    tile_load<6>(pairs[0][0], 64);
    tile_load<7>(pairs[0][1], 64);
    tile_bf16<0, 4, 6>();
    tile_bf16<1, 4, 7>();
    if (n > 32) {
      tile_load<6>(pairs[1][0], 64);
      tile_load<7>(pairs[1][1], 64);
      tile_bf16<0, 5, 6>();
      tile_bf16<1, 5, 7>();
    }
    tile_store<0>(o + c, size_t(vw_) * 4);
    tile_store<1>(o + c + 16, size_t(vw_) * 4);
  }
}

// o[lane][c] = o * fix[lane] + unit[lane] * the sum of weights (bytes, [16 fours of rows][16
// lanes], zeros beyond the last row) times `quads` (ops.h), c < width (a multiple of 32)
template <class Ahead>
void tile_value_ints(int lanes, const uint8_t* quads, const uint8_t* p, float* o, int width,
                     const float* fix, const float* unit, Ahead& ahead) {
  alignas(64) uint8_t turned[1024];
  alignas(64) int32_t sums[2][16 * 16];
  turn_words(p, turned, 64);
  TileShapes shapes;
  for (int i = 0; i < 2; i++) shapes.set(i, lanes, 64), shapes.set(6 + i, 16, 64);
  shapes.set(4, lanes, 64);
  shapes.load();
  tile_load<4>(turned, 64);
  for (int c = 0; c < width; c += 32, quads += 2048) {
    tile_load<6>(quads, 64);
    tile_load<7>(quads + 1024, 64);
    tile_zero<0>(), tile_zero<1>();
    tile_us<0, 4, 6>();
    tile_us<1, 4, 7>();
    tile_store<0>(sums[0], 64);
    tile_store<1>(sums[1], 64);
    ahead.after(32);
    for (int i = 0; i < lanes; i++)
      UNROLL_FOR(j, 2) {
        float* to = o + size_t(i) * width + c + 16 * j;
        vstore(to, vfma(vload(to), vset(fix[i]), vcvt(wload(sums[j] + 16 * i)) * vset(unit[i])));
      }
  }
}

}  // namespace LAMOE_NS
}  // namespace lamoe
