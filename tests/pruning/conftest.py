"""The models here are tiny: threads cost more than they bring."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def pytest_collection_modifyitems(items):
    """Most tests here compact without an optimizer, and know what they do."""
    quiet = pytest.mark.filterwarnings(r"ignore:compact\(\) has put new parameters")
    for item in items:  # of the whole suite: the hook is not confined to this folder
        if Path(__file__).parent in item.path.parents:
            item.add_marker(quiet)
