// Attention over cache rows that have been decoded into scratch. Two forms:
//   attend_tile    few queries: sixteen (token, head) lanes side by side against up to 64 rows,
//   each row read once for all lanes (absorbed MLA: one
//                  576-wide key whose first 512 elements are the value; MHA / GQA / MQA: one kv
//                  head)
//   rows_as_mat, rows_as_values, softmax_rows   many queries: rows become the weights of `linear`,
//   scores and outputs its products
// Rows and probabilities are BF16 or FP32 (`elem`); a unit is four bytes of them, sums are float.
#include <limits>

#include "cpu/kernels.h"
#if defined(LAMOE_ISA_AMX)
#include "simd/amx.h"
#endif

namespace lamoe {
namespace LAMOE_NS {
namespace {

#if defined(LAMOE_ISA_AVX512)
constexpr int kScoreRows = 16;
constexpr int kOutLanes = 16;
#else
constexpr int kScoreRows = 4;
constexpr int kOutLanes = 4;
#endif

template <int E>
INLINE vf dot_unit(vf acc, vw w, const void* x) {
  return E == FP32 ? dot_f32(acc, w, x) : dot_bf16(acc, w, x);
}

struct Ahead : Soon {
  INLINE void next() {
    if (p < end) __builtin_prefetch(p, 0, 2), p += 64;
  }
  INLINE void next(int lines) {
    for (; lines > 0; lines--) next();
  }
  INLINE void after() {  // where loads are not what a loop waits for: among scores the same lines
                         // cost more than they bring
    if (later < later_end) __builtin_prefetch(later, 0, 2), later += 64;
  }
  INLINE void after(int lines) {
    for (; lines > 0; lines--) after();
  }
};

// out[t][16] = rows t of `units` words times the packed queries
template <int E, int N>
void score_rows(const uint8_t* rows, size_t stride, const uint8_t* q, int units, float* out,
                Ahead& ahead) {
  vf acc[N];
  UNROLL_FOR(i, N) acc[i] = vzero();
  for (int u = 0; u < units; u++) {
    const vw w = wload(q + size_t(u) * 64);
    ahead.next();
    UNROLL_FOR(i, N) acc[i] = dot_unit<E>(acc[i], w, rows + i * stride + size_t(u) * 4);
  }
  UNROLL_FOR(i, N) vstore(out + 16 * i, acc[i]);
}

template <int E, int N = kScoreRows>
void all_scores(const uint8_t* rows, size_t stride, const uint8_t* q, int units, int n, float* out,
                Ahead& ahead) {
  for (; n >= N; n -= N, rows += N * stride, out += 16 * N)
    score_rows<E, N>(rows, stride, q, units, out, ahead);
  if constexpr (N > 1) {
    if (n) all_scores<E, N / 2>(rows, stride, q, units, n, out, ahead);
  }
}

// o[lane][c .. c+16] += sum over rows of p[row][lane] * value[row][c ..], L lanes at once
template <int E, int L>
void add_values(const uint8_t* rows, size_t stride, const uint8_t* p, int n, float* o, int vw_,
                int left) {
  vf acc[L];
  UNROLL_FOR(i, L) acc[i] = vload_n(o + size_t(i) * vw_, left);
  for (int t = 0; t < n; t += E == FP32 ? 1 : 2) {
    const uint8_t* r = rows + t * stride;
    const vw w = E == FP32 ? wload(r)
                           : interleave_bf16((const uint16_t*)r,
                                             (const uint16_t*)(t + 1 < n ? r + stride : r));
    const uint8_t* y = p + size_t(E == FP32 ? t : t / 2) * 64;
    UNROLL_FOR(i, L) acc[i] = dot_unit<E>(acc[i], w, y + 4 * i);
  }
  UNROLL_FOR(i, L) vstore_n(o + size_t(i) * vw_, acc[i], left);
}

template <int E>
void add_lanes(int lanes, const uint8_t* rows, size_t stride, const uint8_t* p, int n, float* o,
               int vw_, int left) {
  for (int i = 0; i < lanes;) {
    const int rest = lanes - i;
    float* to = o + size_t(i) * vw_;
    if (rest >= 16 && kOutLanes >= 16) {
      add_values<E, kOutLanes>(rows, stride, p + 4 * i, n, to, vw_, left);
      i += kOutLanes;
    } else if (rest >= 8 && kOutLanes >= 8) {
      add_values<E, 8>(rows, stride, p + 4 * i, n, to, vw_, left);
      i += 8;
    } else if (rest >= 4) {
      add_values<E, 4>(rows, stride, p + 4 * i, n, to, vw_, left);
      i += 4;
    } else if (rest >= 2) {
      add_values<E, 2>(rows, stride, p + 4 * i, n, to, vw_, left);
      i += 2;
    } else {
      add_values<E, 1>(rows, stride, p + 4 * i, n, to, vw_, left);
      i += 1;
    }
  }
}

// Rows that a lane does not see: minus infinity.
void hide(float* s, int n, int r0, const int* last, int n_lanes) {
  int least = last[0];
  for (int i = 1; i < n_lanes; i++) least = last[i] < least ? last[i] : least;
  for (int t = least - r0 + 1 < 0 ? 0 : least - r0 + 1; t < n; t++)
    for (int i = 0; i < n_lanes; i++)
      if (r0 + t > last[i]) s[16 * t + i] = -INFINITY;
}

template <int E>
void attend(const uint8_t* tile, size_t stride, int n, int r0, int k0, int kw, int v0, int vw_,
            float scale, const Lanes& lanes, int n_lanes, float* m, float* l, float* o,
            uint8_t* scratch, Ahead ahead) {
  constexpr int kBytes = E == FP32 ? 4 : 2;
  float* s = (float*)scratch;      // [64][16]
  uint8_t* p = scratch + 64 * 64;  // [64 or 32][16] words
  const uint8_t *keys = tile + size_t(k0) * kBytes, *q = (const uint8_t*)lanes.q,
                *values = tile + size_t(v0) * kBytes;
#if defined(LAMOE_ISA_AMX)
  if (E == BF16 && kw % 32 == 0)
    tile_scores<false>(keys, stride, q, kw / 32, n, s, ahead);
  else
#endif
    all_scores<E>(keys, stride, q, kw * kBytes / 4, n, s, ahead);
  for (int t = 0; t < n; t++) vstore(s + 16 * t, vload(s + 16 * t) * vset(scale));
  hide(s, n, r0, lanes.last, n_lanes);
  vf top = vload(m);
  for (int t = 0; t < n; t++) top = vmax(top, vload(s + 16 * t));
  const vf fix = vexp(vload(m) - top);
  vf sum = vload(l) * fix;
  if (vdiffers(vload(m), top)) {
    float f[16];
    vstore(f, fix);
    for (int i = 0; i < n_lanes; i++)
      for (int c = 0; c < vw_; c += 16)
        vstore_n(o + size_t(i) * vw_ + c, vload_n(o + size_t(i) * vw_ + c, vw_ - c) * vset(f[i]),
                 vw_ - c);
  }
  for (int t = 0; t < n; t += 2) {
    const vf a = vexp(vload(s + 16 * t) - top),
             b = t + 1 < n ? vexp(vload(s + 16 * t + 16) - top) : vzero();
    sum = sum + a + b;
    if (E == FP32) {
      vstore((float*)p + 16 * t, a);
      vstore((float*)p + 16 * t + 16, b);
    } else {
      wstore(p + size_t(t / 2) * 64, pair_bf16(a, b));
    }
  }
  vstore(m, top);
  vstore(l, sum);
#if defined(LAMOE_ISA_AMX)
  if (E == BF16 && vw_ % 32 == 0) {
    for (int t = (n + 1) / 2; t < 32; t++) wstore(p + 64 * t, wset(0));
    return tile_values(n_lanes, values, stride, p, n, o, vw_);
  }
#endif
  for (int c = 0; c < vw_; c += 16)
    add_lanes<E>(n_lanes, values + size_t(c) * kBytes, stride, p, n, o + c, vw_, vw_ - c);
}

// ---- rows as integers
// ----------------------------------------------------------------------------------------------------
// s[t][16] = (s[t] + step of row t * step of the lane * integer products) * scale
template <int N>
void score_ints(const int8_t* rows, size_t stride, const float* step, const int32_t* sums,
                const uint8_t* q, int units, vf lane, vf scale, float* s, Ahead& ahead) {
  vw acc[N];
  UNROLL_FOR(i, N) acc[i] = start_int8(sums[i]);
  for (int u = 0; u < units; u++) {
    const vw w = decode_int8(q + size_t(u) * 64);
    ahead.next();
    UNROLL_FOR(i, N) acc[i] = dot_int8(acc[i], w, rows + i * stride + size_t(u) * 4);
  }
  UNROLL_FOR(i, N)
    vstore(s + 16 * i, vfma(vcvt(acc[i]), lane * vset(step[i]), vload(s + 16 * i)) * scale);
}

template <int N = kScoreRows>
void all_score_ints(const int8_t* rows, size_t stride, const float* step, const int32_t* sums,
                    const uint8_t* q, int units, vf lane, vf scale, int n, float* s, Ahead& ahead) {
  for (; n >= N; n -= N, rows += N * stride, step += N, sums += N, s += 16 * N)
    score_ints<N>(rows, stride, step, sums, q, units, lane, scale, s, ahead);
  if constexpr (N > 1) {
    if (n) all_score_ints<N / 2>(rows, stride, step, sums, q, units, lane, scale, n, s, ahead);
  }
}

// o[lane][16 c ..] = o * fix[lane] + unit[lane] * the sum over fours of rows of weights times
// bytes; L lanes, C vectors of columns at once
template <int L, int C>
void add_ints(const uint8_t* quads, const uint8_t* p, int fours, float* o, int width,
              const float* fix, const float* unit, Ahead& ahead) {
  vw acc[L][C];
  UNROLL_FOR(i, L)
    UNROLL_FOR(c, C) acc[i][c] = wset(0);
  for (int t = 0; t < fours; t++) {
    vw w[C];
    UNROLL_FOR(c, C) w[c] = wload(quads + (16 * c + t) * 64);
    ahead.after();
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
void add_lane_ints(int lanes, const uint8_t* quads, const uint8_t* p, int fours, float* o,
                   int width, const float* fix, const float* unit, Ahead& ahead) {
  for (; lanes >= L; lanes -= L, p += 4 * L, o += size_t(L) * width, fix += L, unit += L)
    add_ints<L, C>(quads, p, fours, o, width, fix, unit, ahead);
  if constexpr (L > 1) {
    if (lanes) add_lane_ints<L / 2, C>(lanes, quads, p, fours, o, width, fix, unit, ahead);
  }
}

}  // namespace

void pack_lanes_ints(const Codec& c, const float* const* q, int n_lanes, void* out) {
  const int w = c.w[0];
  uint8_t* words = (uint8_t*)out;
  float* scale = (float*)(words + size_t(w) * 16);
  std::memset(words, 128, size_t(w) * 16);
  std::memset(scale, 0, 64);
  const float* keys[16];
  for (int i = 0; i < n_lanes; i++) {
    keys[i] = q[i] + w;
    vf top = vzero(), bad = vzero();
    for (int j = 0; j < w; j += 16)
      top = vmax(top, vabs(vload(q[i] + j))), bad = bad + vload(q[i] + j) * vzero();
    const float s = vhmax(top) / 127.f + vsum(bad);  // NaN where something is not finite
    const bool some = s >= std::numeric_limits<float>::min();
    scale[i] = s;
    for (int j = 0; some && j < w; j += 64) {
      int8_t codes[64];
      for (int k = 0; k < 64; k += 16) vquant(codes + k, vload(q[i] + j + k) * vset(1.f / s));
      for (int k = 0; k < 64; k++)
        words[size_t(j) * 16 + (k / 4 % 4 * 4 + k / 16) * 64 + 4 * i + k % 4] =
            uint8_t(codes[k] + 128);
    }
  }
  pack_lanes(BF16, keys, n_lanes, c.w[1], scale + 16);
}

// Weights p of a lane become bytes: times the step of their rows, as shares of the largest of the
// tile. What rounding leaves over goes to the next row, so that many small weights beside a large
// one keep their sum.
void attend_ints(const Codec& c, const void* tile, int n, int r0, float scale, const Lanes& lanes,
                 int n_lanes, float* m, float* l, float* o, void* scratch, const Soon& soon) {
  const int width = c.w[0];
  Ahead ahead{soon};
  const int8_t* bytes = (const int8_t*)tile;
  const uint8_t* quads = (const uint8_t*)tile + 64 * size_t(width);
  const float* step = (const float*)(quads + 64 * size_t(width));
  const int32_t* sums = (const int32_t*)(step + 64);
  const uint8_t* q = (const uint8_t*)lanes.q;
  const float* lane = (const float*)(q + size_t(width) * 16);
  float* s = (float*)scratch;            // [64][16]
  uint8_t* p = (uint8_t*)(s + 64 * 16);  // [16 fours][16 lanes][4]
  const uint8_t *keys = (const uint8_t*)(sums + 64), *key_lanes = (const uint8_t*)(lane + 16);
#if defined(LAMOE_ISA_AMX)
  if (c.w[1] % 32 == 0)
    tile_scores<false>(keys, size_t(c.w[1]) * 2, key_lanes, c.w[1] / 32, n, s, ahead);
  else
#endif
    all_scores<BF16>(keys, size_t(c.w[1]) * 2, key_lanes, c.w[1] / 2, n, s, ahead);
#if defined(LAMOE_ISA_AMX)
  tile_score_ints((const uint8_t*)bytes, width, step, sums, q, width / 64, vload(lane), vset(scale),
                  n, s, ahead);
#else
  all_score_ints(bytes, width, step, sums, q, width / 4, vload(lane), vset(scale), n, s, ahead);
#endif
  hide(s, n, r0, lanes.last, n_lanes);
  vf top = vload(m), most = vzero();
  for (int t = 0; t < n; t++) top = vmax(top, vload(s + 16 * t));
  const vf fix = vexp(vload(m) - top);
  vf sum = vload(l) * fix;
  for (int t = 0; t < n; t++) {
    const vf e = vexp(vload(s + 16 * t) - top),
             w = vmax(e * vset(step[t]), vzero());  // in this order NaN becomes 0; the sum keeps it
    sum = sum + e;
    vstore(s + 16 * t, w);
    most = vmax(most, w);
  }
  const vf full = vset(float(kMostByte)), up = full / vmax(most, vset(1e-30f));
  vf rest = vzero();
  for (int t = 0; t < n; t += 4) {
    vw word = wset(0);
    UNROLL_FOR(j, 4) {
      if (t + j >= n) break;
      const vf x = vfma(vload(s + 16 * (t + j)), up, rest),
               r = vmin(vmax(vround(x), vzero()), full);
      rest = vmin(x - r, vset(0.5f));  // a little more is left of the largest weight, and that must
                                       // not make a row count that a lane does not see
      word = wor_left(word, wround(r), 8 * j);
    }
    wstore(p + size_t(t) * 16, word);
  }
  vstore(m, top);
  vstore(l, sum);
  float fixes[16], units[16];
  vstore(fixes, fix);
  vstore(units, most * vset(1.f / kMostByte));
#if defined(LAMOE_ISA_AMX)
  for (int t = (n + 3) / 4; t < 16; t++) wstore(p + 64 * t, wset(0));
  tile_value_ints(n_lanes, quads, p, o, width, fixes, units, ahead);
#else
  for (int k = 0; k < width; k += 32)
    add_lane_ints<kOutLanes / 2, 2>(n_lanes, quads + size_t(k) * 64, p, (n + 3) / 4, o + k, width,
                                    fixes, units, ahead);
#endif
}

// scratch: 64 x 16 scores and as many probabilities. A tile's rows may be read up to 15 elements
// beyond v0 + vw: leave room behind the last one.
void attend_tile(int elem, const void* tile, int stride, int n, int r0, int k0, int kw, int v0,
                 int vw, float scale, const Lanes& lanes, int n_lanes, float* m, float* l, float* o,
                 void* scratch, const Soon& soon) {
  const Ahead ahead{soon};
  if (elem == FP32)
    attend<FP32>((const uint8_t*)tile, size_t(stride) * 4, n, r0, k0, kw, v0, vw, scale, lanes,
                 n_lanes, m, l, o, (uint8_t*)scratch, ahead);
  else
    attend<BF16>((const uint8_t*)tile, size_t(stride) * 2, n, r0, k0, kw, v0, vw, scale, lanes,
                 n_lanes, m, l, o, (uint8_t*)scratch, ahead);
}

void combine(const float* states, size_t step, int count, int lane, int vw_, float* out) {
  float top = states[lane], sum = 0;
  for (int i = 1; i < count; i++) {
    const float m = states[i * step + lane];
    if (!(m <= top)) top = m;
  }
  for (int c = 0; c < vw_; c += 16) vstore_n(out + c, vzero(), vw_ - c);
  for (int i = 0; i < count; i++) {
    const float* s = states + i * step;
    const float f = std::exp(s[lane] - top);
    sum += s[16 + lane] * f;
    const float* o = s + 32 + size_t(lane) * vw_;
    for (int c = 0; c < vw_; c += 16)
      vstore_n(out + c, vfma(vload_n(o + c, vw_ - c), vset(f), vload_n(out + c, vw_ - c)), vw_ - c);
  }
  const vf inverse = vset(1.f / sum);
  for (int c = 0; c < vw_; c += 16) vstore_n(out + c, vload_n(out + c, vw_ - c) * inverse, vw_ - c);
}

void pack_lanes(int elem, const float* const* q, int n_lanes, int width, void* out) {
  std::memset(out, 0, size_t(elem == FP32 ? width : width / 2) * 64);
  for (int i = 0; i < n_lanes; i++)
    for (int c = 0; c < width; c += 64) {
      uint32_t words[64];
      const int n = width - c < 64 ? width - c : 64, units = elem == FP32 ? n : n / 2;
      if (elem == FP32) {
        std::memcpy(words, q[i] + c, 4 * n);
      } else {
        uint16_t h[64];
        for (int j = 0; j < n; j += 16) vstore_bf16(h + j, vload_n(q[i] + c + j, n - j));
        std::memcpy(words, h, 2 * n);
      }
      uint32_t* to = (uint32_t*)out + 16 * (elem == FP32 ? c : c / 2) + i;
      for (int u = 0; u < units; u++) to[16 * u] = words[u];
    }
}

void rows_as_mat(int elem, const void* rows, int stride, int col, int width, int n, void* out) {
  const int units = elem == FP32 ? width : width / 2;
  const size_t row = size_t(stride) * (elem == FP32 ? 4 : 2);
  const uint8_t* from = (const uint8_t*)rows + size_t(col) * (elem == FP32 ? 4 : 2);
  for (int t = 0; t < tiles(n); t++) {
    uint32_t* to = (uint32_t*)out + size_t(t) * units * 16;
    for (int i = 0; i < kTile; i++) {
      const int r = t * kTile + i;
      if (r < n) {
        const uint8_t* x = from + r * row;
        for (int u = 0; u < units; u++) std::memcpy(to + u * 16 + i, x + 4 * u, 4);
      } else {
        for (int u = 0; u < units; u++) to[u * 16 + i] = 0;
      }
    }
  }
}

void rows_as_values(int elem, const void* rows, int stride, int col, int width, int n, void* out) {
  const size_t bytes = elem == FP32 ? 4 : 2, row = size_t(stride) * bytes;
  const uint8_t* from = (const uint8_t*)rows + size_t(col) * bytes;
  const int units = elem == FP32 ? n : (n + 1) / 2;
  for (int t = 0; t < tiles(width); t++)
    for (int u = 0; u < units; u++) {
      uint8_t* to = (uint8_t*)out + (size_t(t) * units + u) * 64;
      for (int i = 0; i < kTile; i++) {
        const int c = t * kTile + i;
        uint32_t word = 0;
        if (c < width) {
          if (elem == FP32) {
            std::memcpy(&word, from + u * row + 4 * c, 4);
          } else {
            uint16_t a, b = 0;
            std::memcpy(&a, from + size_t(2 * u) * row + 2 * c, 2);
            if (2 * u + 1 < n) std::memcpy(&b, from + size_t(2 * u + 1) * row + 2 * c, 2);
            word = a | uint32_t(b) << 16;
          }
        }
        std::memcpy(to + 4 * i, &word, 4);
      }
    }
}

// Two tiles of rows at a time: products [nope][32], then pairs of nope elements side by side as
// units of the key tiles.
void expand_keys(int elem, const uint8_t* latents, int latent_width, int t0, int t1, const Acts& uk,
                 int units, void* out, float* tmp) {
  const size_t tile = tile_bytes(elem, latent_width);
  for (int t = t0; t < t1; t += 2) {
    const int count = t + 2 <= t1 ? 2 : 1;
    const Mat m{elem, kTile * count, latent_width, latents + t * tile, 1.f};
    linear(m, 0, count, uk, 0, uk.rows, tmp, 32, nullptr, nullptr);
    for (int i = 0; i < count; i++) {
      uint8_t* to = (uint8_t*)out + size_t(t + i) * units * 64;
      const float* x = tmp + 16 * i;
      if (elem == FP32) {
        for (int u = 0; u < uk.rows; u++) vstore((float*)to + 16 * u, vload(x + 32 * u));
      } else {
        for (int u = 0; 2 * u < uk.rows; u++)
          wstore(to + 64 * u, pair_bf16(vload(x + 64 * u), vload(x + 64 * u + 32)));
      }
    }
  }
}

void expand_values(const Mat& uv, const Acts& rows, int row0, int n, void* out, float* tmp) {
  constexpr int kChunk = 48;
  const int width = ceil_to(uv.n, kTile), units = uv.fmt == FP32 ? n : (n + 1) / 2;
  for (int r = 0; r < n; r += kChunk) {
    const int count = n - r < kChunk ? n - r : kChunk;
    linear(uv, 0, tiles(uv.n), rows, row0 + r, count, tmp, width, nullptr, nullptr);
    for (int t = 0; t < tiles(uv.n); t++) {
      const int valid = uv.n - t * kTile;
      uint8_t* to = (uint8_t*)out + size_t(t) * units * 64;
      for (int i = 0; i < count; i += uv.fmt == FP32 ? 1 : 2) {
        const float* x = tmp + size_t(i) * width + 16 * t;
        const vf a = vload_n(x, valid), b = i + 1 < count ? vload_n(x + width, valid) : vzero();
        if (uv.fmt == FP32)
          vstore((float*)(to + size_t(r + i) * 64), a);
        else
          wstore(to + size_t((r + i) / 2) * 64, pair_bf16(a, b));
      }
    }
  }
}

// scores [rows, cols] -> p = exp(scores * scale - m) with the running m and l of each row moved on;
// rescale: what earlier outputs are to be multiplied with. Of row i only the first visible[i]
// columns count. p is filled with zeros up to ldp.
void softmax_rows(int elem, float* scores, int lds, int rows, int cols, const int* visible,
                  float scale, float* m, float* l, float* rescale, void* p, int ldp) {
  for (int i = 0; i < rows; i++) {
    float* s = scores + size_t(i) * lds;
    const int n = visible[i] < cols ? visible[i] < 0 ? 0 : visible[i] : cols;
    for (int c = n; c < ceil_to(ldp, 16) && c < lds; c++) s[c] = -INFINITY;
    vf top = vset(m[i]);
    for (int c = 0; c < n; c += 16) {
      vf v = vload(s + c) * vset(scale);
      vstore(s + c, v);
      top = vmax(top, v);
    }
    const float now = vhmax(top);
    rescale[i] = std::exp(m[i] - now);
    m[i] = now;
    vf sum = vzero();
    for (int c = 0; c < ldp; c += 16) {
      const vf e =
          c < n ? vexp(vload(s + c) - vset(now)) : vzero();  // exactly 0 beyond the visible ones
      sum = sum + e;
      if (elem == FP32)
        vstore_n((float*)p + size_t(i) * ldp + c, e, ldp - c);
      else
        vstore_bf16((uint16_t*)p + size_t(i) * ldp + c, e);
    }
    l[i] = l[i] * rescale[i] + vsum(sum);
  }
}

}  // namespace LAMOE_NS
}  // namespace lamoe
