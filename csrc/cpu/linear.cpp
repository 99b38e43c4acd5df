// Products of activation rows with packed weights. A result depends on its row and its weights
// alone: not on how many rows come along, nor on threads, because every kernel adds up in one order
// (group by group, block by block).
#include "cpu/kernels.h"
#if defined(LAMOE_ISA_AMX)
#include "simd/amx.h"
#endif

namespace lamoe {
namespace LAMOE_NS {
namespace {

#if defined(LAMOE_ISA_AVX512)
constexpr int
    kRows = 12,
    kTiles = 2, kTileRows = 6,
    kUnitRows =
        12;  // rows of a micro-kernel: INT8 / INT4; over kTiles decoded tiles at once; FP32 / BF16
#else
constexpr int kRows = 8, kTiles = 1, kTileRows = 8, kUnitRows = 6;
#endif
constexpr int kAhead = 9216;  // bytes between a prefetch and its use
#if defined(LAMOE_ISA_AMX)
constexpr int kDecodeFrom = kIntRows;
#else
constexpr int kDecodeFrom =
    2 * kRows;  // from this many rows on a tile is decoded once, ahead of its rows
#endif
// Into L2 on Intel's cores (the only ones with these instructions and no more): what is on its way
// to L1 takes one of the few buffers that all loads wait in.
#if defined(LAMOE_ISA_AMX) || defined(LAMOE_ISA_AVXVNNI) || \
    (defined(LAMOE_ISA_AVX512) && !defined(__AVX512BF16__))
constexpr int kPrefetchTo = 2;
#else
constexpr int kPrefetchTo = 3;
#endif

// ---- INT8, INT4
// --------------------------------------------------------------------------------------------------------
// One group of four quads: weights as unsigned bytes, and the scales of the 16 outputs.
template <int FMT>
struct Packed {
  const uint8_t *p, *end, *then;  // reading goes on up to `end`, and from `then` on
  // A few rows wait for memory: what comes some blocks later is asked for, a quarter with each
  // group (all at once would hold up the loads behind).
  INLINE const uint8_t* ahead(int block) const {
    const uint8_t* b = p + size_t(block) * (FMT == INT8 ? 1088 : 576) + kAhead;
    return b < end ? b : then + (b - end);
  }
  INLINE void prefetch(const uint8_t* b, int g) const {
    constexpr int kLines = FMT == INT8 ? 17 : 9;
    for (int i = kLines * g / 4; i < kLines * (g + 1) / 4; i++)
      __builtin_prefetch(b + 64 * i, 0, kPrefetchTo);
  }
  INLINE void group(int block, int g, vw* w, vf& s) const {
    const uint8_t* b = p + size_t(block) * (FMT == INT8 ? 1088 : 576);
    s = vscales(b + 16 * g);
    if (FMT == INT8) {
      for (int j = 0; j < 4; j++) w[j] = decode_int8(b + 64 + 64 * (4 * g + j));
    } else {
      decode_int4(b + 64 + 128 * g, w[0], w[1]);
      decode_int4(b + 128 + 128 * g, w[2], w[3]);
    }
  }
};
#if !defined(LAMOE_ISA_AMX)
struct Decoded {            // [block][4 groups](16 scales, 4 x 64 bytes)
  const uint8_t *p, *next;  // next: packed blocks to ask for meanwhile (null: none)
  int lines;                // of `next`, for each block
  INLINE const uint8_t* ahead(int block) const { return next + 64 * size_t(block) * lines; }
  INLINE void prefetch(const uint8_t* b, int g) const {
    for (int i = lines * g / 4; i < lines * (g + 1) / 4; i++) __builtin_prefetch(b + 64 * i, 0, 2);
  }
  INLINE void group(int block, int g, vw* w, vf& s) const {
    const uint8_t* b = p + size_t(4 * block + g) * 320;
    s = vload((const float*)b);
    for (int j = 0; j < 4; j++) w[j] = wload(b + 64 + 64 * j);
  }
};
#endif

template <int FMT>
INLINE vw start(int32_t c) {
  return FMT == INT8 ? start_int8(c) : wset(c);
}
template <int FMT>
INLINE vw dot(vw acc, vw w, const int8_t* x) {
  return FMT == INT8 ? dot_int8(acc, w, x) : dot_int4(acc, w, x);
}
template <int FMT>
INLINE vw dot(vw acc, vw w, vw x) {
  return FMT == INT8 ? dot_int8(acc, w, x) : dot_int4(acc, w, x);
}

// T tiles x M rows. Two tiles for many rows: an activation word that is in a register serves both
// tiles.
template <int FMT, class W, int T, int M>
void micro_int(const W* weights, int blocks, float scale, const Acts& x, int row, float* out,
               ptrdiff_t ldo, int n) {
  const int8_t* q = x.q + size_t(row) * x.stride;
  const float* s = x.s + size_t(row) * (x.stride / kBlock);
  const int32_t* c = x.c + size_t(row) * (x.stride / kGroup);
  const size_t stride = x.stride;
  vf total[T][M];
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) total[t][m] = vzero();
  for (int b = 0; b < blocks; b++) {
    const uint8_t* ahead = weights[0].ahead(b);
    vf part[T][M];
    UNROLL_FOR(t, T)
      UNROLL_FOR(m, M) part[t][m] = vzero();
    UNROLL_FOR(g, 4) {
      vw w[T][4];
      vf ws[T];
      weights[0].prefetch(ahead, g);
      UNROLL_FOR(t, T) weights[t].group(b, g, w[t], ws[t]);
      UNROLL_FOR(m, M) {
        const int8_t* y = q + m * stride + kBlock * b + kGroup * g;
        const int32_t from = c[m * (stride / kGroup) + 4 * b + g];
        vw acc[T];
        UNROLL_FOR(t, T) acc[t] = start<FMT>(from);
        UNROLL_FOR(j, 4) {
          if constexpr (T == 1) {
            acc[0] = dot<FMT>(acc[0], w[0][j], y + 4 * j);
          } else {
            const vw word = wspread(y + 4 * j);
            UNROLL_FOR(t, T) acc[t] = dot<FMT>(acc[t], w[t][j], word);
          }
        }
        UNROLL_FOR(t, T) part[t][m] = vfma(vcvt(acc[t]), ws[t], part[t][m]);
      }
    }
    UNROLL_FOR(m, M) {
      const vf xs = vset(s[m * (stride / kBlock) + b]);
      UNROLL_FOR(t, T) total[t][m] = vfma(part[t][m], xs, total[t][m]);
    }
  }
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) vstore_n(out + m * ldo + kTile * t, total[t][m] * vset(scale), n - kTile * t);
}

template <int FMT, class W, int T, int M>
void rows_int(const W* w, int blocks, float scale, const Acts& x, int row, int rows, float* out,
              ptrdiff_t ldo, int n) {
  for (; rows >= M; row += M, rows -= M, out += M * ldo)
    micro_int<FMT, W, T, M>(w, blocks, scale, x, row, out, ldo, n);
  if constexpr (M > 1) {
    if (rows) rows_int<FMT, W, T, M - 1>(w, blocks, scale, x, row, rows, out, ldo, n);
  }
}

// One block as `Decoded` has it; on AMX, which multiplies signed bytes, with those.
template <int FMT>
INLINE void decode_block(const Packed<FMT>& packed, int block, uint8_t* to) {
  const uint8_t* ahead = packed.ahead(block);
  UNROLL
  for (int g = 0; g < 4; g++, to += 320) {
    packed.prefetch(ahead, g);
    vw w[4];
    vf s;
    packed.group(block, g, w, s);
    vstore((float*)to, s);
#if defined(LAMOE_ISA_AMX)
    UNROLL_FOR(j, 4) wstore(to + 64 + 64 * j, signed_bytes<FMT>(w[j]));
#else
    UNROLL_FOR(j, 4) wstore(to + 64 + 64 * j, w[j]);
#endif
  }
}

template <int FMT>
void tiles_int(const Mat& m, int t0, int t1, const Acts& x, int row, int rows, float* out,
               ptrdiff_t ldo, uint8_t* scratch, const uint8_t* then) {
  const int blocks = ceil_to(m.k, kBlock) / kBlock;
  const size_t size = tile_bytes(FMT, m.k);
  const uint8_t* end = m.data + t1 * size;
  if (!then) then = m.data + t0 * size;
  if (rows < kDecodeFrom) {
    for (int t = t0; t < t1; t++) {
      const Packed<FMT> w{m.data + t * size, end, then};
      rows_int<FMT, Packed<FMT>, 1, kRows>(&w, blocks, m.scale, x, row, rows, out + kTile * t, ldo,
                                           m.n - kTile * t);
    }
    return;
  }
#if defined(LAMOE_ISA_AMX)
  TileShapes shapes;
  shape_ints(shapes);
  const int rest = rows % kIntRows <= 6 ? rows % kIntRows : 0,
            most = rows - rest;  // so few are done sooner without tiles
  for (int t = t0; t < t1; t++) {
    const Packed<FMT> w{m.data + t * size, end, then};
    const int n = m.n - kTile * t;
    float* to = out + kTile * t;
    for (int r = 0; r < most; r += kIntMost) {
      const int from = most - r < kIntRows ? most - kIntRows : r,
                here = most - from < kIntMost ? most - from : kIntMost;
      linear_ints([&](int b, uint8_t* decoded) { decode_block<FMT>(w, b, decoded); }, blocks,
                  m.scale, x, row + from, here, to + from * ldo, ldo, n);
    }
    rows_int<FMT, Packed<FMT>, 1, kRows>(&w, blocks, m.scale, x, row + most, rest, to + most * ldo,
                                         ldo, n);
  }
  (void)scratch;
#else
  const size_t decoded = size_t(blocks) * kDecodedBlock;
  for (int t = t0; t < t1;) {
    const int count = t + kTiles <= t1 ? kTiles : 1, n = m.n - kTile * t;
    float* to = out + kTile * t;
    for (int i = 0; i < count; i++)
      for (int b = 0; b < blocks; b++)
        decode_block<FMT>({m.data + (t + i) * size, end, then}, b,
                          scratch + i * decoded + size_t(b) * kDecodedBlock);
    t += count;
    // the first rows ask for the tiles that are decoded next
    const uint8_t* next = t < t1 ? m.data + t * size : then;
    const Decoded first[2] = {
        {scratch, next, (t + kTiles <= t1 || t >= t1 ? kTiles : 1) * int(size / 64) / blocks},
        {scratch + decoded, nullptr, 0}};
    const Decoded w[2] = {{scratch, nullptr, 0}, {scratch + decoded, nullptr, 0}};
    const auto go = count == kTiles ? rows_int<FMT, Decoded, kTiles, kTileRows>
                                    : rows_int<FMT, Decoded, 1, kRows>;
    const int some = count == kTiles ? kTileRows : kRows;
    go(first, blocks, m.scale, x, row, some, to, ldo, n);
    go(w, blocks, m.scale, x, row + some, rows - some, to + some * ldo, ldo, n);
  }
#endif
}

// ---- FP32, BF16
// --------------------------------------------------------------------------------------------------------
template <int FMT>
INLINE vf dot_unit(vf acc, vw w, const uint8_t* x) {
  return FMT == FP32 ? dot_f32(acc, w, x) : dot_bf16(acc, w, x);
}

template <int FMT, int T, int M>
void micro_unit(const uint8_t* w, size_t tile, int units, const uint8_t* x, size_t stride,
                float* out, ptrdiff_t ldo, int n) {
  vf acc[T][M];
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) acc[t][m] = vzero();
  for (int u = 0; u < units; u++) {
    vw v[T];
    UNROLL_FOR(t, T) v[t] = wload(w + t * tile + size_t(u) * 64);
    UNROLL_FOR(m, M)
      UNROLL_FOR(t, T) acc[t][m] = dot_unit<FMT>(acc[t][m], v[t], x + m * stride + size_t(u) * 4);
  }
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) vstore_n(out + m * ldo + 16 * t, acc[t][m], n - 16 * t);
}

