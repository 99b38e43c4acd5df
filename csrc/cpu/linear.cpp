// Products of activation rows with packed weights, and SwiGLU.
//
// A result depends only on its activation row and its weights, not on the number of rows or
// threads. Every kernel therefore sums in the same order, group by group and block by block.
#include "cpu/kernels.h"
#include "cpu/unit_products.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int kAhead = 9216;  // bytes between a prefetch and its use

// ---- INT8, INT4 --------------------------------------------------------------------------------
// A micro-kernel reads weights through the class Packed or the class Decoded. Both return one group
// of inputs for 16 outputs: four operands of the byte dot product, and the 16 group scales.

// Reads blocks as they are stored, and decodes each group on the fly.
template <int FMT>
struct Packed {
  const uint8_t *p, *end, *then;  // the address to prefetch after `end` is `then`

  // The address to prefetch while `block` is in use. With few rows a kernel waits mostly for
  // memory. Each of the four groups prefetches a quarter of a block, because prefetching the whole
  // block at once would delay other loads.
  INLINE const uint8_t* ahead(int block) const {
    const uint8_t* b = (const uint8_t*)((const LowBitBlock<FMT>*)p + block) + kAhead;
    return b < end ? b : then + (b - end);
  }
  INLINE void prefetch(const uint8_t* b, int g) const {
    constexpr int kLines = sizeof(LowBitBlock<FMT>) / 64;
    for (int i = kLines * g / 4; i < kLines * (g + 1) / 4; i++)
      __builtin_prefetch(b + 64 * i, 0, Traits::kPrefetchLevel);
  }
  INLINE void group(int block, int g, vw* w, vf& s) const {
    const LowBitBlock<FMT>& b = ((const LowBitBlock<FMT>*)p)[block];
    s = vscales(b.scales[g]);
    if constexpr (FMT == INT8) {
      for (int j = 0; j < 4; j++) w[j] = decode_int8((const uint8_t*)b.codes[g][j]);
    } else {
      decode_int4((const uint8_t*)b.nibbles[g][0], w[0], w[1]);
      decode_int4((const uint8_t*)b.nibbles[g][1], w[2], w[3]);
    }
  }
};

// Reads blocks that have been decoded into scratch before.
struct Decoded {
  const DecodedBlock* p;
  const uint8_t* next;  // packed weights of later tiles, to prefetch during the computation
  int lines;            // number of cache lines of `next` to prefetch per block

  INLINE const uint8_t* ahead(int block) const { return next + 64 * size_t(block) * lines; }
  INLINE void prefetch(const uint8_t* b, int g) const {
    for (int i = lines * g / 4; i < lines * (g + 1) / 4; i++) __builtin_prefetch(b + 64 * i, 0, 2);
  }
  INLINE void group(int block, int g, vw* w, vf& s) const {
    const DecodedBlock::Group& group = p[block].groups[g];
    s = vload(group.scales);
    for (int j = 0; j < 4; j++) w[j] = wload(group.codes[j]);
  }
};

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

// Multiplies M rows by T tiles. With T = 2, each loaded word of activations is used twice.
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

// Processes all rows, M at a time. One micro-kernel call then processes the remaining rows.
template <int FMT, class W, int T, int M>
void rows_int(const W* w, int blocks, float scale, const Acts& x, int row, int rows, float* out,
              ptrdiff_t ldo, int n) {
  for (; rows >= M; row += M, rows -= M, out += M * ldo)
    micro_int<FMT, W, T, M>(w, blocks, scale, x, row, out, ldo, n);
  if constexpr (M > 1) {
    if (rows) rows_int<FMT, W, T, M - 1>(w, blocks, scale, x, row, rows, out, ldo, n);
  }
}

// Decodes one block into scratch. `as_operand` converts codes to operands of the byte dot product
// that will read them.
template <int FMT, class Operand>
INLINE void decode_block(const Packed<FMT>& packed, int block, DecodedBlock* to,
                         const Operand& as_operand) {
  const uint8_t* ahead = packed.ahead(block);
  UNROLL_FOR(g, 4) {
    packed.prefetch(ahead, g);
    vw w[4];
    vf s;
    packed.group(block, g, w, s);
    vstore(to->groups[g].scales, s);
    UNROLL_FOR(j, 4) wstore(to->groups[g].codes[j], as_operand(w[j]));
  }
}

