// Cross-entropy with the output head: loss and gradients in one call, in chunks of rows, so that
// the logits of all rows never exist at once.
#include "train/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int kChunk = 512;      // rows whose logits exist at once
constexpr int kVocabItem = 512;  // columns of an item
constexpr int kStride = kChunk + 32;
constexpr int kStateRows = 64;  // rows of an item of dh
constexpr int kDepth = 1024;    // columns of the vocabulary that an item of dh sums at once

template <class E>
double run_loss(const Parallel& run, const E* h, const E* head, const int64_t* targets, int rows,
                int hidden, int vocab, float share, E* dh, E* dhead) {
  const int td = tiles(hidden), dp = td * kTile;
  // Rows of logits are not a multiple of 4096 bytes apart, which would share cache sets.
  const ptrdiff_t ld = ceil_to(vocab, 64) + 32;
  const size_t tile_nt = panel_tile<E>(hidden), tile_nn = panel_tile<E>(vocab);
  uint8_t* nn = nullptr;  // the head as b [vocab, D], for the gradients of states
  float* dhead_sum = nullptr;
  uint8_t* states = nullptr;  // the states of a chunk as b [rows, D]
  const size_t tile_h = panel_tile<E>(kChunk);
  if (dh) {
    nn = (uint8_t*)run.shared(1, tile_nn * td);
    constexpr int kRows = 256;
    run((vocab + kRows - 1) / kRows, [&](int i, int) {
      const int r = i * kRows;
      pack_nn(head + ptrdiff_t(r) * hidden, hidden, nullptr, std::min(kRows, vocab - r), hidden, 0,
              td, nn, tile_nn, r / kUnit<E>);
    });
    dhead_sum = (float*)run.shared(2, sizeof(float) * size_t(vocab) * dp);
    states = (uint8_t*)run.shared(3, tile_h * td);
  }
  E* logits = (E*)run.shared(4, sizeof(E) * size_t(kChunk) * ld);
  float* losses = (float*)run.shared(5, sizeof(float) * size_t(rows));
  const int vocab_items = (vocab + kVocabItem - 1) / kVocabItem;
  const size_t logits_own = tile_nt * tiles(kVocabItem);
  const size_t dhead_own = sizeof(E) * kVocabItem * size_t(kStride);
  const size_t dh_own = sizeof(float) * kStateRows * size_t(dp);
  const Parallel::Own own = run.own(std::max({logits_own, dhead_own, dh_own}));

  for (int first = 0; first < rows; first += kChunk) {
    const int n = std::min(kChunk, rows - first);
    const E* x = h + ptrdiff_t(first) * hidden;
    // 1. logits
    run(vocab_items, [&](int item, int thread) {
      uint8_t* panel = own.at<uint8_t>(thread);
      const int c = item * kVocabItem, width = std::min(kVocabItem, vocab - c);
      pack_nt(head + ptrdiff_t(c) * hidden, hidden, width, hidden, 0, tiles(width), panel);
      multiply_to(x, hidden, n, hidden, panel, tile_nt, 0, tiles(width), logits + c, ld, width);
    });
    // 2. losses, and logits become gradients
    constexpr int kSoftmaxRows = 16;
    run((n + kSoftmaxRows - 1) / kSoftmaxRows, [&](int item, int) {
      for (int i = item * kSoftmaxRows; i < std::min(n, (item + 1) * kSoftmaxRows); i++) {
        E* z = logits + i * ld;
        z[vocab] = E(0);  // products read bfloat16 in pairs
        const int64_t target = targets[first + i];
        const int whole = vocab / 16 * 16, rest = vocab - whole;
        if (target < 0) {
          losses[first + i] = 0.f;
          if (dh) std::memset(z, 0, sizeof(E) * size_t(vocab));
          continue;
        }
        vf top = vset(-INFINITY);
        for (int c = 0; c < whole; c += 16) top = vmax(top, load_e(z + c));
        float most = vhmax(top);
        for (int c = whole; c < vocab; c++) most = std::max(most, to_float(z[c]));
        // NaN and infinite logits must give a loss that is not finite. vmax ignores some NaN.
        const vf shift = vset(most);
        vf sum = vzero();
        for (int c = 0; c < whole; c += 16) sum = sum + vexp(load_e(z + c) - shift);
        float mass = vsum(sum);
        if (rest) {
          alignas(64) float last[16];
          vstore(last, vexp(load_n(z + whole, rest) - shift));
          for (int c = 0; c < rest; c++) mass += last[c];
        }
        losses[first + i] = (std::log(mass) + most - to_float(z[target])) * share;
        if (!dh) continue;
        const vf factor = vset(share / mass);
        const float of_target = std::exp(to_float(z[target]) - most) / mass;
        for (int c = 0; c < whole; c += 16) store_e(z + c, vexp(load_e(z + c) - shift) * factor);
        if (rest) store_n(z + whole, vexp(load_n(z + whole, rest) - shift) * factor, rest);
        from_float(z + target, (of_target - 1.f) * share);
      }
    });
    if (!dh) continue;
    // 3. dh = dlogits head, and the panel of the states
    run((n + kStateRows - 1) / kStateRows, [&](int item, int thread) {
      float* out = own.at<float>(thread);
      const int r = item * kStateRows, here = std::min(kStateRows, n - r);
      for (int c = 0; c < vocab; c += kDepth) {
        const int depth = std::min(kDepth, vocab - c);
        for (int q = 0; q < here; q += kRowsAtOnce)
          multiply(logits + (r + q) * ld + c, ld, std::min(kRowsAtOnce, here - q), depth,
                   nn + size_t(c / kUnit<E>) * 64, tile_nn, 0, td, out + ptrdiff_t(q) * dp, dp,
                   c > 0);
      }
      for (int i = 0; i < here; i++)
        store_row(out + ptrdiff_t(i) * dp, dh + ptrdiff_t(first + r + i) * hidden, hidden);
      pack_nn(x + ptrdiff_t(r) * hidden, hidden, nullptr, here, hidden, 0, td, states, tile_h,
              r / kUnit<E>);
    });
    // 4. dhead += dlogits^T h
    run(vocab_items, [&](int item, int thread) {
      E* transposed = own.at<E>(thread);
      const int c = item * kVocabItem, width = std::min(kVocabItem, vocab - c);
      transpose(logits + c, ld, n, width, transposed, kStride);
      for (int i = 0; i < width; i += kRowsAtOnce)
        multiply(transposed + i * kStride, kStride, std::min(kRowsAtOnce, width - i), n, states,
                 tile_h, 0, td, dhead_sum + ptrdiff_t(c + i) * dp, dp, first > 0);
      if (first + n == rows)
        for (int i = 0; i < width; i++)
          store_row(dhead_sum + ptrdiff_t(c + i) * dp, dhead + ptrdiff_t(c + i) * hidden, hidden);
    });
  }
  double total = 0;
  for (int i = 0; i < rows; i++) total += losses[i];
  return total;
}

}  // namespace

double cross_entropy(const Parallel& run, int elem, const void* h, const void* head,
                     const int64_t* targets, int rows, int hidden, int vocab, float share, void* dh,
                     void* dhead) {
  double total = 0;
  with_type(elem, [&](auto* type) {
    using P = decltype(type);
    using C = std::remove_pointer_t<P> const*;
    total = run_loss(run, (C)h, (C)head, targets, rows, hidden, vocab, share, (P)dh, (P)dhead);
  });
  return total;
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
