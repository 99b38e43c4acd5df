"""One thread, so that sums are added up in one order, and the two implementations of the kernels as
a fixture.
"""

import hypothesis
import pytest
import torch

from lamoe import kernels

hypothesis.settings.register_profile("same examples every time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same examples every time")
torch.set_num_threads(1)


@pytest.fixture(params=["ref", "fused"])
def impl(request, monkeypatch) -> str:
    """Runs the test once with every op from ref.py and once with every op from fused.py."""
    monkeypatch.setattr(kernels, "_DEFAULT", request.param)
    return request.param
