// SwiGLU experts over tokens sorted by expert.
//
// An item computes some rows of one expert from end to end, so that intermediate results stay in
// the core's caches. Backward recomputes the activation from gate and up.
#include "train/kernels.h"

#include <vector>

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int kColumns = 64;       // columns of gate and of up whose float32 results are in scratch
constexpr int kForwardRows = 128;  // rows of an item of forward
constexpr int kBackwardRows = 128;  // rows that backward processes at once
constexpr int kItemRows = 1536;     // rows of an item of backward, whose weight gradients it sums
constexpr int kStride = kBackwardRows + 32;

// Consecutive sorted rows of one expert.
struct Piece {
  int expert, first, rows;
  int part, parts;  // number of this piece and of all pieces of the expert
};

std::vector<Piece> pieces(const Experts& e, int most) {
  std::vector<Piece> all;
  const int experts = e.plan->experts;
  for (int i = 0; i < experts; i++) {
    const int begin = e.plan->offsets[i], end = e.plan->offsets[i + 1];
    const int parts = (end - begin + most - 1) / most;
    const int each = parts ? ceil_to((end - begin + parts - 1) / parts, kRowsAtOnce) : 0;
    for (int p = 0; p < parts; p++) {
      const int first = begin + p * each;
      all.push_back({i, first, std::min(each, end - first), p, parts});
    }
  }
  return all;
}

template <class E>
struct Sizes {
  int d, f, f2;  // D, F, 2 F
  int td, tf;    // tiles of D and F columns
  int fp;        // F padded to whole tiles
  int ld;        // distance of gathered rows, not a power of two
  explicit Sizes(const Experts& e)
      : d(e.hidden),
        f(e.width),
        f2(2 * e.width),
        td(tiles(d)),
        tf(tiles(f)),
        fp(tf * kTile),
        ld(d + 32) {}
};

INLINE int token_of(const Experts& e, int row) { return e.plan->order[row] / e.plan->top_k; }

// Copies the rows of x that belong to sorted rows first .. first + n.
template <class E>
void gather(const Experts& e, const void* x, int first, int n, E* to, int ld) {
  const E* from = (const E*)x;
  for (int i = 0; i < n; i++)
    std::memcpy(to + ptrdiff_t(i) * ld, from + ptrdiff_t(token_of(e, first + i)) * e.hidden,
                size_t(e.hidden) * sizeof(E));
}

// out [N, D]: the sum of the rows y [A, D] of each token, in float32, rounded once.
template <class E>
void combine(const Parallel& run, const Experts& e, const E* y, E* out) {
  constexpr int kTokens = 32;
  const Plan& plan = *e.plan;
  run((plan.tokens + kTokens - 1) / kTokens, [&](int item, int) {
    const int end = std::min(plan.tokens, (item + 1) * kTokens);
    for (int token = item * kTokens; token < end; token++) {
      const int32_t* place = plan.place + ptrdiff_t(token) * plan.top_k;
      E* to = out + ptrdiff_t(token) * e.hidden;
      for (int c = 0; c < e.hidden; c += 16) {
        const int n = e.hidden - c;
        vf sum = vzero();
        for (int k = 0; k < plan.top_k; k++)
          if (place[k] >= 0) sum = sum + load_n(y + ptrdiff_t(place[k]) * e.hidden + c, n);
        store_n(to + c, sum, n);
      }
    }
  });
}

