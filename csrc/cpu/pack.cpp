// Weights into tiles and back. Not a hot loop: plain code, the same on every ISA.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_NS {
namespace {

constexpr float kTop4 = 56.f;     // the far level on the short side
const uint8_t* nearest_level() {  // code of a value v from -64 on, by floor(2 (v + 64)): midpoints
                                  // between integers are multiples of 1/2
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

uint8_t scale_code_up(
    float s) {  // the least code whose value is at least s (the largest one beyond the range)
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

struct Group4 {
  uint8_t scale = 0, code[16] = {};
};

// The scale with the least (weighted) squared error among those near absmax / level, with either
// sign: the levels reach further below zero. x in units of the matrix's scale: squares of very
// large or small weights would leave the range of float.
Group4 best_int4(const float* x, const float* importance) {
  const uint8_t* nearest = nearest_level();
  float top = 0;
  for (int i = 0; i < 16; i++) top = std::max(top, std::fabs(x[i]));
  Group4 best;
  if (top == 0.f) return best;
  const int last = std::min(0x7f, scale_code_up(top / kTop4) + 1), first = std::max(1, last - 8);
  float best_error = INFINITY;
  for (int code = first; code <= last; code++)
    for (int sign = 0; sign < 2; sign++) {
      const float step = scale_value(uint8_t(code | sign << 7)), inverse = 2.f / step;
      float error = 0;
      uint8_t c[16];
      for (int i = 0; i < 16; i++) {
        int at = int(x[i] * inverse + 128.f);
        c[i] = nearest[std::clamp(at, 0, 255)];
        float d = x[i] - float(kLevels[c[i]] - 64) * step;
        error += d * d * (importance ? importance[i] : 1.f);
      }
      if (error < best_error) {
        best_error = error;
        best.scale = uint8_t(code | sign << 7);
        std::copy(c, c + 16, best.code);
      }
    }
  return best;
}

Group4 best_int8(const float* x, float matrix_scale, int8_t* code) {
  float top = 0;
  for (int i = 0; i < 16; i++) top = std::max(top, std::fabs(x[i]));
  Group4 g;
  g.scale = top == 0.f ? 0 : scale_code_up(top / 127.f / matrix_scale);
  const float step = scale_value(g.scale) * matrix_scale;
  for (int i = 0; i < 16; i++)
    code[i] = int8_t(std::clamp(step > 0 ? std::nearbyint(x[i] / step) : 0.f, -127.f, 127.f));
  return g;
}

// 16 rows, group by group. x holds them transposed, [input][row], and what is still to be rounded
// in it is moved by the errors made so far.
void pack_low(const Mat& m, uint8_t* to, const float* w, size_t ldw, const float* importance,
              const float* feedback, int tile) {
  const int k = m.k, groups = ceil_to(k, kBlock) / kGroup;
  const float unit = m.fmt == INT8 ? 1.f : m.scale;
  std::vector<float> x(size_t(groups) * kGroup * 16, 0.f);
  for (int o = 0; o < kTile && tile * kTile + o < m.n; o++)
    for (int i = 0; i < k; i++) x[size_t(i) * 16 + o] = w[(tile * kTile + o) * ldw + i] / unit;
  for (int g = 0; g < groups; g++) {
    uint8_t* block = to + size_t(g / 4) * (m.fmt == INT8 ? 1088 : 576);
    const int first = g * kGroup, width = std::min(kGroup, std::max(0, k - first));
    float error[16][16] = {};  // [input][row]
    for (int o = 0; o < kTile; o++) {
      float v[16], h[16];
      for (int i = 0; i < 16; i++) v[i] = x[size_t(first + i) * 16 + o];
      for (int i = 0; i < 16; i++) h[i] = importance && i < width ? importance[first + i] : 1.f;
      int8_t code8[16];
      const Group4 best =
          m.fmt == INT8 ? best_int8(v, m.scale, code8) : best_int4(v, importance ? h : nullptr);
      block[(g % 4) * 16 + o] = best.scale;
      const float step = scale_value(best.scale) * (m.fmt == INT8 ? m.scale : 1.f);
      for (int i = 0; i < 16; i++) {
        const int quad = (g % 4) * 4 + i / 4;
        float stored;
        if (m.fmt == INT8) {
          const int c = feedback && step != 0.f
                            ? int(std::clamp(std::nearbyint(v[i] / step), -127.f, 127.f))
                            : code8[i];
          block[64 + quad * 64 + 4 * o + i % 4] = uint8_t(c + 128);
          stored = float(c) * step;
        } else {
          const uint8_t c =
              feedback && step != 0.f
                  ? nearest_level()[int(std::clamp(v[i] * (2.f / step) + 128.f, 0.f, 255.f))]
                  : best.code[i];
          block[64 + (quad / 2) * 64 + 4 * o + i % 4] |= uint8_t(c << (quad % 2 ? 4 : 0));
          stored = float(kLevels[c] - 64) * step;
        }
        if (!feedback || i >= width) continue;
        const float e = error[i][o] = v[i] - stored;
        const float* row = feedback + size_t(first + i) * k + first;
        for (int j = i + 1; j < width; j++) v[j] -= e * row[j];
      }
    }
    if (!feedback) continue;
    vf e[16];
    for (int i = 0; i < 16; i++) e[i] = vset(0.f) - vload(error[i]);
    for (int j = first + kGroup; j < k; j++) {
      const float* f = feedback + size_t(first) * k + j;
      vf moved = vload(x.data() + size_t(j) * 16);
      UNROLL_FOR(i, 16) moved = vfma(vset(f[size_t(i) * k]), e[i], moved);
      vstore(x.data() + size_t(j) * 16, moved);
    }
  }
}

}  // namespace

float pack_scale(int fmt, const float* w, size_t ldw, int n, int k) {
  if (fmt == FP32 || fmt == BF16) return 1.f;
  float top = 0;
  for (int i = 0; i < n; i++)
    for (int j = 0; j < k; j++) top = std::max(top, std::fabs(w[i * ldw + j]));
  return top == 0.f ? 1.f
                    : std::max(top / (fmt == INT8 ? 127.f : kTop4) / 1.5f,
                               std::numeric_limits<float>::denorm_min());
}

void pack(const Mat& m, uint8_t* out, const float* w, size_t ldw, const float* importance,
          const float* feedback, int tile) {
  const size_t size = tile_bytes(m.fmt, m.k);
  uint8_t* to = out + tile * size;
  std::memset(to, 0, size);
  if (m.fmt == INT8 || m.fmt == INT4) {
    pack_low(m, to, w, ldw, importance, feedback, tile);
    return;
  }
  for (int o = 0; o < kTile && tile * kTile + o < m.n; o++) {
    const float* x = w + (tile * kTile + o) * ldw;
    for (int i = 0; i < m.k; i++) {
      if (m.fmt == FP32) {
        std::memcpy(to + (size_t(i) * 16 + o) * 4, x + i, 4);
      } else {
        uint16_t h = float_to_bf16(x[i]);
        std::memcpy(to + (size_t(i / 2) * 16 + o) * 4 + 2 * (i % 2), &h, 2);
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
        std::memcpy(y + i, from + (size_t(i) * 16 + o) * 4, 4);
      } else if (m.fmt == BF16) {
        uint16_t h;
        std::memcpy(&h, from + (size_t(i / 2) * 16 + o) * 4 + 2 * (i % 2), 2);
        y[i] = bf16_to_float(h);
      } else {
        const uint8_t* block = from + size_t(i / 64) * (m.fmt == INT8 ? 1088 : 576);
        const int quad = i % 64 / 4;
        const float step = scale_value(block[i % 64 / 16 * 16 + o]) * m.scale;
        if (m.fmt == INT8) {
          y[i] = float(int(block[64 + quad * 64 + 4 * o + i % 4]) - 128) * step;
        } else {
          const uint8_t b = block[64 + quad / 2 * 64 + 4 * o + i % 4];
          y[i] = float(kLevels[quad % 2 ? b >> 4 : b & 15] - 64) * step;
        }
      }
    }
  }
}

}  // namespace LAMOE_NS
}  // namespace lamoe
