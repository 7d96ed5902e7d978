"""Examples in docstrings, run as a reader pastes them."""

from __future__ import annotations

import doctest


def run_examples(documented: object, name: str, *, own: bool = False) -> None:
    """Those of a function, a class with its methods, or a module; each imports what it uses.

    Args:
        own: of a module, what it has imported from others is left out.
    """
    finder = doctest.DocTestFinder(exclude_empty=True)
    module = None if own else False
    found = [t for t in finder.find(documented, name, module=module, globs={}) if t.examples]
    assert found, f"{name}: its docstring shows no >>> example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
