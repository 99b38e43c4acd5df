// A program without Python for the sanitizers (`make asan tsan`). First it runs every operation on
// awkward sizes, in buffers of exactly the needed size. Then it runs whole models with several
// threads, concurrent callers, waiting threads, and errors inside a parallel pass. Results must
// equal those of one thread. Whether they are right is checked by the Python tests.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <stdexcept>

#include "model/validate.h"
#include "simd/common.h"

namespace lamoe {
void check_text();      // check_text.cpp
void check_training();  // check_train.cpp
}  // namespace lamoe
using namespace lamoe;

namespace {

std::mt19937 dice(1);
float draw() { return std::normal_distribution<float>()(dice); }
std::vector<float> draws(size_t n, float scale = 1.f) {
  std::vector<float> x(n);
  for (float& v : x) v = draw() * scale;
  x.shrink_to_fit();
  return x;
}
void need(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "check: %s\n", what.c_str());
  std::exit(1);
}

// A buffer of n bytes that begins `off` bytes after the start of an allocation and ends with it, so
// that a sanitizer detects any access beyond the end.
struct Bytes {
  std::unique_ptr<uint8_t[]> all;
  uint8_t* p;
  explicit Bytes(size_t n, size_t off = 0) : all(new uint8_t[n + off]), p(all.get() + off) {
    std::memset(all.get(), 0xff, n + off);
  }
};

struct Weights {  // owns the memory of the weights that a model points to
  std::vector<Bytes> bytes;
  std::vector<std::vector<float>> floats;
  Mat mat(int fmt, int n, int k) {
    const auto w = draws(size_t(n) * k, 0.3f);
    bytes.emplace_back(mat_bytes(fmt, n, k), 1);
    Mat m{fmt, n, k, bytes.back().p, ops().pack_scale(fmt, w.data(), k, n, k)};
    for (int t = 0; t < tiles(n); t++)
      ops().pack(m, bytes.back().p, w.data(), k, nullptr, nullptr, t);
    return m;
  }
  const float* vec(int n) { return floats.emplace_back(draws(n)).data(); }
  const void* raw(int elem, size_t n) {
    const auto x = draws(n, 0.3f);
    bytes.emplace_back(n * (elem == FP32 ? 4 : 2));
    for (size_t i = 0; i < n; i++) {
      if (elem == FP32)
        std::memcpy(bytes.back().p + 4 * i, &x[i], 4);
      else {
        const uint16_t h = float_to_bf16(x[i]);
        std::memcpy(bytes.back().p + 2 * i, &h, 2);
      }
    }
    return bytes.back().p;
  }
};

void fill(Model& m, Weights& w, int fmt) {
  const Config& c = m.config;
  const int d = c.hidden, width = c.heads * c.head_dim,
            out = c.heads * (c.latent ? c.value : c.head_dim);
  for (int i = 0; i < c.layers; i++) {
    Layer& l = m.layers[i];
    l.attn_norm = w.vec(d), l.ffn_norm = w.vec(d), l.wo = w.mat(fmt, d, out);
    if (c.latent) {
      if (c.q_lora)
        l.wq_a = w.mat(fmt, c.q_lora, d), l.wq_b = w.mat(fmt, width, c.q_lora),
        l.q_norm = w.vec(c.q_lora);
      else
        l.wq = w.mat(fmt, width, d);
      l.wkv_a = w.mat(fmt, c.latent + c.rope, d), l.kv_norm = w.vec(c.latent);
      for (int h = 0; h < c.heads; h++) {
        l.uk.push_back(w.mat(fmt, c.latent, c.nope)), l.uv.push_back(w.mat(fmt, c.value, c.latent));
        l.uv_elem.push_back(w.mat(c.elem, c.value, c.latent));
      }
      l.uk_rows = w.raw(c.elem, raw_size(c, "uk_rows"));
    } else {
      l.wq = w.mat(fmt, width, d), l.wk = w.mat(fmt, c.kv_heads * c.head_dim, d),
      l.wv = w.mat(fmt, c.kv_heads * c.head_dim, d);
    }
    if (c.experts && i) {
      l.gate = w.mat(FP32, c.experts, d);
      for (int e = 0; e < c.experts; e++)
        l.e13.push_back(w.mat(fmt, 2 * ceil_to(c.moe_width, kTile), d)),
            l.e2.push_back(w.mat(fmt, d, c.moe_width));
    }
    if (!c.experts || i % 2 == 0)
      l.w13 = w.mat(fmt, 2 * ceil_to(33, kTile), d), l.w2 = w.mat(fmt, d, 33);
  }
  m.embed = w.raw(c.elem, raw_size(c, "embed")), m.norm = w.vec(d), m.head = w.mat(fmt, c.vocab, d);
}

