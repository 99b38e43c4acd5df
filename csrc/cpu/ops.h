// Every op once: sizes, strides and byte layouts. Plain pointers; no Python, no torch. The ops are
// compiled once per ISA into a table of function pointers (cpu.cpp picks one); model.cpp drives
// them.
//
// Letters: B sequences, T query tokens, S cached tokens, H heads, G kv heads, D model, C latent, R
// rope, N nope, V value, E experts, F ffn.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lamoe {

// ---- weights
// -----------------------------------------------------------------------------------------------------------
// A matrix [n outputs, k inputs] is cut into tiles of 16 outputs (the last one filled up with zero
// rows); a tile holds all its inputs:
//   FP32  k     x  16 float
//   BF16  k/2   x  16 pairs of bfloat16 (inputs 2i, 2i+1 of output o) k filled up to 2 INT8  k/64
//   x  (4 x 16 group scales, then 16 quads x 16 outputs x 4 bytes, code + 128)      8.5 bits k
//   filled up to 64 INT4  k/64  x  (4 x 16 group scales, then 8 x 64 bytes of nibbles) 4.5 bits k
//   filled up to 64
// A group is 16 inputs of one output; its scale is one byte (sign, 4 bits of exponent, 3 of
// mantissa), relative to the matrix's `scale`. An INT8 weight is code * scales, code from -127 to
// 127; an INT4 weight is (kLevels[code] - 64) * scales. Vector j of nibbles: quad 2j low, 2j+1
// high.
enum Format { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

struct Mat {
  int fmt = 0, n = 0, k = 0;
  const uint8_t* data = nullptr;
  float scale = 1.f;
};
constexpr int kTile = 16, kGroup = 16, kBlock = 64;
inline int ceil_to(int x, int m) { return (x + m - 1) / m * m; }
inline int tiles(int n) { return (n + kTile - 1) / kTile; }
inline size_t tile_bytes(int fmt, int k) {
  if (fmt == FP32) return size_t(k) * 64;
  if (fmt == BF16) return size_t((k + 1) / 2) * 64;
  return size_t(ceil_to(k, kBlock) / kBlock) * (fmt == INT8 ? 1088 : 576);
}
inline size_t mat_bytes(int fmt, int n, int k) { return tiles(n) * tile_bytes(fmt, k); }
inline Mat tile_of(const Mat& m, int tile) {  // the rest of a matrix from one of its tiles on
  Mat r = m;
  r.data += size_t(tile) * tile_bytes(m.fmt, m.k);
  r.n -= tile * kTile;
  return r;
}

// ---- activations
// -------------------------------------------------------------------------------------------------------
// Rows as a matrix of some format wants them. Which of the pointers are set depends on the formats
// that will read them.
//   f   float, row stride `stride`
//   h   bfloat16, row stride `stride`; elements beyond k are zero up to a multiple of 2
//   q   int8 in blocks of 64 with a scale s each (q * s), zero beyond k; c: minus 64 times the sum
//   of each group of 16. Row strides stride,
//       stride / 64, stride / 16
struct Acts {
  int rows = 0, k = 0, stride = 0;
  float* f = nullptr;
  uint16_t* h = nullptr;
  int8_t* q = nullptr;
  float* s = nullptr;
  int32_t* c = nullptr;
};
inline int acts_stride(int k) { return ceil_to(k, kBlock); }

struct Seg {  // one SwiGLU over some rows: gate | up, each padded to whole tiles, then down
  Mat w13, w2;
  int row0 = 0, rows = 0;         // of the sorted activations
  const float* weight = nullptr;  // [rows], multiplies the F-wide activation; null: 1
  const int32_t* token =
      nullptr;  // [rows], row of the output; null: row i of the segment is output row i
};

// ---- cache rows
// ----------------------------------------------------------------------------------------------------------
// As codec.py documents them. Two parts of w[0], w[1] elements; FP32 and BF16 are plain, the others
// blocks of `bits` per code.
struct Codec {
  int kind = 0;  // 0: fp32, 1: bf16, 2: low-bit blocks
  int w[2] = {0, 0}, bits[2] = {0, 0}, group = 0;
  size_t row = 0;  // bytes
};

// Latents of 4 or 5 bits an element can be attended to as integers: a code times its group's
// factor, over 2 with 5 bits, is a signed byte of one step for the whole latent (an odd product is
// off by half of it, at most a 15th of a code's own step where that is largest). A tile of them
// has, one behind the other,
//   bytes of the latent, [64 rows][W]; of each 64 of them the sixteen words are turned as a 4 x 4
//   matrix the same by fours of rows, [W / 16][16][16 columns][4 rows] float step [64]; int32 -64 x
//   the sum of the bytes [64]; the rope key in bfloat16 [64][R]
// and the queries of 16 lanes have
//   INT8 words of the latent's columns in the order of a tile's rows [W / 4][16 lanes], their
//   scales [16], the rope part as pack_lanes has it
inline bool has_ints(const Codec& c) {
  return c.kind == 2 && (c.bits[0] == 4 || c.bits[0] == 5) && c.w[0] == 512 &&
         (c.group == 16 || c.group == 32) && c.w[1] % 2 == 0;
}
inline size_t ints_tile_bytes(const Codec& c) {
  return size_t(64) * (2 * c.w[0] + 8 + 2 * c.w[1]) + 64;
}
inline size_t ints_lanes_bytes(const Codec& c) {
  return size_t(c.w[0]) * 16 + 64 + size_t(c.w[1]) * 32;
}

// Queries of up to 16 (token, head) lanes against rows in scratch; see attention.cpp
struct Lanes {
  const void* q;    // [units of the key][16 lanes] words
  const int* last;  // [16] last visible row of each lane, relative to the first row of the pass
};

// Memory that will be read: asked for line by line while there is something to compute. `p` to
// `end` next, `later` to `later_end` some time after that.
struct Soon {
  const uint8_t *p = nullptr, *end = nullptr, *later = nullptr, *later_end = nullptr;
};

struct Ops {
  const char* name;
  // weights
  // m.scale given; one tile. importance [k] or null: weights of squared errors when a scale is
  // chosen. feedback [k][k] or null, unit upper triangular: after input i is rounded with error e,
  // input j > i is moved by -e * feedback[i][j] before its own turn
  void (*pack)(const Mat& m, uint8_t* out, const float* w, size_t ldw, const float* importance,
               const float* feedback, int tile);
  float (*pack_scale)(int fmt, const float* w, size_t ldw, int n, int k);
  void (*unpack)(const Mat& m, float* out, size_t ldo, int tile);
  // activations: one row of k floats into row `row` of a (whatever of f, h, q is set)
  void (*put_row)(const Acts& a, int row, const float* x);
  // out[r, 16 t ..] = rows row0 .. row0+rows of x times tiles t0 .. t1, r counted from row0. then:
  // what this thread will read next, asked for in time (null: unknown)
  void (*linear)(const Mat& m, int t0, int t1, const Acts& x, int row0, int rows, float* out,
                 ptrdiff_t ldo, void* scratch, const uint8_t* then);
  // act block b (64 wide) of a segment: silu(gate) * up * weight -> rows of `act`
  void (*swiglu)(const Seg& s, int block, const Acts& x, const Acts& act, void* scratch,
                 const uint8_t* then);
  // pointwise
  void (*rms_norm)(const float* x, const float* w, float eps, float* out, int n);
  void (*rope)(float* x, const float* cos_sin, int r,
               bool interleaved);  // in place; cos | sin, r / 2 each
  // cache rows; the parts lie one behind the other in float and in a decoded row
  void (*encode)(const Codec& c, const float* row, uint8_t* out);
  void (*decode)(const Codec& c, const uint8_t* in, int elem, void* out);  // elem FP32 or BF16
  // attention over decoded rows (elem FP32 or BF16), keys at column k0 (kw wide), values at v0 (vw
  // wide): one tile of up to 64 rows. state: m[16], l[16], o[16][vw]; rows at index r0 .. r0+n of
  // the pass
  void (*attend_tile)(int elem, const void* tile, int stride, int n, int r0, int k0, int kw, int v0,
                      int vw, float scale, const Lanes& lanes, int n_lanes, float* m, float* l,
                      float* o, void* scratch, const Soon& soon);
  // the same over rows as integers (has_ints): a tile of n rows, queries, and attention; the
  // latent's bytes are keys and values
  void (*decode_ints)(const Codec& c, const uint8_t* const* rows, int n, void* tile);
  void (*pack_lanes_ints)(const Codec& c, const float* const* q, int n_lanes, void* out);
  void (*attend_ints)(const Codec& c, const void* tile, int n, int r0, float scale,
                      const Lanes& lanes, int n_lanes, float* m, float* l, float* o, void* scratch,
                      const Soon& soon);
  // partial states of `count` chunks, `step` floats apart (m, l, o as above), into one row of vw
  // floats for a lane
  void (*combine)(const float* states, size_t step, int count, int lane, int vw, float* out);
  void (*pack_lanes)(int elem, const float* const* q, int n_lanes, int width,
                     void* out);  // a query per lane -> [units][16]
  // expanded attention: rows as "weights" of `linear`
  void (*rows_as_mat)(int elem, const void* rows, int stride, int col, int width, int n,
                      void* out);  // keys: [tiles of 16 rows][units][16]
  void (*rows_as_values)(int elem, const void* rows, int stride, int col, int width, int n,
                         void* out);  // values: [tiles of 16 cols][row units][16]
  // MLA: keys of tiles t0 .. t1 of latents (rows_as_mat over the latent columns) for one head, uk:
  // its W^UK rows [nope][stride], into the tiles of a key matrix `units` words high; values of `n`
  // latent rows through W^UV (a FP32 / BF16 matrix) as rows_as_values lays them. tmp: float scratch
  void (*expand_keys)(int elem, const uint8_t* latents, int latent_width, int t0, int t1,
                      const Acts& uk, int units, void* out, float* tmp);
  void (*expand_values)(const Mat& uv, const Acts& rows, int row0, int n, void* out, float* tmp);
  void (*softmax_rows)(int elem, float* scores, int lds, int rows, int cols, const int* visible,
                       float scale, float* m, float* l, float* rescale, void* p, int ldp);
  // see probe.cpp
  float (*probe_read)(const uint8_t* p, size_t n);
  float (*probe_dots)(int fmt, long n, double* done);
};

const Ops& ops();  // the table of this process
const Ops* ops_by_name(const char* name);
const char* cpu_features();
size_t scratch_bytes(int k);  // what linear and swiglu want for inputs of k

}  // namespace lamoe
