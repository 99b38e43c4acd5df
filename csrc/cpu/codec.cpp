// Cache rows: the bytes of lamoe/codec.py, which documents them, made and read here without torch.
#include <cmath>

#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_NS {
namespace {

constexpr int kMaxPlanes = 3;
struct Planes {
  int n = 0, bits[kMaxPlanes] = {0, 0, 0};
};
constexpr Planes planes(int bits) {
  switch (bits) {
    case 4:
      return {1, {4, 0, 0}};
    case 5:
      return {2, {4, 1, 0}};
    case 6:
      return {2, {4, 2, 0}};
    case 7:
      return {3, {4, 2, 1}};
    default:
      return {1, {8, 0, 0}};
  }
}

float half_to_float(uint16_t h) {  // finite, not negative
  const int e = h >> 10, m = h & 0x3ff;
  return e ? std::ldexp(float(m + 1024), e - 25) : std::ldexp(float(m), -24);
}
float base_value(uint8_t code) {
  return code >= 0xf8 ? NAN : half_to_float(uint16_t(code << 7)) / 16.f;
}

const float* base_table() {
  static const auto table = [] {
    struct T {
      float v[256];
    } t;
    for (int i = 0; i < 256; i++) t.v[i] = base_value(uint8_t(i));
    return t;
  }();
  return table.v;
}

uint8_t base_code(
    float x) {  // the least e5m3 number that is not smaller than x >= 0; 0xff when there is none
  if (!(x <= 3840.f)) return 0xff;
  const float* t = base_table();
  int low = 0, high = 0xf7;
  while (low < high) {
    int mid = (low + high) / 2;
    if (t[mid] >= x)
      high = mid;
    else
      low = mid + 1;
  }
  return t[low] >= x ? uint8_t(low) : 0xff;
}

struct Block {  // sizes of one part
  int w, W, n, group, groups, factors;
  Block(int w, int n, int group) : w(w), W(ceil_to(w, 8)), n(n), group(group < w ? group : w) {
    groups = (w + this->group - 1) / this->group;
    factors = w <= group ? 0 : (groups + 1) / 2;
  }
  size_t bytes() const { return 1 + factors + size_t(W) / 8 * n; }
};

void encode_block(const Block& b, const float* x, uint8_t* out) {
  const int half = (1 << (b.n - 1)) - 1;
  float need[512], step[512], most = 0;
  const auto larger = [](float a, float b) {
    return a >= b || std::isnan(a) ? a : b;
  };  // NaN when either is: b, which then compares false
  for (int g = 0; g < b.groups; g++) {
    float top = 0;
    for (int i = g * b.group; i < (g + 1) * b.group && i < b.w; i++) {
      top = larger(std::fabs(x[i]), top);
    }
    need[g] = top / float(half);
    most = larger(need[g], most);
  }
  out[0] = base_code(most);
  const float base = base_table()[out[0]];
  std::memset(out + 1, 0, b.bytes() - 1);
  for (int g = 0; g < b.groups; g++) {
    step[g] = base;
    if (!b.factors) continue;
    float f = std::ceil(need[g] * (16.f / base));
    if (std::isnan(f)) f = 1.f;
    f = f < 1.f ? 1.f : f > 16.f ? 16.f : f;
    step[g] = base * (f / 16.f);
    out[1 + g / 2] |= uint8_t(int(f) - 1) << (g % 2 ? 4 : 0);
  }
  const Planes pl = planes(b.n);
  for (int i = 0; i < b.W; i++) {
    int code = 1 << (b.n - 1);
    if (i < b.w) {
      float v = x[i] / step[i / b.group];
      if (!std::isfinite(v)) v = 0.f;
      v = std::nearbyint(v);
      code += int(v < -half ? -half : v > half ? half : v);
    }
    uint8_t* to = out + 1 + b.factors;
    for (int p = 0, shift = 0; p < pl.n; p++) {
      const int size = b.W * pl.bits[p] / 8;
      to[i % size] |=
          uint8_t((code >> shift & ((1 << pl.bits[p]) - 1)) << (pl.bits[p] * (i / size)));
      to += size, shift += pl.bits[p];
    }
  }
}

INLINE void put16(int elem, void* out, int at, vf v, int n) {
  if (elem == FP32) return vstore_n((float*)out + at, v, n);
  if (n >= 16) return vstore_bf16((uint16_t*)out + at, v);
  uint16_t t[16];
  vstore_bf16(t, v);
  std::memcpy((uint16_t*)out + at, t, 2 * n);
}

// 64 elements at a time, where they lie side by side in every plane.
template <int N>
void decode_wide(const Block& b, const float* step, const uint8_t* codes, int elem, void* out) {
  constexpr Planes pl = planes(N);
  constexpr float zero = float(1 << (N - 1));
  const uint8_t* plane[pl.n];
  int size[pl.n],
      at[pl.n] = {},
      shift[pl.n] = {};  // bytes of a plane; where in it, and in its bytes, element i lies
  for (int p = 0; p < pl.n; p++)
    plane[p] = p ? plane[p - 1] + size[p - 1] : codes, size[p] = b.W * pl.bits[p] / 8;
  for (int i = 0; i < b.w; i += 64) {
    vw code = wset(0);
    UNROLL
    for (int p = 0, up = 0; p < pl.n; up += pl.bits[p++]) {
      const vw field = bfields(plane[p] + at[p], shift[p], (1 << pl.bits[p]) - 1);
      code = p ? bor_left(code, field, up) : field;
      if ((at[p] += 64) == size[p]) at[p] = 0, shift[p] += pl.bits[p];
    }
    // code * step - zero * step is (code - zero) * step exactly: a step has at most 9 significant
    // bits, a code 8
    const float* s = step + i / 16;
    const auto value = [&](vf code, int j) { return vfma(code, vset(s[j]), vset(-zero * s[j])); };
    const vf v[4] = {value(bfloats<0>(code), 0), value(bfloats<1>(code), 1),
                     value(bfloats<2>(code), 2), value(bfloats<3>(code), 3)};
    if (elem == FP32) {
      UNROLL_FOR(j, 4) vstore((float*)out + i + 16 * j, v[j]);
    } else {
      vstore_bf16((uint16_t*)out + i, v[0], v[1]);
      vstore_bf16((uint16_t*)out + i + 32, v[2], v[3]);
    }
  }
}

template <int N>
void decode_block(const Block& b, const uint8_t* in, int elem, void* out) {
  const Planes pl = planes(N);
  const float base = base_table()[in[0]];
  const uint8_t* codes = in + 1 + b.factors;
  bool wide = b.w % 64 == 0 && b.w <= 1024;
  for (int p = 0; p < pl.n; p++) wide = wide && b.W * pl.bits[p] / 8 % 64 == 0;
  if (wide) {
    float step[64 + 32], factor[64 + 32];  // of 16 elements; of a group
    for (int g = 0; b.factors && g < b.groups; g += 32) vfactors(in + 1 + g / 2, base, factor + g);
    const int per = b.group / 16;  // b.group is all of a part without factors
    for (int g = 0; (per > 1 || !b.factors) && g < b.w / 16; g++)
      step[g] = b.factors ? factor[g / per] : base;
    return decode_wide<N>(b, b.factors && per == 1 ? factor : step, codes, elem, out);
  }
  for (int i = 0; i < b.w; i += 16) {
    vf step = vset(base);
    if (b.factors) {  // groups are multiples of 16 here
      const int g = i / b.group, f = in[1 + g / 2] >> (g % 2 ? 4 : 0) & 15;
      step = vset(base * (float(f + 1) / 16.f));
    }
    vw code = wset(0);
    const uint8_t* from = codes;
    int shift = 0;
    UNROLL_FOR(p, kMaxPlanes) {
      if (p >= pl.n) break;
      const int bits = pl.bits[p], size = b.W * bits / 8, mask = (1 << bits) - 1;
      vw field;
      if (size % 16 == 0) {
        field = wfields(from + i % size, bits * (i / size), mask);
      } else {  // sixteen neighbours do not lie side by side
        int32_t t[16] = {};
        for (int j = 0; j < 16 && i + j < b.W; j++)
          t[j] = from[(i + j) % size] >> (bits * ((i + j) / size)) & mask;
        field = wload(t);
      }
      code = p ? wor_left(code, field, shift) : field;
      from += size, shift += bits;
    }
    put16(elem, out, i, (vcvt(code) - vset(float(1 << (N - 1)))) * step, b.w - i);
  }
}

void decode_any(const Block& b, const uint8_t* in, int elem, void* out) {
  switch (b.n) {
    case 4:
      return decode_block<4>(b, in, elem, out);
    case 5:
      return decode_block<5>(b, in, elem, out);
    case 6:
      return decode_block<6>(b, in, elem, out);
    case 7:
      return decode_block<7>(b, in, elem, out);
    default:
      return decode_block<8>(b, in, elem, out);
  }
}

// A latent of 512 as signed bytes, 64 at a time and turned; their step and -64 x their sum. up:
// which halves are rounded up (neighbouring rows must differ: what the mean of many rows gets from
// rounding is then nothing).
template <int N>
void decode_bytes(const Block& b, const uint8_t* in, int up, int8_t* out, float& step, int32_t& c) {
  alignas(32) uint8_t some[32], factor[32];  // of groups; of each sixteen
  bfactors(in + 1, b.group == 16 ? factor : some);
  for (int g = 0; g < 16 && b.group == 32; g++) factor[2 * g] = factor[2 * g + 1] = some[g];
  const uint8_t* low = in + 1 + b.factors;
  const uint32_t ones = 0x01010101;
  vw sum = wset(0);
  UNROLL_FOR(i, 8) {
    vw code = bfields(low + i % 4 * 64, i / 4 * 4, 15);
    if (N == 5) code = bor_left(code, bfields(low + 256, i, 1), 4);
    const vw bytes = bturn(bscale<N>(code, factor + 4 * i, up));
    wstore(out + 64 * i, bytes);
    sum = dot_bytes(sum, bytes, &ones);
  }
  step = base_table()[in[0]] * (1.f / (1 << (8 - N)));
  c = -64 * wsum(sum);
}

}  // namespace

