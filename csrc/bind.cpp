// Python's side: typed arrays to plain pointers, the GIL released, no arithmetic. Sizes are checked
// here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <stdexcept>

#include "model/validate.h"

namespace nb = nanobind;
using namespace lamoe;

template <class T, int D>
using In = nb::ndarray<const T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;

namespace {

template <class T>
nb::ndarray<nb::numpy, T> fresh(std::initializer_list<size_t> shape) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  T* data = new T[n ? n : 1];
  return nb::ndarray<nb::numpy, T>(data, shape,
                                   nb::capsule(data, [](void* p) noexcept { delete[] (T*)p; }));
}

void need(bool ok, const std::string& what) {
  if (!ok) throw nb::value_error(what.c_str());
}

void need(const std::string& wrong) {
  if (!wrong.empty()) throw nb::value_error(wrong.c_str());
}

// Of an array that is read as elements of `bytes` bytes.
void need_aligned(const void* p, size_t bytes, const std::string& name) {
  need(uintptr_t(p) % bytes == 0,
       name + " begins at an address that is not a multiple of " + std::to_string(bytes));
}

int thread_count(int threads) {
  need(threads >= 1 && threads <= 1024,
       "threads is " + std::to_string(threads) + "; it must be from 1 to 1,024");
  return threads;
}

const Ops& table(const std::string& isa) {
  if (isa.empty()) return ops();
  const Ops* t = ops_by_name(isa.c_str());
  need(t, "isa is '" + isa + "'; this CPU runs: " + cpu_features());
  return *t;
}

Mat mat(int fmt, int64_t n, int64_t k, const In<uint8_t, 1>& data, float scale) {
  need(wrong_sizes(fmt, n, k));
  need(data.size() == mat_bytes(fmt, n, k),
       "packed matrix [" + std::to_string(n) + ", " + std::to_string(k) + "] takes " +
           std::to_string(mat_bytes(fmt, n, k)) + " bytes, found " + std::to_string(data.size()));
  return {fmt, int(n), int(k), data.data(), scale};
}

auto pack(int fmt, In<float, 2> w, std::optional<In<float, 1>> importance,
          std::optional<In<float, 2>> feedback, int threads, const std::string& isa) {
  const Ops& op = table(isa);
  need(wrong_sizes(fmt, int64_t(w.shape(0)), int64_t(w.shape(1))));
  const int n = int(w.shape(0)), k = int(w.shape(1));
  need(!importance || importance->size() == size_t(k), "importance has one number per input");
  need(!feedback || (feedback->shape(0) == size_t(k) && feedback->shape(1) == size_t(k)),
       "feedback is [inputs, inputs]");
  auto out = fresh<uint8_t>({mat_bytes(fmt, n, k)});
  Mat m{fmt, n, k, out.data(), 1.f};
  {
    nb::gil_scoped_release free;
    m.scale = op.pack_scale(fmt, w.data(), k, n, k);
    Threads pool(thread_count(threads));
    Threads::Session awake(pool);
    pool.run(tiles(n), [&](int t, int) {
      op.pack(m, out.data(), w.data(), k, importance ? importance->data() : nullptr,
              feedback ? feedback->data() : nullptr, t);
    });
  }
  return std::make_tuple(out, m.scale);
}

auto unpack(int fmt, In<uint8_t, 1> data, int64_t n, int64_t k, float scale,
            const std::string& isa) {
  const Ops& op = table(isa);
  const Mat m = mat(fmt, n, k, data, scale);
  auto out = fresh<float>({size_t(n), size_t(k)});
  nb::gil_scoped_release free;
  for (int t = 0; t < tiles(m.n); t++) op.unpack(m, out.data(), m.k, t);
  return out;
}

