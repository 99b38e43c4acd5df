// The choice between absorbed and expanded attention, and the memory for states of absorbed
// attention. Python calls these functions too (bind.cpp), so that each rule exists only once.
#pragma once
#include "model/model.h"

namespace lamoe {

// Limit in bytes of the attention states that exist at once. A single token may exceed it.
constexpr size_t kStateLimit = size_t(128) << 20;

// Whether `tokens` new tokens of a sequence take the expanded form of attention. If not, they take
// the absorbed form. `rows` is the number of cached rows, including those of the new tokens.
//
// Under MLA the form with fewer multiply-adds per head is chosen. A single token always uses the
// absorbed form. For the very first token the expanded form would need slightly fewer
// multiply-adds, but it reads larger weights and has more passes.
bool expand_is_cheaper(const Config& c, int tokens, int rows);

// Number of cache rows of a chunk for a sequence with `rows` cached rows. Each chunk has one
// attention state per lane. Short contexts have smaller chunks, so that they still give work to two
// threads. The size depends only on the length of the sequence. So results do not depend on the
// number of threads or on the rest of the batch.
inline int chunk_rows(int rows) { return rows <= 1024 ? 128 : 512; }

// Upper bound, in bytes, of the states of `tokens` new tokens of a sequence with at most `rows`
// cached rows. It never decreases when an argument grows.
size_t state_bytes(const Config& c, int tokens, int rows);

// Upper bound, in bytes, of what a model allocates for states. Steps have at most step_tokens
// tokens of at most max_sequences sequences. Each sequence has at most max_rows cached rows.
size_t max_state_bytes(const Config& c, int max_rows, int max_sequences, int step_tokens);

// Number of bytes that a buffer allocates if `bytes` are needed. It allocates more than that, so
// that it rarely has to grow.
inline size_t grown(size_t bytes) { return bytes + bytes / 4 + 4096; }

}  // namespace lamoe
