// A whole model with packed weights and a paged cache. One call of `step` computes the new tokens
// of many sequences. The caller owns the weights and the cache.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "model/threads.h"

namespace lamoe {

// Sizes and options of a model. Under MLA, latent > 0 and head_dim = nope + rope. Without MLA,
// latent = 0 and head_dim = rope, because the rotary embedding applies to the whole head.
struct Config {
  int layers = 0, vocab = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int latent = 0, rope = 0, nope = 0, value = 0, q_lora = 0;
  int experts = 0, top_k = 0, groups = 1, top_groups = 1, moe_width = 0;
  bool group_limited = false, normalise = false, interleaved = true;
  float routed_scale = 1.f, eps = 1e-6f, softmax_scale = 1.f;
  int elem = BF16;  // format of attention and embedding, FP32 or BF16

  // Number of kv heads in a cache row. Under MLA a row holds one, the latent with the rope key.
  int cached_heads() const { return latent ? 1 : kv_heads; }
  // Widths of a key (or query) and of a value in the absorbed form.
  int absorbed_key() const { return latent ? latent + rope : head_dim; }
  int absorbed_value() const { return latent ? latent : head_dim; }
  int head_value() const { return latent ? value : head_dim; }
};

struct Layer {
  const float *attn_norm = nullptr, *ffn_norm = nullptr, *q_norm = nullptr, *kv_norm = nullptr;
  Mat wq, wq_a, wq_b, wk, wv, wkv_a, wo;
  // For absorbed attention, one matrix per head: uk is W^UK transposed [latent, nope], uv is W^UV
  // [value, latent].
  std::vector<Mat> uk, uv;
  // For expanded attention: uk_rows is W^UK [heads][nope][latent padded to a multiple of 64], not
  // packed. uv_elem is W^UV, packed. Both are in the format Config::elem.
  const void* uk_rows = nullptr;
  std::vector<Mat> uv_elem;
  Mat gate;                  // router weights, always FP32
  Mat w13, w2;               // dense FFN, or shared experts of an MoE layer
  std::vector<Mat> e13, e2;  // routed experts
};

struct Cache {
  uint8_t* rows = nullptr;  // cache rows [layers][slots][bytes of a row]
  size_t slots = 0;         // number of rows per layer
  int page = 16;            // number of slots per page
  Codec codec;

  uint8_t* layer(int index) const { return rows + size_t(index) * slots * codec.row; }
};

// One sequence of a step. Its new tokens are tokens first .. first + count of the step. Their cache
// rows are rows end - count .. end of the sequence. Row r is in slot
// pages[r / page] * page + r % page, where `page` is Cache::page.
struct Sequence {
  int first, count, end;
  const int32_t* pages;

  int row_of(int token) const { return end - count + (token - first); }
};

struct Step {
  int tokens = 0;
  const int32_t* ids = nullptr;    // token ids [tokens]
  const float* cos_sin = nullptr;  // rope / 2 cosines, then rope / 2 sines [tokens][rope]
  std::vector<Sequence> sequences;
  Cache cache;
  int outputs = 0;
  const int32_t* out_rows = nullptr;  // indices of the tokens whose results are needed [outputs]
  // Results. A null pointer means that the result is not needed.
  float* logits = nullptr;    // logits [outputs][vocab]
  float* states = nullptr;    // hidden states after the final norm [outputs][hidden]
  int16_t* chosen = nullptr;  // chosen experts [MoE layers][tokens][top_k]
};

struct Workspace;

class Model {
 public:
  Model(const Config& c, int threads);
  ~Model();
  const Config config;
  std::vector<Layer> layers;
  const void* embed = nullptr;  // embedding [vocab][hidden] in the format Config::elem
  const float* norm = nullptr;
  Mat head;

  void step(const Step& step);
  int threads() const { return pool_.size(); }
  // Current size in bytes of the buffer for attention states. limit_states sets its limit.
  size_t state_bytes() const;
  void limit_states(size_t bytes);
  size_t state_limit() const;

 private:
  void see_formats();

  Threads pool_;
  std::unique_ptr<Workspace> work_;
};

}  // namespace lamoe
