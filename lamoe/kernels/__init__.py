"""The model's ops with gradients: one function per op, two implementations with one signature.

"ref" (ref.py) defines an op: plain torch, short, slow. "fused" (fused.py), the default,
has hand-written backward passes. LAMOE_OPS=ref|fused in the environment sets the default of a
process, `impl=` chooses for one call. LAMOE_IMPL, the variable's older name, is read too.
Which backend runs a model is a separate choice: see lamoe/backends.
"""

from __future__ import annotations

import os

from lamoe.kernels import fused, ref

_IMPLS = {"ref": ref, "fused": fused}
_VARIABLE = "LAMOE_OPS" if os.environ.get("LAMOE_OPS") else "LAMOE_IMPL"
_DEFAULT = os.environ.get(_VARIABLE) or "fused"
if _DEFAULT not in _IMPLS:
    raise ValueError(f"{_VARIABLE} is {_DEFAULT!r}; known: {', '.join(_IMPLS)}")


def _op(name: str):
    """Make the function that runs the op `name` in the chosen implementation.

    "fused" has no mla_attend, because only decoding uses it; the definition runs instead.
    """

    def call(*args, impl: str | None = None, **kwargs):
        chosen = impl or _DEFAULT
        if chosen not in _IMPLS:
            raise ValueError(f"impl is {chosen!r}; known: {', '.join(_IMPLS)}")
        return getattr(_IMPLS[chosen], name, getattr(ref, name))(*args, **kwargs)

    call.__name__, call.__doc__ = name, getattr(ref, name).__doc__
    return call


rms_norm = _op("rms_norm")
rope = _op("rope")
attend = _op("attend")
mla_attend = _op("mla_attend")
swiglu = _op("swiglu")
experts = _op("experts")
cross_entropy = _op("cross_entropy")
