"""The models here are tiny: threads cost more than they bring."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass
