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

// sizes: elem, B, T, H, G, N, R, V, interleaved, one_rope. strides: of q, kv and k_rope (batch,
// token, head each), then of the batches of freqs. memory: q, kv, k_rope, freqs, spans, out, lse.
Attention attention_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                       const std::vector<Address>& memory, float scale) {
  need(sizes.size() == 10 && strides.size() == 10 && memory.size() == 7,
       "attention takes 10 sizes, 10 strides and 7 addresses");
  const auto size = [&](int i) { return int(sizes[i]); };
  const auto stride = [&](int i) {
    return Attention::Strides{ptrdiff_t(strides[i]), ptrdiff_t(strides[i + 1]),
                              ptrdiff_t(strides[i + 2])};
  };
  Attention a;
  a.elem = size(0), a.batch = size(1), a.tokens = size(2), a.heads = size(3), a.groups = size(4);
  a.nope = size(5), a.rope = size(6), a.value = size(7);
  a.interleaved = sizes[8], a.one_rope = sizes[9], a.scale = scale;
  a.q = (void*)memory[0], a.kv = (void*)memory[1], a.k_rope = (void*)memory[2];
  a.q_stride = stride(0), a.kv_stride = stride(3), a.rope_stride = stride(6);
  a.freqs = (const float*)memory[3], a.freqs_batch = ptrdiff_t(strides[9]);
  a.spans = (const int32_t*)memory[4], a.out = (void*)memory[5], a.lse = (float*)memory[6];
  return a;
}

void attention(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
               const std::vector<Address>& memory, float scale, int threads,
               const std::string& isa) {
  const Attention a = attention_of(sizes, strides, memory, scale);
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) { op.attention(run, a); });
}

void attention_backward(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                        const std::vector<Address>& memory, float scale, Address dout, Address dq,
                        Address dkv, Address dk_rope, int threads, const std::string& isa) {
  const Attention a = attention_of(sizes, strides, memory, scale);
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.attention_backward(run, a, (void*)dout, (void*)dq, (void*)dkv, (void*)dk_rope);
  });
}

bool spans(Address segments, int batch, int tokens, Address memory) {
  return make_spans((const int64_t*)segments, batch, tokens, (int32_t*)memory);
}

double cross_entropy(int elem, Address h, Address head, Address targets, int rows, int hidden,
                     int vocab, float share, Address dh, Address dhead, int threads,
                     const std::string& isa) {
  return operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    return op.cross_entropy(run, elem, (void*)h, (void*)head, (const int64_t*)targets, rows, hidden,
                            vocab, share, (void*)dh, (void*)dhead);
  });
}

// ---- norm, SwiGLU, router, AdamW ----------------------------------------------------------------
void rms_norm(int elem, int rows, int dim, Address weight, float eps, Address x, int64_t ldx,
              Address residual, int64_t ldr, Address sum, Address y, Address inv, int threads,
              const std::string& isa) {
  const Norm s{elem, rows, dim, ldx, ldr, (void*)weight, eps};
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.rms_norm(run, s, (void*)x, (void*)residual, (void*)sum, (void*)y, (float*)inv);
  });
}

void rms_norm_backward(int elem, int rows, int dim, Address weight, Address x, int64_t ldx,
                       Address inv, Address dy, int64_t ldy, Address dsum, int64_t lds, Address dx,
                       Address dweight, int threads, const std::string& isa) {
  const Norm s{elem, rows, dim, ldx, 0, (void*)weight, 0.f};
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.rms_norm_backward(run, s, (void*)x, (float*)inv, (void*)dy, ldy, (void*)dsum, lds, (void*)dx,
                         (void*)dweight);
  });
}

void swiglu(int elem, Address x, int64_t ldx, int rows, int width, Address y, int threads,
            const std::string& isa) {
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.swiglu(run, elem, (void*)x, ldx, rows, width, (void*)y);
  });
}

void swiglu_backward(int elem, Address x, int64_t ldx, Address dy, int64_t ldy, int rows, int width,
                     Address dx, int threads, const std::string& isa) {
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.swiglu_backward(run, elem, (void*)x, ldx, (void*)dy, ldy, rows, width, (void*)dx);
  });
}