// Tiles t0 .. t1 of the matrix m. `next` is the memory to prefetch after the last tile, or null.
template <int FMT>
struct TileRange {
  const Mat& m;
  int t0, t1;
  const uint8_t* next;
  size_t size = tile_bytes(FMT, m.k);
  const uint8_t* data(int t) const { return m.data + t * size; }
  const uint8_t* then() const { return next ? next : data(t0); }
  Packed<FMT> packed(int t) const { return {data(t), data(t1), then()}; }
};

// Multiplies on a matrix unit. A remainder of up to 6 rows is faster without it, so those rows take
// the vector kernel.
template <int FMT, class Unit>
void tiles_int_on_unit(const TileRange<FMT>& range, const Acts& x, int row, int rows, float* out,
                       ptrdiff_t ldo) {
  const Mat& m = range.m;
  const int remainder = rows % Unit::kRows;
  const int rest = remainder <= 6 ? remainder : 0, most = rows - rest;
  typename Unit::IntProducts products;
  for (int t = range.t0; t < range.t1; t++) {
    const Packed<FMT> w = range.packed(t);
    const int n = m.n - kTile * t;
    float* to = out + kTile * t;
    for (int r = 0; r < most; r += Unit::kMostRows) {
      const int from = std::min(r, most - Unit::kRows);
      const int here = std::min(most - from, Unit::kMostRows);
      const auto decode = [&](int b, DecodedBlock* decoded) {
        decode_block<FMT>(w, b, decoded,
                          [](vw codes) { return Unit::template operand<FMT>(codes); });
      };
      products.run(decode, blocks(m.k), m.scale, x, row + from, here, to + from * ldo, ldo, n);
    }
    rows_int<FMT, Packed<FMT>, 1, Traits::kIntRows>(&w, blocks(m.k), m.scale, x, row + most, rest,
                                                    to + most * ldo, ldo, n);
  }
}

// For many rows. Each tile is decoded only once, into scratch.
template <int FMT>
void tiles_int_decoded(const TileRange<FMT>& range, const Acts& x, int row, int rows, float* out,
                       ptrdiff_t ldo, DecodedBlock* scratch) {
  constexpr int kTiles = Traits::kPairTiles, kPairRows = Traits::kPairRows;
  const Mat& m = range.m;
  const int count_blocks = blocks(m.k);
  for (int t = range.t0; t < range.t1;) {
    const int count = t + kTiles <= range.t1 ? kTiles : 1, n = m.n - kTile * t;
    float* to = out + kTile * t;
    for (int i = 0; i < count; i++)
      for (int b = 0; b < count_blocks; b++)
        decode_block<FMT>({range.data(t + i), range.data(range.t1), range.then()}, b,
                          scratch + i * count_blocks + b, [](vw codes) { return codes; });
    t += count;
    // The micro-kernels of the first rows prefetch the tiles that are decoded next.
    const uint8_t* next = t < range.t1 ? range.data(t) : range.then();
    const int next_tiles = t + kTiles <= range.t1 || t >= range.t1 ? kTiles : 1;
    const Decoded first[2] = {{scratch, next, next_tiles * int(range.size / 64) / count_blocks},
                              {scratch + count_blocks, nullptr, 0}};
    const Decoded others[2] = {{scratch, nullptr, 0}, {scratch + count_blocks, nullptr, 0}};
    const auto multiply = count == kTiles ? rows_int<FMT, Decoded, kTiles, kPairRows>
                                          : rows_int<FMT, Decoded, 1, Traits::kIntRows>;
    const int some = count == kTiles ? kPairRows : Traits::kIntRows;
    multiply(first, count_blocks, m.scale, x, row, some, to, ldo, n);
    multiply(others, count_blocks, m.scale, x, row + some, rows - some, to + some * ldo, ldo, n);
  }
}