void decode_ints(const Codec& c, const uint8_t* const* rows, int n, void* tile) {
  const Block latent(c.w[0], c.bits[0], c.group), key(c.w[1], c.bits[1], c.group);
  int8_t* bytes = (int8_t*)tile;
  uint8_t* quads = (uint8_t*)tile + 64 * size_t(latent.w);
  float* step = (float*)(quads + 64 * size_t(latent.w));
  int32_t* sums = (int32_t*)(step + 64);
  uint16_t* keys = (uint16_t*)(sums + 64);
  for (int i = 0; i < n; i += 4) {
    for (int j = i; j < i + 4 && j < n; j++) {
      (latent.n == 4 ? decode_bytes<4> : decode_bytes<5>)(latent, rows[j], j % 2,
                                                          bytes + size_t(j) * latent.w, step[j],
                                                          sums[j]);
      decode_any(key, rows[j] + latent.bytes(), BF16, keys + size_t(j) * key.w);
    }
    for (int k = 0; k < latent.w; k += 64) {
      vw q[4];
      bquads(bytes + size_t(i) * latent.w + k, latent.w,
             q);  // of rows beyond n whatever is there: their weight is 0
      for (int j = 0; j < 4; j++) wstore(quads + (size_t(k / 16 + j) * 16 + i / 4) * 64, q[j]);
    }
  }
}

