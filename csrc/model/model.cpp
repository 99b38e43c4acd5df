// The step of a model, layer by layer. Read `Model::step` first; lamoe/model.py is the same thing
// in torch and the definition.
#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lamoe {
namespace {

constexpr int kRowsTile = 64;      // cache rows that are decoded together
constexpr int kExpandRows = 1024;  // rows whose keys and values exist at once in the expanded form
constexpr int kValueRows = 256;    // of those, how many share a softmax pass
constexpr int kQueryRows = 24;
constexpr size_t kLaterTile = 512 * 64,
                 kLaterMost =
                     16 << 20;  // bytes of weights asked for during attention to a tile, and in all

size_t align(size_t n) { return (n + 63) / 64 * 64; }
int size_of(int elem) { return elem == FP32 ? 4 : 2; }

// Rows of a partial state: short contexts are cut finer, so that two threads have something to do.
// A function of the length alone: results do not depend on the number of threads or on who else is
// in the batch.
int chunk_rows(int end) { return end <= 1024 ? 128 : 512; }

}  // namespace

void* Model::Buffer::get(size_t bytes) {
  if (bytes + 128 > size) {
    size = 0;  // until there is room: new may throw
    p.reset();
    const size_t room = bytes + bytes / 4 + 4096;
    p.reset(new char[room]);
    size = room;
  }
  return (void*)((uintptr_t(p.get()) + 63) / 64 * 64);
}

Model::Model(const Config& c, int threads)
    : config(c),
      layer(c.layers),
      pool_(std::max(threads, 1)),
      scratch_(pool_.size()),
      thread_big_(pool_.size()) {}

Acts Model::acts(Buffer& b, int rows, int k, bool with_float) {
  Acts a;
  a.rows = rows, a.k = k, a.stride = acts_stride(k);
  const size_t n = size_t(rows) * a.stride, f = (with_float || use_f_) ? align(4 * n) : 0,
               h = use_h_ ? align(2 * n) : 0, q = use_q_ ? align(n) : 0,
               s = use_q_ ? align(n / kBlock * 4) : 0, c = use_q_ ? align(n / kGroup * 4) : 0;
  char* p = (char*)b.get(f + h + q + s + c);
  if (f) a.f = (float*)p;
  if (h) a.h = (uint16_t*)(p + f);
  if (q)
    a.q = (int8_t*)(p + f + h), a.s = (float*)(p + f + h + q), a.c = (int32_t*)(p + f + h + q + s);
  return a;
}

void Model::step(const int32_t* ids, const float* cos_sin, int n, const std::vector<SeqStep>& seqs,
                 const Cache& cache, const int32_t* out_rows, int r, float* logits, float* states,
                 int16_t* chosen) {
  Threads::Session awake(pool_);
  const Ops& op = ops();
  const int d = config.hidden;
  if (!scratch_size_) {  // the formats are known now
    int k = d;
    auto see = [&](const Mat& m) {
      if (!m.data) return;
      k = std::max(k, m.k);
      (m.fmt == FP32 ? use_f_ : m.fmt == BF16 ? use_h_ : use_q_) = true;
    };
    see(head);
    for (const Layer& l : layer) {
      for (const Mat* m : {&l.wq, &l.wq_a, &l.wq_b, &l.wk, &l.wv, &l.wkv_a, &l.wo, &l.w13, &l.w2})
        see(*m);
      for (const auto* v : {&l.uk, &l.uv, &l.e13, &l.e2})
        for (const Mat& m : *v) see(m);
    }
    (config.elem == FP32 ? use_f_ : use_h_) = true;  // queries of the expanded form
    scratch_size_ = scratch_bytes(k);
  }
  x_ = room<float>(b_x_, size_t(n) * d);
  for (int i = 0; i < n; i++) {
    float* x = x_ + size_t(i) * d;
    if (config.elem == FP32)
      std::memcpy(x, (const float*)embed + size_t(ids[i]) * d, 4 * d);
    else
      for (int j = 0; j < d; j++) {
        const uint32_t u = uint32_t(((const uint16_t*)embed)[size_t(ids[i]) * d + j]) << 16;
        std::memcpy(x + j, &u, 4);
      }
  }
  int moe_layer = 0;
  for (int i = 0; i < config.layers; i++) {
    const Layer& l = layer[i];
    in_ = acts(b_in_, n, d, true);
    auto norm = [&](const float* weight) {
      pool_.run(n, [&](int t, int thread) {
        float* y = (float*)scratch(thread);
        op.rms_norm(x_ + size_t(t) * d, weight, config.eps, y, d);
        op.put_row(in_, t, y);
      });
    };
    norm(l.attn_norm);
    project(l, n);
    append(l, i, n, cos_sin, seqs, cache);
    attend(l, i, seqs, cache);
    norm(l.ffn_norm);
    feed_forward(l, n,
                 chosen && l.gate.data ? chosen + size_t(moe_layer) * n * config.top_k : nullptr);
    moe_layer += l.gate.data != nullptr;
  }
  if (!r) return;
  Acts last = acts(b_final_, r, d, true);
  for (int i = 0; i < r; i++) {
    float* y = (float*)scratch(0);
    op.rms_norm(x_ + size_t(out_rows[i]) * d, norm, config.eps, y, d);
    if (states) std::memcpy(states + size_t(i) * d, y, 4 * d);
    op.put_row(last, i, y);
  }
  if (logits) products({{&head, logits, config.vocab}}, last);
}

