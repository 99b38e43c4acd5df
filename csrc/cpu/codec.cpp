// Encoding and decoding of cache rows. lamoe/backends/cache_codec.py documents the bytes.
#include <cmath>

#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
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

float half_to_float(uint16_t h) {  // h: a finite IEEE half >= 0
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

// The code of the smallest base that is at least x, for x >= 0. Returns 0xff (NaN) if no base is.
uint8_t base_code(float x) {
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

// Chooses the base and the group scales of a part and writes them to `out`. Sets step[g] to the
// resulting step size of group g.
void encode_steps(const LowBitPart& b, const float* x, float* step, uint8_t* out) {
  const int half = (1 << (b.bits - 1)) - 1;
  float need[512], most = 0;
  // NaN if either argument is NaN: comparisons with NaN are false and give b.
  const auto larger = [](float a, float b) { return a >= b || std::isnan(a) ? a : b; };
  for (int g = 0; g < b.groups; g++) {
    float top = 0;
    for (int i = g * b.group; i < std::min((g + 1) * b.group, b.width); i++)
      top = larger(std::fabs(x[i]), top);
    need[g] = top / float(half);
    most = larger(need[g], most);
  }
  out[0] = base_code(most);
  const float base = base_table()[out[0]];
  for (int g = 0; g < b.groups; g++) {
    step[g] = base;
    if (b.one_group()) continue;
    float f = std::ceil(need[g] * (16.f / base));
    if (std::isnan(f)) f = 1.f;
    f = f < 1.f ? 1.f : f > 16.f ? 16.f : f;
    step[g] = base * (f / 16.f);
    out[1 + g / 2] |= uint8_t(int(f) - 1) << (g % 2 ? 4 : 0);
  }
}

void encode_part(const LowBitPart& b, const float* x, uint8_t* out) {
  const int half = (1 << (b.bits - 1)) - 1;
  float step[512];
  std::memset(out, 0, b.bytes());
  encode_steps(b, x, step, out);
  const Planes pl = planes(b.bits);
  for (int i = 0; i < b.padded; i++) {
    int code = 1 << (b.bits - 1);
    if (i < b.width) {
      float v = x[i] / step[i / b.group];
      if (!std::isfinite(v)) v = 0.f;
      v = std::nearbyint(v);
      code += int(v < -half ? -half : v > half ? half : v);
    }
    uint8_t* to = out + 1 + b.scale_bytes;
    for (int p = 0, shift = 0; p < pl.n; p++) {
      const int size = b.padded * pl.bits[p] / 8, field = code >> shift & ((1 << pl.bits[p]) - 1);
      to[i % size] |= uint8_t(field << (pl.bits[p] * (i / size)));
      to += size, shift += pl.bits[p];
    }
  }
}

INLINE void store16(int elem, void* out, int at, vf v, int n) {
  if (elem == FP32) return vstore_n((float*)out + at, v, n);
  if (n >= 16) return vstore_bf16((uint16_t*)out + at, v);
  uint16_t t[16];
  vstore_bf16(t, v);
  std::memcpy((uint16_t*)out + at, t, 2 * n);
}

// Decodes 64 elements at a time. Requires that 64 neighbouring codes are contiguous in every plane.
// step[i] is the step size of elements 16 i .. 16 i + 15.
template <int N>
void decode_wide(const LowBitPart& b, const float* step, const uint8_t* codes, int elem,
                 void* out) {
  constexpr Planes pl = planes(N);
  constexpr float zero = float(1 << (N - 1));
  const uint8_t* plane[pl.n];
  // at and shift: the byte in each plane that holds the code of element i, and the bit in that
  // byte.
  int size[pl.n], at[pl.n] = {}, shift[pl.n] = {};
  for (int p = 0; p < pl.n; p++) {
    plane[p] = p ? plane[p - 1] + size[p - 1] : codes;
    size[p] = b.padded * pl.bits[p] / 8;
  }
  for (int i = 0; i < b.width; i += 64) {
    vw code = wset(0);
    int bits_below = 0;
    UNROLL_FOR(p, pl.n) {
      const vw field = bfields(plane[p] + at[p], shift[p], (1 << pl.bits[p]) - 1);
      code = p ? bor_left(code, field, bits_below) : field;
      bits_below += pl.bits[p];
      if ((at[p] += 64) == size[p]) at[p] = 0, shift[p] += pl.bits[p];
    }
    // code * step - zero * step equals (code - zero) * step exactly: a step has at most 9
    // significant bits and a code 8.
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

// Decodes 16 elements at a time. Unlike decode_wide, this works for any width.
template <int N>
void decode_narrow(const LowBitPart& b, const uint8_t* in, int elem, void* out) {
  const Planes pl = planes(N);
  const float base = base_table()[in[0]];
  for (int i = 0; i < b.width; i += 16) {
    vf step = vset(base);
    if (!b.one_group()) {  // group sizes are multiples of 16, so 16 elements share one step
      const int g = i / b.group, f = b.scales(in)[g / 2] >> (g % 2 ? 4 : 0) & 15;
      step = vset(base * (float(f + 1) / 16.f));
    }
    vw code = wset(0);
    const uint8_t* from = b.codes(in);
    int shift = 0;
    UNROLL_FOR(p, kMaxPlanes) {
      if (p >= pl.n) break;
      const int bits = pl.bits[p], size = b.padded * bits / 8, mask = (1 << bits) - 1;
      vw field;
      if (size % 16 == 0) {
        field = wfields(from + i % size, bits * (i / size), mask);
      } else {  // 16 neighbours are not contiguous
        int32_t t[16] = {};
        for (int j = 0; j < 16 && i + j < b.padded; j++)
          t[j] = from[(i + j) % size] >> (bits * ((i + j) / size)) & mask;
        field = wload(t);
      }
      code = p ? wor_left(code, field, shift) : field;
      from += size, shift += bits;
    }
    store16(elem, out, i, (vcvt(code) - vset(float(1 << (N - 1)))) * step, b.width - i);
  }
}

template <int N>
void decode_part(const LowBitPart& b, const uint8_t* in, int elem, void* out) {
  const Planes pl = planes(N);
  bool wide = b.width % 64 == 0 && b.width <= 1024;
  for (int p = 0; p < pl.n; p++) wide = wide && b.padded * pl.bits[p] / 8 % 64 == 0;
  if (!wide) return decode_narrow<N>(b, in, elem, out);
  const float base = base_table()[in[0]];
  float step[64 + 32], group_step[64 + 32];  // 32 extra: vfactors always writes 32 step sizes
  for (int g = 0; !b.one_group() && g < b.groups; g += 32)
    vfactors(b.scales(in) + g / 2, base, group_step + g);
  const int per = b.group / 16;
  if (b.one_group())
    for (int g = 0; g < b.width / 16; g++) step[g] = base;
  else if (per > 1)
    for (int g = 0; g < b.width / 16; g++) step[g] = group_step[g / per];
  decode_wide<N>(b, !b.one_group() && per == 1 ? group_step : step, b.codes(in), elem, out);
}

void decode_part(const LowBitPart& b, const uint8_t* in, int elem, void* out) {
  switch (b.bits) {
    case 4:
      return decode_part<4>(b, in, elem, out);
    case 5:
      return decode_part<5>(b, in, elem, out);
    case 6:
      return decode_part<6>(b, in, elem, out);
    case 7:
      return decode_part<7>(b, in, elem, out);
    default:
      return decode_part<8>(b, in, elem, out);
  }
}

// Decodes a latent of 512 codes of N bits to 512 signed bytes of an IntTile. Sets `step` to the
// step size of the bytes and `sum64` to -64 times their sum. Values halfway between two bytes round
// up at odd elements if `up` is 0, and at even elements if `up` is 1. `up` must alternate between
// neighbouring rows, so that rounding does not shift the mean of many rows.
template <int N>
void decode_bytes(const LowBitPart& b, const uint8_t* in, int up, int8_t* out, float& step,
                  int32_t& sum64) {
  // of_group holds one factor per group, `factor` one per 16 codes.
  alignas(32) uint8_t of_group[32], factor[32];
  bfactors(b.scales(in), b.group == 16 ? factor : of_group);
  for (int g = 0; g < 16 && b.group == 32; g++) factor[2 * g] = factor[2 * g + 1] = of_group[g];
  const uint8_t* low = b.codes(in);  // the 4-bit plane; with N = 5 the 1-bit plane follows it
  const uint32_t ones = 0x01010101;
  vw sum = wset(0);
  UNROLL_FOR(i, 8) {
    vw code = bfields(low + i % 4 * 64, i / 4 * 4, 15);
    if (N == 5) code = bor_left(code, bfields(low + 256, i, 1), 4);
    const vw bytes = btranspose(bscale<N>(code, factor + 4 * i, up));
    wstore(out + 64 * i, bytes);
    sum = dot_bytes(sum, bytes, &ones);
  }
  step = base_table()[in[0]] * (1.f / (1 << (8 - N)));
  sum64 = -64 * wsum(sum);
}

}  // namespace

void decode_ints(const Codec& c, const uint8_t* const* rows, int n, void* out) {
  const LowBitPart latent(c.w[0], c.bits[0], c.group), key(c.w[1], c.bits[1], c.group);
  const IntTile tile(c, out);
  const auto decode_latent = latent.bits == 4 ? decode_bytes<4> : decode_bytes<5>;
  for (int i = 0; i < n; i += 4) {
    for (int j = i; j < std::min(i + 4, n); j++) {
      decode_latent(latent, rows[j], j % 2, tile.row(j), tile.steps()[j], tile.sums()[j]);
      decode_part(key, rows[j] + latent.bytes(), BF16, tile.key(j));
    }
    for (int k = 0; k < latent.width; k += 64) {
      vw q[4];
      // The last quad may include rows beyond n with arbitrary bytes. Their softmax weight is 0.
      bquads(tile.row(i) + k, latent.width, q);
      for (int j = 0; j < 4; j++) wstore(tile.quads(k + 16 * j) + size_t(i / 4) * 64, q[j]);
    }
  }
}

void encode(const Codec& c, const float* row, uint8_t* out) {
  if (c.kind == Codec::kFp32) {
    std::memcpy(out, row, size_t(c.width()) * 4);
  } else if (c.kind == Codec::kBf16) {
    for (int i = 0; i < c.width(); i++) {
      const uint16_t h = float_to_bf16(row[i]);
      std::memcpy(out + 2 * i, &h, 2);
    }
  } else {
    const LowBitPart a(c.w[0], c.bits[0], c.group), b(c.w[1], c.bits[1], c.group);
    encode_part(a, row, out);
    encode_part(b, row + c.w[0], out + a.bytes());
  }
}

void decode(const Codec& c, const uint8_t* in, int elem, void* out) {
  if (c.kind == Codec::kLowBit) {
    for (int i = 0; i < 2; i++) {
      const LowBitPart part(c.w[i], c.bits[i], c.group);
      decode_part(part, in, elem, out);
      in += part.bytes();
      out = (char*)out + size_t(c.w[i]) * element_bytes(elem);
    }
  } else if (c.stores(elem)) {
    std::memcpy(out, in, size_t(c.width()) * element_bytes(elem));
  } else if (elem == FP32) {
    for (int i = 0; i < c.width(); i++) {
      uint16_t h;
      std::memcpy(&h, in + 2 * i, 2);
      ((float*)out)[i] = bf16_to_float(h);
    }
  } else {
    for (int i = 0; i < c.width(); i++) {
      float f;
      std::memcpy(&f, in + 4 * i, 4);
      ((uint16_t*)out)[i] = float_to_bf16(f);
    }
  }
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