void encode(const Codec& c, const float* row, uint8_t* out) {
  const int w = c.w[0] + c.w[1];
  if (c.kind == 0) {
    std::memcpy(out, row, size_t(w) * 4);
  } else if (c.kind == 1) {
    for (int i = 0; i < w; i++) {
      const uint16_t h = float_to_bf16(row[i]);
      std::memcpy(out + 2 * i, &h, 2);
    }
  } else {
    Block a(c.w[0], c.bits[0], c.group), b(c.w[1], c.bits[1], c.group);
    encode_block(a, row, out);
    encode_block(b, row + c.w[0], out + a.bytes());
  }
}

void decode(const Codec& c, const uint8_t* in, int elem, void* out) {
  const int w = c.w[0] + c.w[1];
  if (c.kind == 2) {
    for (int part = 0; part < 2; part++) {
      Block b(c.w[part], c.bits[part], c.group);
      decode_any(b, in, elem, out);
      in += b.bytes();
      out = (char*)out + size_t(c.w[part]) * (elem == FP32 ? 4 : 2);
    }
  } else if ((c.kind == 0) == (elem == FP32)) {
    std::memcpy(out, in, size_t(w) * (elem == FP32 ? 4 : 2));
  } else if (elem == FP32) {
    for (int i = 0; i < w; i++) {
      uint16_t h;
      std::memcpy(&h, in + 2 * i, 2);
      ((float*)out)[i] = bf16_to_float(h);
    }
  } else {
    for (int i = 0; i < w; i++) {
      float f;
      std::memcpy(&f, in + 4 * i, 4);
      ((uint16_t*)out)[i] = float_to_bf16(f);
    }
  }
}

}  // namespace LAMOE_NS
}  // namespace lamoe
