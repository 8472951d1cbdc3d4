"""edgeprune: the most accurate Vision Transformer that provably meets a latency on a device.

The Python API mirrors the commands. Importing the package imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("edgeprune")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

_API = {
    "build": ("edgeprune.api", "build"),
    "profile": ("edgeprune.api", "profile"),
    "validate": ("edgeprune.api", "validate"),
    "sweep": ("edgeprune.fleet.sweep", "sweep"),
    "open": ("edgeprune.artifact", "open_entry"),
    "load": ("edgeprune.artifact", "load"),
}

__all__ = ["__version__", *_API]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _API:
        import importlib

        module, attribute = _API[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'edgeprune' has no attribute '{name}'")
