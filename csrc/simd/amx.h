// AMX: AVX-512 with a matrix unit. It has eight tile registers of up to 16 rows of 64 bytes, and
// instructions that add the product of two tiles to a third:
//
//   instruction   sums    rows              weights
//   tdpbf16ps     float   [M][32 BF16]      [16 pairs of inputs][16 outputs] BF16
//   tdpb..d       int32   [M][64 bytes]     [16 quads of inputs][16 outputs] bytes
//
// BF16 matrices are stored in the order of this weights operand (formats.h). INT8 and INT4 products
// use only [M][16 bytes] x [4 quads][16 outputs] per instruction, because each group of 16 inputs
// has its own scale.
//
// tdpbf16ps sums in a different order than the AVX-512 instruction vdpbf16ps. A result must depend
// only on its row and its weights. Whether a BF16 product uses tiles therefore depends on widths
// alone, never on the number of rows. Integer sums are exact, so they equal those of the `avx512`
// kernels bit for bit.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "cpu/formats.h"
#include "simd/avx512.h"

namespace lamoe {
namespace LAMOE_ISA {

struct Traits : Avx512Traits {
  static constexpr const char* kCpuFeatures =
      "avx512f avx512bw avx512vl avx512dq avx512vnni avx512bf16 amx";
  static constexpr int kPrefetchLevel = 2, kDecodeRows = 16;
};

constexpr int kTileBytes = 16 * 64;  // size of a tile register

// ---- instructions ------------------------------------------------------------------------------
// Configures the shapes of the tile registers during the lifetime of this object. Each kernel call
// must configure them again, because other code on this thread (torch) also uses AMX.
class TileShapes {
 public:
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
  // Reads or writes both ends of each row of a tile in C++. Sanitizers do not see the memory
  // accesses of inline assembly, so they check these instead.
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
  struct alignas(64) Shapes {  // memory operand of the instruction ldtilecfg
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
// The next four functions compute C += A * B. In tile_su, for example, the bytes of A are signed
// (s) and those of B are unsigned (u).
template <int C, int A, int B>
INLINE void tile_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_ss() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_su() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_us() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// Number of rows in the i-th block of 16, out of n rows.
INLINE int block_rows(int n, int i) { return std::clamp(n - 16 * i, 0, 16); }

// ---- bfloat16 products -------------------------------------------------------------------------
// Multiplies M blocks of 16 rows by N tiles of 16 outputs. Tile registers 0 .. 3 hold the sums, 4
// and 5 the rows, and 6 and 7 the weights.
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

// Stores the first n columns of the sums in tile register T.
template <int T>
INLINE void store_columns(float* out, ptrdiff_t ldo, int rows, int n) {
  if (n >= 16) return tile_store<T>(out, size_t(ldo) * 4);
  alignas(64) float t[16 * 16];
  tile_store<T>(t, 64);
  for (int r = 0; r < rows; r++) vstore_n(out + r * ldo, vload(t + 16 * r), n);
}

// Stores the first n columns of the sums of M x N blocks.
template <int M, int N>
INLINE void store_block(float* out, ptrdiff_t ldo, int rows, int n) {
  const int first = std::min(rows, 16);
  store_columns<0>(out, ldo, first, n);
  if (N == 2) store_columns<1>(out + 16, ldo, first, n - 16);
  if (M == 2) store_columns<2>(out + 16 * ldo, ldo, rows - 16, n);
  if (M == 2 && N == 2) store_columns<3>(out + 16 * ldo + 16, ldo, rows - 16, n - 16);
}
template <int M, int N>
INLINE void store_block(uint16_t* out, ptrdiff_t ldo, int rows, int n) {
  alignas(64) float t[32 * 32];
  tile_store<0>(t, 128);
  if (N == 2) tile_store<1>(t + 16, 128);
  if (M == 2) tile_store<2>(t + 16 * 32, 128);
  if (M == 2 && N == 2) tile_store<3>(t + 16 * 32 + 16, 128);
  for (int r = 0; r < rows; r++) {
    const float* from = t + 32 * r;
    uint16_t* to = out + r * ldo;
    if (N == 2 && n >= 32) {
      vstore_bf16(to, vload(from), vload(from + 16));
    } else if (n >= 16) {
      vstore_bf16(to, vload(from));
      for (int i = 16; i < std::min(n, 16 * N); i++) to[i] = float_to_bf16(from[i]);
    } else {
      for (int i = 0; i < n; i++) to[i] = float_to_bf16(from[i]);
    }
  }
}

// If ADD, the product is added to `out`, whose n then must cover all N tiles.
template <int M, int N, bool ADD, class O>
void block_bf16(const uint8_t* x, size_t stride, int rows, const uint8_t* w, size_t tile, int units,
                O* out, ptrdiff_t ldo, int n) {
  if constexpr (ADD) {
    const size_t row = size_t(ldo) * 4;
    tile_load<0>(out, row);
    if (N == 2) tile_load<1>(out + 16, row);
    if (M == 2) tile_load<2>(out + 16 * ldo, row);
    if (M == 2 && N == 2) tile_load<3>(out + 16 * ldo + 16, row);
  } else {
    tile_zero<0>(), tile_zero<1>();
    if (M == 2) tile_zero<2>(), tile_zero<3>();
  }
  int u = 0;
  for (; u + 16 <= units; u += 16)
    step_bf16<M, N>(x + 4 * size_t(u), stride, w + 64 * size_t(u), tile);
  if (u < units) {  // the last inputs do not fill a tile register, so pad them with zeros
    alignas(64) uint8_t xs[32 * 64], ws[2 * kTileBytes];
    std::memset(xs, 0, sizeof xs);
    std::memset(ws, 0, sizeof ws);
    for (int r = 0; r < rows; r++)
      std::memcpy(xs + 64 * r, x + r * stride + 4 * size_t(u), 4 * size_t(units - u));
    for (int t = 0; t < N; t++)
      std::memcpy(ws + kTileBytes * t, w + t * tile + 64 * size_t(u), 64 * size_t(units - u));
    step_bf16<M, N>(xs, 64, ws, kTileBytes);
  }
  store_block<M, N>(out, ldo, rows, n);
}

// ---- attention ---------------------------------------------------------------------------------
// Adds products of the I-th block of 16 cache rows with 16 queries to the scores. Tile register I
// holds the scores of the block, 0 <= I < 4. Register 4 holds the rows of a full block, register 5
// those of the last, partial block, and register 6 the queries.
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

// ---- interface for kernels ---------------------------------------------------------------------
struct Tiles {
  static constexpr bool kAvailable = true;
  static constexpr int kRows = 16;       // rows of one block in IntProducts
  static constexpr int kMostRows = 192;  // maximum number of rows in one call of IntProducts::run

