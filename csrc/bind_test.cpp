// The Python module lamoe._native_test, which exposes each operation of a step separately. Only
// tests use it.
#include "bind_common.h"

#include <algorithm>

using namespace lamoe;

namespace {

auto rms_norm(In<float, 2> x, In<float, 1> w, float eps, const std::string& isa) {
  const Ops& op = table(isa);
  need(w.size() == x.shape(1), "a norm has one weight per column");
  auto out = new_array<float>({x.shape(0), x.shape(1)});
  nb::gil_scoped_release free;
  for (size_t i = 0; i < x.shape(0); i++)
    op.rms_norm(x.data() + i * w.size(), w.data(), eps, out.data() + i * w.size(), int(w.size()));
  return out;
}

auto rope(In<float, 2> x, In<float, 2> cos_sin, bool interleaved, const std::string& isa) {
  const Ops& op = table(isa);
  const size_t r = x.shape(1);
  need(r % 2 == 0 && cos_sin.shape(0) == x.shape(0) && cos_sin.shape(1) == r,
       "rows have an even width, and as many cosines and sines");
  auto out = new_array<float>({x.shape(0), r});
  std::copy(x.data(), x.data() + x.size(), out.data());
  nb::gil_scoped_release free;
  for (size_t i = 0; i < x.shape(0); i++)
    op.rope(out.data() + i * r, cos_sin.data() + i * r, int(r), interleaved);
  return out;
}

auto swiglu(int fmt, In<uint8_t, 1> w13, float scale, int64_t f, In<float, 2> x,
            In<float, 1> weight, const std::string& isa) {
  const Ops& op = table(isa);
  need(wrong_sizes(fmt, f, f));
  Seg s;
  s.w13 = mat(fmt, 2 * ceil_to(int(f), kTile), int64_t(x.shape(1)), w13, scale);
  s.w2.k = int(f);
  need(x.shape(0) <= size_t(kMaxWidth) && weight.size() == x.shape(0),
       "there is one weight per row, and at most " + std::to_string(kMaxWidth) + " rows");
  s.rows = int(x.shape(0)), s.weight = weight.data();
  auto out = new_array<float>({x.shape(0), size_t(acts_stride(s.w2.k))});
  const Acts act = plain_acts(FP32, out.data(), s.rows, s.w2.k, acts_stride(s.w2.k));
  nb::gil_scoped_release free;
  const Activations rows(op, s.w13, x);
  std::vector<char> scratch(scratch_bytes(s.w13.k));
  for (int b = 0; b < blocks(s.w2.k); b++) op.swiglu(s, b, rows.acts, act, scratch.data(), nullptr);
  return out;
}

// Up to 16 queries, one per lane. Unused lanes repeat the last query.
struct Queries {
  const float* q[kLanes];
  int last[kLanes];
  int count;