// (bytes read per second, multiply-adds per second of fmt) with all threads; `buffer` should be far
// larger than the caches.
auto probe(In<uint8_t, 1> buffer, int threads) {
  using Clock = std::chrono::steady_clock;
  auto since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  nb::gil_scoped_release free;
  Threads pool(thread_count(threads));
  Threads::Session awake(pool);
  const size_t part = buffer.size() / (64 * threads) / 256 * 256;
  std::atomic<float> sink{0};
  auto begin = Clock::now();
  pool.run(64 * threads,
           [&](int i, int) { sink = sink + ops().probe_read(buffer.data() + i * part, part); });
  const double read = double(part) * 64 * threads / since(begin);
  std::vector<double> rates;
  for (int fmt : {INT8, BF16, FP32}) {
    std::vector<double> done(threads);
    begin = Clock::now();
    pool.run(threads, [&](int i, int) { sink = sink + ops().probe_dots(fmt, 1000000, &done[i]); });
    double all = 0;
    for (double d : done) all += d;
    rates.push_back(all / since(begin));
  }
  return std::make_tuple(read, rates[0], rates[1], rates[2]);
}

struct Rows {  // activations of one call
  std::vector<char> store;
  Acts a;
  Rows(const Ops& op, const Mat& m, const In<float, 2>& x) {
    a.rows = int(x.shape(0)), a.k = m.k, a.stride = acts_stride(m.k);
    const size_t n = size_t(a.rows) * a.stride;
    store.resize(n * 4 + n / kGroup * 4 + n / kBlock * 4 + 256);
    char* p = (char*)((uintptr_t(store.data()) + 63) / 64 * 64);
    if (m.fmt == FP32)
      a.f = (float*)p;
    else if (m.fmt == BF16)
      a.h = (uint16_t*)p;
    else
      a.q = (int8_t*)p, a.s = (float*)(p + n), a.c = (int32_t*)(p + n + n / kBlock * 4);
    for (int r = 0; r < a.rows; r++) op.put_row(a, r, x.data() + size_t(r) * m.k);
  }
};

auto linear(int fmt, In<uint8_t, 1> data, float scale, int64_t n, In<float, 2> x,
            const std::string& isa) {
  const Ops& op = table(isa);
  const Mat m = mat(fmt, n, int64_t(x.shape(1)), data, scale);
  need(x.shape(0) <= size_t(kMaxWidth),
       "a product takes at most " + std::to_string(kMaxWidth) + " rows");
  auto out = fresh<float>({x.shape(0), size_t(n)});
  nb::gil_scoped_release free;
  Rows rows(op, m, x);
  std::vector<char> scratch(scratch_bytes(m.k));
  op.linear(m, 0, tiles(n), rows.a, 0, rows.a.rows, out.data(), n, scratch.data(), nullptr);
  return out;
}

auto rms_norm(In<float, 2> x, In<float, 1> w, float eps, const std::string& isa) {
  const Ops& op = table(isa);
  need(w.size() == x.shape(1), "a norm has one weight per column");
  auto out = fresh<float>({x.shape(0), x.shape(1)});
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
  auto out = fresh<float>({x.shape(0), r});
  std::copy(x.data(), x.data() + x.size(), out.data());
  nb::gil_scoped_release free;
  for (size_t i = 0; i < x.shape(0); i++)
    op.rope(out.data() + i * r, cos_sin.data() + i * r, int(r), interleaved);
  return out;
}

// Gate and up of `f` outputs each, in whole tiles, as a packed matrix; `out` is filled up to a
// whole block.
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
  Acts act;
  act.rows = s.rows, act.k = s.w2.k, act.stride = acts_stride(s.w2.k);
  auto out = fresh<float>({x.shape(0), size_t(act.stride)});
  act.f = out.data();
  nb::gil_scoped_release free;
  Rows rows(op, s.w13, x);
  std::vector<char> scratch(scratch_bytes(s.w13.k));
  for (int b = 0; b * kBlock < s.w2.k; b++) op.swiglu(s, b, rows.a, act, scratch.data(), nullptr);
  return out;
}

