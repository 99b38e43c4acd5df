// Byte layouts of everything that kernels exchange: weights, activations, cache rows, and the
// intermediate results of attention. ops.h says what is done with them.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace lamoe {

enum Format { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr int kTile = 16;   // outputs of a weight tile
constexpr int kGroup = 16;  // inputs of one output that share a scale
constexpr int kBlock = 64;  // inputs of a block: four groups; activations have one scale per block
constexpr int kLanes = 16;  // (token, head) pairs that attention computes side by side

inline int ceil_to(int x, int m) { return (x + m - 1) / m * m; }
inline size_t align64(size_t n) { return (n + 63) / 64 * 64; }
inline int element_bytes(int elem) { return elem == FP32 ? 4 : 2; }

// ---- weights -----------------------------------------------------------------------------------
// A matrix [n outputs, k inputs] is cut into tiles of 16 outputs. The last tile is padded with zero
// rows. A tile holds all inputs of its outputs:
//
//   FP32   [k][16 outputs] float
//   BF16   [k / 2][16 outputs][2 inputs] bfloat16              k padded to a multiple of 2
//   INT8   [k / 64] Int8Block, 8.5 bits per weight             k padded to a multiple of 64
//   INT4   [k / 64] Int4Block, 4.5 bits per weight             k padded to a multiple of 64
//
// A quad is four neighbouring inputs: the operand of one byte dot product. A unit is four bytes of
// a row, that is one fp32 or two bf16 inputs.

struct Int8Block {
  uint8_t scales[4][16];       // [group][output], see scale_value
  uint8_t codes[4][4][16][4];  // [group][quad][output][input], code -127 .. 127 stored + 128
};

struct Int4Block {
  uint8_t scales[4][16];
  uint8_t nibbles[4][2][16][4];  // [group][j][output][input], indices into kLevels:
                                 // quad 2 j in the low half, quad 2 j + 1 in the high half
};

static_assert(sizeof(Int8Block) == 1088 && alignof(Int8Block) == 1);
static_assert(sizeof(Int4Block) == 576 && alignof(Int4Block) == 1);

template <int FMT>
using LowBitBlock = std::conditional_t<FMT == INT8, Int8Block, Int4Block>;

// A block of either format, decoded for use by many rows.
struct DecodedBlock {
  struct Group {
    float scales[16];
    uint8_t codes[4][64];  // [quad][16 outputs][4 inputs], as dot_int8 or dot_int4 wants them
  } groups[4];
};
static_assert(sizeof(DecodedBlock) == 4 * (64 + 256));

struct Mat {
  int fmt = 0, n = 0, k = 0;
  const uint8_t* data = nullptr;
  float scale = 1.f;  // matrix scale; group scales are relative to it
};

inline int tiles(int n) { return (n + kTile - 1) / kTile; }
inline int blocks(int k) { return (k + kBlock - 1) / kBlock; }
inline size_t block_bytes(int fmt) { return fmt == INT8 ? sizeof(Int8Block) : sizeof(Int4Block); }
inline size_t tile_bytes(int fmt, int k) {
  if (fmt == FP32) return size_t(k) * 64;
  if (fmt == BF16) return size_t((k + 1) / 2) * 64;
  return size_t(blocks(k)) * block_bytes(fmt);
}
inline size_t mat_bytes(int fmt, int n, int k) { return tiles(n) * tile_bytes(fmt, k); }

// The part of a matrix that begins with one of its tiles.
inline Mat from_tile(const Mat& m, int tile) {
  Mat r = m;
  r.data += size_t(tile) * tile_bytes(m.fmt, m.k);
  r.n -= tile * kTile;
  return r;
}

// ---- activations -------------------------------------------------------------------------------
// Rows in the forms that products with weights of each format need. Pointers to unused forms are
// null. Rows are `stride` elements apart, and padded with zeros.
struct Acts {
  int rows = 0, k = 0, stride = 0;
  float* f = nullptr;     // for FP32 weights
  uint16_t* h = nullptr;  // bfloat16, for BF16 weights
  // For INT8 and INT4 weights: blocks of 64 signed bytes, value = q * s.
  int8_t* q = nullptr;
  float* s = nullptr;    // [rows][stride / 64]
  int32_t* c = nullptr;  // [rows][stride / 16], -64 * the sum of each group of q
};
inline int acts_stride(int k) { return ceil_to(k, kBlock); }

// Rows in one of the two plain forms.
inline Acts plain_acts(int elem, const void* data, int rows, int k, int stride) {
  Acts a;
  a.rows = rows, a.k = k, a.stride = stride;
  if (elem == FP32)
    a.f = (float*)data;
  else
    a.h = (uint16_t*)data;
  return a;
}

// One SwiGLU over some rows: gate and up, each padded to whole tiles, stacked in one matrix; then
// down.
struct Seg {
  Mat w13, w2;
  int row0 = 0, rows = 0;         // range of activation rows
  const float* weight = nullptr;  // [rows], multiplies the activations between up and down; null: 1
  const int32_t* token = nullptr;  // [rows], output row of each row; null: row i is output row i
};

// ---- cache rows --------------------------------------------------------------------------------
// lamoe/backends/cache_codec.py documents the bytes. A row has two parts, of w[0] and w[1]
// elements: the latent and the rope key under MLA, else keys and values.
struct Codec {
  enum Kind { kFp32 = 0, kBf16 = 1, kLowBit = 2 };
  int kind = kFp32;
  int w[2] = {0, 0};
  int bits[2] = {0, 0}, group = 0;  // bits per code of each part; elements per scale
  size_t row = 0;                   // bytes

