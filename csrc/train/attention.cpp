// Causal attention for training, with rotary embedding, and its gradients.
//
// Logits are computed for some keys at a time and are never stored as a whole. Forward keeps the
// log-sum-exp of each query, from which backward computes the probabilities again.
//
//   forward   rows are queries: S = Q K^T, O = softmax(S) V, with an online softmax over chunks of
//             keys
//   backward  rows are keys: S^T = K Q^T, so that the probabilities P^T and the gradients of the
//             logits dS^T are the row operands of dV = P^T dO and dK = dS^T Q as they are. The
//             third product is dQ^T = K^T dS^T.
//
// All positions are split at multiples of kBlock, so that the products that a block of queries or
// keys takes part in do not depend on how the work is split into items.
#include "train/kernels.h"

#include <cmath>
#include <limits>

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int kBlock = 32;   // queries of forward, or keys of backward, whose logits exist at once
constexpr int kChunk = 512;  // keys of forward whose logits exist at once
constexpr int kRange = 256;  // queries of forward that read a chunk of keys one after the other
constexpr int kQueries = 512;     // queries of backward that are packed at once
constexpr int kKeys = 256;        // keys of backward after which gradients are added to dQ
constexpr float kLeast = -1e30f;  // the largest logit counts as at least this

// Probabilities that become bfloat16 are powers of 2 with a relative error of 4e-6, those that stay
// float32 are powers of e. kLog<E> is the factor from powers of e.
template <class E>
constexpr float kLog = sizeof(E) == 2 ? 1.44269504f : 1.f;
template <class E>
INLINE vf power(vf given) {
  if (sizeof(E) == 4) return vexp(given);
  const vf x = vmax(vset(-100.f), given);  // 2^-100 is as good as 0. NaN stays NaN
  const vf n = vround(x), f = x - n;
  vf p = vfma(f, vset(0.0095605105f), vset(0.055917040f));
  p = vfma(f, p, vset(0.24024981f));
  p = vfma(f, p, vset(0.69312197f));
  return vpow2(vfma(f, p, vset(0.99999917f)), n);
}

INLINE int down(int x) { return x / kBlock * kBlock; }
INLINE int up(int x) { return ceil_to(x, kBlock); }

alignas(64) constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// The positions first .. first + 15 as floats, which are exact below 2^24.
INLINE vf positions(int first) { return vload(kLane) + vset(float(first)); }

// ---- rotation -----------------------------------------------------------------------------------
// Cosines and sines of all positions: [tables][T][2][pairs].
struct Rotation {
  const float* table;
  ptrdiff_t batch;  // floats between the tables of two sequences
  int pairs;
  bool interleaved;
  const float* at(int b, int t) const { return table + b * batch + ptrdiff_t(t) * 2 * pairs; }
};

Rotation rotation(const Parallel& run, const Attention& a) {
  const int pairs = a.rope / 2, tables = a.freqs_batch ? a.batch : 1;
  const ptrdiff_t size = ptrdiff_t(a.tokens) * 2 * pairs;
  float* table = (float*)run.shared(0, sizeof(float) * size_t(size) * tables + 64);
  constexpr int kTokens = 128;
  const int parts = (a.tokens + kTokens - 1) / kTokens;
  run(tables * parts, [&](int item, int) {
    const int b = item / parts, end = std::min(a.tokens, (item % parts + 1) * kTokens);
    for (int t = item % parts * kTokens; t < end; t++) {
      const float* from = a.freqs + b * a.freqs_batch + ptrdiff_t(t) * 2 * pairs;
      float* to = table + b * size + ptrdiff_t(t) * 2 * pairs;
      for (int k = 0; k < pairs; k++) to[k] = from[2 * k], to[pairs + k] = from[2 * k + 1];
    }
  });
  return {table, a.freqs_batch ? size : 0, pairs, a.interleaved};
}

