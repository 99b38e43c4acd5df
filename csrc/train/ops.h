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

  // Returns the sum over rows of (log sum exp(logits) - logits[target]) * share, for logits
  // h [rows, D] head^T, head [vocab, D]. Rows with a negative target do not count. If dh is not
  // null, also writes the gradients dh [rows, D] and dhead [vocab, D].
  double (*cross_entropy)(const Parallel& run, int elem, const void* h, const void* head,
                          const int64_t* targets, int rows, int hidden, int vocab, float share,
                          void* dh, void* dhead);
};

// Sorts the assignments expert [tokens, top_k] by expert, stably. Ids outside 0 .. experts - 1 mean
// no expert. plan.offsets, order and place must point to memory for tokens * top_k assignments.
void make_plan(const int64_t* expert, Plan& plan);

// The table of the instruction set `isa` (empty: that of this process), or null if this CPU does
// not run it.
const TrainOps* train_ops(const char* isa);

}  // namespace lamoe