  int width() const { return w[0] + w[1]; }
  bool stores(int elem) const { return kind == (elem == FP32 ? kFp32 : kBf16); }
};

// One part of a low-bit row:
//
//   base (1 byte, e5m3) | group scales (4 bits each; none if there is one group) | code planes
//
// The step size of a group is base * (scale + 1) / 16. A code is split over planes of 4, 2, 1 or 8
// bits, so that no code crosses a byte: element i of a plane with b bits is in byte i % size, at
// bit b * (i / size), where size = padded * b / 8.
struct LowBitPart {
  int width, padded, bits, group, groups, scale_bytes;
  LowBitPart(int width, int bits, int group)
      : width(width), padded(ceil_to(width, 8)), bits(bits), group(std::min(group, width)) {
    groups = (width + this->group - 1) / this->group;
    scale_bytes = width <= group ? 0 : (groups + 1) / 2;
  }
  bool one_group() const { return scale_bytes == 0; }
  const uint8_t* scales(const uint8_t* in) const { return in + 1; }
  const uint8_t* codes(const uint8_t* in) const { return in + 1 + scale_bytes; }
  size_t bytes() const { return 1 + scale_bytes + size_t(padded) / 8 * bits; }
};

// Bytes of a row with the parts, bits and groups of c.
inline size_t row_bytes(const Codec& c) {
  if (c.kind != Codec::kLowBit) return size_t(c.width()) * (c.kind == Codec::kFp32 ? 4 : 2);
  return LowBitPart(c.w[0], c.bits[0], c.group).bytes() +
         LowBitPart(c.w[1], c.bits[1], c.group).bytes();
}

// ---- attention ---------------------------------------------------------------------------------
constexpr int kTileRows = 64;  // cache rows that attention decodes and processes together

// The online-softmax state of 16 lanes over one chunk of cache rows:
//
//   float maximum[16] | sum[16] | output[lanes][width]
struct AttentionState {
  float* data;
  int width;  // elements of a value