// Rotates the 2 * pairs elements of x by the angles of table row r, or back if `sign` is -1.
template <class From, class To>
void rotate(const From* x, const Rotation& rot, const float* r, float sign, To* out) {
  const int pairs = rot.pairs;
  alignas(64) float u[16], v[16];
  for (int k = 0; k < pairs; k += 16) {
    const int n = std::min(16, pairs - k);
    vf a, b;
    if (!rot.interleaved) {
      a = load_n(x + k, n), b = load_n(x + pairs + k, n);
    } else {
      if (n == 16)
        for (int i = 0; i < 16; i++)
          u[i] = to_float(x[2 * (k + i)]), v[i] = to_float(x[2 * (k + i) + 1]);
      else
        for (int i = 0; i < 16; i++) {
          u[i] = i < n ? to_float(x[2 * (k + i)]) : 0.f;
          v[i] = i < n ? to_float(x[2 * (k + i) + 1]) : 0.f;
        }
      a = vload(u), b = vload(v);
    }
    const vf c = vload_n(r + k, n), s = vload_n(r + pairs + k, n) * vset(sign);
    const vf re = a * c - b * s, im = a * s + b * c;
    if (!rot.interleaved) {
      store_n(out + k, re, n), store_n(out + pairs + k, im, n);
    } else if (sizeof(To) == 2 && n == 16) {
      wstore(out + 2 * k, pair_bf16(re, im));
    } else {
      vstore(u, re), vstore(v, im);
      for (int i = 0; i < n; i++) {
        from_float(out + 2 * (k + i), u[i]);
        from_float(out + 2 * (k + i) + 1, v[i]);
      }
    }
  }
}

// Rows of a head are far apart, so the hardware does not prefetch them. Loops over rows prefetch
// the row that is kAhead rows ahead.
constexpr int kAhead = 8;
template <class E>
INLINE void prefetch(const E* p, int elements) {
  for (int i = 0; i < elements; i += int(64 / sizeof(E))) __builtin_prefetch(p + i, 0, 3);
}
template <class E>
INLINE void prefetch_write(E* p, int elements) {
  for (int i = 0; i < elements; i += int(64 / sizeof(E))) __builtin_prefetch(p + i, 1, 3);
}

template <class E>
INLINE void copy(const E* from, E* to, int n) {
  int i = 0;
  for (; i + 16 * kUnit<E> <= n; i += 16 * kUnit<E>) wstore(to + i, wload(from + i));
  for (; i < n; i++) to[i] = from[i];
}

// ---- sizes and operands -------------------------------------------------------------------------
template <class E>
struct Sizes {
  const Attention& a;
  int t, width, w;     // T, N + R, and N + R padded to 32 elements
  int tv, vp, tw, wp;  // tiles and padded columns of V and of N + R
  explicit Sizes(const Attention& given)
      : a(given),
        t(a.tokens),
        width(a.nope + a.rope),
        w(up(width)),
        tv(tiles(a.value)),
        vp(tv * kTile),
        tw(tiles(width)),
        wp(tw * kTile) {}

  const E* q(int b, int t, int h) const {
    return (const E*)a.q + b * a.q_stride.batch + t * a.q_stride.token + h * a.q_stride.head;
  }
  const E* kv(int b, int t, int g) const {
    return (const E*)a.kv + b * a.kv_stride.batch + t * a.kv_stride.token + g * a.kv_stride.head;
  }
  const E* k_rope(int b, int t, int g) const {
    return (const E*)a.k_rope + b * a.rope_stride.batch + t * a.rope_stride.token +
           (a.one_rope ? 0 : g * a.rope_stride.head);
  }
  // The first key that query i sees, and the end of the queries that see key i.
  int first(int b, int i) const { return a.spans ? a.spans[ptrdiff_t(b) * t + i] : 0; }
  int end(int b, int i) const { return a.spans ? a.spans[(ptrdiff_t(a.batch) + b) * t + i] : t; }
  // Writes rotated queries (or keys) first .. first + n as rows [up(n)][w], padded with zeros.
  void queries(const Rotation& rot, int b, int h, int first, int n, E* to) const {
    for (int i = 0; i < n; i++) {
      if (i + kAhead < n) prefetch(q(b, first + i + kAhead, h), width);
      row(q(b, first + i, h), q(b, first + i, h) + a.nope, rot, rot.at(b, first + i), to + i * w);
    }
    std::fill(to + n * w, to + up(n) * w, E(0));
  }
  void keys(const Rotation& rot, int b, int g, int first, int n, E* to) const {
    for (int i = 0; i < n; i++) {
      if (i + kAhead < n) prefetch(kv(b, first + i + kAhead, g), a.nope + a.value);
      row(kv(b, first + i, g), k_rope(b, first + i, g), rot, rot.at(b, first + i), to + i * w);
    }
    std::fill(to + n * w, to + up(n) * w, E(0));
  }