template <int FMT, int T, int M>
void rows_unit(const uint8_t* w, size_t tile, int units, const uint8_t* x, size_t stride, int rows,
               float* out, ptrdiff_t ldo, int n) {
  for (; rows >= M; rows -= M, x += M * stride, out += M * ldo)
    micro_unit<FMT, T, M>(w, tile, units, x, stride, out, ldo, n);
  if constexpr (M > 1) {
    if (rows) rows_unit<FMT, T, M - 1>(w, tile, units, x, stride, rows, out, ldo, n);
  }
}

template <int FMT>
void tiles_unit(const Mat& m, int t0, int t1, const Acts& x, int row, int rows, float* out,
                ptrdiff_t ldo) {
  const size_t tile = tile_bytes(m.fmt, m.k), stride = size_t(x.stride) * (FMT == FP32 ? 4 : 2);
  const uint8_t* y = (FMT == FP32 ? (const uint8_t*)x.f : (const uint8_t*)x.h) + row * stride;
  const int units = FMT == FP32 ? m.k : (m.k + 1) / 2;
#if defined(LAMOE_ISA_AMX)
  if (FMT == BF16)
    return linear_bf16(m.data + t0 * tile, tile, t1 - t0, units, y, stride, rows, out + kTile * t0,
                       ldo, m.n - kTile * t0);
#endif
  for (int t = t0; t < t1;) {
    const uint8_t* w = m.data + t * tile;
    const int n = m.n - kTile * t;
    float* to = out + kTile * t;
    if (rows == 1 && t + 4 <= t1) {
      micro_unit<FMT, 4, 1>(w, tile, units, y, stride, to, ldo, n);
      t += 4;
    } else if (t + 2 <= t1) {
      rows_unit<FMT, 2, kUnitRows>(w, tile, units, y, stride, rows, to, ldo, n);
      t += 2;
    } else {
      rows_unit<FMT, 1, kUnitRows>(w, tile, units, y, stride, rows, to, ldo, n);
      t += 1;
    }
  }
}

}  // namespace