  static size_t floats(int width) { return 2 * kLanes + size_t(kLanes) * width; }
  float* maximum() const { return data; }
  float* sum() const { return data + kLanes; }
  float* output(int lane = 0) const { return data + 2 * kLanes + size_t(lane) * width; }
  void reset(int lanes) const {
    std::fill(maximum(), maximum() + kLanes, -1e30f);
    std::fill(sum(), output(lanes), 0.f);
  }
};

// Scratch of one thread for one tile.
struct AttentionScratch {
  float scores[kTileRows][kLanes];
  uint8_t weights[kTileRows * kLanes * 4];  // softmax weights as fp32, bf16 pairs or byte quads
};
static_assert(sizeof(AttentionScratch) == 8192);

// Attention can use latents of 4 or 5 bits as integers. A code times its group scale is a signed
// byte; with 5 bits the product is halved to fit. All bytes of a latent then share one step size.
// Halving an odd product loses half a step: in the group with the largest scale, at most 1/15 of
// the step of a code.
inline bool has_ints(const Codec& c) {
  return c.kind == Codec::kLowBit && (c.bits[0] == 4 || c.bits[0] == 5) && c.w[0] == 512 &&
         (c.group == 16 || c.group == 32) && c.w[1] % 2 == 0;
}

// A tile of 64 such rows, W wide with a rope key of R elements:
//
//   int8  rows  [64 rows][W]                        each 64 bytes are transposed as 4 x 4 words
//   int8  quads [W / 16][16][16 columns][4 rows]    the same bytes as operands of value products
//   float steps [64]                                step size of each row
//   int32 sums  [64]                                -64 * the sum of a row's bytes
//   bf16  keys  [64 rows][R]                        rope keys
struct IntTile {
  uint8_t* data;
  int width, rope;
  IntTile(const Codec& c, const void* p) : data((uint8_t*)p), width(c.w[0]), rope(c.w[1]) {}

  int8_t* row(int i) const { return (int8_t*)data + size_t(i) * width; }
  // The quad vectors of 16 columns: [16 quads of rows][64 bytes].
  uint8_t* quads(int column) const { return data + size_t(kTileRows) * (width + column); }
  float* steps() const { return (float*)(data + size_t(2 * kTileRows) * width); }
  int32_t* sums() const { return (int32_t*)(steps() + kTileRows); }
  uint16_t* key(int i) const { return (uint16_t*)(sums() + kTileRows) + size_t(i) * rope; }
  static size_t bytes(const Codec& c) {
    return size_t(kTileRows) * (2 * c.w[0] + 4 + 4 + 2 * c.w[1]) + 64;
  }
};

// The queries of 16 lanes against such a tile:
//
//   words  [W / 4][16 lanes][4]     INT8 codes + 128, columns in the order of a tile's rows
//   scales [16] float
//   rope   [R / 2][16 lanes][2]     bfloat16, as pack_lanes writes it
struct IntLanes {
  uint8_t* data;
  int width;
  IntLanes(const Codec& c, const void* p) : data((uint8_t*)p), width(c.w[0]) {}

  uint8_t* words() const { return data; }
  size_t words_bytes() const { return size_t(width) * kLanes; }
  float* scales() const { return (float*)(data + words_bytes()); }
  uint8_t* rope() const { return data + words_bytes() + kLanes * sizeof(float); }
  static size_t bytes(const Codec& c) {
    return size_t(c.w[0]) * kLanes + kLanes * sizeof(float) + size_t(c.w[1]) * kLanes * 2;
  }
};

// ---- scratch -----------------------------------------------------------------------------------
// Scratch of one thread for a product or SwiGLU with k inputs. Callers that also need a row or a
// block of results put the results first.
constexpr int kChunkRows = 192;  // rows of a SwiGLU or down projection that stay in the cache

inline size_t linear_scratch_bytes(int k) { return 2 * size_t(blocks(k)) * sizeof(DecodedBlock); }

// gate | up of kChunkRows rows, then the scratch of `linear`
inline size_t scratch_bytes(int k) {
  return size_t(kChunkRows) * 2 * kBlock * sizeof(float) + linear_scratch_bytes(k) + 256;
}

// A row of results, put before the scratch of `linear`: at most 16,384 floats.
constexpr size_t kRowScratch = 65536;
static_assert(kRowScratch <= size_t(kChunkRows) * 2 * kBlock * sizeof(float));

// Floats of scratch that expand_keys and expand_values need.
constexpr int kExpandChunk = 48;  // rows that expand_values multiplies at once
inline size_t expand_scratch_floats(int nope, int value) {
  return std::max(size_t(std::max(nope, 1)) * 2 * kTile,
                  size_t(kExpandChunk) * ceil_to(value, kTile));
}

}  // namespace lamoe
