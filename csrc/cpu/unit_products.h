// Micro-kernels for products of FP32 or BF16 rows with tiles of 16 outputs, on vector registers.
#pragma once
#include "cpu/formats.h"
#include "simd/simd.h"

namespace lamoe {
namespace LAMOE_ISA {

template <int FMT>
INLINE vf dot_unit(vf acc, vw w, const uint8_t* x) {
  return FMT == FP32 ? dot_f32(acc, w, x) : dot_bf16(acc, w, x);
}

INLINE void store_columns(float* p, vf x, int n) { vstore_n(p, x, n); }
INLINE void store_columns(uint16_t* p, vf x, int n) {
  if (n >= 16) return vstore_bf16(p, x);
  alignas(64) float t[16];
  vstore(t, x);
  for (int i = 0; i < n; i++) p[i] = float_to_bf16(t[i]);
}

// Multiplies M rows by T tiles. Each tile has `units` units of inputs. Tiles are `tile` bytes
// apart. Writes n columns. If ADD, the product is added to `out`, whose n then must
// cover all T tiles. Columns that n does not reach are not written.
template <int FMT, int T, int M, bool ADD = false, class O = float>
void micro_unit(const uint8_t* w, size_t tile, int units, const uint8_t* x, size_t stride, O* out,
                ptrdiff_t ldo, int n) {
  vf acc[T][M];
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) {
      if constexpr (ADD)
        acc[t][m] = vload(out + m * ldo + kTile * t);
      else
        acc[t][m] = vzero();
    }
  for (int u = 0; u < units; u++) {
    vw v[T];
    UNROLL_FOR(t, T) v[t] = wload(w + t * tile + size_t(u) * 64);
    UNROLL_FOR(m, M)
      UNROLL_FOR(t, T) acc[t][m] = dot_unit<FMT>(acc[t][m], v[t], x + m * stride + size_t(u) * 4);
  }
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) store_columns(out + m * ldo + kTile * t, acc[t][m], n - kTile * t);
}

// Processes all rows, M at a time. One micro-kernel call then processes the remaining rows.
template <int FMT, int T, int M, bool ADD = false, class O = float>
void rows_unit(const uint8_t* w, size_t tile, int units, const uint8_t* x, size_t stride, int rows,
               O* out, ptrdiff_t ldo, int n) {
  for (; rows >= M; rows -= M, x += M * stride, out += M * ldo)
    micro_unit<FMT, T, M, ADD, O>(w, tile, units, x, stride, out, ldo, n);
  if constexpr (M > 1) {
    if (rows) rows_unit<FMT, T, M - 1, ADD, O>(w, tile, units, x, stride, rows, out, ldo, n);
  }
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
