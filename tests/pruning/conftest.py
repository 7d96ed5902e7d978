"""The models here are tiny: threads cost more than they bring."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Most tests here compact without an optimizer, and know what they do."""
    quiet = pytest.mark.filterwarnings(r"ignore:compact\(\) has put new parameters")
    for item in items:
        item.add_marker(quiet)
