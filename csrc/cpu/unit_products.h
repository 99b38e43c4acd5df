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

// Multiplies M rows by T tiles. Each tile has `units` units of inputs. Tiles are `tile` bytes
// apart. If ADD, the product is added to `out`, whose n then must cover all T tiles.
template <int FMT, int T, int M, bool ADD = false>
void micro_unit(const uint8_t* w, size_t tile, int units, const uint8_t* x, size_t stride,
                float* out, ptrdiff_t ldo, int n) {
  vf acc[T][M];
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) acc[t][m] = ADD ? vload(out + m * ldo + kTile * t) : vzero();
  for (int u = 0; u < units; u++) {
    vw v[T];
    UNROLL_FOR(t, T) v[t] = wload(w + t * tile + size_t(u) * 64);
    UNROLL_FOR(m, M)
      UNROLL_FOR(t, T) acc[t][m] = dot_unit<FMT>(acc[t][m], v[t], x + m * stride + size_t(u) * 4);
  }
  UNROLL_FOR(t, T)
    UNROLL_FOR(m, M) vstore_n(out + m * ldo + kTile * t, acc[t][m], n - kTile * t);
}

// Processes all rows, M at a time. One micro-kernel call then processes the remaining rows.
template <int FMT, int T, int M, bool ADD = false>
void rows_unit(const uint8_t* w, size_t tile, int units, const uint8_t* x, size_t stride, int rows,
               float* out, ptrdiff_t ldo, int n) {
  for (; rows >= M; rows -= M, x += M * stride, out += M * ldo)
    micro_unit<FMT, T, M, ADD>(w, tile, units, x, stride, out, ldo, n);
  if constexpr (M > 1) {
    if (rows) rows_unit<FMT, T, M - 1, ADD>(w, tile, units, x, stride, rows, out, ldo, n);
  }
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
