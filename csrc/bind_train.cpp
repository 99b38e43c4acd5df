// The part of lamoe._native that training uses. Tensors arrive as addresses, because numpy has no
// bfloat16; lamoe/kernels/native.py checks their types, sizes and memory order.
#include "bind_common.h"
#include "train/ops.h"

using namespace lamoe;

namespace {

using Address = uintptr_t;

const TrainOps& train_table(const std::string& isa) {
  const TrainOps* t = train_ops(isa.c_str());
  need(t, "isa is '" + isa + "'; this CPU runs: " + cpu_features());
  return *t;
}

// Runs `work(table, run)` without the GIL, one operation at a time.
template <class F>
auto operation(int threads, const std::string& isa, const F& work) {
  const TrainOps& table = train_table(isa);
  nb::gil_scoped_release free;
  Parallel::Lock lock;
  return work(table, Parallel(threads));
}

Plan plan_of(int experts, int tokens, int top_k, Address memory) {
  int32_t* p = (int32_t*)memory;
  return {experts, tokens, top_k, p, p + experts + 1, p + experts + 1 + tokens * top_k};
}

void linear(int elem, Address x, int64_t ldx, int m, int k, Address w, int n, Address y,
            int64_t ldy, int threads, const std::string& isa) {
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.linear(run, elem, (void*)x, ldx, m, k, (void*)w, n, (void*)y, ldy);
  });
}

void linear_backward(int elem, Address dy, int64_t ldy, Address x, int64_t ldx, int m, int n, int k,
                     Address w, Address dx, Address dw, int threads, const std::string& isa) {
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    if (dx) op.linear_dx(run, elem, (void*)dy, ldy, m, n, (void*)w, k, (void*)dx);
    if (dw) op.linear_dw(run, elem, (void*)dy, ldy, (void*)x, ldx, m, n, k, (void*)dw);
  });
}

void plan(Address expert, int experts, int tokens, int top_k, Address memory) {
  Plan p = plan_of(experts, tokens, top_k, memory);
  make_plan((const int64_t*)expert, p);
}

void experts(int elem, int rows, int hidden, int width, int count, int top_k, Address plan,
             Address x, Address weight, Address w13, Address w2, Address h, Address out,
             int threads, const std::string& isa) {
  const Plan p = plan_of(count, rows, top_k, plan);
  const Experts e{elem,           hidden,     width,     &p,      (void*)x,
                  (float*)weight, (void*)w13, (void*)w2, (void*)h};
  operation(threads, isa,
            [&](const TrainOps& op, const Parallel& run) { op.experts(run, e, (void*)out); });
}

void experts_backward(int elem, int rows, int hidden, int width, int count, int top_k, Address plan,
                      Address x, Address weight, Address w13, Address w2, Address h, Address dout,
                      Address dx, Address dweight, Address dw13, Address dw2, int threads,
                      const std::string& isa) {
  const Plan p = plan_of(count, rows, top_k, plan);
  const Experts e{elem,           hidden,     width,     &p,      (void*)x,
                  (float*)weight, (void*)w13, (void*)w2, (void*)h};
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.experts_backward(run, e, (void*)dout, (void*)dx, (float*)dweight, (void*)dw13, (void*)dw2);
  });
}

double cross_entropy(int elem, Address h, Address head, Address targets, int rows, int hidden,
                     int vocab, float share, Address dh, Address dhead, int threads,
                     const std::string& isa) {
  return operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    return op.cross_entropy(run, elem, (void*)h, (void*)head, (const int64_t*)targets, rows, hidden,
                            vocab, share, (void*)dh, (void*)dhead);
  });
}

}  // namespace

void bind_train(nb::module_& m) {
  m.def("train_linear", &linear);
  m.def("train_linear_backward", &linear_backward);
  m.def("train_plan", &plan);
  m.def("train_experts", &experts);
  m.def("train_experts_backward", &experts_backward);
  m.def("train_cross_entropy", &cross_entropy);
  m.def("train_kept_bytes", &kept_bytes);
  m.def("train_runtime", [] { return std::string(parallel_runtime()); });
}