// out = x m^T of several matrices with the same inputs, as one parallel pass.
void Model::products(const std::vector<Part>& parts, const Acts& x) {
  const int per =
      x.rows <= 2 ? 4 : 2;  // tiles of an item: enough bytes to stream, few enough to share out
  int items = 0;
  for (const Part& p : parts) items += (tiles(p.m->n) + per - 1) / per;
  pool_.run(items, [&](int i, int thread) {
    for (size_t k = 0; k < parts.size(); k++) {
      const Part& p = parts[k];
      const int all = tiles(p.m->n), here = (all + per - 1) / per,
                end = std::min((i + 1) * per, all);
      const uint8_t* then = end < all              ? p.m->data + end * tile_bytes(p.m->fmt, p.m->k)
                            : k + 1 < parts.size() ? parts[k + 1].m->data
                                                   : nullptr;
      if (i < here)
        return ops().linear(*p.m, i * per, end, x, 0, x.rows, p.out, p.ldo, scratch(thread), then);
      i -= here;
    }
  });
}

void Model::project(const Layer& l, int n) {
  const Config& c = config;
  const int width = c.heads * c.head_dim;
  q_ = room<float>(b_q_, size_t(n) * width);
  if (!c.latent) {
    const int kv = c.kv_heads * c.head_dim;
    kv_ = room<float>(b_kv_, size_t(n) * 2 * kv);
    return products({{&l.wq, q_, width}, {&l.wk, kv_, 2 * kv}, {&l.wv, kv_ + kv, 2 * kv}}, in_);
  }
  const int row = c.latent + c.rope;
  kv_ = room<float>(b_kv_, size_t(n) * row);
  if (!c.q_lora) return products({{&l.wq, q_, width}, {&l.wkv_a, kv_, row}}, in_);
  float* low = room<float>(b_qa_, size_t(n) * c.q_lora);
  products({{&l.wq_a, low, c.q_lora}, {&l.wkv_a, kv_, row}}, in_);
  Acts a = acts(b_qin_, n, c.q_lora);
  pool_.run(n, [&](int t, int thread) {
    float* y = (float*)scratch(thread);
    ops().rms_norm(low + size_t(t) * c.q_lora, l.q_norm, c.eps, y, c.q_lora);
    ops().put_row(a, t, y);
  });
  products({{&l.wq_b, q_, width}}, a);
}

// Norm and turn the new rows and queries; rows go into the cache.
void Model::append(const Layer& l, int index, int n, const float* cos_sin,
                   const std::vector<SeqStep>& seqs, const Cache& cache) {
  const Config& c = config;
  const Ops& op = ops();
  const int row = cache.codec.w[0] + cache.codec.w[1];
  uint8_t* rows = cache.rows + size_t(index) * cache.slots * cache.codec.row;
  pool_.run(n, [&](int t, int) {
    const float* turn = cos_sin + size_t(t) * c.rope;
    float* kv = kv_ + size_t(t) * row;
    for (int h = 0; h < c.heads; h++)
      op.rope(q_ + (size_t(t) * c.heads + h) * c.head_dim + c.nope, turn, c.rope, c.interleaved);
    if (c.latent) {
      op.rms_norm(kv, l.kv_norm, c.eps, kv, c.latent);
      op.rope(kv + c.latent, turn, c.rope, c.interleaved);
    } else {
      for (int g = 0; g < c.kv_heads; g++)
        op.rope(kv + g * c.head_dim, turn, c.rope, c.interleaved);
    }
    const auto s = std::upper_bound(seqs.begin(), seqs.end(), t,
                                    [](int t, const SeqStep& s) { return t < s.first; }) -
                   1;
    const int at = s->end - s->count + (t - s->first);
    const size_t slot = size_t(s->pages[at / cache.page]) * cache.page + at % cache.page;
    op.encode(cache.codec, kv, rows + slot * cache.codec.row);
  });
}