 private:
  void row(const E* nope, const E* rope, const Rotation& rot, const float* r, E* to) const {
    copy(nope, to, a.nope);
    rotate(rope, rot, r, 1.f, to + a.nope);
    std::fill(to + width, to + w, E(0));
  }
};

// pack_nn of n rows as units 0 .. units(up(n)) of a panel; the rows after the last are 0.
template <class E>
void pack_rows(const E* b, ptrdiff_t ld, int n, int columns, uint8_t* panel, size_t tile) {
  const int count = tiles(columns);
  pack_nn(b, ld, nullptr, n, columns, 0, count, panel, tile);
  for (int t = 0; t < count; t++)
    std::memset(panel + t * tile + size_t(units<E>(n)) * 64, 0,
                size_t(units<E>(up(n)) - units<E>(n)) * 64);
}

// Divides the memory of a thread. Without memory it only counts the bytes.
class Memory {
 public:
  explicit Memory(char* p) : p_(p) {}
  template <class T>
  void take(T*& to, size_t count) {
    to = (T*)(p_ + end_);
    end_ += (count * sizeof(T) + 63) / 64 * 64;
  }
  size_t bytes() const { return end_; }

 private:
  char* p_;
  size_t end_ = 0;
};

// ---- forward ------------------------------------------------------------------------------------
template <class E>
struct Forward {
  static constexpr int kStrideS = kChunk + 16, kStrideP = kChunk + 32;
  uint8_t *keys, *values;  // panels of the keys, and of each chunk of values
  E *rows, *q, *p;         // [2 kBlock][w] keys before packing, [kRange][w], [kBlock][kStrideP]
  float *s, *o;            // [kBlock][kStrideS], [kRange][vp]
  float *most, *sum;       // [kRange] largest logit and sum of exponentials so far
  size_t tile_k, tile_v, chunk_v, bytes;

  Forward(char* memory, const Sizes<E>& z)
      : tile_k(panel_tile<E>(z.w)), tile_v(panel_tile<E>(kChunk)), chunk_v(tile_v * z.tv) {
    Memory m(memory);
    m.take(keys, tile_k * tiles(up(z.t)));
    m.take(values, chunk_v * ((z.t + kChunk - 1) / kChunk));
    m.take(rows, 2 * kBlock * size_t(z.w)), m.take(q, size_t(kRange) * z.w);
    m.take(p, size_t(kBlock) * kStrideP), m.take(s, size_t(kBlock) * kStrideS);
    m.take(o, size_t(kRange) * z.vp), m.take(most, kRange), m.take(sum, kRange);
    bytes = m.bytes();
  }

  // Packs the keys and values from (a multiple of kBlock) to end.
  void pack(const Sizes<E>& z, const Rotation& rot, int b, int g, int from, int end) {
    for (int k = from; k < end; k += 2 * kBlock) {
      const int n = std::min(2 * kBlock, end - k);
      z.keys(rot, b, g, k, n, rows);
      pack_nt(rows, z.w, up(n), z.w, 0, up(n) / kTile, keys + k / kTile * tile_k);
    }
    for (int k = from; k < end;) {
      const int n = std::min(end, k / kChunk * kChunk + kChunk) - k;
      pack_rows(z.kv(b, k, g) + z.a.nope, z.a.kv_stride.token, n, z.a.value,
                values + k / kChunk * chunk_v + size_t(k % kChunk / kUnit<E>) * 64, tile_v);
      k += n;
    }
  }
};

