// Which form of attention is cheaper, and how much memory absorbed attention takes for its states.
// Python asks these functions too (bind.cpp), so each rule exists once.
#pragma once
#include "model/model.h"

namespace lamoe {

// Attention states that exist at once, unless a single token needs more.
constexpr size_t kStateLimit = size_t(128) << 20;

// Whether `tokens` new tokens of a sequence that then has `rows` cached rows take the expanded form
// of attention, else the absorbed one.
//
// Under MLA the form with fewer multiply-adds per head wins. A single token always uses the
// absorbed form: for the very first token the expanded form needs slightly fewer multiply-adds, but
// it reads larger weights and has more passes.
bool expand_is_cheaper(const Config& c, int tokens, int rows);

// Rows of a chunk, which has one attention state per lane. Short contexts have smaller chunks, so
// that two threads have something to do. It depends on the length alone, so results do not depend
// on the number of threads or on the rest of the batch.
inline int chunk_rows(int rows) { return rows <= 1024 ? 128 : 512; }

// Upper bound of the states of `tokens` tokens of a sequence with at most `rows` rows. It grows
// with both.
size_t state_bytes(const Config& c, int tokens, int rows);

// Upper bound of what a model allocates for states in steps of at most step_tokens tokens, of at
// most max_sequences sequences, with at most max_rows rows each.
size_t max_state_bytes(const Config& c, int max_rows, int max_sequences, int step_tokens);

// Bytes that a buffer allocates if `bytes` are needed: some more, so that it rarely has to grow.
inline size_t grown(size_t bytes) { return bytes + bytes / 4 + 4096; }

}  // namespace lamoe
