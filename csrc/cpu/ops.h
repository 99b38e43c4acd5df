// The dispatch table: all operations as function pointers. The operations are compiled once per
// instruction set. dispatch.cpp picks the table that this process uses, and csrc/model calls the
// operations. Arguments are plain pointers, without Python or torch. They are not checked here.
#pragma once
#include "cpu/formats.h"

namespace lamoe {

// The queries of up to 16 (token, head) lanes.
struct Lanes {
  const void* q;    // queries [units of the key][16 lanes], from pack_lanes or pack_lanes_ints
  const int* last;  // last visible cache row of each lane [16]
  int count;        // number of lanes in use
};

// Up to 64 decoded cache rows.
struct RowTile {
  const void* rows;
  int stride;  // row stride in elements
  int count;   // number of rows
  int first;   // position of the first row in its sequence
};

// First columns and widths of the key and the value of one kv head within a cache row, in elements.
struct Columns {
  int key, key_width, value, value_width;
};

// Memory to prefetch during attention over a tile. The next tile reads `next`. Later operations
// read `later`.
struct Prefetch {
  const uint8_t *next = nullptr, *next_end = nullptr, *later = nullptr, *later_end = nullptr;
};

// Arguments of softmax_rows: one pass of online softmax over a block of scores. Each row is a
// query, each column a cache row.
struct SoftmaxBlock {
  float* scores;  // scores [rows][score_stride]
  int score_stride, rows, cols;
  const int* visible;    // number of visible columns of each row [rows]
  float *maximum, *sum;  // running maximum and sum of each row [rows], updated
  float* rescale;        // output: factor for the outputs of earlier blocks [rows]
  void* weights;         // output: softmax weights [rows][weight_stride], zero where not visible
  int weight_stride;
};

struct Ops {
  const char* name;
  const char* cpu_features;  // names of the required CPU features, separated by spaces

  // ---- weights
  // Computes the scale of a weight matrix w with n outputs and k inputs. Rows of w are ldw elements
  // apart. `pack` expects this scale in m.scale.
  float (*pack_scale)(int fmt, const float* w, size_t ldw, int n, int k);
  // Packs one tile of 16 outputs. importance [k] weights the squared errors when a group scale is
  // chosen. feedback [k][k] is unit upper triangular: after input i is rounded with error e, each
  // input j > i changes by -e * feedback[i][j] before it is rounded. Both may be null.
  void (*pack)(const Mat& m, uint8_t* out, const float* w, size_t ldw, const float* importance,
               const float* feedback, int tile);
  void (*unpack)(const Mat& m, float* out, size_t ldo, int tile);

  // ---- activations
  // Writes the k floats of x as row `row` of a, in every form that a holds (non-null pointers).
  void (*put_row)(const Acts& a, int row, const float* x);
  // Multiplies rows row0 .. row0 + rows of x by tiles t0 .. t1 of m. Output 16 t + i of row
  // row0 + r goes to out[r * ldo + 16 t + i]. `next` points to the weights that this thread reads
  // afterwards, which are prefetched. It may be null.
  void (*linear)(const Mat& m, int t0, int t1, const Acts& x, int row0, int rows, float* out,
                 ptrdiff_t ldo, void* scratch, const uint8_t* next);
  // Computes columns 64 block .. 64 block + 63 of silu(gate) * up * weight for all rows of s.
  // Writes them to the same rows of `act`.
  void (*swiglu)(const Seg& s, int block, const Acts& x, const Acts& act, void* scratch,
                 const uint8_t* next);
  void (*rms_norm)(const float* x, const float* w, float eps, float* out, int n);
  // Applies the rotary embedding to r elements of x, in place. cos_sin holds r / 2 cosines, then
  // r / 2 sines.
  void (*rope)(float* x, const float* cos_sin, int r, bool interleaved);

  // ---- cache rows
  void (*encode)(const Codec& c, const float* row, uint8_t* out);
  void (*decode)(const Codec& c, const uint8_t* in, int elem, void* out);
  // Decodes n rows into an IntTile.
  void (*decode_ints)(const Codec& c, const uint8_t* const* rows, int n, void* tile);

  // ---- absorbed attention, for few queries
  // Packs one query of `width` elements per lane as [units][16 lanes].
  void (*pack_lanes)(int elem, const float* const* q, int lanes, int width, void* out);
  // Rounds one query per lane to 8 bits and packs the queries as IntLanes.
  void (*pack_lanes_ints)(const Codec& c, const float* const* q, int lanes, void* out);
  // Attends to the rows of a tile and updates `state`. May read up to 15 elements after the value
  // columns, also in the last row, so the buffer must be 15 elements longer than its rows.
  void (*attend_tile)(int elem, const RowTile& tile, const Columns& columns, float scale,
                      const Lanes& lanes, const AttentionState& state, AttentionScratch* scratch,
                      const Prefetch& prefetch);
  // Attends to the rows of an IntTile, whose latents are keys and values, and updates `state`.
  // Ignores tile.stride.
  void (*attend_ints)(const Codec& c, const RowTile& tile, float scale, const Lanes& lanes,
                      const AttentionState& state, AttentionScratch* scratch,
                      const Prefetch& prefetch);
  // Combines the attention states of `count` chunks into the output [width] of one lane.
  void (*combine)(const float* states, int count, int lane, int width, float* out);

  // ---- expanded attention, for many queries: keys and values are weight matrices of `linear`
  // Packs columns col .. col + width of n rows as the key matrix [n outputs, width inputs].
  void (*rows_as_keys)(int elem, const void* rows, int stride, int col, int width, int n,
                       void* out);
  // Packs columns col .. col + width of n rows as the value matrix [width outputs, n inputs].
  void (*rows_as_values)(int elem, const void* rows, int stride, int col, int width, int n,
                         void* out);
  // Computes the nope part of the keys of one head: W^UK of the head, uk [nope][latent], times
  // tiles t0 .. t1 of latents (packed by rows_as_keys). Key tiles in `out` have `units` units, of
  // which the nope part takes the first ones.
  void (*expand_keys)(int elem, const uint8_t* latents, int latent_width, int t0, int t1,
                      const Acts& uk, int units, void* out, float* scratch);
  // Computes the values of one head: W^UV times n latent rows, packed like rows_as_values.
  void (*expand_values)(const Mat& uv, const Acts& rows, int row0, int n, void* out,
                        float* scratch);
  void (*softmax_rows)(int elem, const SoftmaxBlock& block, float scale);

  // ---- measurement of the machine's limits (probe.cpp)
  float (*probe_read)(const uint8_t* p, size_t n);
  float (*probe_dots)(int fmt, long n, double* done);
};

}  // namespace lamoe
