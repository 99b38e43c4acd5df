// The Python module lamoe._native, which lamoe itself uses. It turns arrays into plain pointers and
// releases the GIL. It computes nothing.
#include "bind_common.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <stdexcept>

#include "model/cost.h"
#include "model/mapped.h"

using namespace lamoe;

namespace {

int thread_count(int threads) {
  need(threads >= 1 && threads <= 1024,
       "threads is " + std::to_string(threads) + "; it must be from 1 to 1,024");
  return threads;
}

auto pack(int fmt, In<float, 2> w, std::optional<In<float, 1>> importance,
          std::optional<In<float, 2>> feedback, int threads, const std::string& isa) {
  const Ops& op = table(isa);
  need(wrong_sizes(fmt, int64_t(w.shape(0)), int64_t(w.shape(1))));
  const int n = int(w.shape(0)), k = int(w.shape(1));
  need(!importance || importance->size() == size_t(k), "importance has one number per input");
  need(!feedback || (feedback->shape(0) == size_t(k) && feedback->shape(1) == size_t(k)),
       "feedback is [inputs, inputs]");
  auto out = new_array<uint8_t>({mat_bytes(fmt, n, k)});
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
  auto out = new_array<float>({size_t(n), size_t(k)});
  nb::gil_scoped_release free;
  for (int t = 0; t < tiles(m.n); t++) op.unpack(m, out.data(), m.k, t);
  return out;
}

auto linear(int fmt, In<uint8_t, 1> data, float scale, int64_t n, In<float, 2> x,
            const std::string& isa) {
  const Ops& op = table(isa);
  const Mat m = mat(fmt, n, int64_t(x.shape(1)), data, scale);
  need(x.shape(0) <= size_t(kMaxWidth),
       "a product takes at most " + std::to_string(kMaxWidth) + " rows");
  auto out = new_array<float>({x.shape(0), size_t(n)});
  nb::gil_scoped_release free;
  const Activations rows(op, m, x);
  std::vector<char> scratch(scratch_bytes(m.k));
  op.linear(m, 0, tiles(m.n), rows.acts, 0, rows.acts.rows, out.data(), n, scratch.data(), nullptr);
  return out;
}

auto encode(const std::vector<int>& format, In<float, 2> rows, const std::string& isa) {
  const Ops& op = table(isa);
  const Codec c = codec(format);
  need(rows.shape(1) == size_t(c.width()), "rows are as wide as the codec's two parts");
  auto out = new_array<uint8_t>({rows.shape(0), c.row});
  nb::gil_scoped_release free;
  for (size_t i = 0; i < rows.shape(0); i++)
    op.encode(c, rows.data() + i * rows.shape(1), out.data() + i * c.row);
  return out;
}

auto decode(const std::vector<int>& format, In<uint8_t, 2> rows, const std::string& isa) {
  const Ops& op = table(isa);
  const Codec c = codec(format);
  need(rows.shape(1) == c.row, "rows have the codec's bytes");
  const size_t w = size_t(c.width());
  auto out = new_array<float>({rows.shape(0), w});
  nb::gil_scoped_release free;
  for (size_t i = 0; i < rows.shape(0); i++)
    op.decode(c, rows.data() + i * c.row, FP32, out.data() + i * w);
  return out;
}

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

Config config(nb::dict d) {
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

std::string cheaper_form(nb::dict settings, int tokens, int rows) {
  need(tokens >= 1 && rows >= tokens, "tokens are from 1 to the rows of the sequence");
  return expand_is_cheaper(config(settings), tokens, rows) ? "expand" : "absorb";
}

size_t max_states(nb::dict settings, int max_rows, int max_sequences, int step_tokens) {
  need(std::min({max_rows, max_sequences, step_tokens}) >= 1,
       "rows, sequences and tokens are at least 1");
  return max_state_bytes(config(settings), max_rows, max_sequences, step_tokens);
}

using CacheRows = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

class PyModel {
 public:
  PyModel(nb::dict c, int threads) : m_(config(c), thread_count(threads)) {}

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
        {"wq", &l.wq}, {"wq_a", &l.wq_a},   {"wq_b", &l.wq_b}, {"wk", &l.wk},   {"wv", &l.wv},
        {"wo", &l.wo}, {"wkv_a", &l.wkv_a}, {"gate", &l.gate}, {"w13", &l.w13}, {"w2", &l.w2}};
    const std::map<std::string, std::vector<Mat>*> stacks = {
        {"uk", &l.uk}, {"uv", &l.uv}, {"uv_elem", &l.uv_elem}, {"e13", &l.e13}, {"e2", &l.e2}};
    const auto i = one.find(name);
    const auto j = stacks.find(name);
    need(i != one.end() || j != stacks.end(), "unknown matrix " + name);
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
    const size_t elements = raw_size(m_.config, name), bytes = element_bytes(m_.config.elem);
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

  auto step(In<int32_t, 1> ids, In<float, 2> cos_sin, In<int32_t, 2> seqs, In<int32_t, 1> pages,
            CacheRows rows, int page, const std::vector<int>& format, In<int32_t, 1> out_rows,
            bool logits, bool experts) {
    const Config& c = m_.config;
    if (!frozen_ || (logits && !m_.head.data)) need(wrong(m_, logits));
    const int64_t most =
        std::min<int64_t>(1 << 22, INT32_MAX / std::max({c.heads, c.top_k, 1}) / 2);
    need(ids.size() > 0 && int64_t(ids.size()) <= most && int64_t(out_rows.size()) <= most,
         "a step computes from 1 to " + std::to_string(most) + " tokens, found " +
             std::to_string(ids.size()));
    Step step;
    step.tokens = int(ids.size()), step.ids = ids.data(), step.cos_sin = cos_sin.data();
    step.outputs = int(out_rows.size()), step.out_rows = out_rows.data();
    step.cache = cache(rows, page, format);
    need(cos_sin.shape(0) == ids.size() && cos_sin.shape(1) == size_t(c.rope),
         "cos_sin is [tokens, rope]");
    for (int i = 0; i < step.tokens; i++)
      need(step.ids[i] >= 0 && step.ids[i] < c.vocab, "token id outside the vocabulary");
    for (int i = 0; i < step.outputs; i++)
      need(step.out_rows[i] >= 0 && step.out_rows[i] < step.tokens,
           "a wanted row is not a token of the step");
    step.sequences = sequences(seqs, pages, step.tokens, step.cache);
    auto out = new_array<float>({out_rows.size(), size_t(logits ? c.vocab : c.hidden)});
    (logits ? step.logits : step.states) = out.data();
    size_t moe = 0;
    for (const Layer& l : m_.layers) moe += l.gate.data != nullptr;
    auto chosen = new_array<int16_t>({experts ? moe : 0, ids.size(), size_t(c.top_k)});
    if (experts) step.chosen = chosen.data();
    frozen_ = true;
    {
      nb::gil_scoped_release free;
      m_.step(step);
    }
    return std::make_tuple(out, chosen);
  }

  int threads() const { return m_.threads(); }
  size_t state_bytes() const { return m_.state_bytes(); }
  size_t state_limit() const { return m_.state_limit(); }
  void limit_states(size_t bytes) { m_.limit_states(bytes); }

 private:
  Cache cache(CacheRows& rows, int page, const std::vector<int>& format) const {
    const Cache cache{rows.data(), rows.shape(1), page, codec(format)};
    need(wrong(cache.codec, m_.config));
    // Attention reads FP32 and BF16 cache rows in place, as words of four bytes.
    need_aligned(rows.data(), 4, "the cache");
    need(rows.shape(0) == size_t(m_.config.layers) && rows.shape(2) == cache.codec.row && page > 0,
         "cache rows are [layers, slots, row bytes], in pages of at least one");
    return cache;
  }

  std::vector<Sequence> sequences(In<int32_t, 2>& seqs, In<int32_t, 1>& pages, int tokens,
                                  const Cache& cache) const {
    need(seqs.shape(1) == 3 && seqs.shape(0) > 0,
         "seqs is [sequences, (tokens, rows after the step, first page)]");
    std::vector<Sequence> list;
    int first = 0;
    for (size_t i = 0; i < seqs.shape(0); i++) {
      const int32_t *s = seqs.data() + 3 * i, count = s[0], end = s[1], at = s[2];
      need(count > 0 && count <= tokens - first,
           "the sequences' tokens do not add up to the step's");
      const int64_t needed = (int64_t(end) + cache.page - 1) / cache.page;
      need(
          end >= count && end <= kMaxWidth * 64 && at >= 0 && uint64_t(at + needed) <= pages.size(),
          "a sequence has more rows than pages, or fewer than tokens");
      for (int64_t j = at; j < at + needed; j++) {
        const int32_t page = pages.data()[j];
        need(page >= 0 && (uint64_t(page) + 1) * cache.page <= cache.slots,
             "a page lies outside the cache");
      }
      list.push_back({first, count, end, pages.data() + at});
      first += count;
    }
    need(first == tokens, "the sequences' tokens do not add up to the step's");
    return list;
  }

  template <class A>
  void keep(const A& data) {
    need(!frozen_, "the model has run; its weights stay as they are");
    keep_.push_back(nb::cast(data));
  }
  Layer& at(int layer) {
    need(layer >= 0 && layer < int(m_.layers.size()), "there is no layer " + std::to_string(layer));
    return m_.layers[layer];
  }

  Model m_;
  // True from the first step on. The first step sets it while it holds the GIL. After that, other
  // threads may be inside m_.step, so weights must not change any more.
  bool frozen_ = false;
  std::vector<nb::object> keep_;  // owners of the arrays that the model points to
};

}  // namespace

