"""The model's ops with gradients: one function per op, and several implementations of each.

    ref      the definition of an op, in plain torch, short and slow (ref.py)
    fused    hand-written backward passes on top of torch's matrix products (fused.py)
    native   compiled kernels for training on CPUs (native.py, csrc/train)
    device   ops that never wait for the device, for accelerators (device.py)

The default depends on the tensors: device on accelerators and in compiled code, native where
gradients are computed on the CPU and native supports the tensors, else fused. The environment
variable LAMOE_OPS names one for the whole process, `using` for a part of a program, and `impl=` for
one call. LAMOE_IMPL, the older name of the variable, works too. Where native lacks an op, fused
runs instead. Where another one lacks it, the definition does. The backend that runs a model is a
separate choice, see lamoe/backends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lamoe.kernels import device, fused, native, ref

_IMPLS = {"ref": ref, "fused": fused, "native": native, "device": device}
_VARIABLE = "LAMOE_OPS" if os.environ.get("LAMOE_OPS") else "LAMOE_IMPL"
_DEFAULT = os.environ.get(_VARIABLE) or None  # None: chosen by the tensors of each call


def _check(name: str, what: str) -> None:
    if name not in _IMPLS:
        raise ValueError(f"{what} is {name!r}; known: {', '.join(_IMPLS)}")


if _DEFAULT is not None:
    _check(_DEFAULT, _VARIABLE)


@contextmanager
def using(impl: str) -> Iterator[None]:
    """Use one implementation for all ops of the process while the context lasts."""
    global _DEFAULT
    _check(impl, "impl")
    before, _DEFAULT = _DEFAULT, impl
    try:
        yield
    finally:
        _DEFAULT = before


def _choose(impl: str | None, tensors: list[torch.Tensor], products: bool = True) -> str:
    """Return the name of the implementation for one call with these tensors.

    Args:
        products: whether the op multiplies rows of the tensors.
    """
    chosen = impl or _DEFAULT
    if chosen:
        _check(chosen, "impl")
    elif tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return "device"  # torch.compile can fuse these ops only
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        chosen = "native"
    if chosen == "native" and not native.supports(*tensors, products=products):
        chosen = "fused"
    return chosen or "fused"


def trains_native() -> bool:
    """Return whether the compiled ops compute gradients on the CPU in this process."""
    return _DEFAULT in (None, "native") and native.lib is not None


def _op(name: str):
    """Return the function that runs the op `name` in the chosen implementation."""

    def call(*args, impl: str | None = None, **kwargs):
        chosen = _choose(impl, [x for x in args if isinstance(x, torch.Tensor)])
        if chosen == "native" and not hasattr(native, name):
            chosen = "fused"
        return getattr(_IMPLS[chosen], name, getattr(ref, name))(*args, **kwargs)

    call.__name__, call.__doc__ = name, getattr(ref, name).__doc__
    return call


def compiled(name: str, *tensors: torch.Tensor, products: bool = True) -> Callable | None:
    """Return the compiled op `name` of native.py if it computes with these tensors, else None.

    For operations that have no definition in ref.py, because it is elsewhere. The tensors must have
    one dtype.

    Args:
        products: whether the op multiplies rows of the tensors.
    """
    chosen = _choose(None, list(tensors), products) == "native"
    return getattr(native, name) if chosen and native.are_alike(*tensors) else None


linear = _op("linear")
embedding = _op("embedding")
rms_norm = _op("rms_norm")
add_rms_norm = _op("add_rms_norm")
rope = _op("rope")
document_mask = _op("document_mask")
attend = _op("attend")
rope_attend = _op("rope_attend")
mla_attend = _op("mla_attend")
swiglu = _op("swiglu")
experts = _op("experts")
cross_entropy = _op("cross_entropy")
