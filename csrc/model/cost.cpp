#include "model/cost.h"

#include <algorithm>

namespace lamoe {
namespace {

// Under MHA and GQA, the largest number of queries per kv head that take the absorbed form.
constexpr int kAbsorbedQueries = 48;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Upper bound of the number of chunks of a sequence with at most `rows` cached rows. A chunk has
// chunk_rows() rows.
int64_t most_chunks(int rows) {
  return rows <= 4096 ? std::min<int64_t>(ceil_div(rows, 128), 8) : ceil_div(rows, 512);
}

// Size in bytes of the attention states of 16 lanes, one state per chunk.
size_t block_state_bytes(const Config& c, int rows) {
  return size_t(most_chunks(rows)) * AttentionState::floats(c.absorbed_value()) * sizeof(float);
}

// The largest number of new tokens, up to `limit`, that still takes the absorbed form.
int most_absorbed(const Config& c, int rows, int limit) {
  int low = 0, high = limit;  // invariant: `low` tokens take the absorbed form, high + 1 do not
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (expand_is_cheaper(c, middle, rows))
      high = middle - 1;
    else
      low = middle;
  }
  return low;
}

}  // namespace

bool expand_is_cheaper(const Config& c, int tokens, int rows) {
  if (!c.latent) return tokens * (c.heads / c.kv_heads) > kAbsorbedQueries;
  const double t = tokens, s = rows, up = double(c.latent) * (c.nope + c.value);
  const double expanded = s * up + t * s * (c.head_dim + c.value);
  const double absorbed = t * up + t * s * (2 * c.latent + c.rope);
  return tokens > 1 && expanded < absorbed;
}

size_t state_bytes(const Config& c, int tokens, int rows) {
  const int64_t kv = c.cached_heads(), per = c.heads / kv;
  return size_t(kv * ceil_div(tokens * per, kLanes)) * block_state_bytes(c, rows);
}

size_t max_state_bytes(const Config& c, int max_rows, int max_sequences, int step_tokens) {
  const int64_t kv = c.cached_heads(), per = c.heads / kv, sequences = max_sequences;
  const int64_t most = most_absorbed(c, max_rows, step_tokens);
  const int64_t tokens = std::min<int64_t>(step_tokens, sequences * most);
  // Each sequence may leave up to 15 lanes unused in its last block.
  const int64_t unused = per % kLanes ? (kLanes - 1) * std::min(sequences, tokens) : 0;
  const int64_t blocks = kv * ((tokens * per + unused) / kLanes);
  const size_t all = size_t(blocks) * block_state_bytes(c, max_rows);
  return grown(std::min(all, std::max(kStateLimit, state_bytes(c, 1, max_rows))));
}

}  // namespace lamoe
