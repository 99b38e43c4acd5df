// Functions that the kernel files share with each other and with table.cpp. They are compiled once
// per instruction set.
#pragma once
#include "cpu/ops.h"
#include "simd/simd.h"

namespace lamoe {
namespace LAMOE_ISA {

float pack_scale(int fmt, const float* w, size_t ldw, int n, int k);
void pack(const Mat& m, uint8_t* out, const float* w, size_t ldw, const float* importance,
          const float* feedback, int tile);
void unpack(const Mat& m, float* out, size_t ldo, int tile);

void put_row(const Acts& a, int row, const float* x);
void put_block(const Acts& a, int row, int block, const float* x);  // put_row for one block of 64
void linear(const Mat& m, int t0, int t1, const Acts& x, int row0, int rows, float* out,
            ptrdiff_t ldo, void* scratch, const uint8_t* next);
void swiglu(const Seg& s, int block, const Acts& x, const Acts& act, void* scratch,
            const uint8_t* next);
void rms_norm(const float* x, const float* w, float eps, float* out, int n);
void rope(float* x, const float* cos_sin, int r, bool interleaved);

void encode(const Codec& c, const float* row, uint8_t* out);
void decode(const Codec& c, const uint8_t* in, int elem, void* out);
void decode_ints(const Codec& c, const uint8_t* const* rows, int n, void* tile);

void pack_lanes(int elem, const float* const* q, int lanes, int width, void* out);
void pack_lanes_ints(const Codec& c, const float* const* q, int lanes, void* out);
void attend_tile(int elem, const RowTile& tile, const Columns& columns, float scale,
                 const Lanes& lanes, const AttentionState& state, AttentionScratch* scratch,
                 const Prefetch& prefetch);
void attend_ints(const Codec& c, const RowTile& tile, float scale, const Lanes& lanes,
                 const AttentionState& state, AttentionScratch* scratch, const Prefetch& prefetch);
void combine(const float* states, int count, int lane, int width, float* out);

void rows_as_keys(int elem, const void* rows, int stride, int col, int width, int n, void* out);
void rows_as_values(int elem, const void* rows, int stride, int col, int width, int n, void* out);
void expand_keys(int elem, const uint8_t* latents, int latent_width, int t0, int t1, const Acts& uk,
                 int units, void* out, float* scratch);
void expand_values(const Mat& uv, const Acts& rows, int row0, int n, void* out, float* scratch);
void softmax_rows(int elem, const SoftmaxBlock& block, float scale);

float probe_read(const uint8_t* p, size_t n);
float probe_dots(int fmt, long n, double* done);

}  // namespace LAMOE_ISA
}  // namespace lamoe