// Multiply-adds per head of the two forms; the small products of the absorbed form and attention in
// few lanes run at about the same share of the peak. A single token is always absorbed: the first
// one of all would be cheaper expanded by a little, but this form reads bigger weights and has more
// passes.
bool Model::expand(const SeqStep& s) const {
  const Config& c = config;
  const double t = s.count, rows = s.end;
  if (!c.latent) return t * (c.heads / c.kv_heads) > 48;
  const double up = double(c.latent) * (c.nope + c.value);
  return t > 1 && rows * up + t * rows * (c.head_dim + c.value) <
                      t * up + t * rows * (2 * c.latent + c.rope);
}

// What the partial states of `few` take at most for `count` tokens of a sequence of `end` rows: of
// chunk_rows(end) it has at most 8, or one for 512 rows.
size_t Model::most_state_bytes(int count, int end) const {
  const Config& c = config;
  const int kv = c.latent ? 1 : c.kv_heads,
            chunks = end <= 4096 ? std::min((end + 127) / 128, 8) : (end + 511) / 512;
  return size_t(kv) * ((count * (c.heads / kv) + 15) / 16) * chunks *
         (32 + 16 * size_t(c.latent ? c.latent : c.head_dim)) * sizeof(float);
}

void Model::attend(const Layer& l, int index, const std::vector<SeqStep>& seqs,
                   const Cache& cache) {
  const Config& c = config;
  const uint8_t* rows = cache.rows + size_t(index) * cache.slots * cache.codec.row;
  const int n = seqs.back().first + seqs.back().count,
            out = c.heads * (c.latent ? c.value : c.head_dim);
  o_ = room<float>(b_o_, size_t(n) * out);
  std::vector<SeqStep> absorbed;  // as many at once as their states may take; the tokens of one
                                  // sequence too, cut by its own numbers alone
  size_t taken = 0;
  for (const SeqStep& s : seqs) {
    if (expand(s)) continue;
    const int most =
        int(std::clamp(state_limit / most_state_bytes(1, s.end), size_t(1), size_t(s.count)));
    for (int at = 0; at < s.count; at += most) {
      const int count = std::min(most, s.count - at), end = s.end - s.count + at + count;
      const size_t size = most_state_bytes(count, end);
      if (!absorbed.empty() && taken + size > state_limit) {
        few(l, rows, absorbed, cache);
        absorbed.clear(), taken = 0;
      }
      absorbed.push_back({s.first + at, count, end, s.pages}), taken += size;
    }
  }
  if (!absorbed.empty()) few(l, rows, absorbed, cache);
  for (const SeqStep& s : seqs)
    if (expand(s)) many(l, rows, s, cache);
  Acts a = acts(b_oin_, n, out);
  pool_.run(n, [&](int t, int) { ops().put_row(a, t, o_ + size_t(t) * out); });
  Seg all;  // the output projection adds to x just as a down projection does
  all.w2 = l.wo, all.rows = n;
  down({all}, {&a});
}

