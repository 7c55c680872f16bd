"""Make an open-weights chat model refuse harmful requests without losing what it can do."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("safesteer")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
