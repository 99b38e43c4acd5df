// The router of an MoE layer: softmax over all experts, then the best K of them.
//
// Logits are float32 sums of products of x and the gate, as they are in memory. Their gradients are
// float32 too. For bfloat16 products they are split into a high and a low bfloat16 part, whose sum
// has 16 bits of precision.
#include "train/kernels.h"

namespace lamoe {
namespace LAMOE_ISA {
namespace {

constexpr int kRows = 32;      // rows of an item
constexpr int kSumRows = 256;  // rows whose part of dgate an item of the sums reads at once

template <class E>
constexpr int kParts = sizeof(E) == 2 ? 2 : 1;  // parts of a logit's gradient

// The best n of `count` scores, best first; equal scores in the order of their ids. `open` says
// which groups of `group` neighbouring scores compete; null means all.
INLINE void best(const float* score, int count, int group, const bool* open, int n, int64_t* id) {
  int found = 0;
  for (int e = 0; e < count; e++) {
    if (open && !open[e / group]) continue;
    const float s = score[e];
    if (found == n && s <= score[id[n - 1]]) continue;
    int at = found < n ? found++ : n - 1;
    // NaN compares false and moves to the front, so that ids are always valid.
    for (; at > 0 && !(s <= score[id[at - 1]]); at--) id[at] = id[at - 1];
    id[at] = e;
  }
}

void softmax(float* row, int n) {
  const int whole = n / 16 * 16;
  vf most = vset(-INFINITY);
  for (int c = 0; c < whole; c += 16) most = vmax(most, vload(row + c));
  float top = vhmax(most);
  for (int c = whole; c < n; c++) top = std::max(top, row[c]);
  vf sum = vzero();
  const vf shift = vset(top);
  for (int c = 0; c < whole; c += 16) {
    const vf p = vexp(vload(row + c) - shift);
    sum = sum + p;
    vstore(row + c, p);
  }
  float mass = vsum(sum);
  if (whole < n) {
    vstore_n(row + whole, vexp(vload_n(row + whole, n - whole) - shift), n - whole);
    for (int c = whole; c < n; c++) mass += row[c];
  }
  for (int c = 0; c < n; c += 16) vstore_n(row + c, vload_n(row + c, n - c) / vset(mass), n - c);
}

template <class E>
void forward(const Parallel& run, const Router& r, float* scores, int64_t* expert, float* weight) {
  const int experts = r.experts, count = tiles(experts), ld = count * kTile, k = r.top_k;
  const size_t tile = panel_tile<E>(r.hidden);
  uint8_t* panel = (uint8_t*)run.shared(0, tile * count);
  pack_nt((const E*)r.gate, r.hidden, experts, r.hidden, 0, count, panel);
  const int group = r.groups ? experts / r.groups : 1;
  const size_t logits = sizeof(float) * kRows * size_t(ld), groups = size_t(r.groups + 1);
  const Parallel::Own own =
      run.own(logits + (groups * 4 + 63) / 64 * 64 + groups * sizeof(int64_t) + groups);
  run((r.rows + kRows - 1) / kRows, [&](int item, int thread) {
    float* out = own.at<float>(thread);
    float* group_score = own.at<float>(thread, logits);
    int64_t* group_id = own.at<int64_t>(thread, logits + (groups * 4 + 63) / 64 * 64);
    bool* open = (bool*)(group_id + groups);
    const int first = item * kRows, rows = std::min(kRows, r.rows - first);
    multiply((const E*)r.x + first * r.ldx, r.ldx, rows, r.hidden, panel, tile, 0, count, out, ld);
    for (int i = 0; i < rows; i++) {
      float* s = scores + ptrdiff_t(first + i) * experts;
      std::memcpy(s, out + ptrdiff_t(i) * ld, sizeof(float) * experts);
      softmax(s, experts);
      if (r.groups) {
        for (int g = 0; g < r.groups; g++) {
          group_score[g] = s[g * group];
          for (int e = 1; e < group; e++)
            group_score[g] = std::max(group_score[g], s[g * group + e]);
          open[g] = false;
        }
        best(group_score, r.groups, 1, nullptr, r.top_groups, group_id);
        for (int g = 0; g < r.top_groups; g++) open[group_id[g]] = true;
      }
      int64_t* id = expert + ptrdiff_t(first + i) * k;
      float* w = weight + ptrdiff_t(first + i) * k;
      best(s, experts, group, r.groups ? open : nullptr, k, id);
      float sum = 1e-20f;
      for (int j = 0; j < k; j++) sum += w[j] = s[id[j]];
      for (int j = 0; j < k; j++) w[j] = (r.normalise ? w[j] / sum : w[j]) * r.scale;
    }
  });
}

INLINE void split(const float* from, float* to, int n, int) {
  std::memcpy(to, from, sizeof(float) * n);
}
INLINE void split(const float* from, bf16* to, int n, int ld) {
  for (int c = 0; c < n; c++) {
    to[c] = float_to_bf16(from[c]);
    to[ld + c] = float_to_bf16(from[c] - bf16_to_float(to[c]));
  }
}

template <class E>
void backward(const Parallel& run, const Router& r, const float* scores, const int64_t* expert,
              const float* dscores, const float* dweight, E* dx, E* dgate) {
  const int experts = r.experts, k = r.top_k, d = r.hidden, td = tiles(d), dp = td * kTile;
  constexpr int parts = kParts<E>;
  // A row of dlogits holds its parts one after the other. Each begins at a whole unit.
  const int part = ceil_to(experts, 32), depth = parts * part;
  const int blocks = (r.rows + kSumRows - 1) / kSumRows;
  const ptrdiff_t ld = ptrdiff_t(blocks) * kSumRows + 32;
  E* turned = (E*)run.shared(0, sizeof(E) * size_t(depth) * size_t(ld));  // dlogits, transposed
  const size_t tile = panel_tile<E>(depth);
  uint8_t* panel = (uint8_t*)run.shared(1, tile * td);  // the gate once for each part
  std::memset(panel, 0, tile * td);
  for (int p = 0; p < parts; p++)
    pack_nn((const E*)r.gate, d, nullptr, experts, d, 0, td, panel, tile, p * part / kUnit<E>);
  const size_t tile_x = panel_tile<E>(kSumRows), block = tile_x * td;
  uint8_t* states = (uint8_t*)run.shared(2, block * size_t(blocks));  // x as b [rows, D]
  const size_t grads = sizeof(E) * kRows * size_t(depth + 32);
  const size_t floats = sizeof(float) * (size_t(kRows) * dp + part);
  const Parallel::Own own =
      run.own(std::max(grads + floats, sizeof(float) * kRows * size_t(parts) * dp));
  run((r.rows + kRows - 1) / kRows, [&](int item, int thread) {
    E* dlogits = own.at<E>(thread);
    float* product = own.at<float>(thread, grads);
    float* ds = product + size_t(kRows) * dp;
    const int first = item * kRows, rows = std::min(kRows, r.rows - first);
    std::memset(dlogits, 0, grads);
    for (int i = 0; i < rows; i++) {
      const ptrdiff_t row = first + i;
      const float* s = scores + row * experts;
      if (dscores)
        std::memcpy(ds, dscores + row * experts, sizeof(float) * experts);
      else
        std::memset(ds, 0, sizeof(float) * experts);
      if (dweight) {
        const int64_t* id = expert + row * k;
        const float* dw = dweight + row * k;
        float sum = 1e-20f, along = 0;
        for (int j = 0; j < k; j++) sum += s[id[j]], along += dw[j] * s[id[j]];
        for (int j = 0; j < k; j++)
          ds[id[j]] += r.scale * (r.normalise ? (dw[j] - along / sum) / sum : dw[j]);
      }
      vf sums = vzero();
      for (int c = 0; c < experts; c += 16)
        sums = vfma(vload_n(s + c, experts - c), vload_n(ds + c, experts - c), sums);
      const vf mean = vset(vsum(sums));
      for (int c = 0; c < experts; c += 16) {
        const int n = experts - c;
        vstore_n(ds + c, vload_n(s + c, n) * (vload_n(ds + c, n) - mean), n);
      }
      split(ds, dlogits + ptrdiff_t(i) * (depth + 32), experts, part);
    }
    multiply(dlogits, depth + 32, rows, depth, panel, tile, 0, td, product, dp);
    for (int i = 0; i < rows; i++)
      store_row(product + ptrdiff_t(i) * dp, dx + ptrdiff_t(first + i) * d, d);
    transpose(dlogits, depth + 32, rows, depth, turned + first, ld);
    pack_nn((const E*)r.x + first * r.ldx, r.ldx, nullptr, rows, d, 0, td,
            states + first / kSumRows * block, tile_x, first % kSumRows / kUnit<E>);
  });
  // dgate [E, D] = dlogits^T x. An item sums some experts, in the order of the rows.
  constexpr int kExperts = 16;
  run((experts + kExperts - 1) / kExperts, [&](int item, int thread) {
    float* sums = own.at<float>(thread);
    const int first = item * kExperts, n = std::min(kExperts, experts - first);
    for (int p = 0; p < parts; p++) {
      float* out = sums + size_t(p) * kExperts * dp;
      for (int b = 0; b < blocks; b++)
        multiply(turned + (p * part + first) * ld + b * kSumRows, ld, n,
                 std::min(kSumRows, r.rows - b * kSumRows), states + b * block, tile_x, 0, td, out,
                 dp, b > 0);
    }
    for (int i = 0; i < n; i++) {
      float* row = sums + ptrdiff_t(i) * dp;
      if (parts == 2)
        for (int c = 0; c < dp; c += 16)
          vstore(row + c, vload(row + c) + vload(row + size_t(kExperts) * dp + c));
      store_row(row, dgate + ptrdiff_t(first + i) * d, d);
    }
  });
}

}  // namespace

void route(const Parallel& run, const Router& r, float* scores, int64_t* expert, float* weight) {
  with_type(r.elem, [&](auto* type) {
    forward<std::remove_pointer_t<decltype(type)>>(run, r, scores, expert, weight);
  });
}

void route_backward(const Parallel& run, const Router& r, const float* scores,
                    const int64_t* expert, const float* dscores, const float* dweight, void* dx,
                    void* dgate) {
  with_type(r.elem, [&](auto* type) {
    using P = decltype(type);
    backward(run, r, scores, expert, dscores, dweight, (P)dx, (P)dgate);
  });
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
