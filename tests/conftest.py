"""Shared set-up of all tests.

torch uses one thread, so that sums always have the same order. The fixture `impl` selects the ops.
"""

import hypothesis
import pytest
import torch

from lamoe import kernels

hypothesis.settings.register_profile("same examples every time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same examples every time")
torch.set_num_threads(1)


@pytest.fixture(params=["ref", "fused", "device"])
def impl(request, monkeypatch) -> str:
    """Run the test once with the ops of ref.py, of fused.py and of device.py."""
    monkeypatch.setattr(kernels, "_DEFAULT", request.param)
    return request.param
