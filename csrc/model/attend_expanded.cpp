// Attention in expanded form, for many new tokens of one sequence. kExpandedRows cache rows at a
// time are expanded to keys and values of each head. Keys and values then serve as the weights of
// ordinary matrix products:
//
//   for each range of kExpandedRows rows
//     decode_rows             decodes cache rows to FP32 or BF16; under MLA also packs the latents
//     for each kv head, in parallel
//       make_keys, make_values
//       for each query head, kQueries queries and kSoftmaxRows rows at a time
//         scores = queries * keys^T, then softmax_rows
//         outputs = outputs * rescale + softmax weights * values
//   finish                    divides outputs by the softmax sums
#include <algorithm>
#include <cstring>

#include "model/pass.h"

namespace lamoe {
namespace {

constexpr int kExpandedRows = 1024;  // cache rows that are expanded at once
constexpr int kSoftmaxRows = 256;    // cache rows of one softmax pass
constexpr int kQueries = 24;         // queries of one softmax pass

// Buffers of one thread for the current kv head.
struct HeadBuffers {
  char *keys, *values, *scores, *weights, *scratch, *queries;
  size_t values_bytes;  // size in bytes of kSoftmaxRows rows in `values`
};

class Expanded {
 public:
  Expanded(const Pass& pass, const Layer& l, uint8_t* cache, const Sequence& sequence)
      : pass_(pass), c_(pass.config), op_(pass.op), l_(l), cache_(cache), s_(sequence) {
    rows_ = (char*)pass.work.rows.get(size_t(kExpandedRows) * stride() * e() + 64);
    if (c_.latent)
      latents_ =
          (char*)pass.work.latents.get(tiles(kExpandedRows) * tile_bytes(c_.elem, c_.latent));
    const size_t queries = size_t(s_.count) * c_.heads;
    maximum_ = pass.work.running.array<float>(2 * queries), sum_ = maximum_ + queries;
    outputs_ = pass.work.outputs.array<float>(queries * value_width());
    std::fill(maximum_, maximum_ + queries, -1e30f);
    std::fill(sum_, sum_ + queries, 0.f);
    std::fill(outputs_, outputs_ + queries * value_width(), 0.f);
  }

  void run() {
    const int kv = c_.latent ? c_.heads : c_.kv_heads;
    for (first_row_ = 0; first_row_ < s_.end; first_row_ += kExpandedRows) {
      num_rows_ = std::min(kExpandedRows, s_.end - first_row_);
      decode_rows();
      pass_.pool.run(kv, [&](int g, int thread) {
        const HeadBuffers b = buffers(thread);
        make_keys(g, b);
        make_values(g, b);
        const int per = c_.heads / kv;
        for (int head = g * per; head < (g + 1) * per; head++) attend_head(head, b);
      });
    }
    finish();
  }

 private:
  int e() const { return element_bytes(c_.elem); }
  int stride() const { return ceil_to(pass_.step.cache.codec.width(), 64); }
  int value_width() const { return c_.head_value(); }
  int key_units() const { return c_.head_dim * e() / 4; }
  char* row(int i) const { return rows_ + size_t(i) * stride() * e(); }
  float* output(int query, int head) const {
    return outputs_ + (size_t(query) * c_.heads + head) * value_width();
  }

  HeadBuffers buffers(int thread) const;
  void decode_rows() const;
  void make_keys(int kv_head, const HeadBuffers& b) const;
  void make_values(int kv_head, const HeadBuffers& b) const;
  void attend_head(int head, const HeadBuffers& b) const;
  void attend_queries(int head, int first, int count, const Acts& q, const HeadBuffers& b) const;
  void finish() const;