// Up to sixteen queries against rows of the given element type, of which lane i sees those up to
// last[i]: tiles of 64 rows into partial states of `chunk` rows, combined in the end.
auto attend(int elem, In<uint8_t, 2> rows, In<float, 2> q, In<int32_t, 1> last, int k0, int v0,
            int vw, float scale, int chunk, const std::string& isa) {
  const Ops& op = table(isa);
  need(elem == FP32 || elem == BF16, "rows are fp32 or bf16");
  const int e = elem == FP32 ? 4 : 2, stride = int(rows.shape(1)) / e, lanes = int(q.shape(0)),
            kw = int(q.shape(1)), n = int(rows.shape(0));
  need(rows.shape(0) <= size_t(kMaxWidth) && rows.shape(1) <= 1 << 17 && rows.shape(1) % e == 0 &&
           n > 0 && chunk > 0,
       "rows are at least one, of whole elements; so is a chunk");
  need(lanes >= 1 && lanes <= 16 && last.size() == size_t(lanes),
       "there are from 1 to 16 queries with a last row each");
  need(kw > 0 && kw % 2 == 0 && vw > 0 && std::min(k0, v0) >= 0 && k0 + int64_t(kw) <= stride &&
           v0 + int64_t(vw) <= stride,
       "keys and values are columns of the rows, keys an even number");
  int seen[16];
  const float* each[16];
  for (int i = 0; i < 16; i++)
    each[i] = q.data() + size_t(std::min(i, lanes - 1)) * kw,
    seen[i] = last.data()[std::min(i, lanes - 1)];
  auto out = fresh<float>({size_t(lanes), size_t(vw)});
  nb::gil_scoped_release free;
  std::vector<uint8_t> tile(64 * rows.shape(1) + 64, 0xff), packed(size_t(kw) * e / 4 * 64),
      scratch(2 * 64 * 64);
  op.pack_lanes(elem, each, lanes, kw, packed.data());
  const size_t state = 32 + 16 * size_t(vw), chunks = (n + int64_t(chunk) - 1) / chunk;
  std::vector<float> states(chunks * state, 0.f);
  for (size_t c = 0; c < chunks; c++) {
    float* p = states.data() + c * state;
    std::fill(p, p + 16, -1e30f);
    const int64_t end = std::min<int64_t>(n, (int64_t(c) + 1) * chunk);
    for (int64_t r = int64_t(c) * chunk; r < end; r += 64) {
      const int count = int(std::min<int64_t>(64, end - r));
      std::fill(tile.begin(), tile.end(), 0xff);  // what lies behind the rows: NaN
      std::copy(rows.data() + r * rows.shape(1), rows.data() + (r + count) * rows.shape(1),
                tile.begin());
      op.attend_tile(elem, tile.data(), stride, count, int(r), k0, kw, v0, vw, scale,
                     {packed.data(), seen}, lanes, p, p + 16, p + 32, scratch.data(), {});
    }
  }
  for (int i = 0; i < lanes; i++)
    op.combine(states.data(), state, int(chunks), i, vw, out.data() + size_t(i) * vw);
  return out;
}

Codec codec(const std::vector<int>& c) {  // kind, widths, bits, group, bytes of a row
  need(c.size() == 7, "a codec is (kind, w0, w1, bits0, bits1, group, row bytes)");
  Codec r;
  r.kind = c[0], r.w[0] = c[1], r.w[1] = c[2], r.bits[0] = c[3], r.bits[1] = c[4], r.group = c[5],
  r.row = size_t(c[6]);
  need(wrong(r));
  return r;
}

