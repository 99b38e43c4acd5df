// Caches of the token ids of units and words, for lamoe/train/fast_encode.py, which computes what
// is missing. A unit is a blank and the characters up to the next white space, or white space. All
// texts are bytes of UTF-8; invalid bytes count as characters that are no white space.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lamoe {

// A bounded hash table from short keys to short values, both bytes.
class ByteCache {
 public:
  static constexpr size_t kMaxKey = 64, kMaxValue = 256;

  // Holds at most `max_entries` entries; then it starts again.
  explicit ByteCache(size_t max_entries);

  struct Value {
    const uint8_t* data;  // 16 bytes are readable, even if the value is shorter; null if missing
    size_t size;
  };
  // The value is valid until the next `insert`. Keys that are too long are never found.
  Value find(const uint8_t* key, size_t size) const;
  // Does nothing if the key or the value is too long.
  void insert(const uint8_t* key, size_t key_size, const uint8_t* value, size_t value_size);
  size_t size() const { return entries_; }

 private:
  struct Slot {
    uint64_t hash;
    uint32_t offset;  // of the key in data_; the value follows
    uint16_t value_size;
    uint8_t key_size;
    uint8_t used;
  };
  void place(const Slot& slot);
  void grow();
  void clear();

  size_t max_entries_, entries_ = 0, bytes_ = 0;
  std::vector<Slot> slots_;
  std::vector<uint8_t> data_;
};

// Returns the number of units in a text.
size_t count_units(const uint8_t* text, size_t size);

// Encodes one text after the other. `start` and `supply` run until a piece of the text is missing
// in the caches. The caller gives the token ids of the piece to `supply`.
class UnitEncoder {
 public:
  struct Piece {
    const uint8_t* data;  // null at the end of the text
    size_t size;
  };

  explicit UnitEncoder(size_t max_entries) : units_(max_entries), words_(max_entries) {}

  // `text` must stay valid and unchanged until the last call of `supply`.
  Piece start(const uint8_t* text, size_t size);
  // Takes the ids of the missing piece: a word if it is in ASCII, otherwise a unit.
  Piece supply(const uint8_t* ids, size_t bytes);
  bool is_waiting() const { return piece_.data; }

  // The ids so far, as the bytes that `supply` got.
  const uint8_t* ids() const { return out_.data(); }
  size_t id_bytes() const { return out_size_; }
  size_t num_units() const { return units_.size(); }
  size_t num_words() const { return words_.size(); }

 private:
  Piece run();
  bool run_words();
  void append(const uint8_t* ids, size_t bytes);
  void append(ByteCache::Value ids);
  void reserve(size_t bytes);

  ByteCache units_, words_;
  const uint8_t *end_ = nullptr, *next_ = nullptr;   // the text after the units that are done
  const uint8_t *unit_ = nullptr, *word_ = nullptr;  // the unit in words, and what is left of it
  size_t unit_ids_ = 0;                              // where the ids of the unit begin
  Piece piece_{nullptr, 0};
  std::vector<uint8_t> out_;
  size_t out_size_ = 0;
};

}  // namespace lamoe