// Few queries per sequence (decoding, drafts, short chunks): sixteen lanes of (token, head) over
// rows as they lie in the cache.
void Model::few(const Layer& l, const uint8_t* rows, const std::vector<SeqStep>& seqs,
                const Cache& cache) {
  const Config& c = config;
  const Ops& op = ops();
  const int elem = c.elem, h = c.heads, kw = c.latent ? c.latent + c.rope : c.head_dim,
            vw = c.latent ? c.latent : c.head_dim;
  int n = 0;
  std::vector<int> token;  // of the step, for each of ours
  for (const SeqStep& s : seqs)
    for (int i = 0; i < s.count; i++) token.push_back(s.first + i);
  n = int(token.size());
  const float* full = q_;  // [token][head][kw]
  if (c.latent) {          // W^UK moves to the query
    float* q = room<float>(b_full_, size_t(n) * h * kw);
    full = q;
    Acts a = acts(b_heads_, h * n, c.nope);
    pool_.run(h, [&](int head, int thread) {
      for (int i = 0; i < n; i++) {
        const float* from = q_ + (size_t(token[i]) * h + head) * c.head_dim;
        op.put_row(a, head * n + i, from);
        std::memcpy(q + (size_t(i) * h + head) * kw + c.latent, from + c.nope, 4 * c.rope);
      }
      op.linear(l.uk[head], 0, tiles(c.latent), a, head * n, n, q + size_t(head) * kw,
                ptrdiff_t(h) * kw, scratch(thread), head + 1 < h ? l.uk[head + 1].data : nullptr);
    });
  }
  // lanes: blocks of up to sixteen (token, head) of one sequence and one kv head
  struct Block {
    int seq, g, lanes, first_state;
  };
  struct Item {
    int seq, chunk;
  };
  std::vector<Block> blocks;
  std::vector<Item> items;
  std::vector<int> begin, lane_token, lane_head;
  const int kv = c.latent ? 1 : c.kv_heads, per = h / kv;
  int states = 0, base = 0;
  std::vector<int> state_of(size_t(n) * h), lane_of(size_t(n) * h), chunks_of(n);
  for (size_t s = 0; s < seqs.size(); s++) {
    const int chunks = (seqs[s].end + chunk_rows(seqs[s].end) - 1) / chunk_rows(seqs[s].end);
    begin.push_back(int(blocks.size()));
    for (int i = 0; i < chunks; i++) items.push_back({int(s), i});
    for (int i = 0; i < seqs[s].count; i++) chunks_of[base + i] = chunks;
    for (int g = 0; g < kv; g++)
      for (int at = 0; at < seqs[s].count * per; at += 16) {
        const int lanes = std::min(16, seqs[s].count * per - at);
        for (int i = 0; i < 16; i++) {
          const int j = std::min(at + i, seqs[s].count * per - 1), t = base + j / per,
                    head = g * per + j % per;
          lane_token.push_back(t), lane_head.push_back(head);
          if (i < lanes) state_of[size_t(t) * h + head] = states, lane_of[size_t(t) * h + head] = i;
        }
        blocks.push_back({int(s), g, lanes, states});
        states += chunks;
      }
    base += seqs[s].count;
  }
  begin.push_back(int(blocks.size()));
  const bool ints = c.latent && elem == BF16 && has_ints(cache.codec);
  const size_t lanes_size = ints ? ints_lanes_bytes(cache.codec) : size_t(kw) * size_of(elem) * 16,
               state = 32 + 16 * size_t(vw);
  char* lanes = (char*)b_lanes_.get(blocks.size() * lanes_size);
  float* partial = room<float>(b_states_, states * state);
  std::vector<int> last(blocks.size() * 16);
  pool_.run(int(blocks.size()), [&](int b, int) {
    const float* q[16];
    for (int i = 0; i < 16; i++) {
      const int t = lane_token[16 * b + i], ours = c.latent ? t : token[t];
      q[i] = full + (size_t(ours) * h + lane_head[16 * b + i]) * kw;
      const SeqStep& s = seqs[blocks[b].seq];
      last[16 * b + i] = s.end - s.count + (token[t] - s.first);
    }
    if (ints)
      op.pack_lanes_ints(cache.codec, q, blocks[b].lanes, lanes + b * lanes_size);
    else
      op.pack_lanes(elem, q, blocks[b].lanes, kw, lanes + b * lanes_size);
  });
  const int row = cache.codec.w[0] + cache.codec.w[1];
  // Attention to integers computes more than it reads: weights that every token needs after it come
  // closer meanwhile, as far as a last-level cache holds them.
  std::vector<std::pair<const uint8_t*, size_t>> later;
  size_t all_later = 0;
  const auto want = [&](const Mat& m) {
    if (!m.data || !ints) return;
    const size_t size =
        std::min(mat_bytes(m.fmt, m.n, m.k), kLaterMost - std::min(kLaterMost, all_later));
    later.push_back({m.data, size}), all_later += size;
  };
  for (const Mat& m : l.uv) want(m);
  for (const Mat* m : {&l.wo, &l.gate, &l.w13, &l.w2}) want(*m);
  std::vector<size_t> tiles_before{0};
  for (const Item& item : items) {
    const int end = seqs[item.seq].end, size = chunk_rows(end);
    tiles_before.push_back(
        tiles_before.back() +
        (std::min(end, (item.chunk + 1) * size) - item.chunk * size + kRowsTile - 1) / kRowsTile);
  }
  const size_t each_later = std::min(align(all_later / tiles_before.back()), kLaterTile);
  pool_.run(int(items.size()), [&](int i, int thread) {
    const SeqStep& s = seqs[items[i].seq];
    const int size = chunk_rows(s.end), from = items[i].chunk * size,
              to = std::min(s.end, from + size);
    const size_t tile_size =
        ints ? ints_tile_bytes(cache.codec) : size_t(kRowsTile) * row * size_of(elem) + 64;
    char* tile = (char*)thread_big_[thread].get(align(tile_size) + 2 * 64 * 64);
    char* tmp = tile + align(tile_size);
    const int b0 = begin[items[i].seq], b1 = begin[items[i].seq + 1];
    for (int b = b0; b < b1; b++) {
      float* p = partial + (blocks[b].first_state + items[i].chunk) * state;
      std::fill(p, p + 16, -1e30f);
      std::fill(p + 16, p + 32 + size_t(blocks[b].lanes) * vw, 0.f);
    }
    // Where rows r .. r + count lie one behind the other in the cache (pages that were taken in
    // order), or null.
    auto together = [&](int r, int count) -> const uint8_t* {
      for (int page = r / cache.page + 1; page <= (r + count - 1) / cache.page; page++)
        if (s.pages[page] != s.pages[page - 1] + 1) return nullptr;
      return rows +
             (size_t(s.pages[r / cache.page]) * cache.page + r % cache.page) * cache.codec.row;
    };
    const bool as_is = cache.codec.kind == (elem == FP32 ? 0 : 1);
    for (int r = from; r < to; r += kRowsTile) {
      const int count = std::min(kRowsTile, to - r), next = std::min(kRowsTile, s.end - r - count);
      const uint8_t* here = as_is ? together(r, count) : nullptr;
      const uint8_t* soon = next > 0 ? together(r + count, next) : nullptr;
      const uint8_t* each[kRowsTile];
      for (int j = 0; j < count && !here; j++)
        each[j] =
            rows + (size_t(s.pages[(r + j) / cache.page]) * cache.page + (r + j) % cache.page) *
                       cache.codec.row;
      if (ints)
        op.decode_ints(cache.codec, each, count, tile);
      else
        for (int j = 0; j < count && !here; j++)
          op.decode(cache.codec, each[j], elem, tile + size_t(j) * row * size_of(elem));
      // rows may be read a little beyond their end, and behind the last slot there is nothing
      if (here &&
          here + size_t(count) * cache.codec.row + 64 > rows + cache.slots * cache.codec.row) {
        std::memcpy(tile, here, size_t(count) * cache.codec.row);
        here = nullptr;
      }
      for (int b = b0; b < b1; b++) {
        float* p = partial + (blocks[b].first_state + items[i].chunk) * state;
        const int g = blocks[b].g;
        const Lanes some{lanes + b * lanes_size, &last[16 * b]};
        Soon coming;
        if (b == b0) {
          if (soon) coming.p = soon, coming.end = soon + size_t(next) * cache.codec.row;
          size_t at = (tiles_before[i] + (r - from) / kRowsTile) * each_later;
          for (const auto& [data, size] : later) {
            if (at < size) {
              coming.later = data + at, coming.later_end = data + std::min(size, at + each_later);
              break;
            }
            at -= size;
          }
        }
        if (ints)
          op.attend_ints(cache.codec, tile, count, r, c.softmax_scale, some, blocks[b].lanes, p,
                         p + 16, p + 32, tmp, coming);
        else
          op.attend_tile(elem, here ? (const char*)here : tile, row, count, r, g * kw, kw,
                         c.latent ? 0 : kv * kw + g * vw, vw, c.softmax_scale, some,
                         blocks[b].lanes, p, p + 16, p + 32, tmp, coming);
      }
    }
  });
  auto gather = [&](int t, int head, float* out) {
    const size_t at = size_t(t) * h + head;
    op.combine(partial + state_of[at] * state, state, chunks_of[t], lane_of[at], vw, out);
  };
  if (!c.latent) {
    pool_.run(n, [&](int t, int) {
      for (int head = 0; head < h; head++) gather(t, head, o_ + (size_t(token[t]) * h + head) * vw);
    });
    return;
  }
  Acts a = acts(b_heads2_, h * n, vw);  // W^UV acts on the output
  pool_.run(h, [&](int head, int thread) {
    char* s = (char*)scratch(thread);
    float* latent = (float*)s;
    for (int t = 0; t < n; t++) {
      gather(t, head, latent);
      op.put_row(a, head * n + t, latent);
    }
    for (int t = 0, end; t < n; t = end) {  // runs of tokens that are neighbours in the step
      for (end = t + 1; end < n && token[end] == token[end - 1] + 1; end++) {
      }
      op.linear(l.uv[head], 0, tiles(c.value), a, head * n + t, end - t,
                o_ + (size_t(token[t]) * h + head) * c.value, ptrdiff_t(h) * c.value, s + 65536,
                head + 1 < h ? l.uv[head + 1].data : nullptr);
    }
  });
}

