// Attention over cache rows in absorbed form, with online softmax. One call processes a tile of 64
// cache rows for up to 16 lanes. A lane is one (token, head) pair. Each row is read once for all
// lanes. Under absorbed MLA a row is one key, and its latent part is also the value. Under
// MHA / GQA / MQA all lanes of a call share one kv head.
//
// Rows and softmax weights are BF16 or FP32 (`elem`). Sums are FP32. attention_expanded.cpp has the
// expanded form, for many queries. attention_ints.cpp has attention over integer rows.
#include "cpu/attention.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

// Adds the weighted values of n cache rows to 16 output columns of L lanes:
//   o[lane][0 .. 16] += sum over rows of p[row][lane] * rows[row][0 .. 16]
// `left` is the number of columns up to the end of the value. Columns beyond it are not written.
template <int E, int L>
void add_values(const uint8_t* rows, size_t stride, const uint8_t* p, int n, float* o, int width,
                int left) {
  vf acc[L];
  UNROLL_FOR(i, L) acc[i] = vload_n(o + size_t(i) * width, left);
  for (int t = 0; t < n; t += E == FP32 ? 1 : 2) {
    const uint8_t* r = rows + t * stride;
    const uint8_t* after = t + 1 < n ? r + stride : r;
    const vw w = E == FP32 ? wload(r) : interleave_bf16((const uint16_t*)r, (const uint16_t*)after);
    const uint8_t* y = p + size_t(E == FP32 ? t : t / 2) * 64;
    UNROLL_FOR(i, L) acc[i] = dot_unit<E>(acc[i], w, y + 4 * i);
  }
  UNROLL_FOR(i, L) vstore_n(o + size_t(i) * width, acc[i], left);
}

// Processes all lanes, L at a time. The remaining lanes follow in smaller groups.
template <int E, int L = Traits::kOutLanes>
void add_lanes(int lanes, const uint8_t* rows, size_t stride, const uint8_t* p, int n, float* o,
               int width, int left) {
  for (; lanes >= L; lanes -= L, p += 4 * L, o += size_t(L) * width)
    add_values<E, L>(rows, stride, p, n, o, width, left);
  if constexpr (L > 1) {
    if (lanes) add_lanes<E, L / 2>(lanes, rows, stride, p, n, o, width, left);
  }
}

// Adds softmax weights times values to the outputs of all lanes and columns.
template <int E, class Unit>
void add_weighted(const uint8_t* values, size_t stride, uint8_t* p, int n, int lanes,
                  const AttentionState& state) {
  if constexpr (E == BF16 && Unit::kAvailable) {
    if (Unit::fits(state.width))
      return Unit::values(lanes, values, stride, p, n, state.output(), state.width);
  }
  for (int c = 0; c < state.width; c += 16)
    add_lanes<E>(lanes, values + size_t(c) * element_bytes(E), stride, p, n, state.output() + c,
                 state.width, state.width - c);
}

void scale_rows(const AttentionState& state, int lanes, vf fix) {
  float f[kLanes];
  vstore(f, fix);
  for (int i = 0; i < lanes; i++)
    for (int c = 0; c < state.width; c += 16) {
      float* o = state.output(i) + c;
      vstore_n(o, vload_n(o, state.width - c) * vset(f[i]), state.width - c);
    }
}

template <int E>
void attend(const RowTile& tile, const Columns& columns, float scale, const Lanes& lanes,
            const AttentionState& state, AttentionScratch* scratch, Ahead ahead) {
  const int n = tile.count, key_bytes = columns.key_width * element_bytes(E);
  const size_t stride = size_t(tile.stride) * element_bytes(E);
  const uint8_t* keys = (const uint8_t*)tile.rows + size_t(columns.key) * element_bytes(E);
  const uint8_t* values = (const uint8_t*)tile.rows + size_t(columns.value) * element_bytes(E);
  float (*s)[kLanes] = scratch->scores;
  uint8_t* p = scratch->weights;

  key_scores<E>(keys, stride, (const uint8_t*)lanes.q, key_bytes, n, s[0], ahead);
  for (int t = 0; t < n; t++) vstore(s[t], vload(s[t]) * vset(scale));
  mask(s, n, tile.first, lanes);
  vf top = vload(state.maximum());
  for (int t = 0; t < n; t++) top = vmax(top, vload(s[t]));
  const vf fix = vexp(vload(state.maximum()) - top);
  vf sum = vload(state.sum()) * fix;
  if (vdiffers(vload(state.maximum()), top)) scale_rows(state, lanes.count, fix);
  for (int t = 0; t < n; t += 2) {
    const vf a = vexp(vload(s[t]) - top), b = t + 1 < n ? vexp(vload(s[t + 1]) - top) : vzero();
    sum = sum + a + b;
    if (E == FP32) {
      vstore((float*)p + 16 * t, a);
      vstore((float*)p + 16 * t + 16, b);
    } else {
      wstore(p + size_t(t / 2) * 64, pair_bf16(a, b));
    }
  }
  vstore(state.maximum(), top);
  vstore(state.sum(), sum);
  add_weighted<E, Tiles>(values, stride, p, n, lanes.count, state);
}

}  // namespace

void attend_tile(int elem, const RowTile& tile, const Columns& columns, float scale,
                 const Lanes& lanes, const AttentionState& state, AttentionScratch* scratch,
                 const Prefetch& prefetch) {
  (elem == FP32 ? attend<FP32> : attend<BF16>)(tile, columns, scale, lanes, state, scratch,
                                               Ahead{prefetch});
}

void combine(const float* states, int count, int lane, int width, float* out) {
  const auto state = [&](int i) {
    return AttentionState{(float*)states + i * AttentionState::floats(width), width};
  };
  float top = state(0).maximum()[lane], sum = 0;
  for (int i = 1; i < count; i++) {
    const float m = state(i).maximum()[lane];
    if (!(m <= top)) top = m;  // NaN replaces top too, because m <= top is then false
  }
  for (int c = 0; c < width; c += 16) vstore_n(out + c, vzero(), width - c);
  for (int i = 0; i < count; i++) {
    const float f = std::exp(state(i).maximum()[lane] - top);
    sum += state(i).sum()[lane] * f;
    const float* o = state(i).output(lane);
    for (int c = 0; c < width; c += 16) {
      const vf total = vload_n(out + c, width - c);
      vstore_n(out + c, vfma(vload_n(o + c, width - c), vset(f), total), width - c);
    }
  }
  const vf inverse = vset(1.f / sum);
  for (int c = 0; c < width; c += 16)
    vstore_n(out + c, vload_n(out + c, width - c) * inverse, width - c);
}

void pack_lanes(int elem, const float* const* q, int lanes, int width, void* out) {
  std::memset(out, 0, size_t(elem == FP32 ? width : width / 2) * 64);
  for (int i = 0; i < lanes; i++)
    for (int c = 0; c < width; c += 64) {
      uint32_t words[64];
      const int n = std::min(width - c, 64), units = elem == FP32 ? n : n / 2;
      if (elem == FP32) {
        std::memcpy(words, q[i] + c, 4 * n);
      } else {
        uint16_t h[64];
        for (int j = 0; j < n; j += 16) vstore_bf16(h + j, vload_n(q[i] + c + j, n - j));
        std::memcpy(words, h, 2 * n);
      }
      uint32_t* to = (uint32_t*)out + kLanes * (elem == FP32 ? c : c / 2) + i;
      for (int u = 0; u < units; u++) to[kLanes * u] = words[u];
    }
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