void bind_text(nb::module_& m);   // bind_text.cpp
void bind_train(nb::module_& m);  // bind_train.cpp

NB_MODULE(_native, m) {
  using nb::arg;
  m.doc() = "The compiled kernels. Use them through lamoe.backends.cpu and lamoe.kernels.";
  bind_train(m);
  bind_text(m);
  m.def(
      "isa", [] { return std::string(ops().name); },
      "Return the instruction set in use, one of `features`.");
  m.def(
      "features", [] { return std::string(cpu_features()); },
      "Return the instruction sets that this CPU runs, best first, separated by ', '.");
  m.def(
      "mat_bytes",
      [](int fmt, int64_t n, int64_t k) {
        need(wrong_sizes(fmt, n, k));
        return mat_bytes(fmt, int(n), int(k));
      },
      arg("fmt"), arg("n"), arg("k"), "Return the bytes of a packed matrix [n, k].");
  m.def("pack", &pack, arg("fmt"), arg("w").noconvert(), arg("importance").noconvert() = nb::none(),
        arg("feedback").noconvert() = nb::none(), arg("threads") = 1, arg("isa") = "",
        "Pack a matrix [n, k]. Return (bytes, scale).\n\n"
        "importance [k] weights the squared errors of the inputs when an int4 scale is chosen.\n"
        "feedback [k, k] is unit upper triangular: the rounding error e of input i changes each\n"
        "later input j by -e * feedback[i, j] before it is rounded.");
  m.def("unpack", &unpack, arg("fmt"), arg("data").noconvert(), arg("n"), arg("k"), arg("scale"),
        arg("isa") = "", "Return the stored values of a packed matrix as float32 [n, k].");
  m.def("linear", &linear, arg("fmt"), arg("data").noconvert(), arg("scale"), arg("n"),
        arg("x").noconvert(), arg("isa") = "",
        "Multiply rows x [m, k] by a packed matrix [n, k], transposed. Return [m, n].");
  m.def("encode", &encode, arg("codec"), arg("rows").noconvert(), arg("isa") = "",
        "Encode cache rows. Return uint8 [rows, row bytes].");
  m.def("decode", &decode, arg("codec"), arg("rows").noconvert(), arg("isa") = "",
        "Decode cache rows. Return float32 [rows, width].");
  m.def("probe", &probe, arg("buffer").noconvert(), arg("threads"),
        "Measure this machine with all threads. `buffer` should be far larger than the caches.\n\n"
        "Return (bytes read, int8, bf16 and fp32 multiply-adds) per second.");
  m.def("cheaper_form", &cheaper_form, arg("settings"), arg("tokens"), arg("rows"),
        "Return the form of attention, 'absorb' or 'expand', that a model with these settings\n"
        "uses for `tokens` new tokens of a sequence that then has `rows` cached rows.");
  m.def("max_state_bytes", &max_states, arg("settings"), arg("max_rows"), arg("max_sequences"),
        arg("step_tokens"),
        "Return an upper bound of what a model with these settings allocates for the partial\n"
        "results of attention, in steps of up to step_tokens tokens of up to max_sequences\n"
        "sequences with up to max_rows cached rows each.");
  m.def(
      "watch_mapping",
      [](In<uint8_t, 1> data, const std::string& message) {
        return watch_mapping(data.data(), data.size(), message);
      },
      arg("data").noconvert(), arg("message"),
      "Watch a mapped file. If a read of `data` fails, for example because the file was "
      "truncated,\n"
      "write `message` to standard error and exit with code 74. Return an id.");
  m.def("unwatch_mapping", &unwatch_mapping, arg("id"),
        "Stop watching a mapped file, before it is unmapped.");
  nb::class_<PyModel>(m, "Model",
                      "A model over packed weights. It keeps references to all arrays it is given.")
      .def(nb::init<nb::dict, int>(), arg("settings"), arg("threads"))
      .def("set", &PyModel::set, arg("layer"), arg("name"), arg("fmt"), arg("n"), arg("k"),
           arg("data").noconvert(), arg("scales"),
           "Set a matrix, or a stack of len(scales) matrices that follow each other in `data`.")
      .def("vector", &PyModel::vector, arg("layer"), arg("name"), arg("data").noconvert(),
           "Set the weights of a norm.")
      .def("raw", &PyModel::raw, arg("layer"), arg("name"), arg("data").noconvert(),
           "Set an array of plain elements: `embed` or `uk_rows`.")
      .def("step", &PyModel::step, arg("ids").noconvert(), arg("cos_sin").noconvert(),
           arg("seqs").noconvert(), arg("pages").noconvert(), arg("rows").noconvert(), arg("page"),
           arg("format"), arg("out_rows").noconvert(), arg("logits"), arg("experts"),
           "Compute one step and append its rows to the cache.\n\n"
           "Args:\n"
           "    ids: int32 [tokens].\n"
           "    cos_sin: float32 [tokens, rope], cosines and then sines of each position.\n"
           "    seqs: int32 [sequences, 3]: tokens in this step, rows after it, and where the\n"
           "        sequence's pages begin in `pages`.\n"
           "    pages: int32, the pages of all sequences.\n"
           "    rows: uint8 [layers, slots, row bytes], the cache. It is written.\n"
           "    page: slots of a page.\n"
           "    format: the cache format, as codec_numbers gives it.\n"
           "    out_rows: int32, the tokens whose results are wanted.\n"
           "    logits: return logits, else final states after the norm.\n"
           "    experts: also return the chosen experts.\n\n"
           "Returns:\n"
           "    (float32 [out_rows, vocabulary or hidden], int16 [MoE layers, tokens, top_k]).")
      .def_prop_ro("threads", &PyModel::threads, "Threads of a step.")
      .def_prop_ro("state_bytes", &PyModel::state_bytes,
                   "Bytes allocated so far for partial results of attention.")
      .def_prop_rw("state_limit", &PyModel::state_limit, &PyModel::limit_states,
                   "Limit of these bytes, unless a single token needs more.");
}
