"""The device that tests run on, and what checks without an accelerator need.

LAMOE_TEST_DEVICE names the device, for example cuda or mps. The default is the CPU.
"""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oracles import tiny

DEVICE = torch.device(os.environ.get("LAMOE_TEST_DEVICE") or "cpu")
# Models without experts: torch's meta device cannot run the routing, which depends on the data.
DENSE = {
    "mla": tiny.config(
        n_routed_experts=None,
        moe_intermediate_size=None,
        num_experts_per_tok=None,
        n_shared_experts=0,
        first_k_dense_replace=0,
        q_lora_rank=24,
        rope_scaling=tiny.YARN,
    ),
    "gqa": tiny.config("llama", num_key_value_heads=2),
}


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