void linear(const Mat& m, int t0, int t1, const Acts& x, int row0, int rows, float* out,
            ptrdiff_t ldo, void* scratch, const uint8_t* then) {
  if (rows <= 0) return;
  if (m.fmt == FP32) return tiles_unit<FP32>(m, t0, t1, x, row0, rows, out, ldo);
  if (m.fmt == BF16) return tiles_unit<BF16>(m, t0, t1, x, row0, rows, out, ldo);
  (m.fmt == INT8 ? tiles_int<INT8> : tiles_int<INT4>)(m, t0, t1, x, row0, rows, out, ldo,
                                                      (uint8_t*)scratch, then);
}

// e^89 is infinite in every instruction set, so gates far below zero give -0; the infinite ones
// NaN, because they are no results.
INLINE static vf silu(vf x) { return x / (vset(1.f) + vexp(vmin(vset(89.f), vzero() - x))); }

// One 64-wide block of F: gate and up products, silu(gate) * up * weight, and the activation rows
// as `down` wants them.
void swiglu(const Seg& s, int block, const Acts& x, const Acts& act, void* scratch,
            const uint8_t* then) {
  constexpr int kChunk = 192;  // rows at a time, so that gate and up stay in the cache
  const int f = s.w2.k, from = block * kBlock, width = from + kBlock <= f ? kBlock : f - from;
  const int first = from / kTile, count = tiles(width);
  float* both = (float*)scratch;
  uint8_t* rest = (uint8_t*)(both + size_t(kChunk) * 2 * kBlock);
  for (int r = 0; r < s.rows; r += kChunk) {
    const int rows = s.rows - r < kChunk ? s.rows - r : kChunk;
    const Mat gate = tile_of(s.w13, first), up = tile_of(s.w13, tiles(f) + first);
    linear(gate, 0, count, x, s.row0 + r, rows, both, 2 * kBlock, rest, up.data);
    linear(up, 0, count, x, s.row0 + r, rows, both + kBlock, 2 * kBlock, rest,
           r + rows < s.rows ? gate.data : then);
    for (int i = 0; i < rows; i++) {
      float* g = both + size_t(i) * 2 * kBlock;
      const vf weight = vset(s.weight ? s.weight[r + i] : 1.f);
      for (int j = 0; j < kBlock; j += 16) {
        vf v = j < width ? silu(vload(g + j)) * vload(g + kBlock + j) * weight : vzero();
        vstore_n(g + j, v, 16);
      }
      for (int j = width; j < kBlock; j++) g[j] = 0.f;
      put_block(act, s.row0 + r + i, block, g);
    }
  }
}

}  // namespace LAMOE_NS
}  // namespace lamoe
