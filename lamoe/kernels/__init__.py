"""The model's ops with gradients: one function per op, and several implementations of each.

"ref" (ref.py) is the definition of an op, in plain torch, short and slow. "fused" (fused.py) has
hand-written backward passes and is the default on the CPU. "device" (device.py) never waits for the
device and is the default on accelerators. The environment variable LAMOE_OPS=ref|fused|device sets
the default of a process, and `impl=` chooses for one call. LAMOE_IMPL, the older name of the
variable, works too. The backend that runs a model is a separate choice, see lamoe/backends.
"""

from __future__ import annotations

import os

import torch

from lamoe.kernels import device, fused, ref

_IMPLS = {"ref": ref, "fused": fused, "device": device}
_VARIABLE = "LAMOE_OPS" if os.environ.get("LAMOE_OPS") else "LAMOE_IMPL"
_DEFAULT = os.environ.get(_VARIABLE) or None  # None: chosen by the device of the first argument
if _DEFAULT not in (None, *_IMPLS):
    raise ValueError(f"{_VARIABLE} is {_DEFAULT!r}; known: {', '.join(_IMPLS)}")


def _op(name: str):
    """Return the function that runs the op `name` in the chosen implementation.

    Where an implementation lacks an op, the definition runs instead.
    """

    def call(x: torch.Tensor, *args, impl: str | None = None, **kwargs):
        chosen = impl or _DEFAULT or ("fused" if x.device.type == "cpu" else "device")
        if chosen not in _IMPLS:
            raise ValueError(f"impl is {chosen!r}; known: {', '.join(_IMPLS)}")
        return getattr(_IMPLS[chosen], name, getattr(ref, name))(x, *args, **kwargs)

    call.__name__, call.__doc__ = name, getattr(ref, name).__doc__
    return call


rms_norm = _op("rms_norm")
rope = _op("rope")
document_mask = _op("document_mask")
attend = _op("attend")
mla_attend = _op("mla_attend")
swiglu = _op("swiglu")
experts = _op("experts")
cross_entropy = _op("cross_entropy")
