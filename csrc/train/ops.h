// The dispatch table of the training kernels. Every operation runs in parallel over its own items
// and returns when all are done. Arguments are plain pointers and are not checked here.
//
// `elem` is FP32 or BF16, the type of activations, weights and their gradients (void*). Sums are
// float32. Every element of a result is computed by one thread in an order that depends on the
// shapes only, so results do not depend on the number of threads.
//
// Letters as in lamoe/model/transformer.py: N rows (tokens), D hidden size, E experts, K experts
// per token, F width of an expert, A assignments (token, expert) that have an expert.
#pragma once
#include <cstddef>
#include <cstdint>

#include "train/parallel.h"

namespace lamoe {

// The assignments of tokens to experts, sorted by expert.
struct Plan {
  int experts, tokens, top_k;
  int32_t* offsets;  // [experts + 1] first sorted row of each expert; the last is A
  int32_t* order;    // [A] assignment (token * top_k + slot) of each sorted row
  int32_t* place;    // [tokens * top_k] sorted row of each assignment, -1 without an expert
};

struct Experts {
  int elem, hidden, width;  // D, F
  const Plan* plan;
  const void* x;        // [N, D]
  const float* weight;  // [N, K] router weights
  const void* w13;      // [E, 2 F, D]
  const void* w2;       // [E, D, F]
  void* h;              // [A, 2 F] gate | up before the activation, written by forward
};

// RMSNorm of rows [rows, dim]. Rows of x and of the residual are ldx and ldr elements apart.
struct Norm {
  int elem, rows, dim;
  ptrdiff_t ldx, ldr;
  const void* weight;  // [dim]
  float eps;
};

struct Router {
  int elem, rows, hidden, experts, top_k;
  int groups, top_groups;  // 0 groups: all experts compete. Else those of the best top_groups
  bool normalise;          // divide the weights of a row by their sum
  float scale;             // factor on the weights
  const void* x;           // [rows, hidden], rows ldx elements apart
  ptrdiff_t ldx;
  const void* gate;  // [experts, hidden]
};

// A tensor of the optimizer. All fields have eight bytes; lamoe/kernels/native.py packs them.
struct AdamWTensor {
  int64_t grad_elem;  // FP32 or BF16
  const void* grad;
  float *master, *mean, *square;  // the weights, and the averages of gradients and their squares
  void* weight;                   // bf16 copy of the master, or null
  int64_t size;
  double weight_decay, mean_bias, square_bias;  // 1 - beta^t for both averages
};

struct AdamWStep {
  double lr, beta1, beta2, eps, grad_scale;  // gradients are multiplied by grad_scale first
};

// Causal attention with rotary embedding, as ref.rope_attend defines it. Strides are in elements.
// Elements of a head are next to each other.
struct Attention {
  int elem, batch, tokens;     // B, T
  int heads, groups;           // H query heads, G key / value heads
  int nope, rope, value;       // N elements of a key without rotation, R with, V of a value
  bool interleaved, one_rope;  // one_rope: all heads share one rotary key
  float scale;
  const void *q, *kv, *k_rope;  // [B, T, H, N + R], [B, T, G, N + V], [B, T, G or 1, R]
  struct Strides {
    ptrdiff_t batch, token, head;
  } q_stride, kv_stride, rope_stride;
  const float* freqs;     // [B or 1, T, R / 2] complex rotations
  ptrdiff_t freqs_batch;  // distance of the tables of two sequences, 0 for one table
  // [2, B, T] the first key that each query sees, and the end of the queries that see each key.
  // Null means one document in each sequence.
  const int32_t* spans;
  void* out;   // [B, T, H, V], written by forward
  float* lse;  // [B, H, T] log sum exp(logits) of each query, written by forward
};

struct TrainOps {
  const char* name;  // of the instruction set

  // y [m, n] = x [m, k] w^T for w [n, k]. Rows of x and y are ldx and ldy elements apart.
  void (*linear)(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, int m, int k,
                 const void* w, int n, void* y, ptrdiff_t ldy);
  // dx [m, k] = dy [m, n] w
  void (*linear_dx)(const Parallel& run, int elem, const void* dy, ptrdiff_t ldy, int m, int n,
                    const void* w, int k, void* dx);
  // dw [n, k] = dy^T x
  void (*linear_dw)(const Parallel& run, int elem, const void* dy, ptrdiff_t ldy, const void* x,
                    ptrdiff_t ldx, int m, int n, int k, void* dw);