// The same over cache rows of a low-bit format whose latents are attended to as integers: q [L,
// latent + rope key] -> [L, latent]
auto attend_ints(const std::vector<int>& format, In<uint8_t, 2> rows, In<float, 2> q,
                 In<int32_t, 1> last, float scale, int chunk, const std::string& isa) {
  const Ops& op = table(isa);
  const Codec c = codec(format);
  need(has_ints(c),
       "rows as integers are latents of 512 elements in 4 or 5 bits with an even number of rope "
       "elements");
  const int lanes = int(q.shape(0)), kw = c.w[0] + c.w[1], n = int(rows.shape(0));
  need(rows.shape(0) <= size_t(kMaxWidth) && n > 0 && chunk > 0 && chunk % 64 == 0 &&
           rows.shape(1) == c.row,
       "rows are at least one, of the codec's bytes; a chunk is a multiple of 64");
  need(lanes >= 1 && lanes <= 16 && last.size() == size_t(lanes) && q.shape(1) == size_t(kw),
       "there are from 1 to 16 queries, as wide as a row, with a last row each");
  int seen[16];
  const float* each[16];
  for (int i = 0; i < 16; i++)
    each[i] = q.data() + size_t(std::min(i, lanes - 1)) * kw,
    seen[i] = last.data()[std::min(i, lanes - 1)];
  auto out = fresh<float>({size_t(lanes), size_t(c.w[0])});
  nb::gil_scoped_release free;
  std::vector<uint8_t> tile(ints_tile_bytes(c), 0xff), packed(ints_lanes_bytes(c)),
      scratch(2 * 64 * 64);
  op.pack_lanes_ints(c, each, lanes, packed.data());
  const size_t state = 32 + 16 * size_t(c.w[0]), chunks = (n + int64_t(chunk) - 1) / chunk;
  std::vector<float> states(chunks * state, 0.f);
  for (size_t k = 0; k < chunks; k++) {
    float* p = states.data() + k * state;
    std::fill(p, p + 16, -1e30f);
    const int64_t end = std::min<int64_t>(n, (int64_t(k) + 1) * chunk);
    for (int64_t r = int64_t(k) * chunk; r < end; r += 64) {
      const int count = int(std::min<int64_t>(64, end - r));
      const uint8_t* at[64];
      for (int i = 0; i < count; i++) at[i] = rows.data() + (r + i) * c.row;
      op.decode_ints(c, at, count, tile.data());
      op.attend_ints(c, tile.data(), count, int(r), scale, {packed.data(), seen}, lanes, p, p + 16,
                     p + 32, scratch.data(), {});
    }
  }
  for (int i = 0; i < lanes; i++)
    op.combine(states.data(), state, int(chunks), i, c.w[0], out.data() + size_t(i) * c.w[0]);
  return out;
}

auto encode(const std::vector<int>& format, In<float, 2> rows, const std::string& isa) {
  const Ops& op = table(isa);
  const Codec c = codec(format);
  need(rows.shape(1) == size_t(c.w[0] + c.w[1]), "rows are as wide as the codec's two parts");
  auto out = fresh<uint8_t>({rows.shape(0), c.row});
  nb::gil_scoped_release free;
  for (size_t i = 0; i < rows.shape(0); i++)
    op.encode(c, rows.data() + i * rows.shape(1), out.data() + i * c.row);
  return out;
}

auto decode(const std::vector<int>& format, In<uint8_t, 2> rows, const std::string& isa) {
  const Ops& op = table(isa);
  const Codec c = codec(format);
  need(rows.shape(1) == c.row, "rows have the codec's bytes");
  const size_t w = c.w[0] + c.w[1];
  auto out = fresh<float>({rows.shape(0), w});
  nb::gil_scoped_release free;
  for (size_t i = 0; i < rows.shape(0); i++)
    op.decode(c, rows.data() + i * c.row, FP32, out.data() + i * w);
  return out;
}

class PyModel {
 public:
  PyModel(nb::dict c, int threads) : m_(config(c), thread_count(threads)) {}

  // A matrix, or matrix `index` of a stack: data holds `count` of them, one behind the other,
  // `scales` a number for each.
  void set(int layer, const std::string& name, int fmt, int64_t n, int64_t k, In<uint8_t, 1> data,
           const std::vector<float>& scales) {
    need(wrong_sizes(fmt, n, k));
    const size_t each = mat_bytes(fmt, int(n), int(k)), count = scales.size();
    need(count > 0 && data.size() == each * count,
         name + ": " + std::to_string(count) + " matrices [" + std::to_string(n) + ", " +
             std::to_string(k) + "] take " + std::to_string(each * count) + " bytes, found " +
             std::to_string(data.size()));
    std::vector<Mat> all;
    for (size_t i = 0; i < count; i++)
      all.push_back({fmt, int(n), int(k), data.data() + i * each, scales[i]});
    if (name == "head") {
      keep(data);
      m_.head = all[0];
      return;
    }
    Layer& l = at(layer);
    const std::map<std::string, Mat*> one = {
        {"wq", &l.wq},       {"wq_a", &l.wq_a}, {"wq_b", &l.wq_b}, {"wk", &l.wk},   {"wv", &l.wv},
        {"wkv_a", &l.wkv_a}, {"wo", &l.wo},     {"gate", &l.gate}, {"w13", &l.w13}, {"w2", &l.w2}};
    const std::map<std::string, std::vector<Mat>*> many = {
        {"uk", &l.uk}, {"uv", &l.uv}, {"uv_elem", &l.uv_elem}, {"e13", &l.e13}, {"e2", &l.e2}};
    const auto i = one.find(name);
    const auto j = many.find(name);
    need(i != one.end() || j != many.end(), "unknown matrix " + name);
    keep(data);
    if (i != one.end())
      *i->second = all[0];
    else
      *j->second = all;
  }

