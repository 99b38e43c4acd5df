#include <algorithm>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "train/ops.h"

namespace lamoe {

#define X(isa)                       \
  namespace isa {                    \
  extern const TrainOps train_table; \
  }
LAMOE_ISAS
#undef X

const TrainOps* train_ops(const char* isa) {
  const Ops* chosen = isa && *isa ? ops_by_name(isa) : &ops();
  if (!chosen) return nullptr;
#define X(isa) &isa::train_table,
  static const TrainOps* const all[] = {LAMOE_ISAS};
#undef X
  for (const TrainOps* table : all)
    if (std::string(table->name) == chosen->name) return table;
  return nullptr;
}

void make_plan(const int64_t* expert, Plan& plan) {
  const int assignments = plan.tokens * plan.top_k;
  const auto valid = [&](int64_t e) { return e >= 0 && e < plan.experts; };
  for (int e = 0; e <= plan.experts; e++) plan.offsets[e] = 0;
  for (int i = 0; i < assignments; i++)
    if (valid(expert[i])) plan.offsets[expert[i] + 1]++;
  for (int e = 0; e < plan.experts; e++) plan.offsets[e + 1] += plan.offsets[e];
  // offsets[e] counts up to the end of expert e, and is put back afterwards.
  for (int i = 0; i < assignments; i++) {
    plan.place[i] = valid(expert[i]) ? plan.offsets[expert[i]]++ : -1;
    if (plan.place[i] >= 0) plan.order[plan.place[i]] = i;
  }
  for (int e = plan.experts; e > 0; e--) plan.offsets[e] = plan.offsets[e - 1];
  plan.offsets[0] = 0;
}

bool make_spans(const int64_t* segments, int batch, int tokens, int32_t* spans) {
  std::vector<int64_t> ids;  // of the documents of a sequence
  for (int b = 0; b < batch; b++) {
    const int64_t* id = segments + ptrdiff_t(b) * tokens;
    int32_t *first = spans + ptrdiff_t(b) * tokens, *end = first + ptrdiff_t(batch) * tokens;
    ids.clear();
    for (int t = 0, begin = 0; t < tokens; t++) {
      first[t] = begin;
      if (t + 1 < tokens && id[t + 1] == id[t]) continue;
      std::fill(end + begin, end + t + 1, t + 1);
      ids.push_back(id[t]), begin = t + 1;
    }
    if (!std::is_sorted(ids.begin(), ids.end())) std::sort(ids.begin(), ids.end());
    if (std::adjacent_find(ids.begin(), ids.end()) != ids.end()) return false;
  }
  return true;
}

}  // namespace lamoe
