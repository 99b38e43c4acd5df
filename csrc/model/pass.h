// The state of one step in progress. The stages in model.cpp, attend_absorbed.cpp,
// attend_expanded.cpp and moe.cpp share it.
#pragma once
#include "model/cost.h"

namespace lamoe {

// Memory that grows and stays allocated between steps.
class Buffer {
 public:
  void* get(size_t bytes);  // returns undefined contents, aligned to 64 bytes
  template <class T>
  T* array(size_t n) {
    return (T*)get(n * sizeof(T));
  }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<char[]> p_;
  size_t size_ = 0;
};

// The experts of each token, and all (token, expert) assignments sorted by expert.
struct Routing {
  std::vector<int> expert;           // chosen experts [tokens][top_k]
  std::vector<float> weight;         // weights of the chosen experts [tokens][top_k]
  std::vector<int> begin;            // first sorted assignment of each expert [experts + 1]
  std::vector<int32_t> token;        // token of each sorted assignment [tokens * top_k]
  std::vector<float> sorted_weight;  // weight of each sorted assignment [tokens * top_k]
};

struct Workspace {
  explicit Workspace(int threads) : scratch(threads), thread_data(threads) {}

  // Allocates activation rows in the forms that the weights of the model need. with_float adds the
  // FP32 form.
  Acts acts(Buffer& b, int rows, int k, bool with_float = false) const;
  char* scratch_of(int thread) { return (char*)scratch[thread].get(scratch_size); }

  bool use_f = false, use_h = false, use_q = false;  // which forms of Acts the weights need
  size_t scratch_size = 0;                           // in bytes; 0 until the first step
  size_t state_limit = kStateLimit;
  std::vector<Buffer> scratch, thread_data;  // one buffer of each kind per thread

  Buffer x, normed, q, q_low, q_low_acts, kv, output, output_acts, last;
  // Buffers of absorbed attention.
  Buffer states, lanes, absorbed_q, head_q, head_latents;
  // Buffers of expanded attention.
  Buffer rows, latents, running, outputs;
  // Buffers of the feed-forward part.
  Buffer gate, shared, sorted, routed;
  Routing routing;
};

struct Pass {
  const Config& config;
  const Step& step;
  const Ops& op;
  Threads& pool;
  Workspace& work;
  float* x = nullptr;       // residual stream [tokens][hidden]
  Acts normed = {};         // normalised input of attention or of the feed-forward part
  float* q = nullptr;       // queries [tokens][heads][head_dim]
  float* kv = nullptr;      // new cache rows [tokens][elements of a row]
  float* output = nullptr;  // outputs of attention [tokens][heads][head_value]

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
  // Address of rows r .. r + count if they are contiguous in the cache, else null.
  const uint8_t* contiguous(int r, int count) const {
    for (int page = r / cache.page + 1; page <= (r + count - 1) / cache.page; page++)
      if (pages[page] != pages[page - 1] + 1) return nullptr;
    return row(r);
  }
};

// A matrix and the output of its product. `multiply` computes the products of the same inputs x
// with several matrices in one parallel pass. Output rows are ldo elements apart.
struct Product {
  const Mat* m;
  float* out;
  ptrdiff_t ldo;
};
void multiply(const Pass& pass, const std::vector<Product>& products, const Acts& x);

// Compute attention of one or more sequences over one layer of the cache. Results go to
// pass.output.
void attend_absorbed(const Pass& pass, const Layer& l, uint8_t* cache,
                     const std::vector<Sequence>& sequences);
void attend_expanded(const Pass& pass, const Layer& l, uint8_t* cache, const Sequence& sequence);

// Computes the dense FFN or the MoE layer, and adds the result to pass.x. If `chosen` is not null,
// it receives the chosen experts [tokens][top_k].
void feed_forward(const Pass& pass, const Layer& l, int16_t* chosen);

// Multiplies the activations of each segment by its w2, and adds the results to pass.x.
void add_down(const Pass& pass, const std::vector<Seg>& segments,
              const std::vector<const Acts*>& acts);

}  // namespace lamoe
