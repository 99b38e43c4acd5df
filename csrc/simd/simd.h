// Includes the vector operations of the instruction set that is being compiled (common.h lists
// them), and adds functions that use only these operations.
#pragma once
#include "simd/common.h"
#include LAMOE_SIMD

namespace lamoe {
namespace LAMOE_ISA {

// Computes e^x for x <= 88, with a relative error of about 2e-7. Returns 0 for x below -87. NaN
// stays NaN.
INLINE vf vexp(vf given) {
  // vmax returns its second operand if one is NaN. `given` is second, so its NaN is kept.
  const vf least = vset(-87.f), x = vmax(least, given) * vset(1.44269504f);
  vf n = vround(x), f = x - n;
  vf p = vfma(f, vset(1.5403530e-4f), vset(1.3333558e-3f));
  p = vfma(f, p, vset(9.6181291e-3f));
  p = vfma(f, p, vset(5.5504109e-2f));
  p = vfma(f, p, vset(0.24022651f));
  p = vfma(f, p, vset(0.69314718f));
  return vzero_if_less(vpow2(vfma(f, p, vset(1.f)), n), given, least);
}

}  // namespace LAMOE_ISA
}  // namespace lamoe
