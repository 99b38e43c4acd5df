// The forward pass of one step, layer by layer. Start at `Model::step`. lamoe/model/transformer.py
// is the reference implementation in torch.
#include "model/model.h"

#include <algorithm>
#include <cstring>

#include "model/pass.h"

namespace lamoe {

void* Buffer::get(size_t bytes) {
  if (bytes + 128 > size_) {
    size_ = 0;  // `new` below may throw, and the old memory is gone
    p_.reset();
    p_.reset(new char[grown(bytes)]);
    size_ = grown(bytes);
  }
  return (void*)((uintptr_t(p_.get()) + 63) / 64 * 64);
}

Acts Workspace::acts(Buffer& b, int rows, int k, bool with_float) const {
  Acts a;
  a.rows = rows, a.k = k, a.stride = acts_stride(k);
  const size_t n = size_t(rows) * a.stride;
  const size_t f = with_float || use_f ? align64(4 * n) : 0, h = use_h ? align64(2 * n) : 0;
  const size_t q = use_q ? align64(n) : 0, s = use_q ? align64(n / kBlock * 4) : 0;
  const size_t c = use_q ? align64(n / kGroup * 4) : 0;
  char* p = (char*)b.get(f + h + q + s + c);
  if (f) a.f = (float*)p;
  if (h) a.h = (uint16_t*)(p + f);
  if (q) {
    a.q = (int8_t*)(p + f + h);
    a.s = (float*)(p + f + h + q);
    a.c = (int32_t*)(p + f + h + q + s);
  }
  return a;
}

namespace {

// Starts the residual stream with the embedding rows of the tokens, converted to FP32.
void embed_tokens(const Pass& pass, const void* embed) {
  const int d = pass.config.hidden;
  for (int i = 0; i < pass.step.tokens; i++) {
    float* x = pass.x + size_t(i) * d;
    const size_t from = size_t(pass.step.ids[i]) * d;
    if (pass.config.elem == FP32) {
      std::memcpy(x, (const float*)embed + from, 4 * d);
    } else {
      for (int j = 0; j < d; j++) {
        const uint32_t u = uint32_t(((const uint16_t*)embed)[from + j]) << 16;
        std::memcpy(x + j, &u, 4);
      }
    }
  }
}

void norm_into(const Pass& pass, const float* weight, const Acts& to) {
  const int d = pass.config.hidden;
  pass.pool.run(pass.step.tokens, [&](int t, int thread) {
    float* y = (float*)pass.work.scratch_of(thread);
    pass.op.rms_norm(pass.x + size_t(t) * d, weight, pass.config.eps, y, d);
    pass.op.put_row(to, t, y);
  });
}

// Computes the queries and the new cache rows, both still without norm and rotary embedding.
void project(Pass& pass, const Layer& l) {
  const Config& c = pass.config;
  const int n = pass.step.tokens, width = c.heads * c.head_dim;
  pass.q = pass.work.q.array<float>(size_t(n) * width);
  if (!c.latent) {
    const int kv = c.kv_heads * c.head_dim;
    pass.kv = pass.work.kv.array<float>(size_t(n) * 2 * kv);
    return multiply(
        pass, {{&l.wq, pass.q, width}, {&l.wk, pass.kv, 2 * kv}, {&l.wv, pass.kv + kv, 2 * kv}},
        pass.normed);
  }
  const int row = c.latent + c.rope;
  pass.kv = pass.work.kv.array<float>(size_t(n) * row);
  if (!c.q_lora)
    return multiply(pass, {{&l.wq, pass.q, width}, {&l.wkv_a, pass.kv, row}}, pass.normed);
  float* low = pass.work.q_low.array<float>(size_t(n) * c.q_lora);
  multiply(pass, {{&l.wq_a, low, c.q_lora}, {&l.wkv_a, pass.kv, row}}, pass.normed);
  const Acts a = pass.work.acts(pass.work.q_low_acts, n, c.q_lora);
  pass.pool.run(n, [&](int t, int thread) {
    float* y = (float*)pass.work.scratch_of(thread);
    pass.op.rms_norm(low + size_t(t) * c.q_lora, l.q_norm, c.eps, y, c.q_lora);
    pass.op.put_row(a, t, y);
  });
  multiply(pass, {{&l.wq_b, pass.q, width}}, a);
}

// Applies norm and rotary embedding to the queries and the new rows. Appends the rows to the cache.
void append(const Pass& pass, const Layer& l, uint8_t* layer) {
  const Config& c = pass.config;
  const Cache& cache = pass.step.cache;
  const std::vector<Sequence>& all = pass.step.sequences;
  pass.pool.run(pass.step.tokens, [&](int t, int) {
    const float* rotation = pass.step.cos_sin + size_t(t) * c.rope;
    float* kv = pass.kv + size_t(t) * cache.codec.width();
    const auto rotate = [&](float* x) { pass.op.rope(x, rotation, c.rope, c.interleaved); };
    for (int h = 0; h < c.heads; h++) rotate((float*)pass.query(t, h) + c.nope);
    if (c.latent) {
      pass.op.rms_norm(kv, l.kv_norm, c.eps, kv, c.latent);
      rotate(kv + c.latent);
    } else {
      for (int g = 0; g < c.kv_heads; g++) rotate(kv + g * c.head_dim);
    }
    const auto before = [](int token, const Sequence& s) { return token < s.first; };
    const auto s = std::upper_bound(all.begin(), all.end(), t, before) - 1;
    const SequenceRows rows{cache, layer, s->pages};
    pass.op.encode(cache.codec, kv, rows.row(s->row_of(t)));
  });
}

// Runs the absorbed form in several parts, so that the attention states of each part fit the limit.
// The tokens of one sequence may be split too. That split depends only on the sequence itself, so
// results do not depend on the rest of the batch.
void attend_all_absorbed(const Pass& pass, const Layer& l, uint8_t* layer) {
  const Config& c = pass.config;
  const size_t limit = pass.work.state_limit;
  std::vector<Sequence> part;
  size_t taken = 0;
  for (const Sequence& s : pass.step.sequences) {
    if (expand_is_cheaper(c, s.count, s.end)) continue;
    const int most = int(std::clamp(limit / state_bytes(c, 1, s.end), size_t(1), size_t(s.count)));
    for (int at = 0; at < s.count; at += most) {
      const int count = std::min(most, s.count - at), end = s.end - s.count + at + count;
      const size_t size = state_bytes(c, count, end);
      if (!part.empty() && taken + size > limit) {
        attend_absorbed(pass, l, layer, part);
        part.clear(), taken = 0;
      }
      part.push_back({s.first + at, count, end, s.pages}), taken += size;
    }
  }
  if (!part.empty()) attend_absorbed(pass, l, layer, part);
}

void attend(Pass& pass, const Layer& l, uint8_t* layer) {
  const Config& c = pass.config;
  const int n = pass.step.tokens, width = c.heads * c.head_value();
  pass.output = pass.work.output.array<float>(size_t(n) * width);
  attend_all_absorbed(pass, l, layer);
  for (const Sequence& s : pass.step.sequences)
    if (expand_is_cheaper(c, s.count, s.end)) attend_expanded(pass, l, layer, s);
  const Acts a = pass.work.acts(pass.work.output_acts, n, width);
  pass.pool.run(n, [&](int t, int) { pass.op.put_row(a, t, pass.output + size_t(t) * width); });
  Seg projection;  // the output projection W^O, which add_down adds to x like a down projection
  projection.w2 = l.wo, projection.rows = n;
  add_down(pass, {projection}, {&a});
}

void write_outputs(const Pass& pass, const float* norm, const Mat& head) {
  const Step& step = pass.step;
  const int d = pass.config.hidden;
  const Acts last = pass.work.acts(pass.work.last, step.outputs, d, true);
  for (int i = 0; i < step.outputs; i++) {
    float* y = (float*)pass.work.scratch_of(0);
    pass.op.rms_norm(pass.x + size_t(step.out_rows[i]) * d, norm, pass.config.eps, y, d);
    if (step.states) std::memcpy(step.states + size_t(i) * d, y, 4 * d);
    pass.op.put_row(last, i, y);
  }
  if (step.logits) multiply(pass, {{&head, step.logits, pass.config.vocab}}, last);
}

}  // namespace

void multiply(const Pass& pass, const std::vector<Product>& products, const Acts& x) {
  // Tiles per work item. More tiles make reads sequential, fewer tiles balance the threads better.
  const int per = x.rows <= 2 ? 4 : 2;
  int items = 0;
  for (const Product& p : products) items += (tiles(p.m->n) + per - 1) / per;
  pass.pool.run(items, [&](int i, int thread) {
    for (size_t k = 0; k < products.size(); k++) {
      const Product& p = products[k];
      const int all = tiles(p.m->n), here = (all + per - 1) / per;
      if (i >= here) {
        i -= here;
        continue;
      }
      const int end = std::min((i + 1) * per, all);
      const uint8_t* next = end < all                 ? from_tile(*p.m, end).data
                            : k + 1 < products.size() ? products[k + 1].m->data
                                                      : nullptr;
      return pass.op.linear(*p.m, i * per, end, x, 0, x.rows, p.out, p.ldo,
                            pass.work.scratch_of(thread), next);
    }
  });
}

Model::Model(const Config& c, int threads)
    : config(c),
      layers(c.layers),
      pool_(std::max(threads, 1)),
      work_(new Workspace(pool_.size())) {}

Model::~Model() = default;

size_t Model::state_bytes() const { return work_->states.size(); }
size_t Model::state_limit() const { return work_->state_limit; }
void Model::limit_states(size_t bytes) { work_->state_limit = bytes; }

// Determines from the weight formats which forms of activations, and how much scratch, are needed.
void Model::see_formats() {
  int k = config.hidden;
  const auto see = [&](const Mat& m) {
    if (!m.data) return;
    k = std::max(k, m.k);
    (m.fmt == FP32 ? work_->use_f : m.fmt == BF16 ? work_->use_h : work_->use_q) = true;
  };
  see(head);
  for (const Layer& l : layers) {
    for (const Mat* m : {&l.wq, &l.wq_a, &l.wq_b, &l.wk, &l.wv, &l.wkv_a, &l.wo, &l.w13, &l.w2})
      see(*m);
    for (const auto* v : {&l.uk, &l.uv, &l.e13, &l.e2})
      for (const Mat& m : *v) see(m);
  }
  // The queries of expanded attention are always in the format `elem`.
  (config.elem == FP32 ? work_->use_f : work_->use_h) = true;
  work_->scratch_size = scratch_bytes(k);
}

void Model::step(const Step& step) {
  Threads::Session awake(pool_);
  if (!work_->scratch_size) see_formats();
  Pass pass{config, step, ops(), pool_, *work_};
  const int n = step.tokens, d = config.hidden;
  pass.x = work_->x.array<float>(size_t(n) * d);
  embed_tokens(pass, embed);
  int moe_layer = 0;
  for (int i = 0; i < config.layers; i++) {
    const Layer& l = layers[i];
    uint8_t* cache = step.cache.layer(i);
    pass.normed = work_->acts(work_->normed, n, d, true);
    norm_into(pass, l.attn_norm, pass.normed);
    project(pass, l);
    append(pass, l, cache);
    attend(pass, l, cache);
    norm_into(pass, l.ffn_norm, pass.normed);
    const bool moe = l.gate.data != nullptr;
    const size_t at = size_t(moe_layer) * n * config.top_k;
    feed_forward(pass, l, step.chosen && moe ? step.chosen + at : nullptr);
    moe_layer += moe;
  }
  if (step.outputs) write_outputs(pass, norm, head);
}

}  // namespace lamoe
