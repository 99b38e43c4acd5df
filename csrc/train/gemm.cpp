#include "train/gemm.h"

#include "cpu/unit_products.h"

namespace lamoe {
namespace LAMOE_ISA {

template <class E>
void pack_nt(const E* w, ptrdiff_t ld, int n, int k, int t0, int t1, void* panel) {
  constexpr int kWords = 16;
  const int whole = k / (kWords * kUnit<E>)*kWords;  // units that come in blocks of 16
  for (int t = t0; t < t1; t++) {
    uint8_t* to = (uint8_t*)panel + size_t(t) * panel_tile<E>(k);
    const E* from = w + ptrdiff_t(t) * kTile * ld;
    const int rows = std::min(kTile, n - t * kTile);
    int u = 0;
    if (rows == kTile)
      for (; u < whole; u += kWords)
        transpose_words(from + u * kUnit<E>, size_t(ld) * sizeof(E), to + size_t(u) * 64, 64);
    for (; u < units<E>(k); u++) {
      E* words = (E*)(to + size_t(u) * 64);
      for (int i = 0; i < kTile; i++)
        for (int j = 0; j < kUnit<E>; j++) {
          const int c = u * kUnit<E> + j;
          words[i * kUnit<E> + j] = i < rows && c < k ? from[i * ld + c] : E(0);
        }
    }
  }
}

namespace {
INLINE vw join_rows(const bf16* p, const bf16* q) { return interleave_bf16(p, q); }
INLINE vw join_rows(const float* p, const float*) { return wload(p); }

// Copies the first n elements of p to `to` and sets the rest of 16 to zero.
template <class E>
INLINE const E* padded(const E* p, int n, E* to) {
  for (int i = 0; i < kTile; i++) to[i] = i < n ? p[i] : E(0);
  return to;
}
}  // namespace

template <class E>
void pack_nn(const E* b, ptrdiff_t ld, const int32_t* row, int k, int n, int t0, int t1,
             void* panel, size_t tile, int u0) {
  static const E zeros[kTile] = {};
  E rest[2][kTile];
  for (int u = 0; u < units<E>(k); u++) {
    const int r = u * kUnit<E>;
    const bool second = kUnit<E> == 2 && r + 1 < k;
    const E* p = b + (row ? row[r] : r) * ld;
    const E* q = second ? b + (row ? row[r + 1] : r + 1) * ld : nullptr;
    uint8_t* to = (uint8_t*)panel + size_t(u0 + u) * 64;
    for (int t = t0; t < t1; t++) {
      const int c = t * kTile;
      const E *x = p + c, *y = q ? q + c : zeros;
      if (n - c < kTile) {
        x = padded(x, n - c, rest[0]);
        if (q) y = padded(y, n - c, rest[1]);
      }
      wstore(to + t * tile, join_rows(x, y));
    }
  }
}

namespace {
// Transposes the block x [rows, cols] to out [cols, 16 or 32 columns], padded with zeros.
template <class E>
INLINE void transpose_block(const E* x, ptrdiff_t ld, int rows, int cols, E* out, ptrdiff_t ldo) {
  constexpr int kRows = 16 * kUnit<E>;
  if (rows == kRows && cols == kTile) {
    alignas(64) uint8_t words[16 * 64];
    for (int u = 0; u < 16; u++)
      wstore(words + 64 * u,
             join_rows(x + u * kUnit<E> * ld, x + (u * kUnit<E> + kUnit<E> - 1) * ld));
    transpose_words(words, 64, out, size_t(ldo) * sizeof(E));
    return;
  }
  for (int j = 0; j < cols; j++)
    for (int i = 0; i < kRows; i++) out[j * ldo + i] = i < rows ? x[i * ld + j] : E(0);
}
}  // namespace

template <class E>
void transpose(const E* x, ptrdiff_t ld, int m, int n, E* out, ptrdiff_t ldo) {
  constexpr int kRows = 16 * kUnit<E>;
  const int padded_m = ceil_to(m, 32);
  for (int i = 0; i < padded_m; i += kRows)
    for (int j = 0; j < n; j += kTile)
      transpose_block(x + i * ld + j, ld, std::clamp(m - i, 0, kRows), std::min(kTile, n - j),
                      out + j * ldo + i, ldo);
}

namespace {
template <class E, bool ADD, class O, class Unit = Tiles>
void product(const E* a, ptrdiff_t lda, int rows, int k, const uint8_t* w, size_t tile, int count,
             O* out, ptrdiff_t ldo, int n) {
  constexpr int kRows = Traits::kUnitRows;
  const uint8_t* x = (const uint8_t*)a;
  const size_t stride = size_t(lda) * sizeof(E);
  if constexpr (sizeof(E) == 2 && Unit::kAvailable) {
    return Unit::template linear_bf16<ADD>(w, tile, count, units<E>(k), x, stride, rows, out, ldo,
                                           n);
  }
  constexpr int kTiles = Traits::kUnitTiles;
  for (int t = 0; t < count; t += kTiles) {
    const auto multiply = t + kTiles <= count ? rows_unit<kElem<E>, kTiles, kRows, ADD, O>
                                              : rows_unit<kElem<E>, 1, kRows, ADD, O>;
    multiply(w + t * tile, tile, units<E>(k), x, stride, rows, out + kTile * t, ldo, n - kTile * t);
  }
}
}  // namespace

template <class E>
void multiply(const E* a, ptrdiff_t lda, int rows, int k, const void* panel, size_t tile, int t0,
              int t1, float* out, ptrdiff_t ldo, bool add) {
  if (rows <= 0 || t1 <= t0) return;
  const uint8_t* w = (const uint8_t*)panel + size_t(t0) * tile;
  (add ? product<E, true, float> : product<E, false, float>)(a, lda, rows, k, w, tile, t1 - t0, out,
                                                             ldo, kTile * (t1 - t0));
}

template <class E>
void multiply_to(const E* a, ptrdiff_t lda, int rows, int k, const void* panel, size_t tile, int t0,
                 int t1, E* out, ptrdiff_t ldo, int n) {
  if (rows <= 0 || t1 <= t0) return;
  product<E, false, E>(a, lda, rows, k, (const uint8_t*)panel + size_t(t0) * tile, tile, t1 - t0,
                       out, ldo, n);
}

#define INSTANTIATE(E)                                                                             \
  template void pack_nt<E>(const E*, ptrdiff_t, int, int, int, int, void*);                        \
  template void pack_nn<E>(const E*, ptrdiff_t, const int32_t*, int, int, int, int, void*, size_t, \
                           int);                                                                   \
  template void transpose<E>(const E*, ptrdiff_t, int, int, E*, ptrdiff_t);                        \
  template void multiply<E>(const E*, ptrdiff_t, int, int, const void*, size_t, int, int, float*,  \
                            ptrdiff_t, bool);                                                      \
  template void multiply_to<E>(const E*, ptrdiff_t, int, int, const void*, size_t, int, int, E*,   \
                               ptrdiff_t, int);
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace LAMOE_ISA
}  // namespace lamoe
