// Packs weights into tiles, and unpacks them. This code is not hot, so most of it is plain C++. The
// results are the same on every instruction set.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr float kTop4 = 56.f;  // the largest INT4 level; the smallest is -63

// Returns a lookup table: entry floor(2 (v + 64)) is the code of the INT4 level nearest to v. A
// step of 1/2 is exact, because all midpoints between levels are multiples of 1/2.
const uint8_t* nearest_level() {
  static const auto table = [] {
    struct T {
      uint8_t code[256];
    } t;
    for (int i = 0; i < 256; i++) {
      float v = 0.5f * i + 0.25f;
      int best = 0;
      for (int c = 1; c < 16; c++)
        if (std::fabs(kLevels[c] - v) < std::fabs(kLevels[best] - v)) best = c;
      t.code[i] = uint8_t(best);
    }
    return t;
  }();
  return table.code;
}

// The code of the smallest group scale that is at least s. If no scale is, the code of the largest.
uint8_t scale_code_up(float s) {
  int low = 1, high = 0x7f;
  while (low < high) {
    int mid = (low + high) / 2;
    if (scale_value(uint8_t(mid)) >= s)
      high = mid;
    else
      low = mid + 1;
  }
  return uint8_t(low);
}

float largest(const float* x) {
  float top = 0;
  for (int i = 0; i < kGroup; i++) top = std::max(top, std::fabs(x[i]));
  return top;
}

struct Group {
  uint8_t scale = 0;
  int code[kGroup] = {};  // INT8: -127 .. 127; INT4: index into kLevels
};

// Searches the group scale with the smallest squared error, weighted by importance unless that is
// null. Both signs are tried, because the INT4 levels reach further below zero than above. x is in
// units of the matrix scale. Otherwise squares of very large or small weights would leave the range
// of float.
Group best_int4(const float* x, const float* importance) {
  const uint8_t* nearest = nearest_level();
  const float top = largest(x);
  Group best;
  if (top == 0.f) return best;
  const int last = std::min(0x7f, scale_code_up(top / kTop4) + 1), first = std::max(1, last - 8);
  float best_error = INFINITY;
  for (int code = first; code <= last; code++)
    for (int sign = 0; sign < 2; sign++) {
      const float step = scale_value(uint8_t(code | sign << 7)), inverse = 2.f / step;
      float error = 0;
      int c[kGroup];
      for (int i = 0; i < kGroup; i++) {
        int at = int(x[i] * inverse + 128.f);
        c[i] = nearest[std::clamp(at, 0, 255)];
        float d = x[i] - float(kLevels[c[i]] - 64) * step;
        error += d * d * (importance ? importance[i] : 1.f);
      }
      if (error < best_error) {
        best_error = error;
        best.scale = uint8_t(code | sign << 7);
        std::copy(c, c + kGroup, best.code);
      }
    }
  return best;
}

int round_int8(float x, float step) {
  return int(std::clamp(step > 0 ? std::nearbyint(x / step) : 0.f, -127.f, 127.f));
}

Group best_int8(const float* x, float matrix_scale) {
  const float top = largest(x);
  Group g;
  g.scale = top == 0.f ? 0 : scale_code_up(top / 127.f / matrix_scale);
  const float step = scale_value(g.scale) * matrix_scale;
  for (int i = 0; i < kGroup; i++) g.code[i] = round_int8(x[i], step);
  return g;
}

// Int8Packing and Int4Packing define how a format searches a group scale, rounds weights and stores
// codes. INT8 weights are in units of 1, INT4 weights in units of the matrix scale.
struct Int8Packing {
  using Block = Int8Block;
  static float unit(const Mat&) { return 1.f; }
  static Group best(const float* x, const Mat& m, const float*) { return best_int8(x, m.scale); }
  static float step(uint8_t scale, const Mat& m) { return scale_value(scale) * m.scale; }
  static int round(float x, float step) {
    return int(std::clamp(std::nearbyint(x / step), -127.f, 127.f));
  }
  static float value(int code) { return float(code); }
  static void store(Block& b, int g, int output, int i, int code) {
    b.codes[g][i / 4][output][i % 4] = uint8_t(code + 128);
  }
  static int load(const Block& b, int g, int output, int i) {
    return int(b.codes[g][i / 4][output][i % 4]) - 128;
  }
};

struct Int4Packing {
  using Block = Int4Block;
  static float unit(const Mat& m) { return m.scale; }
  static Group best(const float* x, const Mat&, const float* importance) {
    return best_int4(x, importance);
  }
  static float step(uint8_t scale, const Mat&) { return scale_value(scale); }
  static int round(float x, float step) {
    return nearest_level()[int(std::clamp(x * (2.f / step) + 128.f, 0.f, 255.f))];
  }
  static float value(int code) { return float(kLevels[code] - 64); }
  static void store(Block& b, int g, int output, int i, int code) {
    b.nibbles[g][i / 8][output][i % 4] |= uint8_t(code << (i / 4 % 2 ? 4 : 0));
  }
  static int load(const Block& b, int g, int output, int i) {
    const uint8_t both = b.nibbles[g][i / 8][output][i % 4];
    return i / 4 % 2 ? both >> 4 : both & 15;
  }
};

