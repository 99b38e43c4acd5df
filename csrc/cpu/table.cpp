// The dispatch table of one instruction set.
#include "cpu/kernels.h"

#define LAMOE_QUOTE_(x) #x
#define LAMOE_QUOTE(x) LAMOE_QUOTE_(x)

namespace lamoe {
namespace LAMOE_ISA {

extern const Ops table;
const Ops table = {
    LAMOE_QUOTE(LAMOE_ISA),
    Traits::kCpuFeatures,
    pack_scale,
    pack,
    unpack,
    put_row,
    linear,
    swiglu,
    rms_norm,
    rope,
    encode,
    decode,
    decode_ints,
    pack_lanes,
    pack_lanes_ints,
    attend_tile,
    attend_ints,
    combine,
    rows_as_keys,
    rows_as_values,
    expand_keys,
    expand_values,
    softmax_rows,
    probe_read,
    probe_dots,
};

}  // namespace LAMOE_ISA
}  // namespace lamoe