  const Pass& pass_;
  const Config& c_;
  const Ops& op_;
  const Layer& l_;
  uint8_t* cache_;
  const Sequence& s_;
  char *rows_ = nullptr, *latents_ = nullptr;
  // maximum_ and sum_ are the online-softmax state [heads][queries]. outputs_ are not yet divided
  // by the sums [queries][heads][value].
  float *maximum_, *sum_, *outputs_;
  int first_row_ = 0, num_rows_ = 0;  // current range of cache rows
};

HeadBuffers Expanded::buffers(int thread) const {
  const int vw = value_width(), value_row = ceil_to(vw, kTile);
  const size_t keys = align64(size_t(tiles(kExpandedRows)) * key_units() * 64);
  const size_t values = align64(size_t(tiles(vw)) * (kSoftmaxRows * e() / 4) * 64);
  const size_t all_values = values * (kExpandedRows / kSoftmaxRows);
  const size_t scores = align64(size_t(kQueries) * std::max(kSoftmaxRows, value_row) * 4);
  const size_t scratch = align64(4 * expand_scratch_floats(c_.nope, vw));
  const size_t queries = align64(size_t(s_.count) * acts_stride(c_.head_dim) * e());
  HeadBuffers b;
  b.keys = (char*)pass_.work.thread_data[thread].get(keys + all_values + 2 * scores + scratch +
                                                     queries + 4096);
  b.values = b.keys + keys, b.values_bytes = values;
  b.scores = b.values + all_values, b.weights = b.scores + scores;
  b.scratch = b.weights + scores, b.queries = b.scratch + scratch;
  return b;
}

void Expanded::decode_rows() const {
  const Codec& codec = pass_.step.cache.codec;
  const SequenceRows stored{pass_.step.cache, cache_, s_.pages};
  pass_.pool.run((num_rows_ + kTileRows - 1) / kTileRows, [&](int i, int) {
    const int first = i * kTileRows, count = std::min(kTileRows, num_rows_ - first);
    for (int j = first; j < first + count; j++)
      op_.decode(codec, stored.row(first_row_ + j), c_.elem, row(j));
    if (c_.latent)
      op_.rows_as_keys(c_.elem, row(first), stride(), 0, c_.latent, count,
                       latents_ + size_t(first / kTile) * tile_bytes(c_.elem, c_.latent));
  });
}

void Expanded::make_keys(int kv_head, const HeadBuffers& b) const {
  const int units = key_units();
  if (!c_.latent)
    return op_.rows_as_keys(c_.elem, rows_, stride(), kv_head * c_.head_dim, c_.head_dim, num_rows_,
                            b.keys);
  const int uk_stride = ceil_to(c_.latent, kBlock);
  const char* uk_rows = (const char*)l_.uk_rows + size_t(kv_head) * c_.nope * uk_stride * e();
  const Acts uk = plain_acts(c_.elem, uk_rows, c_.nope, c_.latent, uk_stride);
  op_.expand_keys(c_.elem, (const uint8_t*)latents_, c_.latent, 0, tiles(num_rows_), uk, units,
                  b.keys, (float*)b.scratch);
  // Every head uses the same rope key. It was rotated when the row was written to the cache.
  const int nope_units = c_.nope * e() / 4;
  for (int t = 0; t < tiles(num_rows_); t++)
    op_.rows_as_keys(c_.elem, row(t * kTile), stride(), c_.latent, c_.rope,
                     std::min(kTile, num_rows_ - t * kTile),
                     b.keys + (size_t(t) * units + nope_units) * 64);
}

void Expanded::make_values(int kv_head, const HeadBuffers& b) const {
  const Acts latents = plain_acts(c_.elem, rows_, num_rows_, c_.latent, stride());
  for (int v = 0; v * kSoftmaxRows < num_rows_; v++) {
    const int first = v * kSoftmaxRows, count = std::min(kSoftmaxRows, num_rows_ - first);
    char* to = b.values + v * b.values_bytes;
    if (c_.latent) {
      op_.expand_values(l_.uv_elem[kv_head], latents, first, count, to, (float*)b.scratch);
    } else {
      const int column = pass_.step.cache.codec.w[0] + kv_head * value_width();
      op_.rows_as_values(c_.elem, row(first), stride(), column, value_width(), count, to);
    }
  }
}

void Expanded::attend_head(int head, const HeadBuffers& b) const {
  const int n = s_.count, kw = c_.head_dim;
  const Acts q = plain_acts(c_.elem, b.queries, n, kw, acts_stride(kw));
  for (int t = 0; t < n; t++) op_.put_row(q, t, pass_.query(s_.first + t, head));
  for (int t = 0; t < n; t += kQueries) attend_queries(head, t, std::min(kQueries, n - t), q, b);
}

// Computes attention of queries first .. first + count over all rows of the current range that the
// last of these queries sees.
void Expanded::attend_queries(int head, int first, int count, const Acts& q,
                              const HeadBuffers& b) const {
  const int n = s_.count, vw = value_width(), value_row = ceil_to(vw, kTile);
  const Mat keys{c_.elem, num_rows_, c_.head_dim, (const uint8_t*)b.keys, 1.f};
  float* scores = (float*)b.scores;
  const auto visible_rows = [&](int query) { return s_.end - n + query + 1 - first_row_; };
  const int seen = std::min(num_rows_, visible_rows(first + count - 1));
  for (int v = 0; v * kSoftmaxRows < seen; v++) {
    const int at = v * kSoftmaxRows, cols = std::min(kSoftmaxRows, num_rows_ - at);
    int visible[kQueries];
    float rescale[kQueries];
    for (int t = 0; t < count; t++) visible[t] = visible_rows(first + t) - at;
    op_.linear(from_tile(keys, at / kTile), 0, tiles(cols), q, first, count, scores, kSoftmaxRows,
               nullptr, nullptr);
    const size_t state = size_t(head) * n + first;
    const SoftmaxBlock block{scores,           kSoftmaxRows, count,   cols,      visible,
                             maximum_ + state, sum_ + state, rescale, b.weights, ceil_to(cols, 16)};
    op_.softmax_rows(c_.elem, block, c_.softmax_scale);
    const Acts weights = plain_acts(c_.elem, b.weights, count, cols, block.weight_stride);
    const Mat values{c_.elem, vw, cols, (const uint8_t*)b.values + v * b.values_bytes, 1.f};
    op_.linear(values, 0, tiles(vw), weights, 0, count, scores, value_row, nullptr, nullptr);
    for (int t = 0; t < count; t++) {
      float* o = output(first + t, head);
      const float* y = scores + size_t(t) * value_row;
      for (int k = 0; k < vw; k++) o[k] = o[k] * rescale[t] + y[k];
    }
  }
}

void Expanded::finish() const {
  const int n = s_.count;
  pass_.pool.run(n, [&](int t, int) {
    for (int head = 0; head < c_.heads; head++) {
      const float inverse = 1.f / sum_[size_t(head) * n + t];
      const float* y = output(t, head);
      float* o = pass_.head_output(s_.first + t, head);
      for (int k = 0; k < value_width(); k++) o[k] = y[k] * inverse;
    }
  });
}

}  // namespace

void attend_expanded(const Pass& pass, const Layer& l, uint8_t* cache, const Sequence& sequence) {
  Expanded(pass, l, cache, sequence).run();
}

}  // namespace lamoe