// Many queries of one sequence: keys and values of its rows, kExpandRows at a time, head by head.
void Model::many(const Layer& l, const uint8_t* rows, const SeqStep& seq, const Cache& cache) {
  const Config& c = config;
  const Ops& op = ops();
  const int elem = c.elem, e = size_of(elem), h = c.heads, kv = c.latent ? h : c.kv_heads,
            per = h / kv, row = cache.codec.w[0] + cache.codec.w[1];
  const int kw = c.head_dim, vw = c.latent ? c.value : c.head_dim, units = kw * e / 4,
            n = seq.count, stride = ceil_to(row, 64);
  char* raw = (char*)b_latents_.get(size_t(kExpandRows) * stride * e + 64);
  char* packed =
      c.latent ? (char*)b_packed_.get(tiles(kExpandRows) * tile_bytes(elem, c.latent)) : nullptr;
  float* ml = room<float>(b_ml_, size_t(n) * h * 2);
  float* out = room<float>(b_out_, size_t(n) * h * vw);
  std::fill(ml, ml + size_t(n) * h, -1e30f);
  std::fill(ml + size_t(n) * h, ml + size_t(n) * h * 2, 0.f);
  std::fill(out, out + size_t(n) * h * vw, 0.f);
  const size_t keys_size = align(size_t(tiles(kExpandRows)) * units * 64),
               values_size = align(size_t(tiles(vw)) * (kValueRows * e / 4) * 64),
               scores_size = align(size_t(kQueryRows) * std::max(kValueRows, ceil_to(vw, 16)) * 4),
               tmp_size = align(
                   4 * std::max(size_t(std::max(c.nope, 1)) * 32, size_t(48) * ceil_to(vw, 16))),
               queries = align(size_t(n) * acts_stride(kw) * e);
  const size_t values_all = values_size * (kExpandRows / kValueRows);
  for (int start = 0; start < seq.end; start += kExpandRows) {
    const int here = std::min(kExpandRows, seq.end - start);
    pool_.run((here + kRowsTile - 1) / kRowsTile, [&](int i, int) {
      const int first = i * kRowsTile, count = std::min(kRowsTile, here - first);
      for (int j = 0; j < count; j++) {
        const int at = start + first + j;
        const size_t slot = size_t(seq.pages[at / cache.page]) * cache.page + at % cache.page;
        op.decode(cache.codec, rows + slot * cache.codec.row, elem,
                  raw + size_t(first + j) * stride * e);
      }
      if (c.latent)
        op.rows_as_mat(elem, raw + size_t(first) * stride * e, stride, 0, c.latent, count,
                       packed + size_t(first / kTile) * tile_bytes(elem, c.latent));
    });
    pool_.run(kv, [&](int g, int thread) {
      char* keys = (char*)thread_big_[thread].get(keys_size + values_all + 2 * scores_size +
                                                  tmp_size + queries + 4096);
      char *values = keys + keys_size, *scores = values + values_all, *probs = scores + scores_size,
           *tmp = probs + scores_size, *qe = tmp + tmp_size;
      const Mat key_mat{elem, here, kw, (const uint8_t*)keys, 1.f};
      Acts raws;  // the decoded rows as activations
      raws.rows = here, raws.k = c.latent, raws.stride = stride;
      (elem == FP32 ? (void*&)raws.f : (void*&)raws.h) = raw;
      if (c.latent) {
        Acts uk;
        uk.rows = c.nope, uk.k = c.latent, uk.stride = ceil_to(c.latent, 64);
        (elem == FP32 ? (void*&)uk.f : (void*&)uk.h) =
            (char*)l.uk_rows + size_t(g) * c.nope * uk.stride * e;
        op.expand_keys(elem, (const uint8_t*)packed, c.latent, 0, tiles(here), uk, units, keys,
                       (float*)tmp);
        const int nope_units =
            c.nope * e /
            4;  // the rope key is the same for every head: turned, as it lies in the row
        for (int t = 0; t < tiles(here); t++)
          op.rows_as_mat(elem, raw + size_t(t) * kTile * stride * e, stride, c.latent, c.rope,
                         std::min(kTile, here - t * kTile),
                         keys + (size_t(t) * units + nope_units) * 64);
      } else {
        op.rows_as_mat(elem, raw, stride, g * kw, kw, here, keys);
      }
      for (int v = 0; v * kValueRows < here; v++) {
        const int first = v * kValueRows, count = std::min(kValueRows, here - first);
        if (c.latent)
          op.expand_values(l.uv_elem[g], raws, first, count, values + v * values_size, (float*)tmp);
        else
          op.rows_as_values(elem, raw + size_t(first) * stride * e, stride, kv * kw + g * vw, vw,
                            count, values + v * values_size);
      }
      for (int j = 0; j < per; j++) {
        const int head = g * per + j;
        Acts q;
        q.rows = n, q.k = kw, q.stride = acts_stride(kw);
        (elem == FP32 ? (void*&)q.f : (void*&)q.h) = qe;
        for (int t = 0; t < n; t++) op.put_row(q, t, q_ + (size_t(seq.first + t) * h + head) * kw);
        for (int t0 = 0; t0 < n; t0 += kQueryRows) {
          const int count = std::min(kQueryRows, n - t0),
                    seen = seq.end - n + t0 + count - start;  // columns that the last of them sees
          for (int v = 0; v * kValueRows < std::min(here, seen); v++) {
            const int first = v * kValueRows, cols = std::min(kValueRows, here - first),
                      ldp = ceil_to(cols, 16);
            int visible[kQueryRows];
            float fix[kQueryRows];
            for (int t = 0; t < count; t++) visible[t] = seq.end - n + t0 + t + 1 - start - first;
            op.linear(tile_of(key_mat, first / kTile), 0, tiles(cols), q, t0, count, (float*)scores,
                      kValueRows, nullptr, nullptr);
            float *m = ml + size_t(head) * n + t0, *sum = m + size_t(n) * h;
            op.softmax_rows(elem, (float*)scores, kValueRows, count, cols, visible, c.softmax_scale,
                            m, sum, fix, probs, ldp);
            Acts p;
            p.rows = count, p.k = cols, p.stride = ldp;
            (elem == FP32 ? (void*&)p.f : (void*&)p.h) = probs;
            const Mat value_mat{elem, vw, cols, (const uint8_t*)values + v * values_size, 1.f};
            op.linear(value_mat, 0, tiles(vw), p, 0, count, (float*)scores, ceil_to(vw, 16),
                      nullptr, nullptr);
            for (int t = 0; t < count; t++) {
              float* o = out + (size_t(t0 + t) * h + head) * vw;
              const float* y = (const float*)scores + size_t(t) * ceil_to(vw, 16);
              for (int k = 0; k < vw; k++) o[k] = o[k] * fix[t] + y[k];
            }
          }
        }
      }
    });
  }
  pool_.run(n, [&](int t, int) {
    for (int head = 0; head < h; head++) {
      const float inverse = 1.f / ml[size_t(n) * h + size_t(head) * n + t];
      const float* y = out + (size_t(t) * h + head) * vw;
      float* o = o_ + (size_t(seq.first + t) * h + head) * vw;
      for (int k = 0; k < vw; k++) o[k] = y[k] * inverse;
    }
  });
}