  // out [N, D]; also writes e.h.
  void (*experts)(const Parallel& run, const Experts& e, void* out);
  // Gradients: dx [N, D], dweight [N, K], dw13, dw2.
  void (*experts_backward)(const Parallel& run, const Experts& e, const void* dout, void* dx,
                           float* dweight, void* dw13, void* dw2);

  // Writes a.out and a.lse.
  void (*attention)(const Parallel& run, const Attention& a);
  // Gradients with the shapes of q, kv and k_rope, all without gaps; dout is [B, T, H, V].
  void (*attention_backward)(const Parallel& run, const Attention& a, const void* dout, void* dq,
                             void* dkv, void* dk_rope);

  // Returns the sum over rows of (log sum exp(logits) - logits[target]) * share, for logits
  // h [rows, D] head^T, head [vocab, D]. Rows with a negative target do not count. If dh is not
  // null, also writes the gradients dh [rows, D] and dhead [vocab, D].
  double (*cross_entropy)(const Parallel& run, int elem, const void* h, const void* head,
                          const int64_t* targets, int rows, int hidden, int vocab, float share,
                          void* dh, void* dhead);

  // y = RMSNorm(x), or sum = x + residual and y = RMSNorm(sum) if residual is not null. sum and y
  // are [rows, dim]. Also writes the factor 1 / root mean square of each row to inv.
  void (*rms_norm)(const Parallel& run, const Norm& s, const void* x, const void* residual,
                   void* sum, void* y, float* inv);
  // dx = gradient of RMSNorm(x), plus dsum if it is not null. x is the sum if there was a residual.
  void (*rms_norm_backward)(const Parallel& run, const Norm& s, const void* x, const float* inv,
                            const void* dy, ptrdiff_t ldy, const void* dsum, ptrdiff_t lds,
                            void* dx, void* dweight);

  // y [rows, width] = silu(gate) * up for x = gate | up, and its gradient dx [rows, 2 width].
  void (*swiglu)(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, int rows, int width,
                 void* y);
  void (*swiglu_backward)(const Parallel& run, int elem, const void* x, ptrdiff_t ldx,
                          const void* dy, ptrdiff_t ldy, int rows, int width, void* dx);

  // dweight [ids, dim] of an embedding from dy [tokens, dim]: the sums of the rows of each id, or
  // 0. The plan sorts tokens by id, with ids in place of experts.
  void (*embedding_backward)(const Parallel& run, int elem, const Plan& rows, const void* dy,
                             ptrdiff_t ldy, int dim, void* dweight);

  // scores [rows, experts] = softmax(x gate^T); the best experts of each row, best first, ties by
  // id; their weights. expert and weight are [rows, top_k].
  void (*route)(const Parallel& run, const Router& r, float* scores, int64_t* expert,
                float* weight);
  // Gradients dx [rows, hidden] and dgate from those of scores and weights, each of which may be
  // null.
  void (*route_backward)(const Parallel& run, const Router& r, const float* scores,
                         const int64_t* expert, const float* dscores, const float* dweight,
                         void* dx, void* dgate);

  // master += grad, in float32
  void (*add_gradients)(const Parallel& run, const AdamWTensor* tensors, int count);
  // Returns the sum of the squares of all gradients.
  double (*squared_norm)(const Parallel& run, const AdamWTensor* tensors, int count);
  void (*adamw)(const Parallel& run, const AdamWTensor* tensors, int count, const AdamWStep& step);
};

// Sorts the assignments expert [tokens, top_k] by expert, stably. Ids outside 0 .. experts - 1 mean
// no expert. plan.offsets, order and place must point to memory for tokens * top_k assignments.
void make_plan(const int64_t* expert, Plan& plan);

// Writes the spans of Attention for documents given by ids segments [batch, tokens]. Returns false
// if a document is not a contiguous run of tokens.
bool make_spans(const int64_t* segments, int batch, int tokens, int32_t* spans);

// The table of the instruction set `isa` (empty: that of this process), or null if this CPU does
// not run it.
const TrainOps* train_ops(const char* isa);

}  // namespace lamoe
