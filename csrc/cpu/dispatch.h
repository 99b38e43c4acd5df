// Choice of the instruction set that this process uses, and access to its dispatch table.
#pragma once
#include "cpu/ops.h"

namespace lamoe {

// The dispatch table of the best instruction set of this CPU. The environment variable LAMOE_ISA
// can name another instruction set. Throws std::invalid_argument if this CPU cannot run it.
const Ops& ops();
// The dispatch table of the named instruction set. Returns null if the name is unknown or if this
// CPU cannot run the instruction set.
const Ops* ops_by_name(const char* name);
// The names of all instruction sets that this CPU can run, best first, separated by ", ".
const char* cpu_features();

}  // namespace lamoe
