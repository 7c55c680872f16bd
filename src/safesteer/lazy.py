"""Public names that are imported when first used, so that importing a package does not wait for PyTorch."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose names are imported when first asked for (PEP 562).

    Args:
        package: Its `__name__`.
        modules: Public name to the module below the package that holds it.

    Returns:
        A function that imports a name; it raises AttributeError for any other, as Python expects.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return __getattr__
