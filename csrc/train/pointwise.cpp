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

void embedding_backward(const Parallel& run, int elem, const Plan& rows, const void* dy,
                        ptrdiff_t ldy, int dim, void* dweight) {
  constexpr int kIds = 64;  // ids of an item
  const Parallel::Own own = run.own(sizeof(float) * ceil_to(dim, 16));
  with_type(elem, [&](auto* type) {
    using P = decltype(type);
    using C = std::remove_pointer_t<P> const*;
    run((rows.experts + kIds - 1) / kIds, [&](int item, int thread) {
      float* sum = own.at<float>(thread);
      const int end = std::min(rows.experts, (item + 1) * kIds);
      for (int id = item * kIds; id < end; id++) {
        P to = (P)dweight + ptrdiff_t(id) * dim;
        const int first = rows.offsets[id], last = rows.offsets[id + 1];
        if (first == last) {
          std::memset(to, 0, sizeof(*to) * size_t(dim));
          continue;
        }
        std::memset(sum, 0, sizeof(float) * ceil_to(dim, 16));
        for (int r = first; r < last; r++) {
          C row = (C)dy + rows.order[r] * ldy;
          for (int c = 0; c < dim; c += 16)
            vstore(sum + c, vload(sum + c) + load_n(row + c, dim - c));
        }
        store_row(sum, to, dim);
      }
    });
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