  void vector(int layer, const std::string& name, In<float, 1> data) {
    const size_t size = vector_size(m_.config, name);
    need(size, "unknown vector " + name);
    need(data.size() == size, "vector " + name + " has " + std::to_string(size) +
                                  " elements, found " + std::to_string(data.size()));
    need_aligned(data.data(), 4, name);
    if (name == "norm") {
      keep(data);
      m_.norm = data.data();
      return;
    }
    Layer& l = at(layer);
    keep(data);
    (name == "attn_norm"  ? l.attn_norm
     : name == "ffn_norm" ? l.ffn_norm
     : name == "q_norm"   ? l.q_norm
                          : l.kv_norm) = data.data();
  }

  void raw(int layer, const std::string& name, In<uint8_t, 1> data) {
    const size_t elements = raw_size(m_.config, name), bytes = m_.config.elem == FP32 ? 4 : 2;
    need(elements, "unknown array " + name);
    need(data.size() == elements * bytes, "array " + name + " has " +
                                              std::to_string(elements * bytes) + " bytes, found " +
                                              std::to_string(data.size()));
    need_aligned(data.data(), bytes, name);
    if (name == "embed") {
      keep(data);
      m_.embed = data.data();
      return;
    }
    Layer& l = at(layer);
    keep(data);
    l.uk_rows = data.data();
  }

  // -> (logits [out rows, vocabulary] or final states [out rows, hidden], chosen experts [MoE
  // layers, tokens, K])
  auto step(In<int32_t, 1> ids, In<float, 2> cos_sin, In<int32_t, 2> seqs, In<int32_t, 1> pages,
            nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> rows, int page,
            const std::vector<int>& format, In<int32_t, 1> out_rows, bool logits, bool experts) {
    const Config& c = m_.config;
    if (!frozen_ || (logits && !m_.head.data)) need(wrong(m_, logits));
    const int64_t most =
        std::min<int64_t>(1 << 22, INT32_MAX / std::max({c.heads, c.top_k, 1}) / 2);
    need(ids.size() > 0 && int64_t(ids.size()) <= most && int64_t(out_rows.size()) <= most,
         "a step computes from 1 to " + std::to_string(most) + " tokens, found " +
             std::to_string(ids.size()));
    const int n = int(ids.size()), r = int(out_rows.size());
    Cache cache{rows.data(), rows.shape(1), page, codec(format)};
    need(wrong(cache.codec, c));
    need_aligned(rows.data(), 4, "the cache");  // rows of the plain formats are read where they lie
    need(cos_sin.shape(0) == size_t(n) && cos_sin.shape(1) == size_t(c.rope),
         "cos_sin is [tokens, rope]");
    need(rows.shape(0) == size_t(c.layers) && rows.shape(2) == cache.codec.row && page > 0,
         "cache rows are [layers, slots, row bytes], in pages of at least one");
    for (int i = 0; i < n; i++)
      need(ids.data()[i] >= 0 && ids.data()[i] < c.vocab, "token id outside the vocabulary");
    for (int i = 0; i < r; i++)
      need(out_rows.data()[i] >= 0 && out_rows.data()[i] < n,
           "a wanted row is not a token of the step");
    need(seqs.shape(1) == 3 && seqs.shape(0) > 0,
         "seqs is [sequences, (tokens, rows after the step, first page)]");
    std::vector<SeqStep> list;
    int first = 0;
    for (size_t i = 0; i < seqs.shape(0); i++) {
      const int32_t *s = seqs.data() + 3 * i, count = s[0], end = s[1], at = s[2];
      need(count > 0 && count <= n - first, "the sequences' tokens do not add up to the step's");
      const int64_t needed = (int64_t(end) + page - 1) / page;
      need(
          end >= count && end <= kMaxWidth * 64 && at >= 0 && uint64_t(at + needed) <= pages.size(),
          "a sequence has more rows than pages, or fewer than tokens");
      for (int64_t j = 0; j < needed; j++)
        need(
            pages.data()[at + j] >= 0 && (uint64_t(pages.data()[at + j]) + 1) * page <= cache.slots,
            "a page lies outside the cache");
      list.push_back({first, count, end, pages.data() + at});
      first += count;
    }
    need(first == n, "the sequences' tokens do not add up to the step's");
    const size_t width = logits ? c.vocab : c.hidden;
    auto out = fresh<float>({size_t(r), width});
    size_t moe = 0;
    for (const Layer& l : m_.layer) moe += l.gate.data != nullptr;
    auto chosen = fresh<int16_t>({experts ? moe : 0, size_t(n), size_t(c.top_k)});
    frozen_ = true;  // from here on other threads may be inside m_.step: its weights stay
    {
      nb::gil_scoped_release free;
      m_.step(ids.data(), cos_sin.data(), n, list, cache, out_rows.data(), r,
              logits ? out.data() : nullptr, logits ? nullptr : out.data(),
              experts ? chosen.data() : nullptr);
    }
    return std::make_tuple(out, chosen);
  }