  // Converts decoded codes to the signed bytes that IntProducts multiplies.
  template <int FMT>
  INLINE static vw operand(vw codes) {
    return {_mm512_sub_epi8(codes.v, _mm512_set1_epi8(char(FMT == INT8 ? 128 : 64)))};
  }

  // Multiplies `rows` rows, each of `units` pairs of BF16 elements, by `count` tiles of weights.
  // Writes n outputs per row as float or bfloat16 (O), or adds to float outputs if ADD. Tiles are
  // `tile` bytes apart, rows `stride` bytes.
  template <bool ADD = false, class O = float>
  static void linear_bf16(const uint8_t* w, size_t tile, int count, int units, const uint8_t* x,
                          size_t stride, int rows, O* out, ptrdiff_t ldo, int n) {
    TileShapes shapes;
    for (int r = 0; r < rows; r += 32) {
      const int here = std::min(rows - r, 32);
      if (r == 0 || here < 32) {
        for (int i = 0; i < 2; i++) {
          const int m = block_rows(here, i);
          shapes.set(2 * i, m, 64), shapes.set(2 * i + 1, m, 64);
          shapes.set(4 + i, m, 64), shapes.set(6 + i, 16, 64);
        }
        shapes.load();
      }
      const uint8_t* y = x + r * stride;
      O* to = out + r * ldo;
      for (int t = 0; t < count; t += 2) {
        const auto multiply =
            t + 1 < count ? (here > 16 ? block_bf16<2, 2, ADD, O> : block_bf16<1, 2, ADD, O>)
                          : (here > 16 ? block_bf16<2, 1, ADD, O> : block_bf16<1, 1, ADD, O>);
        multiply(y, stride, here, w + t * tile, tile, units, to + 16 * t, ldo, n - 16 * t);
      }
    }
  }

