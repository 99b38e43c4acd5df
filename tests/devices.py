"""The device that tests run on, and a check that no operation mixes devices.

LAMOE_TEST_DEVICE names the device, for example cuda or mps. The default is the CPU.
"""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device(os.environ.get("LAMOE_TEST_DEVICE") or "cpu")


class NoMixedDevices(TorchDispatchMode):
    """Raises RuntimeError when an operation other than a copy has arguments on two devices.

    Tensors without dimensions are exempt: accelerators accept them from the host.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim()}
        if len(devices) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func} has arguments on {sorted(devices)}")
        return func(*args, **(kwargs or {}))