void embedding_backward(int elem, Address plan, int ids, int tokens, int dim, Address dy,
                        int64_t ldy, Address dweight, int threads, const std::string& isa) {
  const Plan p = plan_of(ids, tokens, 1, plan);
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.embedding_backward(run, elem, p, (void*)dy, ldy, dim, (void*)dweight);
  });
}

Router router_of(int elem, int rows, int hidden, int experts, int top_k, int groups, int top_groups,
                 bool normalise, float scale, Address x, int64_t ldx, Address gate) {
  return {elem,       rows,      hidden, experts,  top_k, groups,
          top_groups, normalise, scale,  (void*)x, ldx,   (void*)gate};
}

void route(int elem, int rows, int hidden, int experts, int top_k, int groups, int top_groups,
           bool normalise, float scale, Address x, int64_t ldx, Address gate, Address scores,
           Address expert, Address weight, int threads, const std::string& isa) {
  const Router r = router_of(elem, rows, hidden, experts, top_k, groups, top_groups, normalise,
                             scale, x, ldx, gate);
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.route(run, r, (float*)scores, (int64_t*)expert, (float*)weight);
  });
}

void route_backward(int elem, int rows, int hidden, int experts, int top_k, int groups,
                    int top_groups, bool normalise, float scale, Address x, int64_t ldx,
                    Address gate, Address scores, Address expert, Address dscores, Address dweight,
                    Address dx, Address dgate, int threads, const std::string& isa) {
  const Router r = router_of(elem, rows, hidden, experts, top_k, groups, top_groups, normalise,
                             scale, x, ldx, gate);
  operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    op.route_backward(run, r, (float*)scores, (int64_t*)expert, (float*)dscores, (float*)dweight,
                      (void*)dx, (void*)dgate);
  });
}

// Calls work(table, run, tensors, count) for the packed AdamWTensors.
template <class F>
auto for_tensors(const nb::bytes& packed, int threads, const std::string& isa, const F& work) {
  need(packed.size() % sizeof(AdamWTensor) == 0, "tensors do not have the size of AdamWTensor");
  const auto* tensors = (const AdamWTensor*)packed.data();
  const int count = int(packed.size() / sizeof(AdamWTensor));
  return operation(threads, isa, [&](const TrainOps& op, const Parallel& run) {
    return work(op, run, tensors, count);
  });
}

void add_gradients(const nb::bytes& packed, int threads, const std::string& isa) {
  for_tensors(packed, threads, isa, [](auto& op, auto& run, auto* tensors, int count) {
    op.add_gradients(run, tensors, count);
  });
}

double squared_norm(const nb::bytes& packed, int threads, const std::string& isa) {
  return for_tensors(packed, threads, isa, [](auto& op, auto& run, auto* tensors, int count) {
    return op.squared_norm(run, tensors, count);
  });
}

void adamw(const nb::bytes& packed, double lr, double beta1, double beta2, double eps,
           double grad_scale, int threads, const std::string& isa) {
  for_tensors(packed, threads, isa, [&](auto& op, auto& run, auto* tensors, int count) {
    op.adamw(run, tensors, count, {lr, beta1, beta2, eps, grad_scale});
  });
}

}  // namespace

void bind_train(nb::module_& m) {
  m.def("train_linear", &linear);
  m.def("train_linear_backward", &linear_backward);
  m.def("train_plan", &plan);
  m.def("train_experts", &experts);
  m.def("train_experts_backward", &experts_backward);
  m.def("train_attention", &attention);
  m.def("train_attention_backward", &attention_backward);
  m.def("train_spans", &spans);
  m.def("train_cross_entropy", &cross_entropy);
  m.def("train_kept_bytes", &kept_bytes);
  m.def("train_rms_norm", &rms_norm);
  m.def("train_rms_norm_backward", &rms_norm_backward);
  m.def("train_swiglu", &swiglu);
  m.def("train_swiglu_backward", &swiglu_backward);
  m.def("train_embedding_backward", &embedding_backward);
  m.def("train_route", &route);
  m.def("train_route_backward", &route_backward);
  m.def("train_add_gradients", &add_gradients);
  m.def("train_squared_norm", &squared_norm);
  m.def("train_adamw", &adamw);
}