template <class E>
void forward(const Parallel& run, const Experts& e, E* out) {
  const Sizes<E> s(e);
  const int experts = e.plan->experts;
  const size_t tile13 = panel_tile<E>(s.d), tile2 = panel_tile<E>(s.f);
  // Panels of an expert: gate, up, then w2.
  const size_t gate_bytes = tile13 * s.tf, expert_bytes = 2 * gate_bytes + tile2 * s.td;
  uint8_t* panels = (uint8_t*)run.shared(0, expert_bytes * size_t(experts));
  const E *all13 = (const E*)e.w13, *all2 = (const E*)e.w2;
  run(experts * 3, [&](int item, int) {
    const int i = item / 3;
    if (e.plan->offsets[i] == e.plan->offsets[i + 1]) return;
    uint8_t* to = panels + expert_bytes * size_t(i) + gate_bytes * size_t(item % 3);
    if (item % 3 < 2)
      pack_nt(all13 + (ptrdiff_t(i) * 2 + item % 3) * s.f * s.d, s.d, s.f, s.d, 0, s.tf, to);
    else
      pack_nt(all2 + ptrdiff_t(i) * s.d * s.f, s.f, s.d, s.f, 0, s.td, to);
  });
  const auto list = pieces(e, kForwardRows);
  E* y = (E*)run.shared(1, sizeof(E) * size_t(e.plan->offsets[experts]) * s.d);
  const size_t sum_floats = size_t(kRowsAtOnce) * 2 * kColumns;
  const Parallel::Own own =
      run.own(sum_floats * 4 + size_t(kRowsAtOnce) * (s.ld + s.fp) * sizeof(E));
  run(int(list.size()), [&](int item, int thread) {
    const Piece& p = list[item];
    float* sums = own.at<float>(thread);
    E* rows = own.at<E>(thread, sum_floats * 4);
    E* act = rows + size_t(kRowsAtOnce) * s.ld;
    const uint8_t* gate_panel = panels + expert_bytes * size_t(p.expert);
    const uint8_t *up_panel = gate_panel + gate_bytes, *w2_panel = up_panel + gate_bytes;
    for (int r = 0; r < p.rows; r += kRowsAtOnce) {
      const int n = std::min(kRowsAtOnce, p.rows - r), at = p.first + r;
      gather(e, e.x, at, n, rows, s.ld);
      for (int c0 = 0; c0 < s.f; c0 += kColumns) {
        const int t0 = c0 / kTile, t1 = std::min(s.tf, t0 + kColumns / kTile);
        multiply(rows, s.ld, n, s.d, gate_panel, tile13, t0, t1, sums, 2 * kColumns);
        multiply(rows, s.ld, n, s.d, up_panel, tile13, t0, t1, sums + kColumns, 2 * kColumns);
        for (int i = 0; i < n; i++) {
          const float* g = sums + ptrdiff_t(i) * 2 * kColumns;
          E* h = (E*)e.h + ptrdiff_t(at + i) * s.f2 + c0;
          const vf weight = vset(e.weight[e.plan->order[at + i]]);
          for (int c = 0; c < std::min(kColumns, s.f - c0); c += 16) {
            const int left = s.f - c0 - c;
            // Continue with gate and up as rounded for the backward pass.
            store_n(h + c, vload(g + c), left);
            store_n(h + s.f + c, vload(g + kColumns + c), left);
            const vf gate = load_n(h + c, left), up = load_n(h + s.f + c, left);
            store_e(act + ptrdiff_t(i) * s.fp + c0 + c, gate * sigmoid(gate) * up * weight);
          }
        }
      }
      multiply_to(act, s.fp, n, s.f, w2_panel, tile2, 0, s.td, y + ptrdiff_t(at) * s.d, s.d, s.d);
    }
  });
  combine(run, e, y, out);
}

// The memory of one thread in backward. Strides of transposed matrices are kStride.
template <class E>
struct Scratch {
  float *sum13, *sum2;  // [2 F][D], [F][D] (transposed): gradients of the weights of a piece
  float* product;       // [kRowsAtOnce][F]
  E *dy, *h, *act;      // [kBackwardRows][D], [..][2 F], [..][F]
  E *h_transposed, *act_transposed;  // [2 F], [F] rows of kStride: dh and act, transposed
  uint8_t* panel;                    // x or dy as b [kBackwardRows, D]

  static size_t bytes(const Sizes<E>& s) { return Scratch(nullptr, s).end; }
  Scratch(char* p, const Sizes<E>& s) {
    const size_t dp = size_t(s.td) * kTile;
    take(p, sum13, size_t(s.f2) * dp), take(p, sum2, size_t(s.f) * dp);
    take(p, product, size_t(kRowsAtOnce) * s.fp);
    take(p, dy, size_t(kBackwardRows) * s.ld), take(p, h, size_t(kBackwardRows) * s.f2);
    take(p, act, size_t(kBackwardRows) * s.fp);
    take(p, h_transposed, size_t(s.f2) * kStride), take(p, act_transposed, size_t(s.f) * kStride);
    take(p, panel, panel_tile<E>(kBackwardRows) * s.td);
  }

 private:
  size_t end = 0;
  template <class T>
  void take(char* p, T*& to, size_t count) {
    to = (T*)(p + end);
    end += (count * sizeof(T) + 63) / 64 * 64;
  }
};