  // Multiplies 16 or more rows by one tile of INT8 or INT4 weights.
  class IntProducts {
   public:
    // Tile registers 0 .. 3 hold the sums of four groups, 4 the rows, and 6 the weights.
    IntProducts() {
      for (int i = 0; i < 4; i++) shapes_.set(i, kRows, 64);
      shapes_.set(4, kRows, kGroup), shapes_.set(6, kGroup / 4, 64);
      shapes_.load();
    }

    // Computes 16 rows at a time. If 16 does not divide `rows`, the last 16 overlap with rows that
    // have been computed before, and give the same results again. decode(b, to) decodes block b.
    //
    // Each group has its own scale, so its sum must leave the tile registers through memory. The
    // work is pipelined in steps of one block for 16 rows. While the sums of step i are computed,
    // those of step i - 1 are stored, and those of step i - 2 are scaled and added. The order of
    // the additions is that of micro_int in linear.cpp.
    template <class Decode>
    void run(const Decode& decode, int blocks, float scale, const Acts& x, int row, int rows,
             float* out, ptrdiff_t ldo, int n) {
      const size_t scale_stride = size_t(x.stride / kBlock), stride = size_t(x.stride);
      const int parts = (rows + kRows - 1) / kRows, all = parts * blocks;
      alignas(64) DecodedBlock decoded[3];
      alignas(64) int32_t sums[2][4][kRows * 16];
      alignas(64) float totals[kMostRows / kRows][kRows * 16];
      std::memset(totals, 0, size_t(parts) * sizeof totals[0]);
      const auto first = [&](int part) { return part + 1 < parts ? part * kRows : rows - kRows; };
      int b = 0, part = 0, b_add = 0, part_add = 0;
      for (int i = 0; i < all + 2; i++) {
        const bool make = i < all, store = i > 0 && i <= all, add = i > 1;
        if (make && part == 0) decode(b, &decoded[b % 3]);
        const int8_t* q = x.q + size_t(row + first(part)) * stride + kBlock * size_t(b);
        const DecodedBlock &w = decoded[b % 3], &w_add = decoded[b_add % 3];
        vf sum[kRows];
        UNROLL_FOR(m, kRows) sum[m] = vzero();
        const auto group = [&](auto number) __attribute__((always_inline)) {
          constexpr int g = decltype(number)::value;
          if (add) {
            const vf ws = vload(w_add.groups[g].scales);
            const int32_t* from = sums[i % 2][g];
            UNROLL_FOR(m, kRows) sum[m] = vfma(vcvt(wload(from + 16 * m)), ws, sum[m]);
          }
          if (store) tile_store<g>(sums[(i - 1) % 2][g], 64);
          if (make) {
            tile_load<4>(q + kGroup * g, stride);
            tile_load<6>(w.groups[g].codes, 64);
            tile_zero<g>();
            tile_ss<g, 4, 6>();
          }
        };
        group(std::integral_constant<int, 0>()), group(std::integral_constant<int, 1>());
        group(std::integral_constant<int, 2>()), group(std::integral_constant<int, 3>());
        if (add) {
          const float* s = x.s + size_t(row + first(part_add)) * scale_stride + b_add;
          float* total = totals[part_add];
          UNROLL_FOR(m, kRows) {
            vstore(total + 16 * m, vfma(sum[m], vset(s[m * scale_stride]), vload(total + 16 * m)));
          }
          if (++part_add == parts) part_add = 0, b_add++;
        }
        if (make && ++part == parts) part = 0, b++;
      }
      for (int p = 0; p < parts; p++)
        for (int m = 0; m < kRows; m++)
          vstore_n(out + (first(p) + m) * ldo, vload(totals[p] + 16 * m) * vset(scale), n);
    }

