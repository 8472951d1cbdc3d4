"""Runtimes: each one is a module here, and its file name is its name.

A runtime module is light: importing it imports no runtime library, and finding out what exists
imports nothing at all. The measuring worker uses these modules too, so they know neither torch nor timm.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from edgeprune import errors


class Session(Protocol):
    """One opened model, ready to run."""

    input_shape: tuple[int, ...]  # the first is the batch; of a file that takes any, the one it says it is timed at
    input_type: str  # float32 or uint8, in numpy's names
    facts: dict[str, Any]  # what is in force, as the runtime itself reports it; JSON types only

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """The first output for `x`, both `[batch, ...]`. The result may be overwritten by the next run."""


class Runtime(Protocol):
    """The functions of a runtime module (`self` does not exist for a module)."""

    def available(self) -> str:
        """ "" when the runtime can be imported; otherwise why not, with the pip command."""

    def version(self) -> str:
        """The runtime library's version."""

    def cap_environment(self, max_isa: str) -> dict[str, str] | None:
        """Environment variables that cap the instruction set before the library loads.

        None when the runtime cannot be capped. `max_isa` is one of oneDNN's names, as in `Target`.
        """

    def open(self, path: str, threads: int, precision: str) -> Session:
        """Open a model file. Raises UsageError for a bad model, precision or thread count."""

    def operators(self, path: str, threads: int, precision: str, x: NDArray[Any], runs: int) -> list[dict[str, Any]]:
        """Where one inference of a model file spends its time, by the runtime's own profiler.

        Opens the file as `open` does and runs `x` `[batch, ...]` `runs` times, after runs that warm it up.
        Returns an entry per executed node of the optimised graph, in execution order:
        `name` of the node; `operator`, its type as executed, after fusion; `kernel`, which implementation
        ran, "" where the runtime does not tell; `ms`, the typical milliseconds. Nodes too quick for the
        profiler's microseconds are left out, and profiling itself takes time: shares are sound, sums are not
        latencies. Raises as `open` does, UsageError for fewer than 1 run, StorageError.
        """

    def compile(self, onnx_path: Path, out_dir: Path, weights: str = "fp32") -> list[Path]:
        """Write the files this runtime wants in the artifact besides model.onnx; say which.

        weights: fp32 or fp16, as they are kept in these files; computed with is what `open` is asked for.
        """


BATCH = "edgeprune.batch"  # in a file's metadata: at how many images one that takes any number is timed
MOST_BATCH = 1024
INPUT_TYPES = ("float32", "uint8")  # in numpy's names


def fixed(path: str, shape: Sequence[int | None], said: str) -> tuple[int, ...]:
    """The shape with the batch that the file's metadata says, where that may be any number; None = any.

    Raises UsageError for other sizes that are not fixed, and where the metadata says no batch.
    """
    first, *others = shape
    batch = int(said) if re.fullmatch("[0-9]{1,4}", said) else 0
    if first is None and 1 <= batch <= MOST_BATCH:
        first = batch
    if first is None or any(size is None for size in others):
        raise errors.UsageError(f"{path} has a dynamic input {list(shape)}; export it with batch 1")
    return (first, *(size for size in others if size is not None))


def names() -> list[str]:
    """The runtimes there are, sorted; they may still be uninstalled (see `available`)."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Runtime:
    """The runtime module called `name`. Raises UsageError when there is none."""
    known = names()
    if name not in known:
        raise errors.unknown("runtime", name, known)
    return cast(Runtime, importlib.import_module(f"edgeprune.runtimes.{name}"))