// Where block `block` of the gate matrix of a segment begins.
static const uint8_t* gate_block(const Seg& s, int block) {
  return tile_of(s.w13, block * (kBlock / kTile)).data;
}

void Model::feed_forward(const Layer& l, int n, int16_t* chosen) {
  const Config& c = config;
  const Ops& op = ops();
  Seg shared;  // or the dense layer's only one
  shared.w13 = l.w13, shared.w2 = l.w2, shared.rows = l.w13.data ? n : 0;
  const int blocks = shared.rows ? (l.w2.k + kBlock - 1) / kBlock : 0;
  Acts shared_act = blocks ? acts(b_shared_, n, l.w2.k) : Acts();
  const int gates = l.gate.data ? tiles(c.experts) : 0;
  const auto one_shared = [&](int i, int thread) {
    op.swiglu(shared, i, in_, shared_act, scratch(thread), gate_block(shared, i + 1));
  };
  std::vector<Seg> segs;
  std::vector<const Acts*> out;
  if (blocks) segs.push_back(shared), out.push_back(&shared_act);
  if (!gates) {
    pool_.run(blocks, one_shared);
    return down(segs, out);
  }
  gate_ = room<float>(b_gate_, size_t(n) * c.experts);
  products({{&l.gate, gate_, c.experts}}, in_);
  route(n, chosen);
  const int total = n * c.top_k;
  Acts sorted = acts(b_sorted_, total, c.hidden), act = acts(b_act_, total, c.moe_width);
  pool_.run(total, [&](int i, int) {  // gather; a row is copied in the forms that are used
    const size_t from = size_t(token_[i]) * in_.stride, to = size_t(i) * sorted.stride,
                 w = in_.stride;
    if (sorted.f) std::memcpy(sorted.f + to, in_.f + from, 4 * w);
    if (sorted.h) std::memcpy(sorted.h + to, in_.h + from, 2 * w);
    if (sorted.q) {
      std::memcpy(sorted.q + to, in_.q + from, w);
      std::memcpy(sorted.s + to / kBlock, in_.s + from / kBlock, w / kBlock * 4);
      std::memcpy(sorted.c + to / kGroup, in_.c + from / kGroup, w / kGroup * 4);
    }
  });
  const size_t routed = segs.size();
  for (int e = 0; e < c.experts; e++) {
    Seg s;
    s.w13 = l.e13[e], s.w2 = l.e2[e], s.row0 = begin_[e], s.rows = begin_[e + 1] - begin_[e];
    s.weight = sorted_weight_.data() + begin_[e], s.token = token_.data() + begin_[e];
    if (s.rows) segs.push_back(s), out.push_back(&act);
  }
  const int per = (c.moe_width + kBlock - 1) / kBlock;
  // The shared expert comes first: of a large batch it is a lot of arithmetic, and another thread
  // reads routed experts from memory meanwhile.
  pool_.run(blocks + int(segs.size() - routed) * per, [&](int i, int thread) {
    if (i < blocks) return one_shared(i, thread);
    const size_t k = routed + (i - blocks) / per;
    const int block = (i - blocks) % per;
    op.swiglu(segs[k], block, sorted, act, scratch(thread),
              block + 1 < per       ? gate_block(segs[k], block + 1)
              : k + 1 < segs.size() ? segs[k + 1].w13.data
                                    : nullptr);
  });
  down(segs, out);
}