   private:
    TileShapes shapes_;
  };

  // Whether tiles can process keys or values of `width` elements.
  static bool fits(int width) { return width % 32 == 0; }

  // Computes the scores s[n rows][16 lanes]: n cache rows of 64 * steps bytes times packed queries
  // [16 * steps words][16 lanes]. The elements are BF16 with FP32 scores. If INTS, rows are signed
  // bytes, queries are unsigned bytes, and scores are int32.
  template <bool INTS, class Ahead>
  static void scores(const uint8_t* rows, size_t stride, const uint8_t* q, int steps, int n,
                     void* s, Ahead& ahead) {
    TileShapes shapes;
    for (int i = 0; i < 4; i++) shapes.set(i, block_rows(n, i), 64);
    shapes.set(4, 16, 64), shapes.set(5, n % 16, 64), shapes.set(6, 16, 64);
    shapes.load();
    tile_zero<0>();
    if (n > 16) tile_zero<1>();
    if (n > 32) tile_zero<2>();
    if (n > 48) tile_zero<3>();
    for (int i = 0; i < steps; i++, rows += 64, q += kTileBytes) {
      tile_load<6>(q, 64);
      score_block<0, INTS>(rows, stride, n), ahead.next(16);
      score_block<1, INTS>(rows, stride, n), ahead.next(16);
      score_block<2, INTS>(rows, stride, n), ahead.next(16);
      score_block<3, INTS>(rows, stride, n), ahead.next(16);
    }
    uint8_t* to = (uint8_t*)s;
    tile_store<0>(to, 64);
    if (n > 16) tile_store<1>(to + kTileBytes, 64);
    if (n > 32) tile_store<2>(to + 2 * kTileBytes, 64);
    if (n > 48) tile_store<3>(to + 3 * kTileBytes, 64);
  }

  // Adds the latent scores of n rows of an IntTile, like score_ints in attention_ints.cpp:
  //   s[row][lane] = (s[row][lane] + step[row] * lane_scale[lane] * integer product) * scale
  template <class Ahead>
  static void add_int_scores(const IntTile& tile, const IntLanes& lanes, vf scale, int n, float* s,
                             Ahead& ahead) {
    alignas(64) int32_t products[kTileRows * kLanes];
    scores<true>((const uint8_t*)tile.row(0), tile.width, lanes.words(), tile.width / 64, n,
                 products, ahead);
    const vf lane = vload(lanes.scales());
    for (int t = 0; t < n; t++) {
      const vw product = wload(products + 16 * t);
      const vw sum = {_mm512_add_epi32(product.v, start_int8(tile.sums()[t]).v)};
      vstore(s + 16 * t, vfma(vcvt(sum), lane * vset(tile.steps()[t]), vload(s + 16 * t)) * scale);
    }
  }