// dw [rows][columns] = sums, for sums [rows][ld] or, if `transposed`, sums [columns][ld].
template <class E>
void store_sums(const float* sums, int ld, bool transposed, E* dw, int rows, int columns) {
  if (!transposed) {
    for (int i = 0; i < rows; i++)
      store_row(sums + ptrdiff_t(i) * ld, dw + ptrdiff_t(i) * columns, columns);
    return;
  }
  alignas(64) float block[16 * 16];
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j += 16) {
      const int nr = std::min(16, rows - i), nc = std::min(16, columns - j);
      if (nc == 16) {
        transpose_words(sums + ptrdiff_t(j) * ld + i, size_t(ld) * 4, block, 64);
      } else {
        for (int c = 0; c < nc; c++)
          for (int r = 0; r < nr; r++) block[r * 16 + c] = sums[ptrdiff_t(j + c) * ld + i + r];
      }
      for (int r = 0; r < nr; r++)
        store_n(dw + ptrdiff_t(i + r) * columns + j, vload(block + 16 * r), nc);
    }
}

template <class E>
void backward(const Parallel& run, const Experts& e, const E* dout, E* dx, float* dweight, E* dw13,
              E* dw2) {
  const Sizes<E> s(e);
  const int experts = e.plan->experts, dp = s.td * kTile;
  const size_t size13 = size_t(s.f2) * s.d, size2 = size_t(s.d) * s.f;
  // dact = dy w2 and dx = dh w13.
  const size_t tile2 = panel_tile<E>(s.d), tile13 = panel_tile<E>(s.f2);
  const size_t panel2 = tile2 * s.tf, panel13 = tile13 * s.td;
  uint8_t* panels = (uint8_t*)run.shared(0, (panel13 + panel2) * size_t(experts));
  const auto w13 = [&](int i) { return panels + (panel13 + panel2) * size_t(i); };
  const auto w2 = [&](int i) { return w13(i) + panel13; };
  constexpr int kPackRows = 128;
  const int pack13 = (s.f2 + kPackRows - 1) / kPackRows, pack2 = (s.d + kPackRows - 1) / kPackRows;
  run(experts * (pack13 + pack2), [&](int item, int) {
    const int i = item / (pack13 + pack2), p = item % (pack13 + pack2);
    if (e.plan->offsets[i] == e.plan->offsets[i + 1]) {
      if (p == 0) {
        std::memset(dw13 + i * size13, 0, size13 * sizeof(E));
        std::memset(dw2 + i * size2, 0, size2 * sizeof(E));
      }
    } else if (p < pack13) {
      const int r = p * kPackRows;
      pack_nn((const E*)e.w13 + i * size13 + ptrdiff_t(r) * s.d, s.d, nullptr,
              std::min(kPackRows, s.f2 - r), s.d, 0, s.td, w13(i), tile13, r / kUnit<E>);
    } else {
      const int r = (p - pack13) * kPackRows;
      pack_nn((const E*)e.w2 + i * size2 + ptrdiff_t(r) * s.f, s.f, nullptr,
              std::min(kPackRows, s.d - r), s.f, 0, s.tf, w2(i), tile2, r / kUnit<E>);
    }
  });
  const auto list = pieces(e, kItemRows);
  // Pieces of an expert with several pieces leave their sums in `partial`, in the order of `list`.
  const size_t sums = (size_t(s.f2) + s.f) * dp;
  std::vector<int> slot(list.size(), -1);
  int slots = 0;
  for (size_t i = 0; i < list.size(); i++)
    if (list[i].parts > 1) slot[i] = slots++;
  float* partial = (float*)run.shared(2, sums * 4 * size_t(slots));
  E* rows_dx = (E*)run.shared(1, sizeof(E) * size_t(e.plan->offsets[experts]) * s.d);
  const Parallel::Own own = run.own(Scratch<E>::bytes(s));
  run(int(list.size()), [&](int item, int thread) {
    const Piece& p = list[item];
    Scratch<E> m(own.at<char>(thread), s);
    if (slot[item] >= 0)
      m.sum13 = partial + slot[item] * sums, m.sum2 = m.sum13 + size_t(s.f2) * dp;
    int32_t token[kBackwardRows];
    for (int r = 0; r < p.rows; r += kBackwardRows) {
      const int n = std::min(kBackwardRows, p.rows - r), at = p.first + r;
      for (int i = 0; i < n; i++) token[i] = token_of(e, at + i);
      gather(e, dout, at, n, m.dy, s.ld);
      for (int q = 0; q < n; q += kRowsAtOnce) {
        const int here = std::min(kRowsAtOnce, n - q);
        multiply(m.dy + ptrdiff_t(q) * s.ld, s.ld, here, s.d, w2(p.expert), tile2, 0, s.tf,
                 m.product, s.fp);
        for (int i = 0; i < here; i++) {
          const int row = at + q + i;
          const float* dact = m.product + ptrdiff_t(i) * s.fp;
          const E* h = (const E*)e.h + ptrdiff_t(row) * s.f2;
          E *dh = m.h + ptrdiff_t(q + i) * s.f2, *act = m.act + ptrdiff_t(q + i) * s.fp;
          const vf weight = vset(e.weight[e.plan->order[row]]);
          vf along = vzero();
          for (int c = 0; c < s.f; c += 16) {
            const int left = s.f - c;
            const vf gate = load_n(h + c, left), up = load_n(h + s.f + c, left);
            const vf g = vload(dact + c), sig = sigmoid(gate), silu = gate * sig;
            const vf a = silu * up;
            along = vfma(g, a, along);
            const vf gw = g * weight;
            store_n(dh + c, gw * up * sig * (vset(1.f) + gate - silu), left);
            store_n(dh + s.f + c, gw * silu, left);
            store_e(act + c, a * weight);
          }
          dweight[e.plan->order[row]] = vsum(along);
        }
        multiply_to(m.h + ptrdiff_t(q) * s.f2, s.f2, here, s.f2, w13(p.expert), tile13, 0, s.td,
                    rows_dx + ptrdiff_t(at + q) * s.d, s.d, s.d);
      }
      // dw2^T [F, D] += act^T dy and dw13 [2 F, D] += dh^T x
      const size_t tile = panel_tile<E>(kBackwardRows);
      transpose(m.act, s.fp, n, s.f, m.act_transposed, kStride);
      pack_nn(m.dy, s.ld, nullptr, n, s.d, 0, s.td, m.panel, tile);
      for (int i = 0; i < s.f; i += kRowsAtOnce)
        multiply(m.act_transposed + i * kStride, kStride, std::min(kRowsAtOnce, s.f - i), n,
                 m.panel, tile, 0, s.td, m.sum2 + ptrdiff_t(i) * dp, dp, r > 0);
      transpose(m.h, s.f2, n, s.f2, m.h_transposed, kStride);
      pack_nn((const E*)e.x, s.d, token, n, s.d, 0, s.td, m.panel, tile);
      for (int i = 0; i < s.f2; i += kRowsAtOnce)
        multiply(m.h_transposed + i * kStride, kStride, std::min(kRowsAtOnce, s.f2 - i), n, m.panel,
                 tile, 0, s.td, m.sum13 + ptrdiff_t(i) * dp, dp, r > 0);
    }
    if (slot[item] < 0) {
      store_sums(m.sum13, dp, false, dw13 + p.expert * size13, s.f2, s.d);
      store_sums(m.sum2, dp, true, dw2 + p.expert * size2, s.d, s.f);
    }
  });
  // Add the sums of the pieces of an expert in their order.
  std::vector<int> firsts;
  for (size_t i = 0; i < list.size(); i++)
    if (list[i].parts > 1 && list[i].part == 0) firsts.push_back(int(i));
  constexpr int kSplit = 8;  // items per expert, each for some rows of the sums
  const int rows_all = s.f2 + s.f, rows_each = (rows_all + kSplit - 1) / kSplit;
  run(int(firsts.size()) * kSplit, [&](int item, int) {
    const int i = firsts[item / kSplit];
    float* to = partial + slot[i] * sums;
    const size_t begin = size_t(item % kSplit) * rows_each * dp,
                 end = std::min(sums, begin + size_t(rows_each) * dp);
    for (int p = 1; p < list[i].parts; p++)
      for (size_t c = begin; c < end; c += 16)
        vstore(to + c, vload(to + c) + vload(to + p * sums + c));
  });
  run(int(firsts.size()) * 2, [&](int item, int) {
    const int i = firsts[item / 2], expert = list[i].expert;
    const float* from = partial + slot[i] * sums;
    if (item % 2 == 0)
      store_sums(from, dp, false, dw13 + expert * size13, s.f2, s.d);
    else
      store_sums(from + size_t(s.f2) * dp, dp, true, dw2 + expert * size2, s.d, s.f);
  });
  for (int i = 0; i < e.plan->tokens * e.plan->top_k; i++)
    if (e.plan->place[i] < 0) dweight[i] = 0.f;  // an assignment without an expert has no row
  combine(run, e, rows_dx, dx);
}

}  // namespace

void experts_forward(const Parallel& run, const Experts& e, void* out) {
  with_type(e.elem, [&](auto* type) { forward(run, e, (decltype(type))out); });
}

void experts_backward(const Parallel& run, const Experts& e, const void* dout, void* dx,
                      float* dweight, void* dw13, void* dw2) {
  with_type(e.elem, [&](auto* type) {
    using P = decltype(type);
    backward(run, e, (std::remove_pointer_t<P> const*)dout, (P)dx, dweight, (P)dw13, (P)dw2);
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
