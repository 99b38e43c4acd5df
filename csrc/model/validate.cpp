#include "model/validate.h"

#include <algorithm>

namespace lamoe {
namespace {

std::string s(int64_t x) { return std::to_string(x); }
std::string size(int64_t n, int64_t k) { return "[" + s(n) + ", " + s(k) + "]"; }

struct Check {  // collects the first error in the weights of a layer
  std::string where, found;
  void one(const char* name, const Mat& m, int n, int k, int fmt = -1) {
    if (!found.empty()) return;
    if (!m.data)
      found = where + "matrix " + name + " " + size(n, k) + " has not been set";
    else if (m.n != n || m.k != k)
      found =
          where + "matrix " + name + " is " + size(m.n, m.k) + ", the config says " + size(n, k);
    else if (fmt >= 0 && m.fmt != fmt)
      found = where + "matrix " + name + " is in format " + s(m.fmt) + ", it must be in format " +
              s(fmt);
  }
  void stack(const char* name, const std::vector<Mat>& all, int count, int n, int k, int fmt = -1) {
    if (found.empty() && int(all.size()) != count)
      found = where + s(all.size()) + " matrices " + name + " have been set, the config says " +
              s(count);
    for (const Mat& m : all) one(name, m, n, k, fmt);
  }
  void there(const char* name, const void* p) {
    if (found.empty() && !p) found = where + name + " has not been set";
  }
  void swiglu(const char* name13, const char* name2, const Mat& w13, const Mat& w2, int d) {
    one(name2, w2, d, w2.data ? w2.k : 1);
    one(name13, w13, 2 * ceil_to(w2.k, kTile), d);
  }
};

}  // namespace

std::string wrong_sizes(int fmt, int64_t n, int64_t k) {
  if (fmt < FP32 || fmt > INT4)
    return "matrix format " + s(fmt) +
           " is not known; there are 0 (fp32), 1 (bf16), 2 (int8) and 3 (int4)";
  if (n < 1 || k < 1 || n > kMaxWidth || k > kMaxWidth)
    return "a matrix has from 1 to " + s(kMaxWidth) + " rows and columns, found " + size(n, k);
  return "";
}

std::string wrong(const Config& c) {
  const struct {
    const char* name;
    int value, low, high;
  } ranges[] = {{"layers", c.layers, 1, 1 << 16},
                {"vocab", c.vocab, 1, kMaxWidth},
                {"hidden", c.hidden, 1, 1 << 18},
                {"heads", c.heads, 1, 1 << 12},
                {"kv_heads", c.kv_heads, c.latent ? 0 : 1, 1 << 12},
                {"head_dim", c.head_dim, 2, 1 << 12},
                {"latent", c.latent, 0, 8192},
                {"rope", c.rope, 2, 1 << 12},
                {"nope", c.nope, c.latent ? 2 : 0, c.latent ? 1 << 12 : 0},
                {"value", c.value, c.latent ? 2 : 0, 1 << 12},
                {"q_lora", c.q_lora, 0, 1 << 18},
                {"experts", c.experts, 0, 32767},
                {"top_k", c.top_k, c.experts ? 1 : 0, std::max(c.experts, 0)},
                {"groups", c.groups, 1, std::max(c.experts, 1)},
                {"top_groups", c.top_groups, 1, std::max(c.groups, 1)},
                {"moe_width", c.moe_width, c.experts ? 1 : 0, 1 << 18},
                {"elem", c.elem, FP32, BF16}};
  for (const auto& r : ranges)
    if (r.value < r.low || r.value > r.high)
      return std::string(r.name) + " is " + s(r.value) + "; it must be from " + s(r.low) + " to " +
             s(r.high);
  for (const auto& [name, value] :
       {std::pair("head_dim", c.head_dim), std::pair("rope", c.rope), std::pair("nope", c.nope),
        std::pair("value", c.value), std::pair("latent", c.latent)})
    if (value % 2)
      return std::string(name) + " is " + s(value) + "; the kernels need an even width";
  if (c.latent ? c.head_dim != c.nope + c.rope : c.head_dim != c.rope)
    return "head_dim is " + s(c.head_dim) + "; it must be nope + rope under MLA (" + s(c.nope) +
           " + " + s(c.rope) + "), else rope";
  if (!c.latent && c.heads % c.kv_heads)
    return "kv_heads is " + s(c.kv_heads) + "; it must divide heads " + s(c.heads);
  if (c.experts % c.groups)
    return "groups is " + s(c.groups) + "; it must divide experts " + s(c.experts);
  if (c.experts && c.group_limited && c.top_k > c.top_groups * (c.experts / c.groups))
    return "top_k is " + s(c.top_k) + ", and top_groups " + s(c.top_groups) + " groups hold " +
           s(c.top_groups * (c.experts / c.groups)) + " experts";
  return "";
}

std::string wrong(const Codec& c) {
  if (c.kind < 0 || c.kind > 2)
    return "codec kind " + s(c.kind) +
           " is not known; there are 0 (fp32), 1 (bf16) and 2 (low-bit blocks)";
  if (std::min(c.w[0], c.w[1]) < 1 || std::max(c.w[0], c.w[1]) > 8192)
    return "the parts of a cache row have from 1 to 8,192 elements, found " + s(c.w[0]) + " and " +
           s(c.w[1]);
  if (c.kind == 2) {
    if (std::min(c.bits[0], c.bits[1]) < 4 || std::max(c.bits[0], c.bits[1]) > 8)
      return "codes of a low-bit codec have 4 to 8 bits, found " + s(c.bits[0]) + " and " +
             s(c.bits[1]);
    if (c.group < 16 || c.group > 8192 || c.group % 16)
      return "groups of a low-bit codec are multiples of 16, found " + s(c.group);
  }
  const size_t row = row_bytes(c);
  return row == c.row ? "" : "a row of this codec takes " + s(row) + " bytes, found " + s(c.row);
}

std::string wrong(const Codec& c, const Config& m) {
  if (std::string w = wrong(c); !w.empty()) return w;
  const int64_t first = m.latent ? m.latent : int64_t(m.kv_heads) * m.head_dim,
                second = m.latent ? m.rope : first;
  if (c.w[0] == first && c.w[1] == second) return "";
  return "a cache row of this model has parts of " + s(first) + " and " + s(second) +
         " elements, the codec says " + s(c.w[0]) + " and " + s(c.w[1]);
}

std::string wrong(const Model& m, bool head) {
  const Config& c = m.config;
  const int d = c.hidden, width = c.heads * c.head_dim;
  for (size_t i = 0; i < m.layers.size(); i++) {
    const Layer& l = m.layers[i];
    Check is{"layer " + s(i) + ": ", ""};
    is.there("attn_norm", l.attn_norm);
    is.there("ffn_norm", l.ffn_norm);
    if (c.latent) {
      if (c.q_lora) {
        is.one("wq_a", l.wq_a, c.q_lora, d);
        is.there("q_norm", l.q_norm);
      }
      c.q_lora ? is.one("wq_b", l.wq_b, width, c.q_lora) : is.one("wq", l.wq, width, d);
      is.one("wkv_a", l.wkv_a, c.latent + c.rope, d);
      is.there("kv_norm", l.kv_norm);
      is.stack("uk", l.uk, c.heads, c.latent, c.nope);
      is.stack("uv", l.uv, c.heads, c.value, c.latent);
      is.there("uk_rows", l.uk_rows);
      is.stack("uv_elem", l.uv_elem, c.heads, c.value, c.latent, c.elem);
    } else {
      is.one("wq", l.wq, width, d);
      is.one("wk", l.wk, c.kv_heads * c.head_dim, d);
      is.one("wv", l.wv, c.kv_heads * c.head_dim, d);
    }
    is.one("wo", l.wo, d, c.heads * c.head_value());
    if (l.gate.data || !l.e13.empty() || !l.e2.empty()) {
      is.one("gate", l.gate, c.experts, d, FP32);
      is.stack("e13", l.e13, c.experts, 2 * ceil_to(c.moe_width, kTile), d);
      is.stack("e2", l.e2, c.experts, d, c.moe_width);
    }
    if (!l.gate.data || l.w13.data || l.w2.data) is.swiglu("w13", "w2", l.w13, l.w2, d);
    if (!is.found.empty()) return is.found;
  }
  Check is{"", ""};
  is.there("embed", m.embed);
  is.there("norm", m.norm);
  if (head) is.one("head", m.head, c.vocab, d);
  return is.found;
}

size_t vector_size(const Config& c, const std::string& name) {
  if (name == "norm" || name == "attn_norm" || name == "ffn_norm") return c.hidden;
  return name == "q_norm" ? c.q_lora : name == "kv_norm" ? c.latent : 0;
}

size_t raw_size(const Config& c, const std::string& name) {
  if (name == "embed") return size_t(c.vocab) * c.hidden;
  return name == "uk_rows" ? size_t(c.heads) * c.nope * ceil_to(c.latent, kBlock) : 0;
}

}  // namespace lamoe
