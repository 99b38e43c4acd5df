// The op table of one ISA.
#include "cpu/kernels.h"

namespace lamoe {
namespace LAMOE_NS {
extern const Ops table;
#define LAMOE_STR2(x) #x
#define LAMOE_STR(x) LAMOE_STR2(x)
const Ops table = {LAMOE_STR(LAMOE_NS),
                   pack,
                   pack_scale,
                   unpack,
                   put_row,
                   linear,
                   swiglu,
                   rms_norm,
                   rope,
                   encode,
                   decode,
                   attend_tile,
                   decode_ints,
                   pack_lanes_ints,
                   attend_ints,
                   combine,
                   pack_lanes,
                   rows_as_mat,
                   rows_as_values,
                   expand_keys,
                   expand_values,
                   softmax_rows,
                   probe_read,
                   probe_dots};
}  // namespace LAMOE_NS
}  // namespace lamoe
