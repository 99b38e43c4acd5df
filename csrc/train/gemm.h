// Matrix products of the training kernels: rows in memory times a packed panel.
//
// A product out [m, n] = a [m, k] b [k, n] reads `a` in place, row by row, and `b` as a panel. A
// panel holds tiles of 16 columns; a tile holds units of 32 bits for each of its columns:
//
//   [tiles][units][16 columns], unit = 1 float or 2 neighbouring bfloat16 along k
//
// This is the layout of FP32 and BF16 weight matrices (cpu/formats.h). Three functions make the
// operands of the three products of a linear layer y = x w^T:
//
//   y = x w^T       a = x     b from pack_nt(w)
//   dx = dy w       a = dy    b from pack_nn(w)
//   dw = dy^T x     a from transpose(dy)    b from pack_nn(x)
//
// E is float or bf16 (uint16_t).
#pragma once
#include <algorithm>

#include "cpu/formats.h"
#include "simd/simd.h"
#include "train/ops.h"

namespace lamoe {
namespace LAMOE_ISA {

using bf16 = uint16_t;

template <class E>
constexpr int kElem = sizeof(E) == 4 ? FP32 : BF16;
template <class E>
constexpr int kUnit = 4 / int(sizeof(E));  // elements along k in a unit

// Rows of a product that stay in a core's L1 cache. AMX computes as many at once.
constexpr int kRowsAtOnce = 32;

template <class E>
INLINE constexpr int units(int k) {
  return (k + kUnit<E> - 1) / kUnit<E>;
}
// Bytes from one tile of a panel to the next. Tiles at multiples of large powers of two would share
// the same few sets of the L1 cache.
template <class E>
INLINE constexpr size_t panel_tile(int k) {
  const size_t bytes = size_t(units<E>(k)) * 64;
  return bytes % 1024 ? bytes : bytes + 64;
}
template <class E>
INLINE size_t panel_bytes(int n, int k) {
  return size_t(tiles(n)) * panel_tile<E>(k);
}

// ---- sixteen elements of type E -----------------------------------------------------------------
INLINE vf load_e(const float* p) { return vload(p); }
INLINE vf load_e(const bf16* p) { return vload_bf16(p); }
INLINE void store_e(float* p, vf x) { vstore(p, x); }
INLINE void store_e(bf16* p, vf x) { vstore_bf16(p, x); }
INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { return bf16_to_float(x); }
INLINE void from_float(float* p, float x) { *p = x; }
INLINE void from_float(bf16* p, float x) { *p = float_to_bf16(x); }
// The first n elements; the other lanes are 0.
template <class E>
INLINE vf load_n(const E* p, int n) {
  if (n >= 16) return load_e(p);
  alignas(64) float t[16] = {};
  for (int i = 0; i < n; i++) t[i] = to_float(p[i]);
  return vload(t);
}
template <class E>
INLINE void store_n(E* p, vf x, int n) {
  if (n >= 16) return store_e(p, x);
  alignas(64) float t[16];
  vstore(t, x);
  for (int i = 0; i < n; i++) from_float(p + i, t[i]);
}
// Copies n floats to elements.
template <class E>
INLINE void store_row(const float* from, E* to, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store_e(to + i, vload(from + i));
  if (i < n) store_n(to + i, vload_n(from + i, n - i), n - i);
}

// ---- packing ------------------------------------------------------------------------------------
// Packs tiles t0 .. t1 of b = w^T for w [n, k], rows `ld` elements apart. Columns beyond n are 0.
template <class E>
void pack_nt(const E* w, ptrdiff_t ld, int n, int k, int t0, int t1, void* panel);

// Packs tiles t0 .. t1 of b [k, n], rows `ld` elements apart, as units u0 .. u0 + units(k) of a
// panel with tiles of `tile` bytes. If `row` is not null, row i of b is row[i] of the memory at b.
// Columns beyond n and the row after an odd k are 0.
template <class E>
void pack_nn(const E* b, ptrdiff_t ld, const int32_t* row, int k, int n, int t0, int t1,
             void* panel, size_t tile, int u0 = 0);

// out [n, m] = x [m, n]^T. Rows of out are ldo >= m elements apart and padded with zeros up to the
// next multiple of 32 columns, which ldo must hold.
template <class E>
void transpose(const E* x, ptrdiff_t ld, int m, int n, E* out, ptrdiff_t ldo);

// ---- products -----------------------------------------------------------------------------------
// out [rows][16 (t1 - t0)] = a [rows, k] times tiles t0 .. t1 of a panel with tiles of `tile`
// bytes; if `add`, the product is added to out. Writes whole tiles: 16 columns each.
template <class E>
void multiply(const E* a, ptrdiff_t lda, int rows, int k, const void* panel, size_t tile, int t0,
              int t1, float* out, ptrdiff_t ldo, bool add = false);

// The same product for tiles that begin with column 16 t0, rounded to E. Writes n columns.
template <class E>
void multiply_to(const E* a, ptrdiff_t lda, int rows, int k, const void* panel, size_t tile, int t0,
                 int t1, E* out, ptrdiff_t ldo, int n);

}  // namespace LAMOE_ISA
}  // namespace lamoe
