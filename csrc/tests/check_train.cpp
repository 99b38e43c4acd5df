// Runs every training operation on awkward sizes, with inputs and outputs in buffers of exactly the
// needed size. Results must equal those of one thread bit for bit. Whether they are right is
// checked by the Python tests.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/formats.h"
#include "simd/common.h"
#include "train/ops.h"

namespace lamoe {
namespace {

// Products read BF16 rows in pairs of elements, so callers never pass odd sizes.
bool is_odd(int elem, int size) { return elem == BF16 && size % 2; }

std::mt19937 dice(2);

void need(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "check: %s\n", what.c_str());
  std::exit(1);
}

// Elements of type FP32 or BF16, with nothing after them.
struct Tensor {
  int elem;
  size_t size;
  std::unique_ptr<uint8_t[]> data;
  Tensor(int elem, size_t size, bool random = true)
      : elem(elem), size(size), data(new uint8_t[bytes()]) {
    std::memset(data.get(), 0xff, bytes());  // NaN where an operation writes nothing
    for (size_t i = 0; random && i < size; i++) {
      const float x = std::normal_distribution<float>()(dice);
      if (elem == FP32)
        ((float*)data.get())[i] = x;
      else
        ((uint16_t*)data.get())[i] = float_to_bf16(x);
    }
  }
  size_t bytes() const { return size * (elem == FP32 ? 4 : 2); }
  void* get() const { return data.get(); }
  float* floats() const { return (float*)data.get(); }
};

// The outputs of one operation, compared between numbers of threads.
struct Outputs {
  int elem;
  std::vector<std::unique_ptr<Tensor>> all;
  void* out(size_t size) { return keep(elem, size); }
  float* floats(size_t size) { return (float*)keep(FP32, size); }
  void* keep(int type, size_t size) {
    all.push_back(std::make_unique<Tensor>(type, size, false));
    return all.back()->get();
  }
};

void compare(const char* name, int elem,
             const std::function<void(const Parallel&, Outputs&)>& operation) {
  Outputs want{elem, {}};
  operation(Parallel(1), want);
  for (int threads : {2, 3}) {
    Outputs got{elem, {}};
    operation(Parallel(threads), got);
    for (size_t i = 0; i < want.all.size(); i++) {
      const Tensor &a = *want.all[i], &b = *got.all[i];
      need(!std::memcmp(a.get(), b.get(), a.bytes()),
           std::string(name) + " depends on the number of threads");
      for (size_t j = 0; j < a.size; j++)
        need(std::isfinite(a.elem == FP32 ? a.floats()[j] : bf16_to_float(((uint16_t*)a.get())[j])),
             std::string(name) + " left an element unwritten, or not finite");
    }
  }
}

void check_linear(const TrainOps& op, int elem, int m, int k, int n) {
  if (is_odd(elem, k) || is_odd(elem, n)) return;
  const Tensor x(elem, size_t(m) * k), w(elem, size_t(n) * k), dy(elem, size_t(m) * n);
  compare("linear", elem, [&](const Parallel& run, Outputs& o) {
    op.linear(run, elem, x.get(), k, m, k, w.get(), n, o.out(size_t(m) * n), n);
    op.linear_dx(run, elem, dy.get(), n, m, n, w.get(), k, o.out(x.size));
    op.linear_dw(run, elem, dy.get(), n, x.get(), k, m, n, k, o.out(w.size));
  });
}

void check_experts(const TrainOps& op, int elem, int n, int d, int f, int experts, int top_k) {
  if (is_odd(elem, d)) return;
  std::vector<int64_t> chosen(size_t(n) * top_k);
  for (size_t i = 0; i < chosen.size(); i++)  // id `experts` means no expert
    chosen[i] = i % top_k ? experts : int64_t(dice() % (i % 3 ? 1 : experts + 1));
  std::vector<int32_t> memory(size_t(experts) + 1 + 2 * chosen.size());
  Plan plan{experts,
            n,
            top_k,
            memory.data(),
            memory.data() + experts + 1,
            memory.data() + experts + 1 + chosen.size()};
  make_plan(chosen.data(), plan);
  const size_t rows = size_t(plan.offsets[experts]);
  const Tensor x(elem, size_t(n) * d), weight(FP32, chosen.size()),
      w13(elem, size_t(experts) * 2 * f * d), w2(elem, size_t(experts) * d * f), dout(elem, x.size);
  compare("experts", elem, [&](const Parallel& run, Outputs& o) {
    const Experts e{
        elem, d, f, &plan, x.get(), weight.floats(), w13.get(), w2.get(), o.out(rows * 2 * f)};
    op.experts(run, e, o.out(x.size));
    op.experts_backward(run, e, dout.get(), o.out(x.size), o.floats(weight.size), o.out(w13.size),
                        o.out(w2.size));
  });
}

void check_loss(const TrainOps& op, int elem, int rows, int d, int vocab) {
  if (is_odd(elem, d)) return;
  const Tensor h(elem, size_t(rows) * d), head(elem, size_t(vocab) * d);
  std::vector<int64_t> targets(rows);
  for (auto& t : targets) t = int64_t(dice() % (vocab + 1)) - 1;
  compare("cross-entropy", elem, [&](const Parallel& run, Outputs& o) {
    const float share = 1.f / rows;
    *o.floats(1) = float(op.cross_entropy(run, elem, h.get(), head.get(), targets.data(), rows, d,
                                          vocab, share, o.out(h.size), o.out(head.size)));
    *o.floats(1) = float(op.cross_entropy(run, elem, h.get(), head.get(), targets.data(), rows, d,
                                          vocab, share, nullptr, nullptr));
  });
}

void check_attention(const TrainOps& op, int elem, int b, int t, int heads, int groups, int nope,
                     int rope, int value, bool one_rope, bool documents) {
  const int rotary = one_rope ? 1 : groups, qw = nope + rope, kw = nope + value;
  const size_t tokens = size_t(b) * t;
  const Tensor q(elem, tokens * heads * qw), kv(elem, tokens * groups * kw),
      k_rope(elem, tokens * rotary * rope), freqs(FP32, size_t(t) * rope),
      dout(elem, tokens * heads * value);
  std::vector<int64_t> ids(tokens);
  for (size_t i = 0; i < tokens; i++) ids[i] = int64_t(i % t) / 5;
  std::vector<int32_t> spans(2 * tokens);
  need(make_spans(ids.data(), b, t, spans.data()), "contiguous documents are refused");
  compare("attention", elem, [&](const Parallel& run, Outputs& o) {
    Attention a{};
    a.elem = elem, a.batch = b, a.tokens = t, a.heads = heads, a.groups = groups;
    a.nope = nope, a.rope = rope, a.value = value;
    a.interleaved = true, a.one_rope = one_rope, a.scale = 0.3f;
    a.q = q.get(), a.kv = kv.get(), a.k_rope = k_rope.get(), a.freqs = freqs.floats();
    a.q_stride = {ptrdiff_t(t) * heads * qw, ptrdiff_t(heads) * qw, qw};
    a.kv_stride = {ptrdiff_t(t) * groups * kw, ptrdiff_t(groups) * kw, kw};
    a.rope_stride = {ptrdiff_t(t) * rotary * rope, ptrdiff_t(rotary) * rope, rope};
    a.freqs_batch = 0, a.spans = documents ? spans.data() : nullptr;
    a.out = o.out(dout.size), a.lse = o.floats(tokens * heads);
    op.attention(run, a);
    op.attention_backward(run, a, dout.get(), o.out(q.size), o.out(kv.size), o.out(k_rope.size));
  });
}

void check_layers(const TrainOps& op, int elem, int rows, int dim) {
  const Tensor x(elem, size_t(rows) * dim), r(elem, x.size), dy(elem, x.size), weight(elem, dim),
      both(elem, 2 * x.size);
  compare("norm", elem, [&](const Parallel& run, Outputs& o) {
    const Norm s{elem, rows, dim, dim, dim, weight.get(), 1e-6f};
    void* sum = o.out(x.size);
    float* inv = o.floats(rows);
    op.rms_norm(run, s, x.get(), r.get(), sum, o.out(x.size), inv);
    op.rms_norm_backward(run, s, sum, inv, dy.get(), dim, r.get(), dim, o.out(x.size), o.out(dim));
    op.rms_norm(run, s, x.get(), nullptr, nullptr, o.out(x.size), o.floats(rows));
  });
  compare("swiglu", elem, [&](const Parallel& run, Outputs& o) {
    op.swiglu(run, elem, both.get(), 2 * dim, rows, dim, o.out(x.size));
    op.swiglu_backward(run, elem, both.get(), 2 * dim, dy.get(), dim, rows, dim, o.out(both.size));
  });
}

void check_router(const TrainOps& op, int elem, int rows, int d, int experts, int top_k,
                  int groups) {
  if (is_odd(elem, d)) return;
  const Tensor x(elem, size_t(rows) * d), gate(elem, size_t(experts) * d),
      dscores(FP32, size_t(rows) * experts), dweight(FP32, size_t(rows) * top_k);
  std::vector<int64_t> expert(size_t(rows) * top_k);
  compare("router", elem, [&](const Parallel& run, Outputs& o) {
    const Router s{elem,           rows, d,   experts, top_k, groups,
                   groups ? 1 : 0, true, 2.f, x.get(), d,     gate.get()};
    float* scores = o.floats(dscores.size);
    op.route(run, s, scores, expert.data(), o.floats(dweight.size));
    op.route_backward(run, s, scores, expert.data(), dscores.floats(), dweight.floats(),
                      o.out(x.size), o.out(gate.size));
  });
}

void check_adamw(const TrainOps& op, int elem) {
  const std::vector<int> sizes = {1, 15, 16, 1000, 70001};
  std::vector<Tensor> grads;
  for (int size : sizes) grads.emplace_back(elem, size);
  compare("adamw", elem, [&](const Parallel& run, Outputs& o) {
    std::vector<AdamWTensor> list;
    for (size_t i = 0; i < sizes.size(); i++) {
      const size_t size = size_t(sizes[i]);
      AdamWTensor t{elem,
                    grads[i].get(),
                    o.floats(size),
                    o.floats(size),
                    o.floats(size),
                    o.keep(BF16, size),
                    int64_t(size),
                    0.1,
                    0.5,
                    0.5};
      for (float* p : {t.master, t.mean, t.square}) std::fill(p, p + size, 1.f);
      list.push_back(t);
    }
    *o.floats(1) = float(op.squared_norm(run, list.data(), int(list.size())));
    op.adamw(run, list.data(), int(list.size()), {1e-3, 0.9, 0.95, 1e-8, 0.5});
    op.add_gradients(run, list.data(), int(list.size()));
  });
}

}  // namespace