// Replaces the logits s [count] of keys lo .. lo + count, computes their exponentials p relative to
// the largest logit so far, and updates that logit and the sum. Returns the factor on earlier sums.
template <class E>
float exponentials(float* s, E* p, int lo, int count, int first, int last, float scale, float& most,
                   float& sum) {
  if (first >= lo + count) {  // all of these keys belong to earlier documents
    std::fill(p, p + count, E(0));
    return 1.f;
  }
  const vf from = vset(float(first)), to = vset(float(last));
  vf high = vset(kLeast);
  for (int c = 0; c < count; c += kTile) {
    vf x = vload(s + c);
    if (lo + c < first || lo + c + kTile > last + 1) {
      const vf lane = positions(lo + c);
      // limit is infinity, or -infinity where the query does not see the key.
      vf limit = vset(std::numeric_limits<float>::infinity());
      limit = vzero_if_less(vzero_if_less(limit, lane, from), to, lane);
      limit = (limit - vset(std::numeric_limits<float>::max())) * vset(2.f);
      x = vmin(x, limit);  // NaN becomes infinity, which gives NaN again below
      vstore(s + c, x);
    }
    high = vmax(high, x);
  }
  const float before = most, here = vhmax(high);
  most = std::max(most, here * scale);
  // Without a finite logit the result is not a number.
  if (!(here > kLeast)) most = std::numeric_limits<float>::quiet_NaN();
  const vf factor = vset(scale * kLog<E>), offset = vset(-most * kLog<E>);
  vf total = vzero();
  for (int c = 0; c < count; c += 2 * kTile) {
    const vf x = power<E>(vfma(vload(s + c), factor, offset)),
             y = power<E>(vfma(vload(s + c + kTile), factor, offset));
    total = total + x + y;
    store_e(p + c, x), store_e(p + c + kTile, y);
  }
  const float fix = sum == 0.f ? 0.f : std::exp(before - most);  // 0 before the first keys
  sum = sum * fix + vsum(total);
  return fix;
}

