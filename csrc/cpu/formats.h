// Byte layouts of the data that kernels exchange: weights, activations, cache rows, and the
// intermediate results of attention. ops.h lists the operations on them.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace lamoe {

enum Format { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr int kTile = 16;   // outputs of a weight tile
constexpr int kGroup = 16;  // inputs of one output that share a scale
constexpr int kBlock = 64;  // inputs of a block (four groups); activations have a scale per block
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
// A quad is four neighbouring inputs of one byte each, the operand of one byte dot product. A unit
// is four bytes of a row: one FP32 input or two BF16 inputs.

struct Int8Block {
  uint8_t scales[4][16];       // group scales [group][output], decoded by scale_value
  uint8_t codes[4][4][16][4];  // weights [group][quad][output][input], -127 .. 127, stored + 128
};

struct Int4Block {
  uint8_t scales[4][16];  // group scales [group][output], decoded by scale_value
  // Weights [group][j][output][input] as indices into kLevels. The low half of a byte belongs to
  // quad 2 j of the group, the high half to quad 2 j + 1.
  uint8_t nibbles[4][2][16][4];
};

static_assert(sizeof(Int8Block) == 1088 && alignof(Int8Block) == 1);
static_assert(sizeof(Int4Block) == 576 && alignof(Int4Block) == 1);

template <int FMT>
using LowBitBlock = std::conditional_t<FMT == INT8, Int8Block, Int4Block>;

// An INT8 or INT4 block, decoded once and then multiplied by many activation rows.
struct DecodedBlock {
  struct Group {
    float scales[16];
    uint8_t codes[4][64];  // weights [quad][16 outputs][4 inputs], operands of dot_int8 or dot_int4
  } groups[4];
};
static_assert(sizeof(DecodedBlock) == 4 * (64 + 256));

// A packed weight matrix with n outputs and k inputs.
struct Mat {
  int fmt = 0, n = 0, k = 0;
  const uint8_t* data = nullptr;
  float scale = 1.f;  // scale of the whole matrix, multiplies the group scales
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
// Activation rows of k elements, in one form per weight format. Pointers to unused forms are null.
// Rows are `stride` elements apart and padded with zeros up to the stride.
struct Acts {
  int rows = 0, k = 0, stride = 0;
  float* f = nullptr;     // FP32 elements, for FP32 weights
  uint16_t* h = nullptr;  // BF16 elements, for BF16 weights
  // For INT8 and INT4 weights: signed bytes in blocks of 64, one scale per block. An element is
  // q * s.
  int8_t* q = nullptr;
  float* s = nullptr;    // block scales [rows][stride / 64]
  int32_t* c = nullptr;  // correction terms [rows][stride / 16]: -64 * the sum of each group of q
};
inline int acts_stride(int k) { return ceil_to(k, kBlock); }

// Wraps existing FP32 or BF16 rows (`elem`), without a copy.
inline Acts plain_acts(int elem, const void* data, int rows, int k, int stride) {
  Acts a;
  a.rows = rows, a.k = k, a.stride = stride;
  if (elem == FP32)
    a.f = (float*)data;
  else
    a.h = (uint16_t*)data;
  return a;
}

// One SwiGLU over a range of activation rows. w13 stacks the gate and up matrices, each padded to
// whole tiles. w2 is the down matrix.
struct Seg {
  Mat w13, w2;
  int row0 = 0, rows = 0;  // first activation row, and number of rows
  // Routing weight of each row [rows], multiplies the input of w2. Null means 1.
  const float* weight = nullptr;
  // Output row of each activation row [rows]. Null means that row i is output row i.
  const int32_t* token = nullptr;
};

// ---- cache rows --------------------------------------------------------------------------------
// The format of a cache row. lamoe/backends/cache_codec.py documents the bytes. A row has two parts
// with w[0] and w[1] elements. Under MLA they are the latent and the rope key, otherwise the keys
// and the values.
struct Codec {
  enum Kind { kFp32 = 0, kBf16 = 1, kLowBit = 2 };
  int kind = kFp32;
  int w[2] = {0, 0};
  int bits[2] = {0, 0}, group = 0;  // bits per code of each part; elements per group scale
  size_t row = 0;                   // size of a row in bytes

  int width() const { return w[0] + w[1]; }
  bool stores(int elem) const { return kind == (elem == FP32 ? kFp32 : kBf16); }
};

// One part of a low-bit row, with three fields:
//
//   base (1 byte, e5m3) | group scales (4 bits each; none if there is one group) | code planes
//
// The step size of a group is base * (scale + 1) / 16. The bits of a code are split over planes of
// 8, 4, 2 or 1 bits, so that no field crosses a byte. A plane with b bits has
// size = padded * b / 8 bytes. Its field of element i is in byte i % size, at bit b * (i / size).
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

// Computes the size of a row in bytes from the widths, bits and group size of c.
inline size_t row_bytes(const Codec& c) {
  if (c.kind != Codec::kLowBit) return size_t(c.width()) * (c.kind == Codec::kFp32 ? 4 : 2);
  return LowBitPart(c.w[0], c.bits[0], c.group).bytes() +
         LowBitPart(c.w[1], c.bits[1], c.group).bytes();
}

// ---- attention ---------------------------------------------------------------------------------
constexpr int kTileRows = 64;  // cache rows of a tile, which attention processes at once

// The online-softmax state of 16 lanes over one chunk of cache rows:
//
//   float maximum[16] | sum[16] | output[lanes][width]
struct AttentionState {
  float* data;
  int width;  // number of elements of a value