// x += w2 act of every segment. An item owns 64 columns of the output, so its sums have one order:
// segments as they stand, or the first one last. That one may have all tokens (a shared expert),
// which is arithmetic where the others are reading: by turns, so that not all threads are at it
// together.
void Model::down(const std::vector<Seg>& segs, const std::vector<const Acts*>& acts) {
  constexpr int kChunk = 192;
  const int d = config.hidden, items = (d + kBlock - 1) / kBlock, count = int(segs.size());
  pool_.run(items, [&](int i, int thread) {
    const bool turned = (i + (i >= items / 2)) % 2;
    const int width = std::min(kBlock, d - i * kBlock);
    char* s = (char*)scratch(thread);
    float* y = (float*)s;
    for (int at = 0; at < count; at++) {
      const int k = (at + turned) % count, next = (k + 1) % count;
      const Seg& g = segs[k];
      const Mat m = tile_of(g.w2, i * 4);
      const bool more = at + 1 < count,
                 over = i + 1 < items;  // over: the next item is likely ours too
      const uint8_t* then = more   ? tile_of(segs[next].w2, i * 4).data
                            : over ? tile_of(segs[turned ? 0 : 1 % count].w2, (i + 1) * 4).data
                                   : nullptr;
      for (int r = 0; r < g.rows; r += kChunk) {
        const int rows = std::min(kChunk, g.rows - r);
        ops().linear(m, 0, tiles(width), *acts[k], g.row0 + r, rows, y, kBlock,
                     s + size_t(kChunk) * kBlock * 4, r + rows < g.rows ? m.data : then);
        for (int j = 0; j < rows; j++) {
          float* x = x_ + size_t(g.token ? g.token[r + j] : r + j) * d + i * kBlock;
          for (int q = 0; q < width; q++) x[q] += y[j * kBlock + q];
        }
      }
    }
  });
}

