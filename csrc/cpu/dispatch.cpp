// Which ISA this process uses: the best that the CPU has, or what LAMOE_ISA says.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/ops.h"

namespace lamoe {
namespace scalar {
extern const Ops table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Ops table;
}
namespace avxvnni {
extern const Ops table;
}
namespace avx512vnni {
extern const Ops table;
}
namespace avx512 {
extern const Ops table;
}
namespace amx {
extern const Ops table;
}
#endif

namespace {
constexpr const char* kBestFirst[] = {"amx", "avx512", "avx512vnni", "avxvnni",
                                      "avx2"};  // avx512: with VNNI and BF16

// Tile registers are large: Linux lets a process have them that asks for it (and refuses where
// signal stacks are too small for them).
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool has(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avxvnni") {
    unsigned a = 0, b, c, d;
    return has("avx2") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }
  if (isa == "avx512vnni")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  if (isa == "avx512") return has("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == "amx") {
    constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;
    unsigned a, b, c, d = 0;
    return has("avx512") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) &&
           (d & kInt8) && (d & kBf16) && may_use_tiles();
  }
#endif
  return isa == "scalar";
}

const Ops& choose() {
  const char* forced = std::getenv("LAMOE_ISA");
  if (forced && *forced) {
    const Ops* t = ops_by_name(forced);
    if (!t)
      throw std::invalid_argument(std::string("LAMOE_ISA is '") + forced +
                                  "'; this CPU runs: " + cpu_features());
    return *t;
  }
  for (const char* isa : kBestFirst)
    if (const Ops* t = ops_by_name(isa)) return *t;
  return scalar::table;
}
}  // namespace

const Ops* ops_by_name(const char* name) {
  const std::string isa = name;
  if (!has(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == "amx") return &amx::table;
  if (isa == "avx512") return &avx512::table;
  if (isa == "avx512vnni") return &avx512vnni::table;
  if (isa == "avxvnni") return &avxvnni::table;
  if (isa == "avx2") return &avx2::table;
#endif
  return isa == "scalar" ? &scalar::table : nullptr;
}

const char* cpu_features() {
  static const std::string all = [] {
    std::string names;
    for (const char* isa : kBestFirst) names += has(isa) ? std::string(isa) + ", " : "";
    return names + "scalar";
  }();
  return all.c_str();
}

const Ops& ops() {
  static const Ops& table = choose();
  return table;
}

size_t scratch_bytes(int k) {
  return size_t(192) * 2 * kBlock * 4 + size_t(ceil_to(k, kBlock)) / kBlock * 2 * 4 * 320 + 256;
}

}  // namespace lamoe