  // Adds BF16 softmax weights times values to the outputs: o[lane][c] += sum over n rows of
  // p[row / 2][lane][row % 2] * rows[row][c], for c < width. Sets p to zero beyond n rows.
  static void values(int lanes, const uint8_t* rows, size_t stride, uint8_t* p, int n, float* o,
                     int width) {
    // Interleaved values of 64 rows and 32 columns: [half of the rows][half of the columns]
    // [16 pairs of rows][16 columns].
    alignas(64) uint8_t pairs[2][2][kTileBytes];
    alignas(64) uint8_t transposed[16 * 128];
    for (int t = (n + 1) / 2; t < 32; t++) wstore(p + 64 * t, wset(0));
    transpose_words(p, 64, transposed, 128);
    transpose_words(p + kTileBytes, 64, transposed + 64, 128);
    TileShapes shapes;
    for (int i = 0; i < 2; i++) {
      shapes.set(i, lanes, 64), shapes.set(4 + i, lanes, 64), shapes.set(6 + i, 16, 64);
    }
    shapes.load();
    tile_load<4>(transposed, 128);
    tile_load<5>(transposed + 64, 128);
    // Rows beyond n have weight 0. But 0 times uninitialised memory may be NaN, so clear it.
    if (n % 32) std::memset(pairs, 0, sizeof pairs);
    for (int c = 0; c < width; c += 32) {
      const uint8_t* r = rows + 2 * size_t(c);
      for (int u = 0; 2 * u < n; u++, r += 2 * stride) {
        const uint16_t *x = (const uint16_t*)r,
                       *y = (const uint16_t*)(2 * u + 1 < n ? r + stride : r);
        wstore(pairs[u / 16][0] + 64 * (u % 16), interleave_bf16(x, y));
        wstore(pairs[u / 16][1] + 64 * (u % 16), interleave_bf16(x + 16, y + 16));
      }
      tile_load<0>(o + c, size_t(width) * 4);
      tile_load<1>(o + c + 16, size_t(width) * 4);
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
      tile_store<0>(o + c, size_t(width) * 4);
      tile_store<1>(o + c + 16, size_t(width) * 4);
    }
  }

  // Updates outputs from an IntTile and softmax weights p[row / 4][lane][row % 4] in bytes:
  //   o[lane][c] = o[lane][c] * fix[lane] + unit[lane] * sum over rows of p * byte[row][c]
  template <class Ahead>
  static void int_values(int lanes, const IntTile& tile, uint8_t* p, int n, float* o,
                         const float* fix, const float* unit, Ahead& ahead) {
    alignas(64) uint8_t transposed[kTileBytes];
    alignas(64) int32_t sums[2][16 * 16];
    for (int t = (n + 3) / 4; t < 16; t++) wstore(p + 64 * t, wset(0));
    transpose_words(p, 64, transposed, 64);
    TileShapes shapes;
    for (int i = 0; i < 2; i++) shapes.set(i, lanes, 64), shapes.set(6 + i, 16, 64);
    shapes.set(4, lanes, 64);
    shapes.load();
    tile_load<4>(transposed, 64);
    for (int c = 0; c < tile.width; c += 32) {
      tile_load<6>(tile.quads(c), 64);
      tile_load<7>(tile.quads(c + 16), 64);
      tile_zero<0>(), tile_zero<1>();
      tile_us<0, 4, 6>();
      tile_us<1, 4, 7>();
      tile_store<0>(sums[0], 64);
      tile_store<1>(sums[1], 64);
      ahead.later(32);
      for (int i = 0; i < lanes; i++) {
        UNROLL_FOR(j, 2) {
          float* to = o + size_t(i) * tile.width + c + 16 * j;
          const vf sum = vcvt(wload(sums[j] + 16 * i));
          vstore(to, vfma(vload(to), vset(fix[i]), sum * vset(unit[i])));
        }
      }
    }
  }

  // Runs n times four independent products, for probe.cpp. Returns the number of multiply-adds.
  static double probe(int fmt, long n) {
    TileShapes shapes;
    for (int i = 0; i < 8; i++) shapes.set(i, 16, 64);
    shapes.load();
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
    for (long k = 0; k < n; k++)
      if (fmt == INT8)
        tile_ss<0, 4, 6>(), tile_ss<1, 4, 7>(), tile_ss<2, 5, 6>(), tile_ss<3, 5, 7>();
      else
        tile_bf16<0, 4, 6>(), tile_bf16<1, 4, 7>(), tile_bf16<2, 5, 6>(), tile_bf16<3, 5, 7>();
    return double(n) * 4 * 16 * 16 * (fmt == INT8 ? 64 : 32);
  }
};

}  // namespace LAMOE_ISA
}  // namespace lamoe
