// One step in progress: what the stages in model.cpp, attend_absorbed.cpp, attend_expanded.cpp and
// moe.cpp share.
#pragma once
#include "model/cost.h"

namespace lamoe {

// Memory that grows and stays allocated between steps.
class Buffer {
 public:
  void* get(size_t bytes);  // at an address that is a multiple of 64; contents are undefined
  template <class T>
  T* array(size_t n) {
    return (T*)get(n * sizeof(T));
  }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<char[]> p_;
  size_t size_ = 0;
};

// The experts of each token, and the assignments sorted by expert.
struct Routing {
  std::vector<int> expert;     // [tokens][top_k]
  std::vector<float> weight;   // [tokens][top_k]
  std::vector<int> begin;      // [experts + 1], in the sorted assignments
  std::vector<int32_t> token;  // [tokens * top_k], sorted
  std::vector<float> sorted_weight;
};

struct Workspace {
  explicit Workspace(int threads) : scratch(threads), thread_data(threads) {}

  // Rows in the forms that the model's matrices need; with_float: also as floats.
  Acts acts(Buffer& b, int rows, int k, bool with_float = false) const;
  char* scratch_of(int thread) { return (char*)scratch[thread].get(scratch_size); }

  bool use_f = false, use_h = false, use_q = false;  // forms of activations that matrices need
  size_t scratch_size = 0;                           // 0 until a step has seen the formats
  size_t state_limit = kStateLimit;
  std::vector<Buffer> scratch, thread_data;  // one per thread

  Buffer x, normed, q, q_low, q_low_acts, kv, output, output_acts, last;
  // Absorbed attention.
  Buffer states, lanes, absorbed_q, head_q, head_latents;
  // Expanded attention.
  Buffer rows, latents, running, outputs;
  // Feed-forward.
  Buffer gate, shared, sorted, routed;
  Routing routing;
};

struct Pass {
  const Config& config;
  const Step& step;
  const Ops& op;
  Threads& pool;
  Workspace& work;
  float* x = nullptr;       // [tokens][hidden], the residual stream
  Acts normed = {};         // input of the current block
  float* q = nullptr;       // [tokens][heads][head_dim]
  float* kv = nullptr;      // [tokens][elements of a cache row]
  float* output = nullptr;  // attention: [tokens][heads][head_value]

  const float* query(int token, int head) const {
    return q + (size_t(token) * config.heads + head) * config.head_dim;
  }
  float* head_output(int token, int head) const {
    return output + (size_t(token) * config.heads + head) * config.head_value();
  }
};

// The rows of one sequence in one layer of the cache.
struct SequenceRows {
  const Cache& cache;
  uint8_t* layer;
  const int32_t* pages;

  uint8_t* row(int r) const {
    return layer + (size_t(pages[r / cache.page]) * cache.page + r % cache.page) * cache.codec.row;
  }
  // Rows r .. r + count if they are neighbours in the cache, else null.
  const uint8_t* contiguous(int r, int count) const {
    for (int page = r / cache.page + 1; page <= (r + count - 1) / cache.page; page++)
      if (pages[page] != pages[page - 1] + 1) return nullptr;
    return row(r);
  }
};

// Multiplies the same inputs by several matrices in one parallel pass.
struct Product {
  const Mat* m;
  float* out;
  ptrdiff_t ldo;
};
void multiply(const Pass& pass, const std::vector<Product>& products, const Acts& x);

// Attention of some sequences over one layer of the cache; results go to pass.output.
void attend_absorbed(const Pass& pass, const Layer& l, uint8_t* cache,
                     const std::vector<Sequence>& sequences);
void attend_expanded(const Pass& pass, const Layer& l, uint8_t* cache, const Sequence& sequence);

// The dense FFN, or routed and shared experts; adds to pass.x. chosen: null or [tokens][top_k].
void feed_forward(const Pass& pass, const Layer& l, int16_t* chosen);

// x += w2 times the activations of each segment.
void add_down(const Pass& pass, const std::vector<Seg>& segments,
              const std::vector<const Acts*>& acts);

}  // namespace lamoe
