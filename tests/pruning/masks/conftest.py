"""How masked entries are written."""

from __future__ import annotations

import pytest

from taylor_kernels.backends import native


@pytest.fixture(params=["native", "PyTorch alone"])
def way(request, monkeypatch):
    if request.param == "PyTorch alone":
        monkeypatch.setattr(native, "plans_calls", False)
    elif not native.plans_calls:
        pytest.skip("the native module cannot view tensors of this PyTorch")
    return request.param
