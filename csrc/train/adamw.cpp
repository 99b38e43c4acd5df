// AdamW over float32 master weights: gradient sums, the global norm, and the update.
//
// All tensors of a model are processed in one parallel run. An item is a block of kBlock elements
// of one tensor.
#include <vector>

#include "train/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int64_t kBlock = 1 << 16;

struct Block {
  int tensor;
  int64_t first;
  int count;
};

std::vector<Block> blocks(const AdamWTensor* tensors, int count) {
  std::vector<Block> all;
  for (int i = 0; i < count; i++)
    for (int64_t first = 0; first < tensors[i].size; first += kBlock)
      all.push_back({i, first, int(std::min(kBlock, tensors[i].size - first))});
  return all;
}

// Calls f for the gradient of a block, which is float or bf16.
template <class F>
INLINE void with_grad(const AdamWTensor& t, int64_t first, const F& f) {
  t.grad_elem == FP32 ? f((const float*)t.grad + first) : f((const bf16*)t.grad + first);
}

}  // namespace

void add_gradients(const Parallel& run, const AdamWTensor* tensors, int count) {
  const auto all = blocks(tensors, count);
  run(int(all.size()), [&](int item, int) {
    const Block& b = all[item];
    float* sum = tensors[b.tensor].master + b.first;
    with_grad(tensors[b.tensor], b.first, [&](auto* grad) {
      for (int i = 0; i < b.count; i += 16) {
        const int n = b.count - i;
        store_n(sum + i, load_n(sum + i, n) + load_n(grad + i, n), n);
      }
    });
  });
}

double squared_norm(const Parallel& run, const AdamWTensor* tensors, int count) {
  const auto all = blocks(tensors, count);
  std::vector<double> sums(all.size());
  run(int(all.size()), [&](int item, int) {
    const Block& b = all[item];
    with_grad(tensors[b.tensor], b.first, [&](auto* grad) {
      constexpr int kSums = 4;  // independent sums hide the latency of the additions
      vf sum[kSums];
      UNROLL_FOR(j, kSums) sum[j] = vzero();
      int i = 0;
      for (; i + 16 * kSums <= b.count; i += 16 * kSums)
        UNROLL_FOR(j, kSums) {
          const vf g = load_e(grad + i + 16 * j);
          sum[j] = vfma(g, g, sum[j]);
        }
      for (; i < b.count; i += 16) {
        const vf g = load_n(grad + i, b.count - i);
        sum[0] = vfma(g, g, sum[0]);
      }
      sums[item] = vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    });
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void adamw(const Parallel& run, const AdamWTensor* tensors, int count, const AdamWStep& step) {
  const auto all = blocks(tensors, count);
  run(int(all.size()), [&](int item, int) {
    const Block& b = all[item];
    const AdamWTensor& t = tensors[b.tensor];
    float *master = t.master + b.first, *mean = t.mean + b.first, *square = t.square + b.first;
    const vf scale = vset(float(step.grad_scale)), eps = vset(float(step.eps));
    const vf keep = vset(float(1. - step.lr * t.weight_decay));
    const vf new_mean = vset(float(1. - step.beta1)), old_square = vset(float(step.beta2)),
             new_square = vset(float(1. - step.beta2));
    const vf rate = vset(float(step.lr / t.mean_bias)),
             root = vset(float(1. / std::sqrt(t.square_bias)));
    with_grad(t, b.first, [&](auto* grad) {
      const auto update = [&](int i, int n) __attribute__((always_inline)) {
        const vf g = load_n(grad + i, n) * scale;
        vf m = load_n(mean + i, n), v = load_n(square + i, n);
        m = vfma(new_mean, g - m, m);
        v = vfma(g * new_square, g, v * old_square);
        const vf w = load_n(master + i, n) * keep - rate * m / vfma(vsqrt(v), root, eps);
        store_n(mean + i, m, n), store_n(square + i, v, n), store_n(master + i, w, n);
        if (t.weight) store_n((bf16*)t.weight + b.first + i, w, n);
      };
      int i = 0;
      for (; i + 16 <= b.count; i += 16) update(i, 16);
      if (i < b.count) update(i, b.count - i);
    });
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
