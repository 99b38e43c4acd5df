// Functions that the training kernels share with each other and with table.cpp. They are compiled
// once per instruction set.
#pragma once
#include "train/gemm.h"

namespace lamoe {
namespace LAMOE_ISA {

// Calls f(float*) or f(bf16*) for the element type. The argument is a null pointer, for its type.
template <class F>
INLINE void with_type(int elem, const F& f) {
  elem == FP32 ? f((float*)nullptr) : f((bf16*)nullptr);
}

// e^-x is limited to e^87, so that its reciprocal is a normal number.
INLINE vf sigmoid(vf x) { return vrecip(vset(1.f) + vexp(vmin(vset(87.f), vzero() - x))); }

void linear_forward(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, int m, int k,
                    const void* w, int n, void* y, ptrdiff_t ldy);
void linear_dx(const Parallel& run, int elem, const void* dy, ptrdiff_t ldy, int m, int n,
               const void* w, int k, void* dx);
void linear_dw(const Parallel& run, int elem, const void* dy, ptrdiff_t ldy, const void* x,
               ptrdiff_t ldx, int m, int n, int k, void* dw);
void experts_forward(const Parallel& run, const Experts& e, void* out);
void experts_backward(const Parallel& run, const Experts& e, const void* dout, void* dx,
                      float* dweight, void* dw13, void* dw2);
void attention_forward(const Parallel& run, const Attention& a);
void attention_backward(const Parallel& run, const Attention& a, const void* dout, void* dq,
                        void* dkv, void* dk_rope);
double cross_entropy(const Parallel& run, int elem, const void* h, const void* head,
                     const int64_t* targets, int rows, int hidden, int vocab, float share, void* dh,
                     void* dhead);

void rms_norm(const Parallel& run, const Norm& s, const void* x, const void* residual, void* sum,
              void* y, float* inv);
void rms_norm_backward(const Parallel& run, const Norm& s, const void* x, const float* inv,
                       const void* dy, ptrdiff_t ldy, const void* dsum, ptrdiff_t lds, void* dx,
                       void* dweight);
void swiglu(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, int rows, int width,
            void* y);
void swiglu_backward(const Parallel& run, int elem, const void* x, ptrdiff_t ldx, const void* dy,
                     ptrdiff_t ldy, int rows, int width, void* dx);
void embedding_backward(const Parallel& run, int elem, const Plan& rows, const void* dy,
                        ptrdiff_t ldy, int dim, void* dweight);
void route(const Parallel& run, const Router& r, float* scores, int64_t* expert, float* weight);
void route_backward(const Parallel& run, const Router& r, const float* scores,
                    const int64_t* expert, const float* dscores, const float* dweight, void* dx,
                    void* dgate);
void add_gradients(const Parallel& run, const AdamWTensor* tensors, int count);
double squared_norm(const Parallel& run, const AdamWTensor* tensors, int count);
void adamw(const Parallel& run, const AdamWTensor* tensors, int count, const AdamWStep& step);

}  // namespace LAMOE_ISA
}  // namespace lamoe
