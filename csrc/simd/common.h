// Scalar conversions that all instruction sets share, and the list of operations that every
// instruction set must define.
//
// Kernel files are compiled once per instruction set. CMake sets LAMOE_ISA, the name of the
// instruction set (it is also the namespace of the compiled kernels), and LAMOE_SIMD, the file
// that implements it. To add an instruction set, write one file here and add one line to
// CMakeLists.txt; CONTRIBUTING.md has the steps.
//
// Each file defines, in namespace lamoe::LAMOE_ISA:
//
//   vf   sixteen floats                      vw   sixteen 32-bit words, or 64 bytes
//
//   Floats
//     vzero, vset, vload, vstore             all lanes
//     vload_n, vstore_n(p, n)                only the first n lanes; vload_n sets the others to 0
//     + - * /, vfma(a, b, c) = a * b + c
//     vrecip(a)                              1 / a for normal a, with a relative error of 2^-23
//     vmax(a, b), vmin(a, b)                 b where a or b is NaN
//     vzero_if_less(a, x, y)                 0 where x < y, else a
//     vabs, vround, vsqrt                    vround: to nearest, ties to even
//     vpow2(p, n)                            p * 2^n, n a whole number from -126 to 127
//     vsum, vhmax                            sum and maximum over the lanes
//     vdiffers(a, b)                         whether any lane differs; NaN differs from all
//     vcvt(w), wround(f)                     int32 to float, float to the nearest int32
//   bfloat16
//     vload_bf16, vstore_bf16(p, a)          sixteen values; vstore_bf16(p, a, b): 32 values
//     interleave_bf16(p, q)                  words (p[i] low half, q[i] high half)
//     pair_bf16(a, b)                        words (a[i] low half, b[i] high half), from floats
//     dot_f32(acc, w, x)                     acc + w * x as floats; x: one word in memory
//     dot_bf16(acc, w, x)                    acc + both halves of w times those of x, as bfloat16
//   Words and bytes
//     wload, wstore, wset, wspread(p)        wspread: one word from memory in every lane
//     wsum                                   sum over the lanes
//     wfields(p, shift, mask)                sixteen bytes as words, (byte >> shift) & mask
//     wor_left(a, b, shift)                  a | b << shift, by words
//     bfields, bor_left                      wfields and wor_left for 64 bytes
//     bfloats<Q>(w)                          bytes 16 Q .. 16 Q + 15 as floats
//     btranspose(w)                          the sixteen words as a 4 x 4 matrix, transposed
//     transpose_words(in, in_stride, out, stride)   16 x 16 words, transposed; strides of the rows
//                                            in bytes
//     bquads(rows, stride, out)              four rows transposed by btranspose -> the four bytes
//                                            of each column side by side, as vectors
//                                            [4 vectors][16 columns][4 rows]
//   Quantised weights
//     vscales(p)                             sixteen group scales (scale_value) as floats
//     decode_int8(p), decode_int4(p, low, high)   stored codes as operands of dot_int8 / dot_int4
//     dot_int8, dot_int4(acc, w, x)          acc + four products of bytes in each word
//     start_int8(c)                          initial sum of an INT8 group, where c = -64 * sum(x):
//                                            2 c if operands are code + 128, 0 if they are signed
//     vquant(p, a)                           stores floats from -127 to 127 as signed bytes, and
//                                            returns the sum of the bytes
//   Low-bit cache rows
//     vfactors(p, base, out)                 32 nibbles f -> base * (f + 1) / 16
//     bfactors(p, out)                       32 nibbles f -> bytes f + 1
//     bscale<N>(code, f, up)                 64 signed bytes from 64 N-bit codes:
//                                            (code - middle code) * factor / 2^(N - 4), with one
//                                            factor per 16 codes. Halves round up at odd elements,
//                                            or at even elements if `up` is 1
//     dot_bytes(acc, w, x)                   acc + four products, w signed and x unsigned bytes of
//                                            at most Traits::kMaxByte
//   Measurement (probe.cpp)
//     in_register(x)                         hides the value of x from the optimiser
//
//   struct Traits   tuning constants, documented in scalar.h
//   Tiles           the matrix unit (amx.h has its interface), or NoTiles
//
// Every instruction set sums in the same order, with two exceptions: vsum, and bfloat16 products on
// AMX.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
// scalar.h defines this macro as nothing, because unrolling plain C++ would only cost minutes of
// compile time.
#define UNROLL_LOOP _Pragma("GCC unroll 16")
#define UNROLL_FOR(i, n) \
  UNROLL                 \
  for (int i = 0; i < (n); i++)

namespace lamoe {

// The 16 levels of the INT4 codebook, stored + 64 so that they are unsigned. docs/LOG.md says how
// they were found.
alignas(16) constexpr uint8_t kLevels[16] = {1,  12, 23, 32, 40, 48, 54,  60,
                                             65, 71, 76, 82, 89, 97, 106, 120};

INLINE float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Rounds a float to bfloat16, to nearest even. NaN stays NaN.
INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 64);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Decodes the scale of a weight group, relative to the scale of its matrix. The bits of a code are
//   sign (1 bit) | exponent (4 bits) | mantissa (3 bits)
// and code 0 is zero.
INLINE float scale_value(uint8_t code) {
  if (!(code & 0x7f)) return 0.f;
  uint32_t u = uint32_t(code & 0x80) << 24 | ((uint32_t(code & 0x7f) << 20) + (112u << 23));
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Replaces `Tiles` on instruction sets without a matrix unit.
struct NoTiles {
  static constexpr bool kAvailable = false;
};

}  // namespace lamoe
