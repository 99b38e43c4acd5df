// Attention in absorbed form, for few new tokens per sequence (decoding, drafts, short chunks).
// Queries are compared with the latents in the cache, without expanding them to keys. Each cache
// row is read once for 16 lanes.
//
//   1. LanePlan         splits the (token, head) pairs of each sequence and kv head into blocks of
//                       16 lanes, and the cache rows into chunks, the work items of the threads
//   2. absorb_queries   under MLA, multiplies queries by W^UK (nope -> latent elements)
//   3. pack_queries     packs the queries of each block
//   4. ChunkAttention   decodes each tile of 64 rows of a chunk once, and updates the attention
//                       state of every block
//   5. combine          merges the states of all chunks; under MLA, expand_outputs then multiplies
//                       by W^UV (latent -> value elements)
#include <algorithm>
#include <cstring>

#include "model/pass.h"

namespace lamoe {
namespace {

// ---- 1. blocks and chunks ----------------------------------------------------------------------
struct LaneBlock {
  int sequence, kv_head, lanes;
  int first_state;  // index of the first state of this block; a block has one state per chunk
  // Token and head of each lane. Tokens are counted within this call of attend_absorbed. Unused
  // lanes repeat the last pair.
  int token[kLanes], head[kLanes];
};

struct Chunk {
  int sequence, index, from, to;  // the chunk holds rows from .. to of the sequence
  int first_block, end_block;     // range of the lane blocks of the sequence
  size_t first_tile;              // index of the first tile of this chunk among all tiles
};

struct LanePlan {
  LanePlan(const Config& c, const std::vector<Sequence>& sequences);

  struct Place {
    int first_state, lane, chunks;
  };
  const Place& place(int token, int head) const { return places[size_t(token) * heads + head]; }
  int tokens() const { return int(step_token.size()); }

  int heads;
  std::vector<int> step_token;  // for each token of this call, its index within the step
  std::vector<LaneBlock> blocks;
  std::vector<Chunk> chunks;
  std::vector<Place> places;
  int states = 0;
  size_t tiles = 0;

 private:
  void add_blocks(const Config& c, const Sequence& s, int sequence, int first_token, int count);
};

LanePlan::LanePlan(const Config& c, const std::vector<Sequence>& sequences) : heads(c.heads) {
  for (int i = 0; i < int(sequences.size()); i++) {
    const Sequence& s = sequences[i];
    const int first_token = tokens(), first_block = int(blocks.size());
    for (int t = 0; t < s.count; t++) step_token.push_back(s.first + t);
    const int size = chunk_rows(s.end), count = (s.end + size - 1) / size;
    add_blocks(c, s, i, first_token, count);
    for (int k = 0; k < count; k++) {
      const int from = k * size, to = std::min(s.end, from + size);
      chunks.push_back({i, k, from, to, first_block, int(blocks.size()), tiles});
      tiles += (to - from + kTileRows - 1) / kTileRows;
    }
  }
}

void LanePlan::add_blocks(const Config& c, const Sequence& s, int sequence, int first_token,
                          int count) {
  const int kv = c.cached_heads(), per = heads / kv, pairs = s.count * per;
  places.resize(size_t(tokens()) * heads);
  for (int g = 0; g < kv; g++)
    for (int at = 0; at < pairs; at += kLanes) {
      LaneBlock b{sequence, g, std::min(kLanes, pairs - at), states, {}, {}};
      for (int i = 0; i < kLanes; i++) {
        const int pair = std::min(at + i, pairs - 1);
        b.token[i] = first_token + pair / per, b.head[i] = g * per + pair % per;
        if (i < b.lanes) places[size_t(b.token[i]) * heads + b.head[i]] = {states, i, count};
      }
      blocks.push_back(b);
      states += count;
    }
}

// ---- 2. and 3. queries -------------------------------------------------------------------------
// Multiplies the nope part of each query by W^UK. Returns queries [token][head][latent + rope].
const float* absorb_queries(const Pass& pass, const Layer& l, const LanePlan& plan) {
  const Config& c = pass.config;
  const int n = plan.tokens(), h = c.heads, width = c.absorbed_key();
  float* q = pass.work.absorbed_q.array<float>(size_t(n) * h * width);
  const Acts a = pass.work.acts(pass.work.head_q, h * n, c.nope);
  pass.pool.run(h, [&](int head, int thread) {
    for (int i = 0; i < n; i++) {
      const float* from = pass.query(plan.step_token[i], head);
      pass.op.put_row(a, head * n + i, from);
      float* to = q + (size_t(i) * h + head) * width;
      std::memcpy(to + c.latent, from + c.nope, 4 * c.rope);
    }
    const uint8_t* next = head + 1 < h ? l.uk[head + 1].data : nullptr;
    pass.op.linear(l.uk[head], 0, tiles(c.latent), a, head * n, n, q + size_t(head) * width,
                   ptrdiff_t(h) * width, pass.work.scratch_of(thread), next);
  });
  return q;
}

struct PackedQueries {
  bool ints;  // true if the queries are IntLanes, false if they come from pack_lanes
  char* data;
  size_t block_bytes;
  std::vector<int> last;  // last visible cache row of each lane [blocks][16]