// Adjusts the weights x[input][row] of all inputs after a group by the rounding errors
// error[input][row] of that group, as `pack` documents for `feedback`.
void feed_back(std::vector<float>& x, int first, int k, const float* feedback,
               const float (*error)[kTile]) {
  vf e[kGroup];
  for (int i = 0; i < kGroup; i++) e[i] = vset(0.f) - vload(error[i]);
  for (int j = first + kGroup; j < k; j++) {
    const float* f = feedback + size_t(first) * k + j;
    vf moved = vload(x.data() + size_t(j) * kTile);
    UNROLL_FOR(i, kGroup) moved = vfma(vset(f[size_t(i) * k]), e[i], moved);
    vstore(x.data() + size_t(j) * kTile, moved);
  }
}

// Packs one tile: 16 outputs (rows of w), group by group.
template <class P>
void pack_low(const Mat& m, uint8_t* to, const float* w, size_t ldw, const float* importance,
              const float* feedback, int tile) {
  const int k = m.k, groups = ceil_to(k, kBlock) / kGroup;
  std::vector<float> x(size_t(groups) * kGroup * kTile, 0.f);  // [input][row]
  for (int o = 0; o < kTile && tile * kTile + o < m.n; o++)
    for (int i = 0; i < k; i++)
      x[size_t(i) * kTile + o] = w[(tile * kTile + o) * ldw + i] / P::unit(m);
  for (int g = 0; g < groups; g++) {
    typename P::Block& block = ((typename P::Block*)to)[g / 4];
    const int first = g * kGroup, width = std::min(kGroup, std::max(0, k - first));
    float error[kGroup][kTile] = {};
    for (int o = 0; o < kTile; o++) {
      float v[kGroup], h[kGroup];
      for (int i = 0; i < kGroup; i++) v[i] = x[size_t(first + i) * kTile + o];
      for (int i = 0; i < kGroup; i++) h[i] = importance && i < width ? importance[first + i] : 1.f;
      const Group best = P::best(v, m, importance ? h : nullptr);
      block.scales[g % 4][o] = best.scale;
      const float step = P::step(best.scale, m);
      for (int i = 0; i < kGroup; i++) {
        // With feedback, v has changed since P::best, so its code is rounded again.
        const int code = feedback && step != 0.f ? P::round(v[i], step) : best.code[i];
        P::store(block, g % 4, o, i, code);
        if (!feedback || i >= width) continue;
        const float e = error[i][o] = v[i] - P::value(code) * step;
        const float* row = feedback + size_t(first + i) * k + first;
        for (int j = i + 1; j < width; j++) v[j] -= e * row[j];
      }
    }
    if (feedback) feed_back(x, first, k, feedback, error);
  }
}

template <class P>
float stored(const Mat& m, const uint8_t* tile, int output, int i) {
  const typename P::Block& b = ((const typename P::Block*)tile)[i / kBlock];
  const int g = i % kBlock / kGroup;
  const float step = scale_value(b.scales[g][output]) * m.scale;
  return P::value(P::load(b, g, output, i % kGroup)) * step;
}

}  // namespace

float pack_scale(int fmt, const float* w, size_t ldw, int n, int k) {
  if (fmt == FP32 || fmt == BF16) return 1.f;
  float top = 0;
  for (int i = 0; i < n; i++)
    for (int j = 0; j < k; j++) top = std::max(top, std::fabs(w[i * ldw + j]));
  if (top == 0.f) return 1.f;
  return std::max(top / (fmt == INT8 ? 127.f : kTop4) / 1.5f,
                  std::numeric_limits<float>::denorm_min());
}

void pack(const Mat& m, uint8_t* out, const float* w, size_t ldw, const float* importance,
          const float* feedback, int tile) {
  const size_t size = tile_bytes(m.fmt, m.k);
  uint8_t* to = out + tile * size;
  std::memset(to, 0, size);
  if (m.fmt == INT8 || m.fmt == INT4) {
    const auto pack_tile = m.fmt == INT8 ? pack_low<Int8Packing> : pack_low<Int4Packing>;
    return pack_tile(m, to, w, ldw, importance, feedback, tile);
  }
  for (int o = 0; o < kTile && tile * kTile + o < m.n; o++) {
    const float* x = w + (tile * kTile + o) * ldw;
    for (int i = 0; i < m.k; i++) {
      if (m.fmt == FP32) {
        std::memcpy(to + (size_t(i) * kTile + o) * 4, x + i, 4);
      } else {
        uint16_t h = float_to_bf16(x[i]);
        std::memcpy(to + (size_t(i / 2) * kTile + o) * 4 + 2 * (i % 2), &h, 2);
      }
    }
  }
}

void unpack(const Mat& m, float* out, size_t ldo, int tile) {
  const uint8_t* from = m.data + tile * tile_bytes(m.fmt, m.k);
  for (int o = 0; o < kTile && tile * kTile + o < m.n; o++) {
    float* y = out + (tile * kTile + o) * ldo;
    for (int i = 0; i < m.k; i++) {
      if (m.fmt == FP32) {
        std::memcpy(y + i, from + (size_t(i) * kTile + o) * 4, 4);
      } else if (m.fmt == BF16) {
        uint16_t h;
        std::memcpy(&h, from + (size_t(i / 2) * kTile + o) * 4 + 2 * (i % 2), 2);
        y[i] = bf16_to_float(h);
      } else {
        y[i] =
            m.fmt == INT8 ? stored<Int8Packing>(m, from, o, i) : stored<Int4Packing>(m, from, o, i);
      }
    }
  }
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