  static size_t floats(int width) { return 2 * kLanes + size_t(kLanes) * width; }
  float* maximum() const { return data; }
  float* sum() const { return data + kLanes; }
  float* output(int lane = 0) const { return data + 2 * kLanes + size_t(lane) * width; }
  void reset(int lanes) const {
    std::fill(maximum(), maximum() + kLanes, -1e30f);
    std::fill(sum(), output(lanes), 0.f);
  }
};

// Scratch memory that one thread needs to process one tile.
struct AttentionScratch {
  float scores[kTileRows][kLanes];
  uint8_t weights[kTileRows * kLanes * 4];  // softmax weights as FP32, BF16 pairs or byte quads
};
static_assert(sizeof(AttentionScratch) == 8192);

// Whether attention can use latents of this format as integers (4 or 5 bits). A code times its
// group scale is a signed byte. With 5 bits the product is halved to fit. All bytes of a latent
// then share one step size. Halving an odd product loses half of that step. In the group with the
// largest scale the loss is at most 1/15 of the step of a code.
inline bool has_ints(const Codec& c) {
  return c.kind == Codec::kLowBit && (c.bits[0] == 4 || c.bits[0] == 5) && c.w[0] == 512 &&
         (c.group == 16 || c.group == 32) && c.w[1] % 2 == 0;
}

// A tile of 64 rows with integer latents of W elements and rope keys of R elements:
//
//   int8  rows  [64 rows][W]                        every 64 bytes are transposed as 4 x 4 words
//   int8  quads [W / 16][16][16 columns][4 rows]    the same bytes as operands of value products
//   float steps [64]                                step size of each row
//   int32 sums  [64]                                -64 * the sum of the bytes of each row
//   bf16  keys  [64 rows][R]                        rope key of each row
struct IntTile {
  uint8_t* data;
  int width, rope;
  IntTile(const Codec& c, const void* p) : data((uint8_t*)p), width(c.w[0]), rope(c.w[1]) {}

  int8_t* row(int i) const { return (int8_t*)data + size_t(i) * width; }
  // The quads of 16 columns, as one vector per four rows: [16 vectors][64 bytes].
  uint8_t* quads(int column) const { return data + size_t(kTileRows) * (width + column); }
  float* steps() const { return (float*)(data + size_t(2 * kTileRows) * width); }
  int32_t* sums() const { return (int32_t*)(steps() + kTileRows); }
  uint16_t* key(int i) const { return (uint16_t*)(sums() + kTileRows) + size_t(i) * rope; }
  static size_t bytes(const Codec& c) {
    return size_t(kTileRows) * (2 * c.w[0] + 4 + 4 + 2 * c.w[1]) + 64;
  }
};

// The queries of 16 lanes for attention over an IntTile with latents of W and rope keys of R
// elements:
//
//   words  [W / 4][16 lanes][4]   INT8 codes + 128 of the latent part, ordered like IntTile rows
//   scales [16]                   FP32 scale of each lane
//   rope   [R / 2][16 lanes][2]   BF16 elements of the rope part, as pack_lanes writes them
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
// These sizes are for one thread and one product or SwiGLU with k inputs. Callers that also need
// memory for results put the results first and the scratch of `linear` after them.
constexpr int kChunkRows = 192;  // rows of a SwiGLU or down projection that fit in the CPU cache

inline size_t linear_scratch_bytes(int k) { return 2 * size_t(blocks(k)) * sizeof(DecodedBlock); }

// Bytes for the gate and up results of kChunkRows rows, followed by the scratch of `linear`.
inline size_t scratch_bytes(int k) {
  return size_t(kChunkRows) * 2 * kBlock * sizeof(float) + linear_scratch_bytes(k) + 256;
}

// Bytes for one row of results (at most 16,384 floats), followed by the scratch of `linear`.
constexpr size_t kRowScratch = 65536;
static_assert(kRowScratch <= size_t(kChunkRows) * 2 * kBlock * sizeof(float));

constexpr int kExpandChunk = 48;  // cache rows that expand_values multiplies at once
// Number of floats of scratch that expand_keys and expand_values need.
inline size_t expand_scratch_floats(int nope, int value) {
  return std::max(size_t(std::max(nope, 1)) * 2 * kTile,
                  size_t(kExpandChunk) * ceil_to(value, kTile));
}

}  // namespace lamoe
