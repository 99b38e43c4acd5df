"""One thread, so that sums are added up in one order, and the two implementations of the kernels as a fixture."""

import pytest
import torch

from lamoe import kernels

torch.set_num_threads(1)


@pytest.fixture(params=["ref", "fused"])
def impl(request, monkeypatch) -> str:
    """Runs the test once with every op from ref.py and once with every op from fused.py."""
    monkeypatch.setattr(kernels, "_DEFAULT", request.param)
    return request.param
