// RMSNorm over rows, with an optional residual that is added first.
#include "train/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int kRows = 32;  // rows of an item

// x rounded to elements of type E.
INLINE vf round_to(const float*, vf x) { return x; }
INLINE vf round_to(const bf16*, vf x) {
  alignas(64) bf16 t[16];
  vstore_bf16(t, x);
  return vload_bf16(t);
}

// Calls f(column, columns) for 16 columns at a time. The last call may have fewer.
template <class F>
INLINE void for_columns(int d, const F& f) {
  int c = 0;
  for (; c + 16 <= d; c += 16) f(c, 16);
  if (c < d) f(c, d - c);
}

template <class E>
void forward(const Parallel& run, const Norm& s, const E* x, const E* residual, E* sum, E* y,
             float* inv) {
  const E* weight = (const E*)s.weight;
  run((s.rows + kRows - 1) / kRows, [&](int item, int) {
    const int end = std::min(s.rows, (item + 1) * kRows);
    for (int i = item * kRows; i < end; i++) {
      const E* row = x + i * s.ldx;
      vf squares = vzero();
      if (residual) {
        const E* other = residual + i * s.ldr;
        E* to = sum + ptrdiff_t(i) * s.dim;
        for_columns(s.dim, [&](int c, int n) __attribute__((always_inline)) {
          const vf v = round_to(x, load_n(row + c, n) + load_n(other + c, n));
          store_n(to + c, v, n);
          squares = vfma(v, v, squares);
        });
        row = to;
      } else {
        for_columns(s.dim, [&](int c, int n) __attribute__((always_inline)) {
          const vf v = load_n(row + c, n);
          squares = vfma(v, v, squares);
        });
      }
      inv[i] = 1.f / std::sqrt(vsum(squares) / float(s.dim) + s.eps);
      const vf factor = vset(inv[i]);
      E* to = y + ptrdiff_t(i) * s.dim;
      for_columns(s.dim, [&](int c, int n) __attribute__((always_inline)) {
        store_n(to + c, round_to(x, load_n(row + c, n) * factor) * load_n(weight + c, n), n);
      });
    }
  });
}

template <class E>
void backward(const Parallel& run, const Norm& s, const E* x, const float* inv, const E* dy,
              ptrdiff_t ldy, const E* dsum, ptrdiff_t lds, E* dx, E* dweight) {
  const E* weight = (const E*)s.weight;
  const int blocks = (s.rows + kRows - 1) / kRows, ld = ceil_to(s.dim, 16) + 16;
  float* partial = (float*)run.shared(0, sizeof(float) * size_t(blocks) * ld);
  run(blocks, [&](int item, int) {
    float* dw = partial + ptrdiff_t(item) * ld;
    std::memset(dw, 0, sizeof(float) * ld);
    const int end = std::min(s.rows, (item + 1) * kRows);
    for (int i = item * kRows; i < end; i++) {
      const E *row = x + i * s.ldx, *grad = dy + i * ldy, *other = dsum ? dsum + i * lds : nullptr;
      const vf factor = vset(inv[i]);
      vf sum = vzero();  // of the gradient along the normalised row
      for_columns(s.dim, [&](int c, int n) __attribute__((always_inline)) {
        const vf product = load_n(grad + c, n) * (load_n(row + c, n) * factor);
        vstore(dw + c, vload(dw + c) + product);
        sum = vfma(product, load_n(weight + c, n), sum);
      });
      const vf along = vset(vsum(sum) / float(s.dim));
      E* to = dx + ptrdiff_t(i) * s.dim;
      for_columns(s.dim, [&](int c, int n) __attribute__((always_inline)) {
        const vf unit = load_n(row + c, n) * factor;
        vf v = (load_n(grad + c, n) * load_n(weight + c, n) - unit * along) * factor;
        if (other) v = v + load_n(other + c, n);
        store_n(to + c, v, n);
      });
    }
  });
  // Partial sums are added in the order of the blocks.
  constexpr int kColumns = 64;
  run((s.dim + kColumns - 1) / kColumns, [&](int item, int) {
    const int end = std::min(s.dim, (item + 1) * kColumns);
    for (int c = item * kColumns; c < end; c += 16) {
      vf sum = vzero();
      for (int b = 0; b < blocks; b++) sum = sum + vload(partial + ptrdiff_t(b) * ld + c);
      store_n(dweight + c, sum, end - c);
    }
  });
}

}  // namespace

void rms_norm(const Parallel& run, const Norm& s, const void* x, const void* residual, void* sum,
              void* y, float* inv) {
  with_type(s.elem, [&](auto* type) {
    using P = decltype(type);
    using C = std::remove_pointer_t<P> const*;
    forward(run, s, (C)x, (C)residual, (P)sum, (P)y, inv);
  });
}

void rms_norm_backward(const Parallel& run, const Norm& s, const void* x, const float* inv,
                       const void* dy, ptrdiff_t ldy, const void* dsum, ptrdiff_t lds, void* dx,
                       void* dweight) {
  with_type(s.elem, [&](auto* type) {
    using P = decltype(type);
    using C = std::remove_pointer_t<P> const*;
    backward(run, s, (C)x, inv, (C)dy, ldy, (C)dsum, lds, (P)dx, (P)dweight);
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