Codec codec(const Config& c, int kind) {
  Codec r;
  r.kind = kind ? kind == 1 ? 1 : 2 : 0;
  r.w[0] = c.latent ? c.latent : c.kv_heads * c.head_dim, r.w[1] = c.latent ? c.rope : r.w[0];
  const int bits[][2] = {{32, 32}, {16, 16}, {8, 8}, {5, 8}, {4, 6}, {7, 4}};
  r.bits[0] = bits[kind][0], r.bits[1] = bits[kind][1], r.group = kind == 4 ? 32 : 16;
  r.row = row_bytes(r);
  return r;
}

// Runs one sequence of each given length. Each step processes the next `chunk` tokens of every
// sequence. Returns all logits.
std::vector<float> run(Model& m, const Codec& format, const std::vector<int>& lengths, int chunk) {
  const Config& c = m.config;
  const int page = 7;
  size_t pages = 0;
  std::vector<std::vector<int32_t>> own(lengths.size());
  for (size_t i = 0; i < lengths.size(); i++)
    for (int r = 0; r < lengths[i]; r += page) own[i].push_back(int32_t(pages++));
  for (auto& o : own) {
    for (auto& p : o) p = int32_t(pages) - 1 - p;
    o.shrink_to_fit();
  }
  Bytes rows(size_t(c.layers) * pages * page * format.row);
  const Cache cache{rows.p, pages * page, page, format};
  std::vector<float> all;
  std::mt19937 ids(7);
  for (int done = 0, most = 0; done == 0 || done < most; done += chunk) {
    Step step;
    std::vector<int32_t> tokens, out;
    std::vector<float> cos_sin;
    for (size_t i = 0; i < lengths.size(); i++) {
      most = std::max(most, lengths[i]);
      const int count = std::min(chunk, lengths[i] - done);
      if (count <= 0) continue;
      step.sequences.push_back({int(tokens.size()), count, done + count, own[i].data()});
      for (int t = 0; t < count; t++) {
        tokens.push_back(int32_t(ids() % c.vocab)), out.push_back(int32_t(out.size()));
        for (int k = 0; k < c.rope; k++)
          cos_sin.push_back(k < c.rope / 2 ? std::cos(float(done + t) / (k + 1))
                                           : std::sin(float(done + t) / (k + 1 - c.rope / 2)));
      }
    }
    const int n = int(tokens.size());
    std::vector<float> logits(size_t(n) * c.vocab), states(size_t(n) * c.hidden);
    size_t moe = 0;
    for (const Layer& l : m.layers) moe += l.gate.data != nullptr;
    std::vector<int16_t> chosen(moe * n * c.top_k);
    step.tokens = step.outputs = n, step.cache = cache;
    step.ids = tokens.data(), step.cos_sin = cos_sin.data(), step.out_rows = out.data();
    step.logits = logits.data(), step.states = states.data(), step.chosen = chosen.data();
    m.step(step);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  for (float x : all) need(std::isfinite(x), "a logit is not finite");
  return all;
}

std::vector<std::vector<float>> draw_queries(int lanes, int width) {
  std::vector<std::vector<float>> q;
  for (int i = 0; i < lanes; i++) q.push_back(draws(width));
  return q;
}

std::vector<const float*> pointers(const std::vector<std::vector<float>>& rows) {
  std::vector<const float*> p;
  for (const auto& x : rows) p.push_back(x.data());
  return p;
}

// An attention state in a buffer that is exactly large enough for `lanes` lanes.
struct State {
  std::vector<float> floats;
  AttentionState state;
  State(int lanes, int width)
      : floats(2 * kLanes + size_t(lanes) * width), state{floats.data(), width} {
    state.reset(lanes);
  }
};

void check_attend_tile(int elem, int lanes, int n, int kw, int vw) {
  const Ops& op = ops();
  const std::vector<int> last(kLanes, n / 2);
  const int stride = kw + vw;
  Weights w;
  const int overread = vw % 16 ? 15 : 0;  // elements that attend_tile may read after the last row
  const void* rows = w.raw(elem, size_t(n) * stride + overread);
  const auto q = draw_queries(lanes, kw);
  Bytes packed(size_t(kw) * element_bytes(elem) * kLanes), scratch(sizeof(AttentionScratch));
  op.pack_lanes(elem, pointers(q).data(), lanes, kw, packed.p);
  State s(lanes, vw);
  op.attend_tile(elem, {rows, stride, n, 0}, {0, kw, kw, vw}, 0.3f, {packed.p, last.data(), lanes},
                 s.state, (AttentionScratch*)scratch.p, {});
}

void check_attend_ints(int kind, int lanes, int n, int rope) {
  const Ops& op = ops();
  const std::vector<int> last(kLanes, n / 2);
  Config c;
  c.latent = 512, c.rope = rope;
  const Codec format = codec(c, kind);
  std::vector<Bytes> rows;
  std::vector<const uint8_t*> each;
  for (int i = 0; i < n; i++) {
    const auto x = draws(format.width());
    rows.emplace_back(format.row);
    op.encode(format, x.data(), rows.back().p);
    each.push_back(rows.back().p);
  }
  const auto q = draw_queries(lanes, format.width());
  Bytes tile(IntTile::bytes(format)), packed(IntLanes::bytes(format));
  Bytes scratch(sizeof(AttentionScratch));
  op.decode_ints(format, each.data(), n, tile.p);
  op.pack_lanes_ints(format, pointers(q).data(), lanes, packed.p);
  State s(lanes, c.latent);
  op.attend_ints(format, {tile.p, 0, n, 0}, 0.3f, {packed.p, last.data(), lanes}, s.state,
                 (AttentionScratch*)scratch.p, {});
}

void check_attention() {
  for (int lanes : {1, 3, 16})
    for (int n : {1, 3, 15, 16, 17, 33, 48, 63, 64}) {
      for (int elem : {FP32, BF16})
        for (int kw : {18, 32, 96})
          for (int vw : {18, 64}) check_attend_tile(elem, lanes, n, kw, vw);
      for (int kind : {3, 4})
        for (int rope : {2, 34, 64}) check_attend_ints(kind, lanes, n, rope);
    }
}

void check_ops() {
  const Ops& op = ops();
  for (int fmt = FP32; fmt <= INT4; fmt++)
    for (int n : {1, 3, 15, 16, 17, 63, 65, 127})
      for (int k : {1, 3, 15, 17, 63, 64, 65, 127, 1408}) {
        Weights w;
        const Mat m = w.mat(fmt, n, k);
        auto back = draws(size_t(n) * k);
        for (int t = 0; t < tiles(n); t++) op.unpack(m, back.data(), k, t);
        for (int rows : {0, 1, 2, 5, 13, 21, 27, 55}) {
          Acts a;
          a.rows = rows, a.k = k, a.stride = acts_stride(k);
          const size_t size = size_t(rows) * a.stride;
          std::vector<float> f(size), s(size / kBlock);
          std::vector<uint16_t> h(size);
          std::vector<int8_t> q(size);
          std::vector<int32_t> c(size / kGroup);
          a.f = f.data(), a.h = h.data(), a.q = q.data(), a.s = s.data(), a.c = c.data();
          for (int r = 0; r < rows; r++) {
            auto x = draws(k);
            if (r == 1) x[0] = NAN;
            if (r == 2) x[k - 1] = INFINITY;
            op.put_row(a, r, x.data());
          }
          auto out = draws(size_t(rows) * n);
          Bytes scratch(scratch_bytes(k));
          op.linear(m, 0, tiles(n), a, 0, rows, out.data(), n, scratch.p, nullptr);
        }
      }
  for (int kind = 0; kind < 6; kind++)
    for (int w0 : {1, 3, 15, 16, 17, 63, 64, 65, 127, 512, 8192})
      for (int w1 : {1, 8, 15, 64, 65}) {
        Config c;
        c.latent = w0, c.rope = w1;
        const Codec format = codec(c, kind);
        need(wrong(format).empty(), wrong(format));
        auto x = draws(w0 + w1), y = draws(w0 + w1);
        for (float bad : {1.f, NAN, INFINITY, 1e30f, 1e-42f}) {
          x[w0 / 2] = bad;
          Bytes row(format.row, 1);
          op.encode(format, x.data(), row.p);
          op.decode(format, row.p, FP32, y.data());
          std::vector<uint16_t> h(w0 + w1);
          op.decode(format, row.p, BF16, h.data());
        }
      }
  check_attention();
  for (int n : {1, 15, 16, 17, 127}) {
    auto x = draws(n), w = draws(n), y = draws(n);
    op.rms_norm(x.data(), w.data(), 1e-6f, y.data(), n);
  }
}

std::vector<Config> configs() {
  Config mla;
  mla.layers = 3, mla.vocab = 37, mla.hidden = 50, mla.heads = 3, mla.kv_heads = 3,
  mla.head_dim = 20, mla.latent = 40, mla.rope = 6, mla.nope = 14, mla.value = 18;
  mla.experts = 8, mla.top_k = 3, mla.groups = 4, mla.top_groups = 2, mla.group_limited = true,
  mla.moe_width = 27, mla.softmax_scale = 0.2f, mla.routed_scale = 2.5f;
  Config lora = mla;
  lora.q_lora = 21, lora.heads = 19, lora.group_limited = false, lora.normalise = true,
  lora.value = 272;
  Config gqa;
  gqa.layers = 2, gqa.vocab = 33, gqa.hidden = 48, gqa.heads = 6, gqa.kv_heads = 2,
  gqa.head_dim = 18, gqa.rope = 18, gqa.interleaved = false, gqa.softmax_scale = 0.2f;
  Config wide = mla;  // a model whose low-bit cache rows attention uses as integers
  wide.layers = 2, wide.latent = 512, wide.heads = 17;
  Config even = mla;  // a model whose widths are multiples of 32, so that AMX tiles are used
  even.layers = 2, even.latent = 96, even.rope = 32, even.head_dim = even.nope + even.rope,
  even.heads = 17;
  return {mla, lora, gqa, wide, even};
}

void check_models() {
  const bool slow =
      ops().name == std::string("scalar");  // too slow under a sanitizer to run everything
  for (Config c : configs())
    for (int fmt = FP32; fmt <= INT4; fmt++) {
      c.elem = fmt == FP32 ? FP32 : BF16;
      need(wrong(c).empty(), wrong(c));
      Weights w;
      Model one(c, 1);
      fill(one, w, fmt);
      need(wrong(one, true).empty(), wrong(one, true));
      const std::vector<int> lengths = slow ? std::vector<int>{1, 60, 5, 131}
                                       : fmt == FP32 && !c.q_lora
                                           ? std::vector<int>{1, 5, 130, 1050, 64}
                                           : std::vector<int>{1, 5, 130, 64};
      for (int chunk : {200, 33, 9}) {
        const Codec format = codec(c, c.latent == 512 ? (chunk == 33 ? 3 : 4)
                                      : chunk == 200  ? fmt
                                      : chunk == 33   ? 3
                                                      : 5);
        if (chunk == 9 && (slow || fmt == FP32)) continue;
        if (c.latent == 512 && (chunk == 200 || fmt == INT8)) continue;
        const auto want = run(one, format, lengths, chunk);
        for (int threads : {2, 3, 5}) {
          if (slow && threads != 3) continue;
          Model many(c, threads);
          many.layers = one.layers, many.embed = one.embed, many.norm = one.norm,
          many.head = one.head;
          need(run(many, format, lengths, chunk) == want,
               "results depend on the number of threads");
        }
      }
      Model shared(c, 3);  // a model that two threads call at the same time
      shared.layers = one.layers, shared.embed = one.embed, shared.norm = one.norm,
      shared.head = one.head;
      const auto want = run(one, codec(c, 1), {5, 40}, 8);
      std::vector<float> got[2];
      std::thread other([&] { got[0] = run(shared, codec(c, 1), {5, 40}, 8); });
      got[1] = run(shared, codec(c, 1), {5, 40}, 8);
      other.join();
      need(got[0] == want && got[1] == want, "two callers at once disturb each other");
    }
}

void check_threads() {
  for (int n : {1, 2, 3, 8}) {
    Threads pool(n);
    for (int round = 0; round < 300; round++) {
      Threads::Session awake(pool);
      for (int items : {0, 1, 2, 7, 100}) {
        std::vector<int> seen(items);
        pool.run(items, [&](int i, int thread) { seen[i] += 1 + (thread < 0 || thread >= n); });
        for (int s : seen) need(s == 1, "an item ran twice, never, or in a thread that is none");
      }
      bool caught = false;
      try {
        pool.run(50, [&](int i, int) {
          if (i % 16 == 7) throw std::runtime_error("an item failed");
        });
      } catch (const std::runtime_error&) {
        caught = true;
      }
      need(caught, "an error inside a pass was lost");
    }
  }
}

// Threads that wait sleep after a short spin, and no wake-up is lost. The pauses of the caller are
// shorter and longer than the spin, and close to it.
void check_waiting() {
  using namespace std::chrono;
  const int n = 3;
  Threads pool(n);
  Threads::Session awake(pool);
  std::atomic<int> arrived{0};
  const auto meet = [&] {  // returns when all n threads are inside the round
    arrived++;
    for (const auto end = steady_clock::now() + seconds(20); arrived % n; std::this_thread::yield())
      need(steady_clock::now() < end, "a sleeping worker was not woken");
  };
  for (int round = 0; round < 400; round++) {
    std::this_thread::sleep_for(microseconds(round % 100 * 3));
    pool.run(n, [&](int, int) { meet(); });
  }
  const auto cpu_seconds = [] { return double(std::clock()) / CLOCKS_PER_SEC; };
  double begin = cpu_seconds();
  std::this_thread::sleep_for(milliseconds(200));
  need(cpu_seconds() - begin < 0.02, "workers spin while the caller does other things");
  pool.run(n, [&](int, int thread) {
    meet();
    if (thread == 0)
      begin = cpu_seconds();
    else
      std::this_thread::sleep_for(milliseconds(200));
  });
  need(cpu_seconds() - begin < 0.02, "the caller spins while it waits for workers");
}

}  // namespace

int main(int arguments, char**) {
  const Ops& table = ops();  // throws if this CPU cannot run the instruction set in LAMOE_ISA
  if (arguments > 1) return 0;
  check_threads();
  check_waiting();
  check_ops();
  check_models();
  check_training();
  check_text();
  std::printf("check: %s all well\n", table.name);
}
