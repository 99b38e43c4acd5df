// The feed-forward part of a layer: one dense SwiGLU, or routed and shared experts.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/pass.h"

namespace lamoe {
namespace {

void softmax(float* s, int n) {
  float top = s[0], sum = 0;
  for (int i = 1; i < n; i++) top = std::max(top, s[i]);
  for (int i = 0; i < n; i++) sum += s[i] = std::exp(s[i] - top);
  for (int i = 0; i < n; i++) s[i] /= sum;
}

// Excludes the experts of all groups except the best `top_groups`. The score of a group is that of
// its best expert. Of groups with equal scores, the first is preferred.
void close_groups(const Config& c, const float* s, std::vector<char>& closed) {
  const int size = c.experts / c.groups;
  std::vector<float> best(c.groups);
  for (int g = 0; g < c.groups; g++) best[g] = *std::max_element(s + g * size, s + (g + 1) * size);
  for (int g = 0; g < c.groups; g++) {
    int better = 0;
    for (int o = 0; o < c.groups; o++) better += best[o] > best[g] || (best[o] == best[g] && o < g);
    if (better >= c.top_groups)
      std::fill(closed.begin() + g * size, closed.begin() + (g + 1) * size, 1);
  }
}

// Chooses the experts of one token from its gate logits s, and overwrites s. The rules are those of
// lamoe/model/routing.py.
void choose_experts(const Config& c, float* s, int* expert, float* weight) {
  softmax(s, c.experts);
  std::vector<char> closed(c.experts, 0);
  if (c.group_limited) close_groups(c, s, closed);
  float mass = 0;
  for (int j = 0; j < c.top_k; j++) {
    int best = -1;
    for (int i = 0; i < c.experts; i++)
      if (!closed[i] && (best < 0 || s[i] > s[best])) best = i;
    best = std::max(best, 0);  // best < 0 if all scores are NaN; then the output is NaN anyway
    closed[best] = 1;
    expert[j] = best;
    weight[j] = s[best];
    mass += s[best];
  }
  for (int j = 0; j < c.top_k; j++)
    weight[j] *= c.routed_scale / (c.normalise ? mass + 1e-20f : 1.f);
}

void sort_by_expert(const Config& c, Routing& r) {
  r.begin.assign(c.experts + 1, 0);
  for (int x : r.expert) r.begin[x + 1]++;
  for (int i = 0; i < c.experts; i++) r.begin[i + 1] += r.begin[i];
  r.token.resize(r.expert.size()), r.sorted_weight.resize(r.expert.size());
  std::vector<int> at(r.begin.begin(), r.begin.end() - 1);
  for (size_t i = 0; i < r.expert.size(); i++) {
    const int to = at[r.expert[i]]++;
    r.token[to] = int32_t(i / c.top_k), r.sorted_weight[to] = r.weight[i];
  }
}

void route(const Pass& pass, const Layer& l, int16_t* chosen) {
  const Config& c = pass.config;
  const int n = pass.step.tokens;
  float* gate = pass.work.gate.array<float>(size_t(n) * c.experts);
  multiply(pass, {{&l.gate, gate, c.experts}}, pass.normed);
  Routing& r = pass.work.routing;
  r.expert.resize(size_t(n) * c.top_k), r.weight.resize(size_t(n) * c.top_k);
  pass.pool.run(n, [&](int t, int) {
    const size_t at = size_t(t) * c.top_k;
    choose_experts(c, gate + size_t(t) * c.experts, &r.expert[at], &r.weight[at]);
  });
  sort_by_expert(c, r);
  if (chosen) std::copy(r.expert.begin(), r.expert.end(), chosen);
}

// Copies the input row of every (token, expert) assignment, sorted by expert, in the forms of
// activations that the weights need.
Acts gather(const Pass& pass) {
  const Acts& in = pass.normed;
  const std::vector<int32_t>& token = pass.work.routing.token;
  const Acts sorted = pass.work.acts(pass.work.sorted, int(token.size()), pass.config.hidden);
  pass.pool.run(int(token.size()), [&](int i, int) {
    const size_t from = size_t(token[i]) * in.stride, to = size_t(i) * sorted.stride;
    const size_t width = in.stride;
    if (sorted.f) std::memcpy(sorted.f + to, in.f + from, 4 * width);
    if (sorted.h) std::memcpy(sorted.h + to, in.h + from, 2 * width);
    if (sorted.q) {
      std::memcpy(sorted.q + to, in.q + from, width);
      std::memcpy(sorted.s + to / kBlock, in.s + from / kBlock, width / kBlock * 4);
      std::memcpy(sorted.c + to / kGroup, in.c + from / kGroup, width / kGroup * 4);
    }
  });
  return sorted;
}

// Address of the first gate weights of block `block`, for prefetching.
const uint8_t* gate_block(const Seg& s, int block) {
  return from_tile(s.w13, block * (kBlock / kTile)).data;
}

// One Seg per routed expert that has tokens.
std::vector<Seg> routed_segments(const Config& c, const Layer& l, const Routing& r) {
  std::vector<Seg> segments;
  for (int e = 0; e < c.experts; e++) {
    Seg s;
    s.w13 = l.e13[e], s.w2 = l.e2[e];
    s.row0 = r.begin[e], s.rows = r.begin[e + 1] - r.begin[e];
    s.weight = r.sorted_weight.data() + r.begin[e], s.token = r.token.data() + r.begin[e];
    if (s.rows) segments.push_back(s);
  }
  return segments;
}

}  // namespace

void feed_forward(const Pass& pass, const Layer& l, int16_t* chosen) {
  const Config& c = pass.config;
  const int n = pass.step.tokens;
  std::vector<Seg> segments;
  std::vector<const Acts*> acts;
  Seg shared;  // shared experts of an MoE layer, or the FFN of a dense layer
  Acts shared_act;
  int shared_blocks = 0;
  if (l.w13.data) {
    shared.w13 = l.w13, shared.w2 = l.w2, shared.rows = n;
    shared_act = pass.work.acts(pass.work.shared, n, l.w2.k);
    shared_blocks = blocks(l.w2.k);
    segments.push_back(shared), acts.push_back(&shared_act);
  }
  const auto run_shared = [&](int block, int thread) {
    pass.op.swiglu(shared, block, pass.normed, shared_act, pass.work.scratch_of(thread),
                   gate_block(shared, block + 1));
  };
  if (!l.gate.data) {
    pass.pool.run(shared_blocks, run_shared);
    return add_down(pass, segments, acts);
  }
  route(pass, l, chosen);
  const Acts sorted = gather(pass);
  const Acts act = pass.work.acts(pass.work.routed, n * c.top_k, c.moe_width);
  const std::vector<Seg> routed = routed_segments(c, l, pass.work.routing);
  for (const Seg& s : routed) segments.push_back(s), acts.push_back(&act);
  const int per = blocks(c.moe_width);
  // The items of the shared experts come first. With a large batch they are mostly arithmetic, so
  // another thread can meanwhile use the memory bandwidth for routed experts.
  pass.pool.run(shared_blocks + int(routed.size()) * per, [&](int i, int thread) {
    if (i < shared_blocks) return run_shared(i, thread);
    const size_t k = (i - shared_blocks) / per;
    const int block = (i - shared_blocks) % per;
    const uint8_t* next = block + 1 < per         ? gate_block(routed[k], block + 1)
                          : k + 1 < routed.size() ? routed[k + 1].w13.data
                                                  : nullptr;
    pass.op.swiglu(routed[k], block, sorted, act, pass.work.scratch_of(thread), next);
  });
  add_down(pass, segments, acts);
}

// Each work item owns 64 columns of the output. It sums the segments in an order that does not
// depend on the thread. If the first segment has all tokens (shared experts), it is bound by
// arithmetic, and the other segments by memory. Items alternate between adding this segment first
// and last, so that not all threads compute it at the same time.
void add_down(const Pass& pass, const std::vector<Seg>& segments,
              const std::vector<const Acts*>& acts) {
  const int d = pass.config.hidden, items = blocks(d), count = int(segments.size());
  const auto columns = [&](int segment, int item) {
    return from_tile(segments[segment].w2, item * (kBlock / kTile));
  };
  pass.pool.run(items, [&](int i, int thread) {
    const bool first_last = (i + (i >= items / 2)) % 2;
    const int width = std::min(kBlock, d - i * kBlock);
    char* scratch = pass.work.scratch_of(thread);
    float* y = (float*)scratch;  // results [kChunkRows][kBlock]
    void* rest = y + size_t(kChunkRows) * kBlock;
    for (int at = 0; at < count; at++) {
      const int k = (at + first_last) % count;
      const Seg& g = segments[k];
      const Mat m = columns(k, i);
      const uint8_t* next = nullptr;
      if (at + 1 < count)
        next = columns((k + 1) % count, i).data;
      else if (i + 1 < items)
        next = columns(first_last ? 0 : 1 % count, i + 1).data;
      for (int r = 0; r < g.rows; r += kChunkRows) {
        const int rows = std::min(kChunkRows, g.rows - r);
        pass.op.linear(m, 0, tiles(width), *acts[k], g.row0 + r, rows, y, kBlock, rest,
                       r + rows < g.rows ? m.data : next);
        for (int j = 0; j < rows; j++) {
          float* x = pass.x + size_t(g.token ? g.token[r + j] : r + j) * d + i * kBlock;
          for (int q = 0; q < width; q++) x[q] += y[j * kBlock + q];
        }
      }
    }
  });
}

}  // namespace lamoe
