// Which table of operations this process uses.
#pragma once
#include "cpu/ops.h"

namespace lamoe {

// The best table that this CPU runs, or the one that the environment variable LAMOE_ISA names.
// Throws std::invalid_argument if this CPU does not run that one.
const Ops& ops();
// Null if the name is unknown or this CPU does not run it.
const Ops* ops_by_name(const char* name);
// The names of all tables that this CPU runs, best first, separated by ", ".
const char* cpu_features();

}  // namespace lamoe