void check_training() {
  const TrainOps& op = *train_ops("");
  need(!std::strcmp(parallel_runtime(), "own"), "the check program has no OpenMP");
  for (int elem : {FP32, BF16}) {
    check_linear(op, elem, 1, 1, 1);
    check_linear(op, elem, 37, 50, 33);
    check_linear(op, elem, 37, 50, 34);
    check_linear(op, elem, 5, 6, 2);
    check_linear(op, elem, 150, 40, 70);
    check_experts(op, elem, 5, 6, 3, 4, 2);
    check_experts(op, elem, 70, 40, 33, 3, 2);
    check_experts(op, elem, 1600, 16, 16, 2, 1);
    check_loss(op, elem, 3, 5, 7);
    check_loss(op, elem, 530, 24, 530);
    check_attention(op, elem, 1, 1, 1, 1, 2, 2, 2, true, false);
    check_attention(op, elem, 2, 37, 3, 3, 8, 4, 6, true, true);
    check_attention(op, elem, 1, 70, 4, 2, 0, 16, 16, false, true);
    check_layers(op, elem, 3, 5);
    check_layers(op, elem, 70, 33);
    check_router(op, elem, 3, 5, 4, 2, 0);
    check_router(op, elem, 70, 40, 24, 3, 4);
    check_adamw(op, elem);
  }
  // Two callers at once, as two models trained in threads of one process.
  std::thread other([&] {
    Parallel::Lock lock;
    for (int i = 0; i < 3; i++) check_layers(op, FP32, 40, 20);
  });
  {
    Parallel::Lock lock;
    for (int i = 0; i < 3; i++) check_layers(op, FP32, 40, 20);
  }
  other.join();
}

}  // namespace lamoe