  Lanes lanes(int block, int count) const {
    return {data + block * block_bytes, &last[size_t(kLanes) * block], count};
  }
};

PackedQueries pack_queries(const Pass& pass, const LanePlan& plan, const float* absorbed,
                           const std::vector<Sequence>& sequences) {
  const Config& c = pass.config;
  const Codec& codec = pass.step.cache.codec;
  const int width = c.absorbed_key(), blocks = int(plan.blocks.size());
  PackedQueries packed;
  packed.ints = c.latent && c.elem == BF16 && has_ints(codec);
  packed.block_bytes =
      packed.ints ? IntLanes::bytes(codec) : size_t(width) * element_bytes(c.elem) * kLanes;
  packed.data = (char*)pass.work.lanes.get(blocks * packed.block_bytes);
  packed.last.resize(size_t(blocks) * kLanes);
  pass.pool.run(blocks, [&](int b, int) {
    const LaneBlock& block = plan.blocks[b];
    const float* q[kLanes];
    for (int i = 0; i < kLanes; i++) {
      const int token = block.token[i], head = block.head[i], of_step = plan.step_token[token];
      q[i] = absorbed ? absorbed + (size_t(token) * c.heads + head) * width
                      : pass.query(of_step, head);
      packed.last[size_t(kLanes) * b + i] = sequences[block.sequence].row_of(of_step);
    }
    char* to = packed.data + b * packed.block_bytes;
    if (packed.ints)
      pass.op.pack_lanes_ints(codec, q, block.lanes, to);
    else
      pass.op.pack_lanes(c.elem, q, block.lanes, width, to);
  });
  return packed;
}

// ---- 4. attention ------------------------------------------------------------------------------
// The weights that every token needs after attention, to be prefetched during attention. Attention
// over integers is bound by arithmetic, so it has memory bandwidth left for them. Every tile
// prefetches an equal share. The total is limited to what a last-level cache holds.
class LaterWeights {
 public:
  LaterWeights(const Layer& l, bool use, size_t tiles) {
    constexpr size_t kMostPerTile = 512 * 64;
    if (!use) return;
    for (const Mat& m : l.uv) add(m);
    for (const Mat* m : {&l.wo, &l.gate, &l.w13, &l.w2}) add(*m);
    per_tile_ = std::min(align64(all_ / tiles), kMostPerTile);
  }
  void prefetch_with(size_t tile, Prefetch& p) const {
    size_t at = tile * per_tile_;
    for (const auto& [data, size] : parts_) {
      if (at < size) {
        p.later = data + at, p.later_end = data + std::min(size, at + per_tile_);
        return;
      }
      at -= size;
    }
  }

