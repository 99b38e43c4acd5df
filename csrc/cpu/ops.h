// All operations, as a dispatch table of function pointers. The operations are compiled once per
// instruction set; dispatch.cpp picks the table that this process uses, and csrc/model drives it.
// Arguments are plain pointers, without Python or torch, and are not checked here.
//
// Sizes in comments: D hidden, H heads, C latent, R rope, N nope, V value, F ffn width.
#pragma once
#include "cpu/formats.h"

namespace lamoe {

// The queries of up to 16 (token, head) lanes.
struct Lanes {
  const void* q;    // [units of the key][16 lanes], by pack_lanes or pack_lanes_ints
  const int* last;  // [16], the last visible row of each lane
  int count;
};

// Up to 64 decoded cache rows.
struct RowTile {
  const void* rows;
  int stride;  // elements
  int count;
  int first;  // row number of the first row in its sequence
};

// Which columns of a row are the key and the value of a kv head.
struct Columns {
  int key, key_width, value, value_width;
};

// Memory to prefetch during attention: `next` is read by the next tile, `later` some time after.
struct Prefetch {
  const uint8_t *next = nullptr, *next_end = nullptr, *later = nullptr, *later_end = nullptr;
};

// One pass of online softmax over a block of scores (softmax_rows).
struct SoftmaxBlock {
  float* scores;  // [rows][score_stride]
  int score_stride, rows, cols;
  const int* visible;    // [rows], columns that count
  float *maximum, *sum;  // [rows], running values, updated
  float* rescale;        // [rows], out: factor for the outputs of earlier blocks
  void* weights;         // out: [rows][weight_stride] of elem, zeros beyond the visible columns
  int weight_stride;
};

struct Ops {
  const char* name;
  const char* cpu_features;  // separated by spaces

  // ---- weights
  // The scale of a matrix, which `pack` needs in m.scale.
  float (*pack_scale)(int fmt, const float* w, size_t ldw, int n, int k);
  // Packs one tile. importance [k]: weights of the squared errors when a group scale is chosen.
  // feedback [k][k], unit upper triangular: after input i is rounded with error e, each input
  // j > i changes by -e * feedback[i][j] before it is rounded. Both may be null.
  void (*pack)(const Mat& m, uint8_t* out, const float* w, size_t ldw, const float* importance,
               const float* feedback, int tile);
  void (*unpack)(const Mat& m, float* out, size_t ldo, int tile);

  // ---- activations
  // Writes a row of k floats as row `row` of a, in every form that a has.
  void (*put_row)(const Acts& a, int row, const float* x);
  // Multiplies rows row0 .. row0 + rows of x by tiles t0 .. t1 of m. Writes column 16 t + i of row
  // row0 + r to out[r * ldo + 16 t + i]. next: weights that this thread reads afterwards, to be
  // prefetched, or null.
  void (*linear)(const Mat& m, int t0, int t1, const Acts& x, int row0, int rows, float* out,
                 ptrdiff_t ldo, void* scratch, const uint8_t* next);
  // Writes block `block` of silu(gate) * up * weight to the same rows of `act`.
  void (*swiglu)(const Seg& s, int block, const Acts& x, const Acts& act, void* scratch,
                 const uint8_t* next);
  void (*rms_norm)(const float* x, const float* w, float eps, float* out, int n);
  // Rotates x [r] in place. cos_sin: r / 2 cosines, then r / 2 sines.
  void (*rope)(float* x, const float* cos_sin, int r, bool interleaved);

  // ---- cache rows
  void (*encode)(const Codec& c, const float* row, uint8_t* out);
  void (*decode)(const Codec& c, const uint8_t* in, int elem, void* out);
  // Fills an IntTile with n rows.
  void (*decode_ints)(const Codec& c, const uint8_t* const* rows, int n, void* tile);

  // ---- absorbed attention: few queries, each cache row is read once for 16 lanes
  // Packs a query of `width` elements per lane as [units][16 lanes].
  void (*pack_lanes)(int elem, const float* const* q, int lanes, int width, void* out);
  // Fills an IntLanes.
  void (*pack_lanes_ints)(const Codec& c, const float* const* q, int lanes, void* out);
  // Adds a tile to `state`. Up to 15 elements after the value columns may be read, also after the
  // last row: the buffer has to be that much longer.
  void (*attend_tile)(int elem, const RowTile& tile, const Columns& columns, float scale,
                      const Lanes& lanes, const AttentionState& state, AttentionScratch* scratch,
                      const Prefetch& prefetch);
  // The same for an IntTile; tile.stride is not used. The latent is both key and value.
  void (*attend_ints)(const Codec& c, const RowTile& tile, float scale, const Lanes& lanes,
                      const AttentionState& state, AttentionScratch* scratch,
                      const Prefetch& prefetch);
  // Combines the states of `count` chunks into the output row [width] of one lane.
  void (*combine)(const float* states, int count, int lane, int width, float* out);

  // ---- expanded attention: many queries, keys and values of each head are weights of `linear`
  // Columns col .. col + width of n rows as the matrix of keys [n outputs, width inputs].
  void (*rows_as_keys)(int elem, const void* rows, int stride, int col, int width, int n,
                       void* out);
  // The same columns as the matrix of values [width outputs, n inputs].
  void (*rows_as_values)(int elem, const void* rows, int stride, int col, int width, int n,
                         void* out);
  // Keys of one head: W^UK rows uk [N][C] times tiles t0 .. t1 of latents (by rows_as_keys), into
  // the first N elements of key tiles that are `units` units high.
  void (*expand_keys)(int elem, const uint8_t* latents, int latent_width, int t0, int t1,
                      const Acts& uk, int units, void* out, float* scratch);
  // Values of one head: W^UV times n latent rows, laid out as rows_as_values does.
  void (*expand_values)(const Mat& uv, const Acts& rows, int row0, int n, void* out,
                        float* scratch);
  void (*softmax_rows)(int elem, const SoftmaxBlock& block, float scale);

  // ---- measuring, see probe.cpp
  float (*probe_read)(const uint8_t* p, size_t n);
  float (*probe_dots)(int fmt, long n, double* done);
};

}  // namespace lamoe
