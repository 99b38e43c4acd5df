// A whole model over packed weights and a paged cache. One call computes one step of many
// sequences. The caller owns weights and cache.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "model/threads.h"

namespace lamoe {

// Under MLA, latent > 0 and head_dim = nope + rope. Else head_dim = rope: all of it is rotated.
struct Config {
  int layers = 0, vocab = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int latent = 0, rope = 0, nope = 0, value = 0, q_lora = 0;
  int experts = 0, top_k = 0, groups = 1, top_groups = 1, moe_width = 0;
  bool group_limited = false, normalise = false, interleaved = true;
  float routed_scale = 1.f, eps = 1e-6f, softmax_scale = 1.f;
  int elem = BF16;  // format of attention and embedding

  // Number of kv heads in a cache row. MLA has one: the latent with the rope key.
  int cached_heads() const { return latent ? 1 : kv_heads; }
  // Widths of a key (or query) and of a value in the absorbed form.
  int absorbed_key() const { return latent ? latent + rope : head_dim; }
  int absorbed_value() const { return latent ? latent : head_dim; }
  int head_value() const { return latent ? value : head_dim; }
};

struct Layer {
  const float *attn_norm = nullptr, *ffn_norm = nullptr, *q_norm = nullptr, *kv_norm = nullptr;
  Mat wq, wq_a, wq_b, wk, wv, wkv_a, wo;
  std::vector<Mat> uk, uv;        // per head: W^UK transposed [latent, nope], W^UV [value, latent]
  const void* uk_rows = nullptr;  // elem [heads][nope][latent padded to 64], for the expanded form
  std::vector<Mat> uv_elem;       // W^UV in elem, for the expanded form
  Mat gate;                       // FP32
  Mat w13, w2;                    // dense FFN or shared experts
  std::vector<Mat> e13, e2;       // routed experts
};

struct Cache {
  uint8_t* rows = nullptr;  // [layers][slots][row bytes]
  size_t slots = 0;
  int page = 16;  // slots
  Codec codec;

  uint8_t* layer(int index) const { return rows + size_t(index) * slots * codec.row; }
};

// One sequence of a step. Its tokens are tokens first .. first + count of the step, and rows
// end - count .. end of the sequence. Row r is in slot pages[r / page] * page + r % page.
struct Sequence {
  int first, count, end;
  const int32_t* pages;

  int row_of(int token) const { return end - count + (token - first); }
};

struct Step {
  int tokens = 0;
  const int32_t* ids = nullptr;    // [tokens]
  const float* cos_sin = nullptr;  // [tokens][rope]: cosines, then sines
  std::vector<Sequence> sequences;
  Cache cache;
  int outputs = 0;
  const int32_t* out_rows = nullptr;  // [outputs], tokens whose results are wanted
  // Results. Null: not wanted.
  float* logits = nullptr;    // [outputs][vocab]
  float* states = nullptr;    // [outputs][hidden], after the final norm
  int16_t* chosen = nullptr;  // [MoE layers][tokens][top_k], chosen experts
};

struct Workspace;

class Model {
 public:
  Model(const Config& c, int threads);
  ~Model();
  const Config config;
  std::vector<Layer> layers;
  const void* embed = nullptr;  // elem [vocab][hidden]
  const float* norm = nullptr;
  Mat head;

  void step(const Step& step);
  int threads() const { return pool_.size(); }
  // Size of the buffer for attention states so far; cost.h has its limit.
  size_t state_bytes() const;
  void limit_states(size_t bytes);
  size_t state_limit() const;

 private:
  void see_formats();

  Threads pool_;
  std::unique_ptr<Workspace> work_;
};

}  // namespace lamoe