template <int FMT>
void tiles_int(const Mat& m, int t0, int t1, const Acts& x, int row, int rows, float* out,
               ptrdiff_t ldo, void* scratch, const uint8_t* next) {
  const TileRange<FMT> range{m, t0, t1, next};
  if (rows < Traits::kDecodeRows) {
    for (int t = t0; t < t1; t++) {
      const Packed<FMT> w = range.packed(t);
      rows_int<FMT, Packed<FMT>, 1, Traits::kIntRows>(&w, blocks(m.k), m.scale, x, row, rows,
                                                      out + kTile * t, ldo, m.n - kTile * t);
    }
  } else if constexpr (Tiles::kAvailable) {
    tiles_int_on_unit<FMT, Tiles>(range, x, row, rows, out, ldo);
  } else {
    tiles_int_decoded<FMT>(range, x, row, rows, out, ldo, (DecodedBlock*)scratch);
  }
}

// ---- FP32, BF16 --------------------------------------------------------------------------------
template <int FMT, class Unit = Tiles>
void tiles_unit(const Mat& m, int t0, int t1, const Acts& x, int row, int rows, float* out,
                ptrdiff_t ldo) {
  constexpr int kRows = Traits::kUnitRows, kTiles = Traits::kUnitTiles;
  const size_t tile = tile_bytes(m.fmt, m.k), stride = size_t(x.stride) * element_bytes(FMT);
  const uint8_t* y = (FMT == FP32 ? (const uint8_t*)x.f : (const uint8_t*)x.h) + row * stride;
  const int units = FMT == FP32 ? m.k : (m.k + 1) / 2;
  if constexpr (FMT == BF16 && Unit::kAvailable) {
    return Unit::linear_bf16(m.data + t0 * tile, tile, t1 - t0, units, y, stride, rows,
                             out + kTile * t0, ldo, m.n - kTile * t0);
  }
  for (int t = t0; t < t1;) {
    const uint8_t* w = m.data + t * tile;
    const int n = m.n - kTile * t;
    float* to = out + kTile * t;
    if (rows == 1 && t + 4 <= t1) {
      micro_unit<FMT, 4, 1>(w, tile, units, y, stride, to, ldo, n);
      t += 4;
    } else if (t + kTiles <= t1) {
      rows_unit<FMT, kTiles, kRows>(w, tile, units, y, stride, rows, to, ldo, n);
      t += kTiles;
    } else {
      rows_unit<FMT, 1, kRows>(w, tile, units, y, stride, rows, to, ldo, n);
      t += 1;
    }
  }
}

}  // namespace

void linear(const Mat& m, int t0, int t1, const Acts& x, int row0, int rows, float* out,
            ptrdiff_t ldo, void* scratch, const uint8_t* next) {
  if (rows <= 0) return;
  if (m.fmt == FP32) return tiles_unit<FP32>(m, t0, t1, x, row0, rows, out, ldo);
  if (m.fmt == BF16) return tiles_unit<BF16>(m, t0, t1, x, row0, rows, out, ldo);
  (m.fmt == INT8 ? tiles_int<INT8> : tiles_int<INT4>)(m, t0, t1, x, row0, rows, out, ldo, scratch,
                                                      next);
}

// The exponent is limited to 89, because e^89 already overflows to infinity on every instruction
// set. So a gate far below zero gives -0, and a gate of minus infinity gives NaN.
INLINE static vf silu(vf x) { return x / (vset(1.f) + vexp(vmin(vset(89.f), vzero() - x))); }

void swiglu(const Seg& s, int block, const Acts& x, const Acts& act, void* scratch,
            const uint8_t* next) {
  const int f = s.w2.k, from = block * kBlock, width = std::min(kBlock, f - from);
  const int first = from / kTile, count = tiles(width);
  float* both = (float*)scratch;  // gate and up results: [rows][64 gate columns | 64 up columns]
  void* rest = both + size_t(kChunkRows) * 2 * kBlock;
  for (int r = 0; r < s.rows; r += kChunkRows) {
    const int rows = std::min(kChunkRows, s.rows - r);
    const Mat gate = from_tile(s.w13, first), up = from_tile(s.w13, tiles(f) + first);
    linear(gate, 0, count, x, s.row0 + r, rows, both, 2 * kBlock, rest, up.data);
    linear(up, 0, count, x, s.row0 + r, rows, both + kBlock, 2 * kBlock, rest,
           r + rows < s.rows ? gate.data : next);
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

}  // namespace LAMOE_ISA
}  // namespace lamoe
