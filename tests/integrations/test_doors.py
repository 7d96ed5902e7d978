"""What all integrations share: nothing is imported unasked, and an absent library says so."""

import importlib
import sys

import pytest

from taylor_kernels.integrations import absent
from tests.helpers.programs import run_program

LIBRARIES = [
    *("torch_pruning", "avalanche", "laplace", "backpack", "opacus", "modelopt"),
    *("lightning", "transformers", "accelerate"),
]


def test_the_package_imports_no_library():
    code = (
        "import sys, taylor_kernels, taylor_kernels.integrations\n"
        f"print([name for name in {LIBRARIES} if name in sys.modules])"
    )
    run = run_program(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_what_a_present_library_lacks_is_not_called_its_absence():
    error = ModuleNotFoundError("No module named 'something'", name="something")
    assert absent(error, "library", "library", "1.0") is error


def test_an_absent_library_is_one_line():
    with pytest.raises(ModuleNotFoundError) as caught:
        raise absent(ModuleNotFoundError(name="lib"), "lib", "the-lib", "1.0 and 2.1")
    message = str(caught.value)
    assert "\n" not in message
    assert "pip install the-lib" in message
    assert "1.0 and 2.1" in message


@pytest.mark.parametrize(
    ("door", "module", "said"),
    [
        ("laplace", "laplace", r"pip install laplace-torch \(tested with 0\.3\)"),
        ("lightning", "lightning", r"pip install lightning \(tested with 2\.6\.6\)"),
        ("transformers", "transformers", r"pip install transformers \(tested with 5\.24\)"),
        ("accelerate", "accelerate", r"pip install accelerate \(tested with 1\.15\)"),
        ("backpack", "backpack", r"pip install backpack-for-pytorch \(tested with 1\.7\.1\)"),
    ],
)
def test_a_door_says_which_library_it_lacks(door, module, said, monkeypatch):
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)

    class Without:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Without, *sys.meta_path])
    name = f"taylor_kernels.integrations.{door}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match=said):
        importlib.import_module(name)
