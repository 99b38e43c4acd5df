// Attention in expanded form, for many queries of one sequence. `linear` computes it with two
// products. Scores are queries times the keys of a head, packed as a weight matrix. Outputs are
// softmax weights times the values of a head, packed in the same way.
#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {

void rows_as_keys(int elem, const void* rows, int stride, int col, int width, int n, void* out) {
  const int units = elem == FP32 ? width : width / 2;
  const size_t row = size_t(stride) * element_bytes(elem);
  const uint8_t* from = (const uint8_t*)rows + size_t(col) * element_bytes(elem);
  for (int t = 0; t < tiles(n); t++) {
    uint32_t* to = (uint32_t*)out + size_t(t) * units * kTile;
    for (int i = 0; i < kTile; i++) {
      const int r = t * kTile + i;
      if (r < n) {
        const uint8_t* x = from + r * row;
        for (int u = 0; u < units; u++) std::memcpy(to + u * kTile + i, x + 4 * u, 4);
      } else {
        for (int u = 0; u < units; u++) to[u * kTile + i] = 0;
      }
    }
  }
}

void rows_as_values(int elem, const void* rows, int stride, int col, int width, int n, void* out) {
  const size_t bytes = element_bytes(elem), row = size_t(stride) * bytes;
  const uint8_t* from = (const uint8_t*)rows + size_t(col) * bytes;
  const int units = elem == FP32 ? n : (n + 1) / 2;
  for (int t = 0; t < tiles(width); t++)
    for (int u = 0; u < units; u++) {
      uint8_t* to = (uint8_t*)out + (size_t(t) * units + u) * 64;
      for (int i = 0; i < kTile; i++) {
        const int c = t * kTile + i;
        uint32_t word = 0;
        if (c < width && elem == FP32) {
          std::memcpy(&word, from + u * row + 4 * c, 4);
        } else if (c < width) {
          uint16_t a, b = 0;
          std::memcpy(&a, from + size_t(2 * u) * row + 2 * c, 2);
          if (2 * u + 1 < n) std::memcpy(&b, from + size_t(2 * u + 1) * row + 2 * c, 2);
          word = a | uint32_t(b) << 16;
        }
        std::memcpy(to + 4 * i, &word, 4);
      }
    }
}

// Expands two tiles of 16 cache rows at a time. `linear` gives a product [nope elements][32 rows].
// With BF16, two neighbouring nope elements of a row form one unit of its key tile. With FP32, each
// element is one unit.
void expand_keys(int elem, const uint8_t* latents, int latent_width, int t0, int t1, const Acts& uk,
                 int units, void* out, float* scratch) {
  constexpr int kPair = 2 * kTile;
  const size_t tile = tile_bytes(elem, latent_width);
  for (int t = t0; t < t1; t += 2) {
    const int count = t + 2 <= t1 ? 2 : 1;
    const Mat m{elem, kTile * count, latent_width, latents + t * tile, 1.f};
    linear(m, 0, count, uk, 0, uk.rows, scratch, kPair, nullptr, nullptr);
    for (int i = 0; i < count; i++) {
      uint8_t* to = (uint8_t*)out + size_t(t + i) * units * 64;
      const float* x = scratch + kTile * i;
      if (elem == FP32) {
        for (int u = 0; u < uk.rows; u++) vstore((float*)to + kTile * u, vload(x + kPair * u));
      } else {
        for (int u = 0; 2 * u < uk.rows; u++) {
          const float* pair = x + 2 * kPair * u;
          wstore(to + 64 * u, pair_bf16(vload(pair), vload(pair + kPair)));
        }
      }
    }
  }
}

void expand_values(const Mat& uv, const Acts& rows, int row0, int n, void* out, float* scratch) {
  const int width = ceil_to(uv.n, kTile), units = uv.fmt == FP32 ? n : (n + 1) / 2;
  for (int r = 0; r < n; r += kExpandChunk) {
    const int count = std::min(n - r, kExpandChunk);
    linear(uv, 0, tiles(uv.n), rows, row0 + r, count, scratch, width, nullptr, nullptr);
    for (int t = 0; t < tiles(uv.n); t++) {
      const int valid = uv.n - t * kTile;
      uint8_t* to = (uint8_t*)out + size_t(t) * units * 64;
      for (int i = 0; i < count; i += uv.fmt == FP32 ? 1 : 2) {
        const float* x = scratch + size_t(i) * width + kTile * t;
        const vf a = vload_n(x, valid), b = i + 1 < count ? vload_n(x + width, valid) : vzero();
        if (uv.fmt == FP32)
          vstore((float*)(to + size_t(r + i) * 64), a);
        else
          wstore(to + size_t((r + i) / 2) * 64, pair_bf16(a, b));
      }
    }
  }
}

void softmax_rows(int elem, const SoftmaxBlock& b, float scale) {
  for (int i = 0; i < b.rows; i++) {
    float* s = b.scores + size_t(i) * b.score_stride;
    const int n = std::clamp(b.visible[i], 0, b.cols), ldp = b.weight_stride;
    for (int c = n; c < ceil_to(ldp, 16) && c < b.score_stride; c++) s[c] = -INFINITY;
    vf top = vset(b.maximum[i]);
    for (int c = 0; c < n; c += 16) {
      vf v = vload(s + c) * vset(scale);
      vstore(s + c, v);
      top = vmax(top, v);
    }
    const float now = vhmax(top);
    b.rescale[i] = std::exp(b.maximum[i] - now);
    b.maximum[i] = now;
    vf sum = vzero();
    for (int c = 0; c < ldp; c += 16) {
      const vf e = c < n ? vexp(vload(s + c) - vset(now)) : vzero();
      sum = sum + e;
      if (elem == FP32)
        vstore_n((float*)b.weights + size_t(i) * ldp + c, e, ldp - c);
      else
        vstore_bf16((uint16_t*)b.weights + size_t(i) * ldp + c, e);
    }
    b.sum[i] = b.sum[i] * b.rescale[i] + vsum(sum);
  }
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
