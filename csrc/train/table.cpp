// The dispatch table of the training kernels of one instruction set.
#include "train/kernels.h"

#define LAMOE_QUOTE_(x) #x
#define LAMOE_QUOTE(x) LAMOE_QUOTE_(x)

namespace lamoe {
namespace LAMOE_ISA {

extern const TrainOps train_table;
const TrainOps train_table = {
    LAMOE_QUOTE(LAMOE_ISA),
    linear_forward,
    linear_dx,
    linear_dw,
    experts_forward,
    experts_backward,
    attention_forward,
    attention_backward,
    cross_entropy,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
    embedding_backward,
    route,
    route_backward,
    add_gradients,
    squared_norm,
    adamw,
};

}  // namespace LAMOE_ISA
}  // namespace lamoe
