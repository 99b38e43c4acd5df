// Encodes texts of all kinds of bytes, valid or not, in buffers of exactly the needed size. The ids
// of a piece are its bytes, so the result must be the text.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "text/unit_encoder.h"

namespace lamoe {
namespace {

void need(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "check: %s\n", what);
  std::exit(1);
}

void encode(UnitEncoder& encoder, const std::string& text) {
  std::unique_ptr<uint8_t[]> bytes(new uint8_t[text.size()]);
  std::memcpy(bytes.get(), text.data(), text.size());
  size_t pieces = 0;
  for (auto p = encoder.start(bytes.get(), text.size()); p.data; pieces++) {
    std::unique_ptr<uint8_t[]> ids(new uint8_t[p.size]);
    std::memcpy(ids.get(), p.data, p.size);
    need(p.size, "a piece of a text is empty");
    p = encoder.supply(ids.get(), p.size);
  }
  need(pieces <= text.size() && count_units(bytes.get(), text.size()) <= text.size(),
       "a text has more pieces than bytes");
  need(encoder.id_bytes() == text.size() &&
           (text.empty() || !std::memcmp(encoder.ids(), text.data(), text.size())),
       "the pieces of a text are not the text");
}

}  // namespace

void check_text() {
  std::mt19937 dice(3);
  const std::string parts[] = {"word",
                               "a",
                               "7",
                               " ",
                               "  ",
                               "\t",
                               "\n",
                               "\r\n",
                               "\xc2\xa0",
                               "\xc2\x85",
                               ".,-",
                               "\xc2",
                               "\xe1\x9a\x80",
                               "\xe2\x80",
                               "\xe2\x80\x8a",
                               "\xff\x80",
                               "\xe3",
                               std::string(1, '\0'),
                               std::string(100, 'x'),
                               std::string(70, ' '),
                               "\xe4\xb8\xad"};
  for (size_t limit : {size_t(0), size_t(3), size_t(1) << 20}) {
    UnitEncoder encoder(limit);
    for (int round = 0; round < 3000; round++) {
      std::string text;
      for (size_t n = dice() % 30; n; n--) text += parts[dice() % std::size(parts)];
      encode(encoder, text);
      if (round % 3 == 0) {  // left in the middle of a text
        encoder.start((const uint8_t*)"new words", 9);
      }
    }
    need(encoder.num_units() <= limit + 1 && encoder.num_words() <= limit + 1, "a cache overflows");
  }
  // More keys than the first table holds, many with equal beginnings.
  ByteCache cache(20000);
  for (int i = 0; i < 30000; i++) {
    const std::string key = "key" + std::to_string(i);
    const auto* k = (const uint8_t*)key.data();
    cache.insert(k, key.size(), k + 3, key.size() - 3);
    const auto v = cache.find(k, key.size());
    need(v.size == key.size() - 3 && !std::memcmp(v.data, k + 3, v.size), "a new entry is lost");
    need(cache.size() <= 20000, "a cache holds too many entries");
  }
}

}  // namespace lamoe