  Queries(const In<float, 2>& x, const In<int32_t, 1>& visible) : count(int(x.shape(0))) {
    need(count >= 1 && count <= kLanes && visible.size() == size_t(count),
         "there are from 1 to 16 queries with a last row each");
    for (int i = 0; i < kLanes; i++) {
      const int j = std::min(i, count - 1);
      q[i] = x.data() + size_t(j) * x.shape(1), last[i] = visible.data()[j];
    }
  }
};

// Calls attend(first row, number of rows, state) for each tile of 64 cache rows. A new attention
// state begins every `chunk` rows. Combines all states at the end.
template <class Attend>
void attend_chunks(const Ops& op, int n, int chunk, const Queries& queries, int width, float* out,
                   const Attend& attend) {
  const int chunks = int((n + int64_t(chunk) - 1) / chunk);
  std::vector<float> states(chunks * AttentionState::floats(width));
  for (int c = 0; c < chunks; c++) {
    const AttentionState state{states.data() + c * AttentionState::floats(width), width};
    state.reset(queries.count);
    const int begin = c * chunk, end = int(std::min<int64_t>(n, begin + int64_t(chunk)));
    for (int r = begin; r < end; r += kTileRows) attend(r, std::min(kTileRows, end - r), state);
  }
  for (int i = 0; i < queries.count; i++)
    op.combine(states.data(), chunks, i, width, out + size_t(i) * width);
}

auto attend(int elem, In<uint8_t, 2> rows, In<float, 2> q, In<int32_t, 1> last, int k0, int v0,
            int vw, float scale, int chunk, const std::string& isa) {
  const Ops& op = table(isa);
  need(elem == FP32 || elem == BF16, "rows are fp32 or bf16");
  const size_t row_bytes = rows.shape(1);
  const int e = element_bytes(elem), stride = int(row_bytes) / e, kw = int(q.shape(1));
  const int n = int(rows.shape(0));
  need(rows.shape(0) <= size_t(kMaxWidth) && row_bytes <= 1 << 17 && row_bytes % e == 0 && n > 0 &&
           chunk > 0,
       "rows are at least one, of whole elements; so is a chunk");
  const Queries queries(q, last);
  need(kw > 0 && kw % 2 == 0 && vw > 0 && std::min(k0, v0) >= 0 && k0 + int64_t(kw) <= stride &&
           v0 + int64_t(vw) <= stride,
       "keys and values are columns of the rows, keys an even number");
  auto out = new_array<float>({q.shape(0), size_t(vw)});
  nb::gil_scoped_release free;
  std::vector<uint8_t> tile(kTileRows * row_bytes + 64), packed(size_t(kw) * e * kLanes);
  AttentionScratch scratch;
  op.pack_lanes(elem, queries.q, queries.count, kw, packed.data());
  const Lanes lanes{packed.data(), queries.last, queries.count};
  attend_chunks(op, n, chunk, queries, vw, out.data(), [&](int r, int count, AttentionState state) {
    std::fill(tile.begin(), tile.end(), 0xff);  // NaN in the memory after the rows
    std::copy(rows.data() + r * row_bytes, rows.data() + (r + count) * row_bytes, tile.begin());
    op.attend_tile(elem, {tile.data(), stride, count, r}, {k0, kw, v0, vw}, scale, lanes, state,
                   &scratch, {});
  });
  return out;
}

auto attend_ints(const std::vector<int>& format, In<uint8_t, 2> rows, In<float, 2> q,
                 In<int32_t, 1> last, float scale, int chunk, const std::string& isa) {
  const Ops& op = table(isa);
  const Codec c = codec(format);
  need(has_ints(c),
       "rows as integers are latents of 512 elements in 4 or 5 bits with an even number of rope "
       "elements");
  const int n = int(rows.shape(0)), width = c.w[0];
  need(rows.shape(0) <= size_t(kMaxWidth) && n > 0 && chunk > 0 && chunk % 64 == 0 &&
           rows.shape(1) == c.row,
       "rows are at least one, of the codec's bytes; a chunk is a multiple of 64");
  need(q.shape(1) == size_t(c.width()), "queries are as wide as a row");
  const Queries queries(q, last);
  auto out = new_array<float>({q.shape(0), size_t(width)});
  nb::gil_scoped_release free;
  std::vector<uint8_t> tile(IntTile::bytes(c), 0xff), packed(IntLanes::bytes(c));
  AttentionScratch scratch;
  op.pack_lanes_ints(c, queries.q, queries.count, packed.data());
  const Lanes lanes{packed.data(), queries.last, queries.count};
  attend_chunks(op, n, chunk, queries, width, out.data(), [&](int r, int count, AttentionState s) {
    const uint8_t* each[kTileRows];
    for (int i = 0; i < count; i++) each[i] = rows.data() + (r + i) * c.row;
    op.decode_ints(c, each, count, tile.data());
    op.attend_ints(c, {tile.data(), 0, count, r}, scale, lanes, s, &scratch, {});
  });
  return out;
}

}  // namespace

NB_MODULE(_native_test, m) {
  using nb::arg;
  m.doc() = "Single operations of the compiled kernels, for tests.";
  m.def("rms_norm", &rms_norm, arg("x").noconvert(), arg("w").noconvert(), arg("eps"),
        arg("isa") = "", "Normalise the rows of x.");
  m.def("rope", &rope, arg("x").noconvert(), arg("cos_sin").noconvert(), arg("interleaved"),
        arg("isa") = "", "Rotate the rows of x.");
  m.def("swiglu", &swiglu, arg("fmt"), arg("w13").noconvert(), arg("scale"), arg("f"),
        arg("x").noconvert(), arg("weight").noconvert(), arg("isa") = "",
        "Compute silu(gate) * up * weight. w13 holds f gates and f ups, each padded to whole\n"
        "tiles. Return [rows, f padded to 64].");
  m.def("attend", &attend, arg("elem"), arg("rows").noconvert(), arg("q").noconvert(),
        arg("last").noconvert(), arg("k0"), arg("v0"), arg("vw"), arg("scale"), arg("chunk"),
        arg("isa") = "", "Attend to rows; query i sees rows 0 .. last[i].");
  m.def("attend_ints", &attend_ints, arg("codec"), arg("rows").noconvert(), arg("q").noconvert(),
        arg("last").noconvert(), arg("scale"), arg("chunk"), arg("isa") = "",
        "Attend to stored low-bit rows as integers.");
}