  int threads() const { return m_.threads(); }
  size_t state_bytes() const { return m_.state_bytes(); }
  size_t state_limit() const { return m_.state_limit; }
  void limit_states(size_t bytes) { m_.state_limit = bytes; }

 private:
  static Config config(nb::dict d) {
    Config c;
    const std::map<std::string, int*> ints = {
        {"layers", &c.layers},       {"vocab", &c.vocab},       {"hidden", &c.hidden},
        {"heads", &c.heads},         {"kv_heads", &c.kv_heads}, {"head_dim", &c.head_dim},
        {"latent", &c.latent},       {"rope", &c.rope},         {"nope", &c.nope},
        {"value", &c.value},         {"q_lora", &c.q_lora},     {"experts", &c.experts},
        {"top_k", &c.top_k},         {"groups", &c.groups},     {"top_groups", &c.top_groups},
        {"moe_width", &c.moe_width}, {"elem", &c.elem}};
    const std::map<std::string, float*> floats = {
        {"routed_scale", &c.routed_scale}, {"eps", &c.eps}, {"softmax_scale", &c.softmax_scale}};
    const std::map<std::string, bool*> bools = {{"group_limited", &c.group_limited},
                                                {"normalise", &c.normalise},
                                                {"interleaved", &c.interleaved}};
    for (auto [key, value] : d) {
      const std::string k = nb::cast<std::string>(key);
      bool known = true;
      if (auto i = ints.find(k); i != ints.end())
        known = nb::try_cast(value, *i->second);
      else if (auto f = floats.find(k); f != floats.end())
        known = nb::try_cast(value, *f->second);
      else if (auto b = bools.find(k); b != bools.end())
        known = nb::try_cast(value, *b->second);
      else
        throw nb::value_error(("unknown setting " + k).c_str());
      need(known, "setting " + k + " is not a number of its kind");
    }
    need(wrong(c));
    return c;
  }
  template <class A>
  void keep(const A& data) {
    need(!frozen_, "the model has run; its weights stay as they are");
    keep_.push_back(nb::cast(data));
  }
  Layer& at(int layer) {
    need(layer >= 0 && layer < int(m_.layer.size()), "there is no layer " + std::to_string(layer));
    return m_.layer[layer];
  }

