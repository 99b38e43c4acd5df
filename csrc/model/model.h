// A whole model over packed weights and a paged cache: one call computes one step of many
// sequences. Weights and cache belong to the caller.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "model/threads.h"

namespace lamoe {

struct Config {
  int layers = 0, vocab = 0, hidden = 0, heads = 0, kv_heads = 0,
      head_dim = 0;  // head_dim: of a query / key, nope + rope under MLA
  int latent = 0, rope = 0, nope = 0, value = 0,
      q_lora = 0;  // MLA when latent > 0; rope: elements that turn
  int experts = 0, top_k = 0, groups = 1, top_groups = 1, moe_width = 0;
  bool group_limited = false, normalise = false, interleaved = true;
  float routed_scale = 1.f, eps = 1e-6f, softmax_scale = 1.f;
  int elem = BF16;  // of attention, and of the embedding
};

struct Layer {
  const float *attn_norm = nullptr, *ffn_norm = nullptr, *q_norm = nullptr, *kv_norm = nullptr;
  Mat wq, wq_a, wq_b, wk, wv, wkv_a, wo;
  std::vector<Mat> uk, uv;        // per head: W^UK transposed [latent, nope], W^UV [value, latent]
  const void* uk_rows = nullptr;  // elem [heads][nope][latent filled up to 64]
  std::vector<Mat> uv_elem;       // W^UV in elem, for the expanded form
  Mat gate, w13, w2;              // gate FP32; w13, w2: dense or shared
  std::vector<Mat> e13, e2;
};

// One sequence of a step: tokens [first, first + count) of the step are its rows end - count ..
// end; row r lies in slot pages[r / page] * page + r % page.
struct SeqStep {
  int first, count, end;
  const int32_t* pages;
};

struct Cache {
  uint8_t* rows = nullptr;  // [layers][slots][row bytes]
  size_t slots = 0;
  int page = 16;
  Codec codec;
};

class Model {
 public:
  Model(const Config& c, int threads);
  Config config;
  std::vector<Layer> layer;
  const void* embed = nullptr;  // elem [vocab][hidden]
  const float* norm = nullptr;
  Mat head;

  // ids [n], cos_sin [n][rope] (cos | sin), out_rows [r]: which tokens' logits [r][vocab] (or,
  // without head, final states [r][hidden]) are wanted. chosen: null or [MoE layers][n][top_k].
  void step(const int32_t* ids, const float* cos_sin, int n, const std::vector<SeqStep>& seqs,
            const Cache& cache, const int32_t* out_rows, int r, float* logits, float* states,
            int16_t* chosen);
  int threads() const { return pool_.size(); }
  size_t state_bytes() const {
    return b_states_.size;
  }  // partial results of attention, so far; lamoe/engine/plan.py says how many at most
  size_t state_limit = size_t(128)
                       << 20;  // of them at once, or what one token takes if that is more

 private:
  struct Part {
    const Mat* m;
    float* out;
    ptrdiff_t ldo;
  };
  void products(const std::vector<Part>& parts, const Acts& x);
  void project(const Layer& l, int n);
  void append(const Layer& l, int index, int n, const float* cos_sin,
              const std::vector<SeqStep>& seqs, const Cache& cache);
  void attend(const Layer& l, int index, const std::vector<SeqStep>& seqs, const Cache& cache);
  void few(const Layer& l, const uint8_t* rows, const std::vector<SeqStep>& seqs,
           const Cache& cache);
  void many(const Layer& l, const uint8_t* rows, const SeqStep& seq, const Cache& cache);
  void feed_forward(const Layer& l, int n, int16_t* chosen);
  void route(int n, int16_t* chosen);
  void down(const std::vector<Seg>& segs, const std::vector<const Acts*>& acts);
  bool expand(const SeqStep& s) const;
  size_t most_state_bytes(int count, int end) const;

  // Buffers grow and stay. Acts are laid out for the formats that the model's matrices have.
  struct Buffer {
    std::unique_ptr<char[]> p;
    size_t size = 0;
    void* get(size_t bytes);
  };
  Acts acts(Buffer& b, int rows, int k, bool with_float = false);
  template <class T>
  T* room(Buffer& b, size_t n) {
    return (T*)b.get(n * sizeof(T));
  }
  void* scratch(int thread) { return scratch_[thread].get(scratch_size_); }

  Threads pool_;
  std::vector<Buffer> scratch_, thread_big_;
  size_t scratch_size_ = 0;
  bool use_h_ = false, use_q_ = false, use_f_ = false;
  Buffer b_x_, b_in_, b_q_, b_qa_, b_qin_, b_kv_, b_full_, b_o_, b_oin_, b_states_, b_lanes_,
      b_heads_, b_heads2_, b_latents_, b_packed_, b_out_, b_ml_, b_gate_, b_shared_, b_sorted_,
      b_act_, b_final_;
  float *x_ = nullptr, *q_ = nullptr, *kv_ = nullptr, *o_ = nullptr, *gate_ = nullptr;
  Acts in_;
  std::vector<int> expert_;     // [n][top_k]
  std::vector<float> weight_;   // [n][top_k]
  std::vector<int32_t> token_;  // sorted assignments
  std::vector<float> sorted_weight_;
  std::vector<int> begin_;  // [experts + 1]
};

}  // namespace lamoe
