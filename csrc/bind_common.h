// Typed arrays and size checks, shared by the modules lamoe._native and lamoe._native_test. Kernels
// check nothing, so each binding checks its arguments once.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "model/validate.h"

namespace lamoe {

namespace nb = nanobind;

// Array arguments must be declared noconvert. Otherwise nanobind silently copies an array of
// another type or memory order, and results that are written to the copy are lost.
template <class T, int D>
using In = nb::ndarray<const T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;

template <class T>
nb::ndarray<nb::numpy, T> new_array(std::initializer_list<size_t> shape) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  T* data = new T[n ? n : 1];
  nb::capsule owner(data, [](void* p) noexcept { delete[] (T*)p; });
  return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

inline void need(bool ok, const std::string& what) {
  if (!ok) throw nb::value_error(what.c_str());
}

inline void need(const std::string& wrong) {
  if (!wrong.empty()) throw nb::value_error(wrong.c_str());
}

// Throws unless p is aligned to `bytes`, the size of the elements that are read from it.
inline void need_aligned(const void* p, size_t bytes, const std::string& name) {
  need(uintptr_t(p) % bytes == 0,
       name + " begins at an address that is not a multiple of " + std::to_string(bytes));
}

inline const Ops& table(const std::string& isa) {
  if (isa.empty()) return ops();
  const Ops* t = ops_by_name(isa.c_str());
  need(t, "isa is '" + isa + "'; this CPU runs: " + cpu_features());
  return *t;
}

inline Mat mat(int fmt, int64_t n, int64_t k, const In<uint8_t, 1>& data, float scale) {
  need(wrong_sizes(fmt, n, k));
  const size_t bytes = mat_bytes(fmt, int(n), int(k));
  need(data.size() == bytes, "packed matrix [" + std::to_string(n) + ", " + std::to_string(k) +
                                 "] takes " + std::to_string(bytes) + " bytes, found " +
                                 std::to_string(data.size()));
  return {fmt, int(n), int(k), data.data(), scale};
}

// Converts a cache format from the list of numbers that Python passes (codec_numbers).
inline Codec codec(const std::vector<int>& c) {
  need(c.size() == 7, "a codec is (kind, w0, w1, bits0, bits1, group, row bytes)");
  Codec r;
  r.kind = c[0], r.w[0] = c[1], r.w[1] = c[2], r.bits[0] = c[3], r.bits[1] = c[4], r.group = c[5],
  r.row = size_t(c[6]);
  need(wrong(r));
  return r;
}

// Activation rows in the form that a product with the weight matrix m reads.
class Activations {
 public:
  Activations(const Ops& op, const Mat& m, const In<float, 2>& x) {
    acts.rows = int(x.shape(0)), acts.k = m.k, acts.stride = acts_stride(m.k);
    const size_t n = size_t(acts.rows) * acts.stride;
    store_.resize(n * 4 + n / kGroup * 4 + n / kBlock * 4 + 256);
    char* p = (char*)align64(uintptr_t(store_.data()));
    if (m.fmt == FP32)
      acts.f = (float*)p;
    else if (m.fmt == BF16)
      acts.h = (uint16_t*)p;
    else
      acts.q = (int8_t*)p, acts.s = (float*)(p + n), acts.c = (int32_t*)(p + n + n / kBlock * 4);
    for (int r = 0; r < acts.rows; r++) op.put_row(acts, r, x.data() + size_t(r) * m.k);
  }
  Acts acts;

 private:
  std::vector<char> store_;
};

}  // namespace lamoe
