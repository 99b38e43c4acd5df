// Element-wise operations on rows.
#include "train/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {
constexpr int kRows = 16;  // rows of an item
}  // namespace

void swiglu(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, int rows, int width,
            void* y) {
  with_type(elem, [&](auto* type) {
    using P = decltype(type);
    using C = std::remove_pointer_t<P> const*;
    run((rows + kRows - 1) / kRows, [&](int item, int) {
      const int end = std::min(rows, (item + 1) * kRows);
      for (int i = item * kRows; i < end; i++) {
        C gates = (C)x + i * ldx, ups = gates + width;
        P to = (P)y + ptrdiff_t(i) * width;
        for (int c = 0; c < width; c += 16) {
          const int n = width - c;
          const vf gate = load_n(gates + c, n);
          store_n(to + c, gate * sigmoid(gate) * load_n(ups + c, n), n);
        }
      }
    });
  });
}

void swiglu_backward(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, const void* dy,
                     ptrdiff_t ldy, int rows, int width, void* dx) {
  with_type(elem, [&](auto* type) {
    using P = decltype(type);
    using C = std::remove_pointer_t<P> const*;
    run((rows + kRows - 1) / kRows, [&](int item, int) {
      const int end = std::min(rows, (item + 1) * kRows);
      for (int i = item * kRows; i < end; i++) {
        C gates = (C)x + i * ldx, ups = gates + width, grad = (C)dy + i * ldy;
        P to = (P)dx + ptrdiff_t(i) * 2 * width;
        for (int c = 0; c < width; c += 16) {
          const int n = width - c;
          const vf gate = load_n(gates + c, n), up = load_n(ups + c, n), g = load_n(grad + c, n);
          const vf sig = sigmoid(gate), silu = gate * sig;
          store_n(to + c, g * up * sig * (vset(1.f) + gate - silu), n);
          store_n(to + width + c, g * silu, n);
        }
      }
    });
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
