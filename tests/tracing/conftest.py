"""The models here are tiny: threads cost more than they bring."""

import pytest

from taylor_kernels.tracing.run import hollow


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def small_networks_are_worth_it():
    """Layers of small networks are left out of runs too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hollow, "_WORTH_A_RUN", 0)
        yield