 private:
  void add(const Mat& m) {
    constexpr size_t kMost = 16 << 20;
    if (!m.data) return;
    const size_t size = std::min(mat_bytes(m.fmt, m.n, m.k), kMost - std::min(kMost, all_));
    parts_.push_back({m.data, size}), all_ += size;
  }
  std::vector<std::pair<const uint8_t*, size_t>> parts_;
  size_t all_ = 0, per_tile_ = 0;
};

struct ChunkAttention {
  const Pass& pass;
  const LanePlan& plan;
  const PackedQueries& queries;
  const LaterWeights& later;
  float* states;

  void run(const Chunk& chunk, const Sequence& s, uint8_t* cache, int thread) const;

 private:
  AttentionState state(const LaneBlock& b, int chunk) const {
    const int width = pass.config.absorbed_value();
    return {states + (b.first_state + chunk) * AttentionState::floats(width), width};
  }
  const void* load(const SequenceRows& rows, uint8_t* cache, int r, int count, char* buffer) const;
  void attend(const Chunk& chunk, const RowTile& tile, AttentionScratch* scratch,
              const Prefetch& prefetch) const;
};

// Returns rows r .. r + count of a sequence. The result points into the cache if the rows can be
// read there in place. Otherwise they are copied or decoded into `buffer`.
const void* ChunkAttention::load(const SequenceRows& rows, uint8_t* cache, int r, int count,
                                 char* buffer) const {
  const Codec& codec = rows.cache.codec;
  const int elem = pass.config.elem;
  if (const uint8_t* here = codec.stores(elem) ? rows.contiguous(r, count) : nullptr) {
    // Kernels may read up to 64 bytes beyond the last row. These bytes must lie inside the cache.
    if (here + size_t(count) * codec.row + 64 <= cache + rows.cache.slots * codec.row) return here;
    std::memcpy(buffer, here, size_t(count) * codec.row);
    return buffer;
  }
  if (queries.ints) {
    const uint8_t* each[kTileRows];
    for (int j = 0; j < count; j++) each[j] = rows.row(r + j);
    pass.op.decode_ints(codec, each, count, buffer);
    return buffer;
  }
  const size_t stride = size_t(codec.width()) * element_bytes(elem);
  for (int j = 0; j < count; j++) pass.op.decode(codec, rows.row(r + j), elem, buffer + j * stride);
  return buffer;
}

// Updates the attention state of every block with one tile. Only the first block prefetches.
void ChunkAttention::attend(const Chunk& chunk, const RowTile& tile, AttentionScratch* scratch,
                            const Prefetch& prefetch) const {
  const Config& c = pass.config;
  const Codec& codec = pass.step.cache.codec;
  const int kw = c.absorbed_key(), vw = c.absorbed_value();
  for (int b = chunk.first_block; b < chunk.end_block; b++) {
    const LaneBlock& block = plan.blocks[b];
    const Lanes lanes = queries.lanes(b, block.lanes);
    const Prefetch mine = b == chunk.first_block ? prefetch : Prefetch();
    const int value = c.latent ? 0 : codec.w[0] + block.kv_head * vw;
    if (queries.ints) {
      pass.op.attend_ints(codec, tile, c.softmax_scale, lanes, state(block, chunk.index), scratch,
                          mine);
    } else {
      pass.op.attend_tile(c.elem, tile, {block.kv_head * kw, kw, value, vw}, c.softmax_scale, lanes,
                          state(block, chunk.index), scratch, mine);
    }
  }
}

void ChunkAttention::run(const Chunk& chunk, const Sequence& s, uint8_t* cache, int thread) const {
  const Codec& codec = pass.step.cache.codec;
  const SequenceRows rows{pass.step.cache, cache, s.pages};
  const size_t plain = size_t(kTileRows) * codec.width() * element_bytes(pass.config.elem) + 64;
  const size_t tile_size = align64(queries.ints ? IntTile::bytes(codec) : plain);
  char* buffer = (char*)pass.work.thread_data[thread].get(tile_size + sizeof(AttentionScratch));
  AttentionScratch* scratch = (AttentionScratch*)(buffer + tile_size);
  for (int b = chunk.first_block; b < chunk.end_block; b++)
    state(plan.blocks[b], chunk.index).reset(plan.blocks[b].lanes);
  for (int r = chunk.from; r < chunk.to; r += kTileRows) {
    const int count = std::min(kTileRows, chunk.to - r);
    const int next = std::min(kTileRows, s.end - r - count);
    Prefetch prefetch;
    if (const uint8_t* soon = next > 0 ? rows.contiguous(r + count, next) : nullptr)
      prefetch.next = soon, prefetch.next_end = soon + size_t(next) * codec.row;
    later.prefetch_with(chunk.first_tile + (r - chunk.from) / kTileRows, prefetch);
    const void* tile = load(rows, cache, r, count, buffer);
    attend(chunk, {tile, codec.width(), count, r}, scratch, prefetch);
  }
}

// ---- 5. outputs --------------------------------------------------------------------------------
void combine(const Pass& pass, const LanePlan& plan, const float* states, int token, int head,
             float* out) {
  const LanePlan::Place& at = plan.place(token, head);
  const int width = pass.config.absorbed_value();
  pass.op.combine(states + at.first_state * AttentionState::floats(width), at.chunks, at.lane,
                  width, out);
}

// Multiplies the outputs of each head by W^UV, from latent to value elements.
void expand_outputs(const Pass& pass, const Layer& l, const LanePlan& plan, const float* states) {
  const Config& c = pass.config;
  const int n = plan.tokens(), h = c.heads;
  const std::vector<int>& of_step = plan.step_token;
  const Acts a = pass.work.acts(pass.work.head_latents, h * n, c.latent);
  pass.pool.run(h, [&](int head, int thread) {
    char* scratch = pass.work.scratch_of(thread);
    float* latent = (float*)scratch;
    for (int t = 0; t < n; t++) {
      combine(pass, plan, states, t, head, latent);
      pass.op.put_row(a, head * n + t, latent);
    }
    const uint8_t* next = head + 1 < h ? l.uv[head + 1].data : nullptr;
    for (int t = 0, end; t < n; t = end) {  // t .. end: tokens that are contiguous in the step
      for (end = t + 1; end < n && of_step[end] == of_step[end - 1] + 1; end++) {
      }
      pass.op.linear(l.uv[head], 0, tiles(c.value), a, head * n + t, end - t,
                     pass.head_output(of_step[t], head), ptrdiff_t(h) * c.value,
                     scratch + kRowScratch, next);
    }
  });
}

}  // namespace

void attend_absorbed(const Pass& pass, const Layer& l, uint8_t* cache,
                     const std::vector<Sequence>& sequences) {
  const Config& c = pass.config;
  const LanePlan plan(c, sequences);
  const float* absorbed = c.latent ? absorb_queries(pass, l, plan) : nullptr;
  const PackedQueries queries = pack_queries(pass, plan, absorbed, sequences);
  float* states =
      pass.work.states.array<float>(plan.states * AttentionState::floats(c.absorbed_value()));
  const LaterWeights later(l, queries.ints, plan.tiles);
  const ChunkAttention attention{pass, plan, queries, later, states};
  pass.pool.run(int(plan.chunks.size()), [&](int i, int thread) {
    const Chunk& chunk = plan.chunks[i];
    attention.run(chunk, sequences[chunk.sequence], cache, thread);
  });
  if (c.latent) return expand_outputs(pass, l, plan, states);
  pass.pool.run(plan.tokens(), [&](int t, int) {
    for (int head = 0; head < c.heads; head++)
      combine(pass, plan, states, t, head, pass.head_output(plan.step_token[t], head));
  });
}

}  // namespace lamoe