// Softmax over all experts, device-limited or plain top-k (lamoe/routing.py), assignments sorted by
// expert.
void Model::route(int n, int16_t* chosen) {
  const Config& c = config;
  const int e = c.experts, k = c.top_k, size = e / c.groups;
  expert_.resize(size_t(n) * k), weight_.resize(size_t(n) * k);
  pool_.run(n, [&](int t, int) {
    float* s = gate_ + size_t(t) * e;
    float top = s[0], sum = 0;
    for (int i = 1; i < e; i++) top = std::max(top, s[i]);
    for (int i = 0; i < e; i++) sum += s[i] = std::exp(s[i] - top);
    for (int i = 0; i < e; i++) s[i] /= sum;
    std::vector<char> closed(e, 0);
    if (c.group_limited) {
      std::vector<float> best(c.groups);
      for (int g = 0; g < c.groups; g++)
        best[g] = *std::max_element(s + g * size, s + (g + 1) * size);
      for (int g = 0; g < c.groups; g++) {
        int better = 0;
        for (int o = 0; o < c.groups; o++)
          better += best[o] > best[g] || (best[o] == best[g] && o < g);
        if (better >= c.top_groups)
          std::fill(closed.begin() + g * size, closed.begin() + (g + 1) * size, 1);
      }
    }
    float mass = 0;
    for (int j = 0; j < k; j++) {
      int best = -1;
      for (int i = 0; i < e; i++)
        if (!closed[i] && (best < 0 || s[i] > s[best])) best = i;
      best = std::max(best, 0);  // NaN everywhere: some expert; the output is NaN anyway
      closed[best] = 1;
      expert_[size_t(t) * k + j] = best;
      weight_[size_t(t) * k + j] = s[best];
      mass += s[best];
    }
    for (int j = 0; j < k; j++)
      weight_[size_t(t) * k + j] *= c.routed_scale / (c.normalise ? mass + 1e-20f : 1.f);
  });
  begin_.assign(e + 1, 0);
  for (int x : expert_) begin_[x + 1]++;
  for (int i = 0; i < e; i++) begin_[i + 1] += begin_[i];
  token_.resize(size_t(n) * k), sorted_weight_.resize(size_t(n) * k);
  std::vector<int> at(begin_.begin(), begin_.end() - 1);
  for (size_t i = 0; i < expert_.size(); i++) {
    const int to = at[expert_[i]]++;
    token_[to] = int32_t(i / k), sorted_weight_[to] = weight_[i];
    if (chosen) chosen[i] = int16_t(expert_[i]);
  }
}

}  // namespace lamoe
