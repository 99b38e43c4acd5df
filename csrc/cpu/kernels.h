// What the kernel files of one ISA offer each other and table.cpp. Compiled once per ISA.
#pragma once
#include "cpu/ops.h"
#include "simd/vec.h"

namespace lamoe {
namespace LAMOE_NS {

constexpr int kDecodedBlock = 4 * 320;  // bytes of 64 inputs of a tile of INT8 or INT4, decoded: [4
                                        // groups](16 scales, 4 quads of 16 outputs)

void linear(const Mat& m, int t0, int t1, const Acts& x, int row0, int rows, float* out,
            ptrdiff_t ldo, void* scratch, const uint8_t* then);
void swiglu(const Seg& s, int block, const Acts& x, const Acts& act, void* scratch,
            const uint8_t* then);

float pack_scale(int fmt, const float* w, size_t ldw, int n, int k);
void pack(const Mat& m, uint8_t* out, const float* w, size_t ldw, const float* importance,
          const float* feedback, int tile);
void unpack(const Mat& m, float* out, size_t ldo, int tile);

void put_row(const Acts& a, int row, const float* x);
void put_block(const Acts& a, int row, int block, const float* x);  // 64 elements
void rms_norm(const float* x, const float* w, float eps, float* out, int n);
void rope(float* x, const float* cos_sin, int r, bool interleaved);

void encode(const Codec& c, const float* row, uint8_t* out);
void decode(const Codec& c, const uint8_t* in, int elem, void* out);

void attend_tile(int elem, const void* tile, int stride, int n, int r0, int k0, int kw, int v0,
                 int vw, float scale, const Lanes& lanes, int n_lanes, float* m, float* l, float* o,
                 void* scratch, const Soon& soon);
void decode_ints(const Codec& c, const uint8_t* const* rows, int n, void* tile);
void pack_lanes_ints(const Codec& c, const float* const* q, int n_lanes, void* out);
void attend_ints(const Codec& c, const void* tile, int n, int r0, float scale, const Lanes& lanes,
                 int n_lanes, float* m, float* l, float* o, void* scratch, const Soon& soon);
void combine(const float* states, size_t step, int count, int lane, int vw, float* out);
void pack_lanes(int elem, const float* const* q, int n_lanes, int width, void* out);
void rows_as_mat(int elem, const void* rows, int stride, int col, int width, int n, void* out);
void rows_as_values(int elem, const void* rows, int stride, int col, int width, int n, void* out);
void expand_keys(int elem, const uint8_t* latents, int latent_width, int t0, int t1, const Acts& uk,
                 int units, void* out, float* tmp);
void expand_values(const Mat& uv, const Acts& rows, int row0, int n, void* out, float* tmp);
void softmax_rows(int elem, float* scores, int lds, int rows, int cols, const int* visible,
                  float scale, float* m, float* l, float* rescale, void* p, int ldp);
float probe_read(const uint8_t* p, size_t n);
float probe_dots(int fmt, long n, double* done);

}  // namespace LAMOE_NS
}  // namespace lamoe
