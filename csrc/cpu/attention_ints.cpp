// Absorbed attention over cache rows whose latents are integers (IntTile). A latent consists of
// signed bytes with one step size per row. Queries and the softmax weights of each tile of 64 rows
// are rounded to 8 bits. The rope key stays in bfloat16.
#include "cpu/attention.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

// Adds the latent scores of N rows to their rope scores, and scales the sums:
//   s[row][lane] = (s[row][lane] + step[row] * lane_scale[lane] * integer product) * scale
template <int N>
void score_ints(const IntTile& tile, int t, const IntLanes& lanes, vf scale, float* s,
                Ahead& ahead) {
  const int8_t* rows = tile.row(t);
  const float* step = tile.steps() + t;
  const int32_t* sums = tile.sums() + t;
  const vf lane = vload(lanes.scales());
  vw acc[N];
  UNROLL_FOR(i, N) acc[i] = start_int8(sums[i]);
  for (int u = 0; u < tile.width / 4; u++) {
    const vw w = decode_int8(lanes.words() + size_t(u) * 64);
    ahead.next();
    UNROLL_FOR(i, N) acc[i] = dot_int8(acc[i], w, rows + i * size_t(tile.width) + size_t(u) * 4);
  }
  UNROLL_FOR(i, N) {
    float* to = s + kLanes * (t + i);
    vstore(to, vfma(vcvt(acc[i]), lane * vset(step[i]), vload(to)) * scale);
  }
}

// Computes the scores of rows t .. n, N at a time. The remaining rows follow in smaller groups.
template <int N = Traits::kScoreRows>
void vector_score_ints(const IntTile& tile, int t, int n, const IntLanes& lanes, vf scale, float* s,
                       Ahead& ahead) {
  for (; n - t >= N; t += N) score_ints<N>(tile, t, lanes, scale, s, ahead);
  if constexpr (N > 1) {
    if (t < n) vector_score_ints<N / 2>(tile, t, n, lanes, scale, s, ahead);
  }
}

template <class Unit>
void add_latent_scores(const IntTile& tile, int n, const IntLanes& lanes, vf scale, float* s,
                       Ahead& ahead) {
  if constexpr (Unit::kAvailable)
    Unit::add_int_scores(tile, lanes, scale, n, s, ahead);
  else
    vector_score_ints(tile, 0, n, lanes, scale, s, ahead);
}

// Updates L lanes and C vectors of 16 columns of the output. The integer sum runs over all rows,
// four rows (one quad) per instruction:
//   o[lane][column] = o[lane][column] * fix[lane] + unit[lane] * sum of p[row][lane] * byte[row]
template <int L, int C>
void add_ints(const uint8_t* quads, const uint8_t* p, int row_quads, float* o, int width,
              const float* fix, const float* unit, Ahead& ahead) {
  vw acc[L][C];
  UNROLL_FOR(i, L)
    UNROLL_FOR(c, C) acc[i][c] = wset(0);
  for (int t = 0; t < row_quads; t++) {
    vw w[C];
    UNROLL_FOR(c, C) w[c] = wload(quads + (16 * c + t) * 64);
    ahead.later();
    UNROLL_FOR(i, L)
      UNROLL_FOR(c, C) acc[i][c] = dot_bytes(acc[i][c], w[c], p + 64 * t + 4 * i);
  }
  UNROLL_FOR(i, L)
    UNROLL_FOR(c, C) {
      float* to = o + size_t(i) * width + 16 * c;
      vstore(to, vfma(vload(to), vset(fix[i]), vcvt(acc[i][c]) * vset(unit[i])));
    }
}

template <int L, int C>
void add_lane_ints(int lanes, const uint8_t* quads, const uint8_t* p, int row_quads, float* o,
                   int width, const float* fix, const float* unit, Ahead& ahead) {
  for (; lanes >= L; lanes -= L, p += 4 * L, o += size_t(L) * width, fix += L, unit += L)
    add_ints<L, C>(quads, p, row_quads, o, width, fix, unit, ahead);
  if constexpr (L > 1) {
    if (lanes) add_lane_ints<L / 2, C>(lanes, quads, p, row_quads, o, width, fix, unit, ahead);
  }
}

template <class Unit>
void add_weighted_ints(const IntTile& tile, uint8_t* p, int n, int lanes, float* o,
                       const float* fix, const float* unit, Ahead& ahead) {
  if constexpr (Unit::kAvailable) {
    Unit::int_values(lanes, tile, p, n, o, fix, unit, ahead);
  } else {
    for (int c = 0; c < tile.width; c += 32)
      add_lane_ints<Traits::kOutLanes / 2, 2>(lanes, tile.quads(c), p, (n + 3) / 4, o + c,
                                              tile.width, fix, unit, ahead);
  }
}

