"""One function per op. Each call runs `impl`: "ref" (ref.py, the definition) or "fused" (fused.py, hand-written backward passes
over torch's own products, the default). LAMOE_IMPL sets the default for a whole process.
"""

from __future__ import annotations

import os

from lamoe.kernels import fused, ref

_IMPLS = {"ref": ref, "fused": fused}
_DEFAULT = os.environ.get("LAMOE_IMPL") or "fused"
if _DEFAULT not in _IMPLS:
    raise ValueError(f"LAMOE_IMPL is {_DEFAULT!r}; known: {', '.join(_IMPLS)}")


def _op(name: str):
    def call(*args, impl: str | None = None, **kwargs):
        if (impl or _DEFAULT) not in _IMPLS:
            raise ValueError(f"impl is {impl!r}; known: {', '.join(_IMPLS)}")
        return getattr(_IMPLS[impl or _DEFAULT], name, getattr(ref, name))(*args, **kwargs)

    call.__name__, call.__doc__ = name, getattr(ref, name).__doc__
    return call


rms_norm = _op("rms_norm")
rope = _op("rope")
attend = _op("attend")
mla_attend = _op("mla_attend")
swiglu = _op("swiglu")
experts = _op("experts")
cross_entropy = _op("cross_entropy")