template <class E>
void forward(const Parallel& run, const Attention& a) {
  const Sizes<E> z(a);
  const Rotation rot = rotation(run, a);
  const int ranges = (z.t + kRange - 1) / kRange, all = a.batch * a.heads;
  // With few heads, the ranges of a head are split too. Each part packs its keys again.
  const int parts = std::clamp((4 * run.threads() + all - 1) / all, 1, ranges);
  const Parallel::Own own = run.own(Forward<E>(nullptr, z).bytes);
  run(all * parts, [&](int item, int thread) {
    Forward<E> m(own.at<char>(thread), z);
    const int b = item / parts / a.heads, h = item / parts % a.heads;
    const int g = h / (a.heads / a.groups), part = item % parts;
    const int begin = ranges * part / parts * kRange,
              stop = std::min(z.t, ranges * (part + 1) / parts * kRange);
    int packed = begin < z.t ? down(z.first(b, begin)) : 0;
    for (int r = begin; r < stop; r += kRange) {
      const int n = std::min(kRange, stop - r);
      packed = std::max(packed, down(z.first(b, r)));
      m.pack(z, rot, b, g, packed, r + n);
      packed = r + n;
      z.queries(rot, b, h, r, n, m.q);
      std::fill(m.most, m.most + kRange, -std::numeric_limits<float>::infinity());
      std::fill(m.sum, m.sum + kRange, 0.f);
      for (int c = z.first(b, r) / kChunk * kChunk; c < r + n; c += kChunk)
        for (int i = 0; i < n; i += kBlock) {
          const int start = down(z.first(b, r + i)), lo = std::max(c, start);
          const int count = std::min(c + kChunk, r + i + kBlock) - lo,
                    here = std::min(kBlock, n - i);
          if (count <= 0) continue;
          multiply(m.q + i * z.w, z.w, here, z.w, m.keys, m.tile_k, lo / kTile,
                   (lo + count) / kTile, m.s, m.kStrideS);
          float* o = m.o + i * z.vp;
          for (int j = 0; j < here; j++) {
            const int query = r + i + j;
            const float fix =
                exponentials(m.s + j * m.kStrideS, m.p + j * m.kStrideP, lo, count,
                             z.first(b, query), query, a.scale, m.most[i + j], m.sum[i + j]);
            if (c > start)
              for (int k = 0; k < z.vp; k += kTile)
                vstore(o + j * z.vp + k, vload(o + j * z.vp + k) * vset(fix));
          }
          multiply(m.p, m.kStrideP, here, count,
                   m.values + c / kChunk * m.chunk_v + size_t((lo - c) / kUnit<E>) * 64, m.tile_v,
                   0, z.tv, o, z.vp, c > start);
        }
      for (int i = 0; i < n; i++) {
        const ptrdiff_t token = ptrdiff_t(b) * z.t + r + i;
        E* to = (E*)a.out + (token * a.heads + h) * a.value;
        if (i + kAhead < n) prefetch_write(to + ptrdiff_t(kAhead) * a.heads * a.value, a.value);
        const vf share = vset(1.f / m.sum[i]);
        for (int k = 0; k < a.value; k += kTile)
          store_n(to + k, vload(m.o + i * z.vp + k) * share, a.value - k);
        a.lse[(ptrdiff_t(b) * a.heads + h) * z.t + r + i] = m.most[i] + std::log(m.sum[i]);
      }
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------
template <class E>
struct Backward {
  static constexpr int kStrideS = kQueries + 16, kStrideP = kQueries + 32, kStrideK = kKeys + 32;
  E *k, *k_transposed;  // [up(T)][w] keys, [T / kKeys][w][kStrideK] the same, transposed
  float *dk, *dv;       // [up(T)][wp], [up(T)][vp] sums
  E* q;                 // [kQueries][w]
  uint8_t *q_nt, *q_nn, *dout_nt, *dout_nn;
  uint8_t* ds_nn;      // gradients of the logits as b [kKeys, kQueries]
  float *s, *dp;       // [kBlock][kStrideS] logits and gradients of the probabilities
  E *p, *ds;           // [kBlock][kStrideP] probabilities and gradients of the logits
  float* dq;           // [wp][kStrideS], transposed
  float *lse, *along;  // [kQueries] -log sum exp, times kLog, and the sum of dO * O
  size_t tile_w, tile_v, tile_q, tile_k, bytes;

  Backward(char* memory, const Sizes<E>& z)
      : tile_w(panel_tile<E>(z.w)),
        tile_v(panel_tile<E>(z.a.value)),
        tile_q(panel_tile<E>(kQueries)),
        tile_k(panel_tile<E>(kKeys)) {
    Memory m(memory);
    const size_t t = size_t(up(z.t)), blocks = (t + kKeys - 1) / kKeys;
    m.take(k, t * z.w), m.take(k_transposed, blocks * z.w * kStrideK);
    m.take(dk, t * z.wp), m.take(dv, t * z.vp), m.take(q, size_t(kQueries) * z.w);
    m.take(q_nt, tile_w * tiles(kQueries)), m.take(q_nn, tile_q * z.tw);
    m.take(dout_nt, tile_v * tiles(kQueries)), m.take(dout_nn, tile_q * z.tv);
    m.take(ds_nn, tile_k * tiles(kQueries));
    m.take(s, size_t(kBlock) * kStrideS), m.take(dp, size_t(kBlock) * kStrideS);
    m.take(p, size_t(kBlock) * kStrideP), m.take(ds, size_t(kBlock) * kStrideP);
    m.take(dq, size_t(z.wp) * kStrideS), m.take(lse, kQueries), m.take(along, kQueries);
    bytes = m.bytes();
  }
};

// Stores rows k and k + 1 of a panel of b for one tile.
INLINE void store_rows(float* to, vf a, vf b) { vstore(to, a), vstore(to + kTile, b); }
INLINE void store_rows(bf16* to, vf a, vf b) { wstore(to, pair_bf16(a, b)); }

// Computes probabilities and gradients of the logits of two keys for queries lo .. hi (multiples of
// 16), lane by lane. If EDGE, key j is seen only by queries key .. end[j] - 1.
template <class E, bool EDGE>
INLINE void gradients(const Backward<E>& m, int row, int q0, int lo, int hi, int key,
                      const int* end, float scale, uint8_t* panel) {
  const vf factor = vset(scale * kLog<E>);
  for (int c = lo; c < hi; c += kTile) {
    const vf lse = vload(m.lse + c), along = vload(m.along + c);
    vf ds[2];
    UNROLL_FOR(j, 2) {
      const ptrdiff_t at = ptrdiff_t(row + j) * m.kStrideS + c,
                      to = ptrdiff_t(row + j) * m.kStrideP + c;
      vf p = power<E>(vfma(vload(m.s + at), factor, lse));
      ds[j] = p * (vload(m.dp + at) - along);
      if (EDGE) {
        const vf lane = positions(q0 + c), from = vset(float(key + j)),
                 last = vset(float(end[j] - 1));
        p = vzero_if_less(vzero_if_less(p, lane, from), last, lane);
        ds[j] = vzero_if_less(vzero_if_less(ds[j], lane, from), last, lane);
      }
      store_e(m.p + to, p), store_e(m.ds + to, ds[j]);
    }
    store_rows((E*)(panel + c / kTile * m.tile_k), ds[0], ds[1]);
  }
}

// Stores a row of gradients of rotated elements: `nope` elements as they are, the rest rotated
// back.
template <class E>
INLINE void store_back(const float* x, int nope, const Rotation& rot, const float* r, E* to,
                       E* rope) {
  store_row(x, to, nope);
  if (rope) rotate(x + nope, rot, r, -1.f, rope);
}

template <class E>
void backward(const Parallel& run, const Attention& a, const E* dout, E* dq, E* dkv, E* dk_rope) {
  const Sizes<E> z(a);
  const Rotation rot = rotation(run, a);
  const int group = a.heads / a.groups;
  // The gradients of rotary keys that several heads share: [B, G, T, R].
  const bool shared = a.one_rope && a.groups > 1;
  const size_t rope_rows = shared ? size_t(a.batch) * a.groups * z.t : 0;
  float* rope_sums = (float*)run.shared(1, sizeof(float) * rope_rows * a.rope + 64);
  const Parallel::Own own = run.own(Backward<E>(nullptr, z).bytes);
  run(a.batch * a.groups, [&](int item, int thread) {
    const Backward<E> m(own.at<char>(thread), z);
    const int b = item / a.groups, g = item % a.groups;
    const vf scale = vset(a.scale);
    z.keys(rot, b, g, 0, z.t, m.k);
    for (int k = 0; k < z.t; k += kKeys)
      transpose(m.k + ptrdiff_t(k) * z.w, z.w, std::min(kKeys, up(z.t) - k), z.width,
                m.k_transposed + k / kKeys * ptrdiff_t(z.w) * m.kStrideK, m.kStrideK);
    for (int h = g * group; h < (g + 1) * group; h++)
      for (int q0 = 0; q0 < z.t; q0 += kQueries) {
        // 1. pack the queries and the gradients of their outputs
        const int nq = std::min(kQueries, z.t - q0), padded = up(nq);
        const auto output = [&](const void* x, int i) {
          return (const E*)x + ((ptrdiff_t(b) * z.t + q0 + i) * a.heads + h) * a.value;
        };
        const ptrdiff_t ldo = ptrdiff_t(a.heads) * a.value;
        for (int i = 0; i < nq; i++) {
          const E *x = output(dout, i), *y = output(a.out, i);
          if (i + kAhead < nq) {
            prefetch(x + kAhead * ldo, a.value);
            prefetch(y + kAhead * ldo, a.value);
          }
          vf sum = vzero();
          for (int k = 0; k < a.value; k += kTile)
            sum = vfma(load_n(x + k, a.value - k), load_n(y + k, a.value - k), sum);
          m.along[i] = vsum(sum);
          m.lse[i] = -kLog<E> * a.lse[(ptrdiff_t(b) * a.heads + h) * z.t + q0 + i];
        }
        for (int i = nq; i < padded; i++)  // probabilities become 0
          m.along[i] = 0.f, m.lse[i] = -std::numeric_limits<float>::infinity();
        z.queries(rot, b, h, q0, nq, m.q);
        pack_nt(m.q, z.w, padded, z.w, 0, padded / kTile, m.q_nt);
        pack_nn(m.q, z.w, nullptr, padded, z.width, 0, z.tw, m.q_nn, m.tile_q);
        pack_nt(output(dout, 0), ldo, nq, a.value, 0, padded / kTile, m.dout_nt);
        pack_rows(output(dout, 0), ldo, nq, a.value, m.dout_nn, m.tile_q);

        // 2. gradients of the keys and values, block by block
        for (int k0 = z.first(b, q0) / kKeys * kKeys; k0 < q0 + nq; k0 += kKeys) {
          const int k1 = std::min({k0 + kKeys, z.t, q0 + nq});
          for (int k = std::max(k0, down(z.first(b, q0))); k < k1; k += kBlock) {
            const int n = std::min(kBlock, z.t - k);
            const int lo = std::max(k - q0, 0);
            const int hi = std::min(up(z.end(b, k + n - 1)) - q0, padded), count = hi - lo;
            if (count <= 0) continue;
            multiply(m.k + ptrdiff_t(k) * z.w, z.w, n, z.w, m.q_nt, m.tile_w, lo / kTile,
                     hi / kTile, m.s + lo, m.kStrideS);
            multiply(z.kv(b, k, g) + a.nope, a.kv_stride.token, n, a.value, m.dout_nt, m.tile_v,
                     lo / kTile, hi / kTile, m.dp + lo, m.kStrideS);
            // Queries from left to right - 1 see all keys of the block.
            const int left = std::clamp(k + kBlock - q0, lo, hi),
                      right = std::clamp((z.end(b, k) - q0) / kTile * kTile, left, hi);
            for (int j = 0; j < kBlock; j += 2) {
              const int key = k + j;
              const auto end_of = [&](int i) { return i < z.t ? z.end(b, i) : 0; };
              const int end[2] = {end_of(key), end_of(key + 1)};
              uint8_t* panel = m.ds_nn + size_t((key - k0) / kUnit<E>) * 64;
              gradients<E, true>(m, j, q0, lo, left, key, end, a.scale, panel);
              if (j + 2 <= n) {
                gradients<E, false>(m, j, q0, left, right, key, end, a.scale, panel);
                gradients<E, true>(m, j, q0, right, hi, key, end, a.scale, panel);
              } else {
                gradients<E, true>(m, j, q0, left, hi, key, end, a.scale, panel);
              }
            }
            const bool add = h > g * group || k < q0;
            const size_t unit = size_t(lo / kUnit<E>) * 64;
            multiply(m.p + lo, m.kStrideP, n, count, m.dout_nn + unit, m.tile_q, 0, z.tv,
                     m.dv + ptrdiff_t(k) * z.vp, z.vp, add);
            multiply(m.ds + lo, m.kStrideP, n, count, m.q_nn + unit, m.tile_q, 0, z.tw,
                     m.dk + ptrdiff_t(k) * z.wp, z.wp, add);
          }
          // 3. gradients of the queries that see some of these keys
          const E* transposed = m.k_transposed + k0 / kKeys * ptrdiff_t(z.w) * m.kStrideK;
          for (int i = 0; i < padded; i += kBlock) {
            const int start = down(z.first(b, q0 + i)), from = std::max(k0, start);
            const int to = std::min(k0 + kKeys, q0 + i + kBlock);
            if (from < to)
              multiply(transposed + from - k0, m.kStrideK, z.width, to - from,
                       m.ds_nn + size_t((from - k0) / kUnit<E>) * 64, m.tile_k, i / kTile,
                       i / kTile + 2, m.dq + i, m.kStrideS, start < k0);
          }
        }
        for (int i = 0; i < nq; i += kTile) {
          float* rows = m.s;  // [16][wp]
          for (int c = 0; c < z.width; c += kTile)
            transpose_words(m.dq + ptrdiff_t(c) * m.kStrideS + i, sizeof(float) * m.kStrideS,
                            rows + c, sizeof(float) * z.wp);
          for (int j = 0; j < std::min(kTile, nq - i); j++) {
            float* x = rows + j * z.wp;
            for (int c = 0; c < z.wp; c += kTile) vstore(x + c, vload(x + c) * scale);
            const int t = q0 + i + j;
            E* to = dq + ((ptrdiff_t(b) * z.t + t) * a.heads + h) * z.width;
            if (t + kTile < z.t) prefetch_write(to + ptrdiff_t(kTile) * a.heads * z.width, z.width);
            store_back(x, a.nope, rot, rot.at(b, t), to, to + a.nope);
          }
        }
      }
    for (int t = 0; t < z.t; t++) {
      float* x = m.dk + ptrdiff_t(t) * z.wp;
      for (int c = 0; c < z.wp; c += kTile) vstore(x + c, vload(x + c) * scale);
      const ptrdiff_t row = (ptrdiff_t(b) * z.t + t) * a.groups + g;
      E* to = dkv + row * (a.nope + a.value);
      E* rope = shared ? nullptr : dk_rope + row * a.rope;
      if (t + kAhead < z.t)
        prefetch_write(to + ptrdiff_t(kAhead) * a.groups * (a.nope + a.value), a.nope + a.value);
      store_back(x, a.nope, rot, rot.at(b, t), to, rope);
      store_row(m.dv + ptrdiff_t(t) * z.vp, to + a.nope, a.value);
      if (shared)
        std::memcpy(rope_sums + ((ptrdiff_t(b) * a.groups + g) * z.t + t) * a.rope, x + a.nope,
                    sizeof(float) * size_t(a.rope));
    }
  });
  if (!shared || !a.rope) return;
  constexpr int kTokens = 32;
  const int parts = (z.t + kTokens - 1) / kTokens;
  const Parallel::Own sums = run.own(sizeof(float) * size_t(ceil_to(a.rope, kTile)));
  run(a.batch * parts, [&](int item, int thread) {
    float* sum = sums.at<float>(thread);
    const int b = item / parts, end = std::min(z.t, (item % parts + 1) * kTokens);
    for (int t = item % parts * kTokens; t < end; t++) {
      for (int c = 0; c < a.rope; c += kTile) {
        vf x = vzero();
        for (int g = 0; g < a.groups; g++)
          x = x + vload_n(rope_sums + ((ptrdiff_t(b) * a.groups + g) * z.t + t) * a.rope + c,
                          a.rope - c);
        vstore(sum + c, x);
      }
      rotate(sum, rot, rot.at(b, t), -1.f, dk_rope + (ptrdiff_t(b) * z.t + t) * a.rope);
    }
  });
}

}  // namespace

void attention_forward(const Parallel& run, const Attention& a) {
  with_type(a.elem, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(run, a); });
}

void attention_backward(const Parallel& run, const Attention& a, const void* dout, void* dq,
                        void* dkv, void* dk_rope) {
  with_type(a.elem, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    backward(run, a, (const E*)dout, (E*)dq, (E*)dkv, (E*)dk_rope);
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
