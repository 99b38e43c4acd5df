// Picks the instruction set that this process uses, with its dispatch table.
#pragma once
#include "cpu/ops.h"

namespace lamoe {

// The dispatch table of the best instruction set of this CPU, or of the one that the environment
// variable LAMOE_ISA names. Throws std::invalid_argument if this CPU does not run that one.
const Ops& ops();
// Null if the name is unknown or this CPU does not run it.
const Ops* ops_by_name(const char* name);
// The names of all instruction sets that this CPU runs, best first, separated by ", ".
const char* cpu_features();

}  // namespace lamoe