  Model m_;
  bool frozen_ = false;           // a step has run (changed with the GIL held)
  std::vector<nb::object> keep_;  // what the pointers point to
};

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Kernels of lamoe. Use them through lamoe.kernels and lamoe.packed.";
  m.def(
      "isa", [] { return std::string(ops().name); },
      "The instruction set in use, one of `features`.");
  m.def(
      "features", [] { return std::string(cpu_features()); },
      "The instruction sets that this CPU runs, best first.");
  // noconvert: an array of another type or order would be copied, silently, and for the cache's
  // rows the copy would be written
  m.def("mat_bytes", [](int fmt, int64_t n, int64_t k) {
    need(wrong_sizes(fmt, n, k));
    return mat_bytes(fmt, int(n), int(k));
  });
  m.def("pack", &pack, nb::arg("fmt"), nb::arg("w").noconvert(),
        nb::arg("importance").noconvert() = nb::none(),
        nb::arg("feedback").noconvert() = nb::none(), nb::arg("threads") = 1, nb::arg("isa") = "");
  m.def("unpack", &unpack, nb::arg("fmt"), nb::arg("data").noconvert(), nb::arg("n"), nb::arg("k"),
        nb::arg("scale"), nb::arg("isa") = "");
  m.def("linear", &linear, nb::arg("fmt"), nb::arg("data").noconvert(), nb::arg("scale"),
        nb::arg("n"), nb::arg("x").noconvert(), nb::arg("isa") = "");
  m.def("rms_norm", &rms_norm, nb::arg("x").noconvert(), nb::arg("w").noconvert(), nb::arg("eps"),
        nb::arg("isa") = "");
  m.def("rope", &rope, nb::arg("x").noconvert(), nb::arg("cos_sin").noconvert(),
        nb::arg("interleaved"), nb::arg("isa") = "");
  m.def("swiglu", &swiglu, nb::arg("fmt"), nb::arg("w13").noconvert(), nb::arg("scale"),
        nb::arg("f"), nb::arg("x").noconvert(), nb::arg("weight").noconvert(), nb::arg("isa") = "");
  m.def("attend", &attend, nb::arg("elem"), nb::arg("rows").noconvert(), nb::arg("q").noconvert(),
        nb::arg("last").noconvert(), nb::arg("k0"), nb::arg("v0"), nb::arg("vw"), nb::arg("scale"),
        nb::arg("chunk"), nb::arg("isa") = "");
  m.def("attend_ints", &attend_ints, nb::arg("codec"), nb::arg("rows").noconvert(),
        nb::arg("q").noconvert(), nb::arg("last").noconvert(), nb::arg("scale"), nb::arg("chunk"),
        nb::arg("isa") = "");
  m.def("probe", &probe, nb::arg("buffer").noconvert(), nb::arg("threads"),
        "(bytes read, int8, bf16, fp32 multiply-adds) per second.");
  m.def("encode", &encode, nb::arg("codec"), nb::arg("rows").noconvert(), nb::arg("isa") = "");
  m.def("decode", &decode, nb::arg("codec"), nb::arg("rows").noconvert(), nb::arg("isa") = "");
  nb::class_<PyModel>(m, "Model")
      .def(nb::init<nb::dict, int>())
      .def("set", &PyModel::set, nb::arg("layer"), nb::arg("name"), nb::arg("fmt"), nb::arg("n"),
           nb::arg("k"), nb::arg("data").noconvert(), nb::arg("scales"))
      .def("vector", &PyModel::vector, nb::arg("layer"), nb::arg("name"),
           nb::arg("data").noconvert())
      .def("raw", &PyModel::raw, nb::arg("layer"), nb::arg("name"), nb::arg("data").noconvert())
      .def("step", &PyModel::step, nb::arg("ids").noconvert(), nb::arg("cos_sin").noconvert(),
           nb::arg("seqs").noconvert(), nb::arg("pages").noconvert(), nb::arg("rows").noconvert(),
           nb::arg("page"), nb::arg("format"), nb::arg("out_rows").noconvert(), nb::arg("logits"),
           nb::arg("experts"))
      .def_prop_ro("threads", &PyModel::threads)
      .def_prop_ro("state_bytes", &PyModel::state_bytes)
      .def_prop_rw("state_limit", &PyModel::state_limit, &PyModel::limit_states);
}
