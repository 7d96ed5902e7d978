"""Doors into other libraries: a module for each, which is imported only when it is asked for.

    from taylor_kernels.integrations.torch_pruning import GroupTaylorImportance

A module subclasses what the library itself offers, or uses its registry. The package works without
any of these libraries.
"""

from __future__ import annotations


def absent(error: ModuleNotFoundError, module: str, install: str, tested: str) -> ImportError:
    """What to raise where `import module` failed: one line that says what to install.

    Args:
        error: what the import raised. If it is not `module` that is missing but something that it
            needs, it is returned as it is.
        module: the name that is imported.
        install: what pip is given.
        tested: the versions that the integration was tested with.

    Example:
        >>> from taylor_kernels.integrations import absent
        >>> missing = ModuleNotFoundError(name="torch_pruning")
        >>> print(absent(missing, "torch_pruning", "torch-pruning", "1.6.1"))
        torch_pruning is not installed: pip install torch-pruning (tested with 1.6.1)
    """
    if error.name != module:
        return error
    return ModuleNotFoundError(
        f"{module} is not installed: pip install {install} (tested with {tested})", name=module
    )
