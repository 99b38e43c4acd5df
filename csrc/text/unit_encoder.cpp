#include "text/unit_encoder.h"

#include <algorithm>
#include <cstring>

namespace lamoe {
namespace {

constexpr size_t kMaxData = 64 << 20;  // bytes of all keys and values of a cache
constexpr size_t kSlack = 16;          // bytes of the vector that copies a short value
constexpr size_t kMinSlots = 1 << 10;
constexpr size_t kProbes = 16;  // bounds the time of a lookup, even for keys that were chosen to
                                // have equal hashes

uint64_t load8(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

uint32_t load4(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

uint64_t mix(uint64_t a, uint64_t b) {
  a = (a ^ b) * 0x9e3779b97f4a7c15u;
  return a ^ (a >> 32);
}

uint64_t hash_of(const uint8_t* p, size_t n) {
  uint64_t h = mix(n, 0);
  if (n >= 8) {
    for (size_t i = 0; i + 8 < n; i += 8) h = mix(h, load8(p + i));
    return mix(h, load8(p + n - 8));
  }
  if (n >= 4) return mix(h, uint64_t(load4(p)) << 32 | load4(p + n - 4));
  if (n) return mix(h, uint64_t(p[0]) << 16 | uint64_t(p[n / 2]) << 8 | p[n - 1]);
  return h;
}

// Classes of bytes. Bytes from 0x80 on are kOther or the beginning of white space.
enum Class : uint8_t { kOther, kLetter, kDigit, kSpace, kWide, kLead };

struct Classes {
  uint8_t of[256];
  constexpr Classes() : of() {
    for (int c = 0; c < 256; c++) {
      const bool letter = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
      const bool space = c == ' ' || (c >= '\t' && c <= '\r');
      of[c] = letter                   ? kLetter
              : c >= '0' && c <= '9'   ? kDigit
              : space                  ? kSpace
              : c == 0xc2              ? kLead
              : c >= 0xe1 && c <= 0xe3 ? kLead
              : c >= 0x80              ? kWide
                                       : kOther;
    }
  }
};
constexpr Classes kClasses;

// Returns the bytes of the white space that p begins with, or 0. p < end.
size_t space_bytes(const uint8_t* p, const uint8_t* end) {
  const uint8_t kind = kClasses.of[*p];
  if (kind != kLead) return kind == kSpace;
  if (end - p < 2) return 0;
  const uint8_t a = p[0], b = p[1];
  if (a == 0xc2) return b == 0x85 || b == 0xa0 ? 2 : 0;  // next line, no-break space
  if (end - p < 3) return 0;
  const uint8_t c = p[2];
  const bool space = (a == 0xe1 && b == 0x9a && c == 0x80) ||  // U+1680
                     (a == 0xe2 && b == 0x80 &&  // U+2000 to U+200A, U+2028, U+2029, U+202F
                      ((c >= 0x80 && c <= 0x8a) || c == 0xa8 || c == 0xa9 || c == 0xaf)) ||
                     (a == 0xe2 && b == 0x81 && c == 0x9f) ||  // U+205F
                     (a == 0xe3 && b == 0x80 && c == 0x80);    // U+3000
  return space ? 3 : 0;
}

// Returns the end of the unit that begins at p < end, and whether it is in ASCII.
const uint8_t* unit_end(const uint8_t* p, const uint8_t* end, bool& ascii) {
  ascii = true;
  const uint8_t* q = p + (*p == ' ');
  const uint8_t* const text = q;
  for (; q < end; q++) {
    const uint8_t kind = kClasses.of[*q];
    if (kind < kSpace) continue;
    if (space_bytes(q, end)) break;
    ascii = false;
  }
  if (q > text) return q;
  // White space. The last character before text is a unit of its own, or belongs to the next.
  const uint8_t* last = q = p;
  size_t n = 0;
  while (q < end && (n = space_bytes(q, end))) {
    last = q;
    q += n;
  }
  if (q < end && last > p) q = last;
  ascii = std::all_of(p, q, [](uint8_t c) { return c < 0x80; });
  return q;
}

// Returns the end of the word that begins at p < end, in a unit of ASCII.
const uint8_t* word_end(const uint8_t* p, const uint8_t* end) {
  const auto run = [&](const uint8_t* q, uint8_t kind) {
    while (q < end && kClasses.of[*q] == kind) q++;
    return q;
  };
  const uint8_t* const q = p + (*p == ' ' && p + 1 < end);
  const uint8_t kind = kClasses.of[*q];
  if (kind == kLetter || kind == kOther) return run(q, kind);
  if (kind == kDigit) return q > p ? q : p + 1;
  const auto is_line_end = [](uint8_t c) { return c == '\r' || c == '\n'; };
  if (is_line_end(*p)) return p + 1;
  while (p < end && kClasses.of[*p] == kSpace && !is_line_end(*p)) p++;
  return p;
}

}  // namespace

ByteCache::ByteCache(size_t max_entries)
    : max_entries_(std::max<size_t>(max_entries, 1)), slots_(kMinSlots), data_(kSlack) {}

ByteCache::Value ByteCache::find(const uint8_t* key, size_t size) const {
  if (size > kMaxKey) return {nullptr, 0};
  const uint64_t hash = hash_of(key, size);
  const size_t mask = slots_.size() - 1;
  for (size_t i = 0; i < kProbes; i++) {
    const Slot& s = slots_[(hash + i) & mask];
    if (!s.used) break;
    if (s.hash != hash || s.key_size != size) continue;
    const uint8_t* data = data_.data() + s.offset;
    if (!std::memcmp(data, key, size)) return {data + size, s.value_size};
  }
  return {nullptr, 0};
}

void ByteCache::insert(const uint8_t* key, size_t key_size, const uint8_t* value,
                       size_t value_size) {
  if (key_size > kMaxKey || value_size > kMaxValue) return;
  if (find(key, key_size).data) return;
  if (entries_ >= max_entries_ || bytes_ + key_size + value_size > kMaxData) clear();
  if (2 * (entries_ + 1) > slots_.size()) grow();
  const size_t bytes = bytes_ + key_size + value_size;
  if (data_.size() < bytes + kSlack) data_.resize(bytes + bytes / 2 + kSlack);
  uint8_t* data = data_.data() + bytes_;
  std::copy_n(key, key_size, data);
  std::copy_n(value, value_size, data + key_size);
  place({hash_of(key, key_size), uint32_t(bytes_), uint16_t(value_size), uint8_t(key_size), 1});
  bytes_ = bytes;
  entries_++;
}

void ByteCache::place(const Slot& slot) {
  const size_t mask = slots_.size() - 1;
  for (size_t i = 0; i < kProbes; i++) {
    Slot& s = slots_[(slot.hash + i) & mask];
    if (s.used) continue;
    s = slot;
    return;
  }
  slots_[slot.hash & mask] = slot;  // the other entry is lost, which only costs time
}

void ByteCache::grow() {
  std::vector<Slot> old(slots_.size() * 2);
  old.swap(slots_);
  for (const Slot& s : old)
    if (s.used) place(s);
}

void ByteCache::clear() {
  slots_.assign(kMinSlots, Slot{});
  entries_ = bytes_ = 0;
}

size_t count_units(const uint8_t* text, size_t size) {
  const uint8_t* const end = text + size;
  size_t n = 0;
  for (bool ascii; text < end; n++) text = unit_end(text, end, ascii);
  return n;
}

UnitEncoder::Piece UnitEncoder::start(const uint8_t* text, size_t size) {
  next_ = text;
  end_ = text + size;
  unit_ = word_ = nullptr;
  out_size_ = 0;
  return run();
}

UnitEncoder::Piece UnitEncoder::supply(const uint8_t* ids, size_t bytes) {
  if (!piece_.data) return piece_;
  append(ids, bytes);
  if (word_) {
    words_.insert(piece_.data, piece_.size, ids, bytes);
    word_ += piece_.size;
  } else {
    units_.insert(piece_.data, piece_.size, ids, bytes);
  }
  return run();
}

UnitEncoder::Piece UnitEncoder::run() {
  piece_ = {nullptr, 0};
  if (word_ && !run_words()) return piece_;
  while (next_ < end_) {
    bool ascii;
    const uint8_t* const unit = next_;
    next_ = unit_end(unit, end_, ascii);
    const size_t size = size_t(next_ - unit);
    if (const ByteCache::Value v = units_.find(unit, size); v.data) {
      append(v);
      continue;
    }
    if (!ascii) return piece_ = {unit, size};
    unit_ = word_ = unit;
    unit_ids_ = out_size_;
    if (!run_words()) return piece_;
  }
  return piece_;
}

// Appends the ids of the rest of the unit. Returns false if a word is missing.
bool UnitEncoder::run_words() {
  while (word_ < next_) {
    const size_t size = size_t(word_end(word_, next_) - word_);
    const ByteCache::Value v = words_.find(word_, size);
    if (!v.data) {
      piece_ = {word_, size};
      return false;
    }
    append(v);
    word_ += size;
  }
  units_.insert(unit_, size_t(next_ - unit_), out_.data() + unit_ids_, out_size_ - unit_ids_);
  unit_ = word_ = nullptr;
  return true;
}

void UnitEncoder::append(const uint8_t* ids, size_t bytes) {
  reserve(bytes);
  if (bytes) std::memcpy(out_.data() + out_size_, ids, bytes);
  out_size_ += bytes;
}

void UnitEncoder::append(ByteCache::Value v) {
  if (v.size > kSlack) return append(v.data, v.size);
  reserve(kSlack);
  std::memcpy(out_.data() + out_size_, v.data, kSlack);
  out_size_ += v.size;
}

void UnitEncoder::reserve(size_t bytes) {
  if (out_.size() < out_size_ + bytes) out_.resize((out_size_ + bytes) * 2 + 1024);
}

}  // namespace lamoe
