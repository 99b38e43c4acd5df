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

constexpr float kClosed = -1.f;  // the score of an expert that does not compete; others are >= 0

// The best n of `count` scores, best first; equal scores in the order of their ids. Overwrites the
// scores, which are padded with kClosed to a multiple of 16.
INLINE void best(float* score, int count, int n, int64_t* id) {
  for (int i = 0; i < n; i++) {
    vf most = vload(score);
    for (int c = 16; c < count; c += 16) most = vmax(most, vload(score + c));
    const float top = vhmax(most);
    int e = 0;
    while (e < count && (score[e] != top || top == kClosed)) e++;
    if (e == count)  // scores are NaN: take any id, so that ids are always valid
      for (e = 0; score[e] == kClosed;) e++;
    score[e] = kClosed;
    id[i] = e;
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
  const size_t logits = sizeof(float) * kRows * size_t(ld), group_ld = ceil_to(r.groups + 1, 16);
  const Parallel::Own own = run.own(logits + sizeof(float) * group_ld + sizeof(int64_t) * group_ld);
  run((r.rows + kRows - 1) / kRows, [&](int item, int thread) {
    float* out = own.at<float>(thread);
    float* group_score = own.at<float>(thread, logits);
    int64_t* group_id = (int64_t*)(group_score + group_ld);
    const int first = item * kRows, rows = std::min(kRows, r.rows - first);
    multiply((const E*)r.x + first * r.ldx, r.ldx, rows, r.hidden, panel, tile, 0, count, out, ld);
    for (int i = 0; i < rows; i++) {
      float* s = scores + ptrdiff_t(first + i) * experts;
      float* competing = out + ptrdiff_t(i) * ld;
      softmax(competing, experts);
      std::memcpy(s, competing, sizeof(float) * experts);
      for (int e = experts; e < ld; e++) competing[e] = kClosed;
      if (r.groups) {
        for (size_t g = r.groups; g < group_ld; g++) group_score[g] = kClosed;
        for (int g = 0; g < r.groups; g++)
          group_score[g] = *std::max_element(s + g * group, s + (g + 1) * group);
        best(group_score, r.groups, r.top_groups, group_id);
        for (int e = 0; e < experts; e++) competing[e] = kClosed;
        for (int g = 0; g < r.top_groups; g++)
          std::memcpy(competing + group_id[g] * group, s + group_id[g] * group,
                      sizeof(float) * group);
      }
      int64_t* id = expert + ptrdiff_t(first + i) * k;
      float* w = weight + ptrdiff_t(first + i) * k;
      best(competing, experts, k, id);
      float sum = 1e-20f;
      for (int j = 0; j < k; j++) sum += w[j] = s[id[j]];
      for (int j = 0; j < k; j++) w[j] = (r.normalise ? w[j] / sum : w[j]) * r.scale;
    }
  });
}

// Writes the parts of sixteen gradients to `to` and, for bfloat16, to + part.
INLINE void split(vf x, float* to, int) { vstore(to, x); }
INLINE void split(vf x, bf16* to, int part) {
  vstore_bf16(to, x);
  vstore_bf16(to + part, x - vload_bf16(to));
}

template <class E>
void backward(const Parallel& run, const Router& r, const float* scores, const int64_t* expert,
              const float* dscores, const float* dweight, E* dx, E* dgate) {
  const int experts = r.experts, k = r.top_k, d = r.hidden, td = tiles(d);
  constexpr int parts = kParts<E>;
  // A row of dlogits holds its parts one after the other. Each begins at a multiple of 16.
  const int part = ceil_to(experts, 16), depth = parts * part;
  const int blocks = (r.rows + kSumRows - 1) / kSumRows;
  const ptrdiff_t ld = ptrdiff_t(blocks) * kSumRows + 32;
  E* transposed = (E*)run.shared(0, sizeof(E) * size_t(depth) * size_t(ld));  // dlogits, transposed
  const size_t tile = panel_tile<E>(depth);
  uint8_t* panel = (uint8_t*)run.shared(1, tile * td);  // the gate once for each part
  std::memset(panel, 0, tile * td);
  for (int p = 0; p < parts; p++)
    pack_nn((const E*)r.gate, d, nullptr, experts, d, 0, td, panel, tile, p * part / kUnit<E>);
  const size_t tile_x = panel_tile<E>(kSumRows), block = tile_x * td;
  uint8_t* states = (uint8_t*)run.shared(2, block * size_t(blocks));  // x as b [rows, D]
  const size_t grads = sizeof(E) * kRows * size_t(depth + 32);
  constexpr int kSumTiles = 4;  // tiles of 16 columns of dgate that an item sums
  const int ld_sum = kSumTiles * kTile;
  const Parallel::Own own =
      run.own(std::max(grads + sizeof(float) * part, sizeof(float) * depth * ld_sum));
  run((r.rows + kRows - 1) / kRows, [&](int item, int thread) {
    E* dlogits = own.at<E>(thread);
    float* ds = own.at<float>(thread, grads);
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
      for (int c = 0; c < experts; c += 16)  // columns after the last expert get 0
        split(vload_n(s + c, experts - c) * (vload_n(ds + c, experts - c) - mean),
              dlogits + ptrdiff_t(i) * (depth + 32) + c, part);
    }
    multiply_to(dlogits, depth + 32, rows, depth, panel, tile, 0, td, dx + ptrdiff_t(first) * d, d,
                d);
    transpose(dlogits, depth + 32, rows, depth, transposed + first, ld);
    pack_nn((const E*)r.x + first * r.ldx, r.ldx, nullptr, rows, d, 0, td,
            states + first / kSumRows * block, tile_x, first % kSumRows / kUnit<E>);
  });
  // dgate [E, D] = dlogits^T x. An item sums some columns in the order of the rows.
  run((td + kSumTiles - 1) / kSumTiles, [&](int item, int thread) {
    float* sums = own.at<float>(thread);
    const int t0 = item * kSumTiles, t1 = std::min(td, t0 + kSumTiles), c0 = t0 * kTile;
    for (int b = 0; b < blocks; b++)
      for (int i = 0; i < depth; i += kRows)
        multiply(transposed + i * ld + b * kSumRows, ld, std::min(kRows, depth - i),
                 std::min(kSumRows, r.rows - b * kSumRows), states + b * block, tile_x, t0, t1,
                 sums + ptrdiff_t(i) * ld_sum, ld_sum, b > 0);
    for (int i = 0; i < experts; i++) {
      float* row = sums + ptrdiff_t(i) * ld_sum;
      for (int p = 1; p < parts; p++)
        for (int c = 0; c < ld_sum; c += 16)
          vstore(row + c, vload(row + c) + vload(row + ptrdiff_t(p) * part * ld_sum + c));
      store_row(row, dgate + ptrdiff_t(i) * d + c0, std::min(d - c0, ld_sum));
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