// Rounds the softmax weights s[n rows][16 lanes] to bytes p[row / 4][lane][row % 4]. No weight of a
// lane exceeds `most`. The rounding error of a row carries over to the next row, so that many small
// weights beside a large one keep their sum.
void round_weights(float (*s)[kLanes], int n, vf most, uint8_t* p) {
  const vf full = vset(float(Traits::kMaxByte)), up = full / vmax(most, vset(1e-30f));
  vf rest = vzero();
  for (int t = 0; t < n; t += 4) {
    vw word = wset(0);
    UNROLL_FOR(j, 4) {
      if (t + j >= n) break;
      const vf x = vfma(vload(s[t + j]), up, rest), r = vmin(vmax(vround(x), vzero()), full);
      // Clamp the carried error. The largest weight can leave more than 1/2, and carrying that over
      // could give a masked row a nonzero weight.
      rest = vmin(x - r, vset(0.5f));
      word = wor_left(word, wround(r), 8 * j);
    }
    wstore(p + size_t(t) * 16, word);
  }
}

}  // namespace

void pack_lanes_ints(const Codec& c, const float* const* q, int lanes, void* out) {
  const IntLanes to(c, out);
  const int w = c.w[0];
  std::memset(to.words(), 128, to.words_bytes());
  std::memset(to.scales(), 0, kLanes * sizeof(float));
  const float* keys[kLanes];
  for (int i = 0; i < lanes; i++) {
    keys[i] = q[i] + w;
    vf top = vzero(), bad = vzero();
    for (int j = 0; j < w; j += 16)
      top = vmax(top, vabs(vload(q[i] + j))), bad = bad + vload(q[i] + j) * vzero();
    // `bad` is NaN if any element is not finite. The scale then becomes NaN too.
    const float s = vhmax(top) / 127.f + vsum(bad);
    const bool some = s >= std::numeric_limits<float>::min();
    to.scales()[i] = s;
    for (int j = 0; some && j < w; j += 64) {
      int8_t codes[64];
      for (int k = 0; k < 64; k += 16) vquant(codes + k, vload(q[i] + j + k) * vset(1.f / s));
      // Every 64 columns are 16 words of four codes. They are transposed as a 4 x 4 matrix of
      // words, because the rows of an IntTile are stored in this order.
      for (int k = 0; k < 64; k++) {
        const int word = k / 4 % 4 * 4 + k / 16;
        to.words()[size_t(j) * kLanes + word * 64 + 4 * i + k % 4] = uint8_t(codes[k] + 128);
      }
    }
  }
  pack_lanes(BF16, keys, lanes, c.w[1], to.rope());
}

void attend_ints(const Codec& c, const RowTile& rows, float scale, const Lanes& lanes,
                 const AttentionState& state, AttentionScratch* scratch, const Prefetch& prefetch) {
  Ahead ahead{prefetch};
  const int n = rows.count;
  const IntTile tile(c, rows.rows);
  const IntLanes queries(c, lanes.q);
  float (*s)[kLanes] = scratch->scores;
  const size_t key_bytes = size_t(tile.rope) * 2;
  key_scores<BF16>((const uint8_t*)tile.key(0), key_bytes, queries.rope(), int(key_bytes), n, s[0],
                   ahead);
  add_latent_scores<Tiles>(tile, n, queries, vset(scale), s[0], ahead);
  mask(s, n, rows.first, lanes);
  vf top = vload(state.maximum()), most = vzero();
  for (int t = 0; t < n; t++) top = vmax(top, vload(s[t]));
  const vf fix = vexp(vload(state.maximum()) - top);
  vf sum = vload(state.sum()) * fix;
  for (int t = 0; t < n; t++) {
    const vf e = vexp(vload(s[t]) - top);
    // vmax returns its second operand if one is NaN. So a NaN weight becomes 0 in the bytes, and
    // only `sum` still carries the NaN.
    const vf w = vmax(e * vset(tile.steps()[t]), vzero());
    sum = sum + e;
    vstore(s[t], w);
    most = vmax(most, w);
  }
  round_weights(s, n, most, scratch->weights);
  vstore(state.maximum(), top);
  vstore(state.sum(), sum);
  float fixes[kLanes], units[kLanes];
  vstore(fixes, fix);
  vstore(units, most * vset(1.f / Traits::kMaxByte));
  add_weighted_ints<Tiles>(tile, scratch->weights, n, lanes.count, state.output(), fixes, units,
                           ahead);
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
