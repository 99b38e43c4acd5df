// The three products of a linear layer y = x w^T.
#include "train/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int kItemRows = 128;
constexpr size_t kPanelBytes = 768 << 10;  // part of a panel that stays in a core's L2 cache
constexpr int kSumRows = 512;              // rows that linear_dw packs at once
constexpr int kSumStride = kSumRows + 32;  // not a power of two, which would share cache sets

// y [m, n] = a [m, k] b for a packed b, in items of rows and of tiles.
template <class E>
void multiply_rows(const Parallel& run, const E* a, ptrdiff_t lda, int m, int k, const void* panel,
                   int n, E* y, ptrdiff_t ldy) {
  const size_t tile = panel_tile<E>(k);
  const int all = tiles(n);
  const int part = std::min(all, std::max(2, int(kPanelBytes / tile)));
  const int parts = (all + part - 1) / part, row_items = (m + kItemRows - 1) / kItemRows;
  run(parts * row_items, [&](int item, int) {
    const int t0 = item / row_items * part, t1 = std::min(all, t0 + part), c = t0 * kTile;
    const int r = item % row_items * kItemRows;
    multiply_to(a + r * lda, lda, std::min(kItemRows, m - r), k, panel, tile, t0, t1,
                y + r * ldy + c, ldy, n - c);
  });
}

constexpr int kPackTiles = 8;  // tiles of an item of packing

}  // namespace

void linear_forward(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, int m, int k,
                    const void* w, int n, void* y, ptrdiff_t ldy) {
  with_type(elem, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    void* panel = run.shared(0, panel_bytes<E>(n, k));
    run((tiles(n) + kPackTiles - 1) / kPackTiles, [&](int i, int) {
      pack_nt((const E*)w, k, n, k, i * kPackTiles, std::min(tiles(n), (i + 1) * kPackTiles),
              panel);
    });
    multiply_rows(run, (const E*)x, ldx, m, k, panel, n, (E*)y, ldy);
  });
}

void linear_dx(const Parallel& run, int elem, const void* dy, ptrdiff_t ldy, int m, int n,
               const void* w, int k, void* dx) {
  with_type(elem, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    void* panel = run.shared(0, panel_bytes<E>(k, n));
    constexpr int kRows = 64;  // rows of w of an item of packing
    run((n + kRows - 1) / kRows, [&](int i, int) {
      const int r = i * kRows;
      pack_nn((const E*)w + ptrdiff_t(r) * k, k, nullptr, std::min(kRows, n - r), k, 0, tiles(k),
              panel, panel_tile<E>(n), r / kUnit<E>);
    });
    multiply_rows(run, (const E*)dy, ldy, m, n, panel, k, (E*)dx, k);
  });
}

void linear_dw(const Parallel& run, int elem, const void* dy, ptrdiff_t ldy, const void* x,
               ptrdiff_t ldx, int m, int n, int k, void* dw) {
  with_type(elem, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    // The panel holds x as b [m, k], in blocks of kSumRows rows. All items read it.
    const int blocks_m = (m + kSumRows - 1) / kSumRows, all = tiles(k);
    const size_t tile = panel_tile<E>(kSumRows), block = tile * size_t(all);
    uint8_t* panel = (uint8_t*)run.shared(0, block * size_t(blocks_m));
    constexpr int kRows = 128;
    run((m + kRows - 1) / kRows, [&](int i, int) {
      const int r = i * kRows;
      pack_nn((const E*)x + r * ldx, ldx, nullptr, std::min(kRows, m - r), k, 0, all,
              panel + r / kSumRows * block, tile, r % kSumRows / kUnit<E>);
    });
    // An item sums the gradients of some outputs: sums [outputs][16 all], rows
    // [outputs][kSumStride].
    const int ld_sum = all * kTile, most = std::max(32, (448 << 10) / (ld_sum * 4) / 32 * 32);
    const int rounds = (n + most * run.threads() - 1) / (most * run.threads());
    const int outputs = ceil_to((n + rounds * run.threads() - 1) / (rounds * run.threads()), 32);
    const size_t sum_bytes = size_t(outputs) * ld_sum * 4;
    const Parallel::Own own = run.own(sum_bytes + size_t(outputs) * kSumStride * sizeof(E));
    run((n + outputs - 1) / outputs, [&](int item, int thread) {
      float* sums = own.at<float>(thread);
      E* rows = own.at<E>(thread, sum_bytes);
      const int first = item * outputs, count = std::min(outputs, n - first);
      for (int b = 0; b < blocks_m; b++) {
        const int r = b * kSumRows, here = std::min(kSumRows, m - r);
        transpose((const E*)dy + r * ldy + first, ldy, here, count, rows, kSumStride);
        for (int i = 0; i < count; i += kRowsAtOnce)
          multiply(rows + i * kSumStride, kSumStride, std::min(kRowsAtOnce, count - i), here,
                   panel + b * block, tile, 0, all, sums + ptrdiff_t(i) * ld_sum, ld_sum, b > 0);
      }
      for (int i = 0; i < count; i++)
        store_row(sums + ptrdiff_t(i) * ld_sum, (E*)dw + ptrdiff_t(first + i) * k, k);
    });
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
