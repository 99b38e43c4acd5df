#include "cpu/dispatch.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lamoe {

// CMake defines LAMOE_ISAS as X(name) for each instruction set of the build, best first.
#define X(isa)            \
  namespace isa {         \
  extern const Ops table; \
  }
LAMOE_ISAS
#undef X

namespace {

#define X(isa) &isa::table,
const Ops* const kBestFirst[] = {LAMOE_ISAS};
#undef X

#if defined(__x86_64__)
// Linux grants the large AMX tile registers only to processes that ask, and refuses if their
// signal stacks are too small for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool has_avxvnni() {
  unsigned a = 0, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_amx() {
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kInt8) && (d & kBf16) &&
         may_use_tiles();
}
#endif

// Whether this CPU has a feature. Knows every feature name that Traits::kCpuFeatures may contain.
bool cpu_has(const std::string& feature) {
#if defined(__x86_64__)
  if (feature == "avx2") return __builtin_cpu_supports("avx2");
  if (feature == "fma") return __builtin_cpu_supports("fma");
  if (feature == "avxvnni") return has_avxvnni();
  if (feature == "avx512f") return __builtin_cpu_supports("avx512f");
  if (feature == "avx512bw") return __builtin_cpu_supports("avx512bw");
  if (feature == "avx512vl") return __builtin_cpu_supports("avx512vl");
  if (feature == "avx512dq") return __builtin_cpu_supports("avx512dq");
  if (feature == "avx512vnni") return __builtin_cpu_supports("avx512vnni");
  if (feature == "avx512bf16") return __builtin_cpu_supports("avx512bf16");
  if (feature == "amx") return has_amx();
#endif
  (void)feature;
  return false;
}

bool runs_here(const Ops& table) {
  std::istringstream words(table.cpu_features);
  for (std::string feature; words >> feature;)
    if (!cpu_has(feature)) return false;
  return true;
}

const Ops& choose() {
  const char* forced = std::getenv("LAMOE_ISA");
  if (forced && *forced) {
    const Ops* table = ops_by_name(forced);
    if (!table)
      throw std::invalid_argument(std::string("LAMOE_ISA is '") + forced +
                                  "'; this CPU runs: " + cpu_features());
    return *table;
  }
  for (const Ops* table : kBestFirst)
    if (runs_here(*table)) return *table;
  throw std::runtime_error("this CPU runs none of the compiled kernels");
}

}  // namespace

const Ops* ops_by_name(const char* name) {
  for (const Ops* table : kBestFirst)
    if (std::string(name) == table->name) return runs_here(*table) ? table : nullptr;
  return nullptr;
}

const char* cpu_features() {
  static const std::string all = [] {
    std::string names;
    for (const Ops* table : kBestFirst)
      if (runs_here(*table)) names += (names.empty() ? "" : ", ") + std::string(table->name);
    return names;
  }();
  return all.c_str();
}

const Ops& ops() {
  static const Ops& table = choose();
  return table;
}

}  // namespace lamoe
