"""Modules that are found by their file names: criteria, allocators, schedules, recoveries, selections, reducers. Imports nothing heavy.

A name on the command line is the file's, with - for _. Files that begin with _ are not listed.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

from edgeprune.errors import unknown

#: Kinds of parts that a method is made of, and the packages in which they are found.
KINDS = {"criterion": "criteria", "allocator": "allocators", "schedule": "schedules", "recovery": "recoveries"}

#: All kinds of modules: how training images are selected and tokens reduced is no part of a method.
PACKAGES = {**KINDS, "selection": "selections", "reducer": "reducers"}


def names(kind: str) -> list[str]:
    """All there are of a kind, sorted."""
    found = (module.name for module in pkgutil.iter_modules(_folders(kind)))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def check(kind: str, name: str) -> None:
    """Raise UsageError, with "did you mean", unless there is one of this name."""
    if name not in names(kind):
        raise unknown(kind, name, names(kind))


def path(kind: str, name: str) -> str:
    """The dotted path of the module."""
    return f"edgeprune.{PACKAGES[kind]}.{_file(name)}"


def get(kind: str, name: str) -> Any:
    """The module; UsageError for an unknown name."""
    check(kind, name)
    return importlib.import_module(path(kind, name))


def doc(kind: str, name: str) -> str:
    """Its docstring; the file is read, not imported."""
    return ast.get_docstring(_source(kind, name)) or ""


def summary(kind: str, name: str) -> str:
    """The first line of its docstring, without its name."""
    return doc(kind, name).split("\n")[0].split(": ", 1)[-1]


def needs(kind: str, name: str) -> tuple[str, ...]:
    """What it looks at (weights, activations, gradients, labels): its constant NEEDS."""
    return constant(kind, name, "NEEDS")


def constant(kind: str, name: str, what: str) -> tuple[str, ...]:
    """A constant of names, () where there is none; the file is read, not imported."""
    for node in _source(kind, name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == what:
            return tuple(ast.literal_eval(node.value))
    return ()


def _file(name: str) -> str:
    return name.replace("-", "_")


def _source(kind: str, name: str) -> ast.Module:
    paths = (Path(folder) / f"{_file(name)}.py" for folder in _folders(kind))
    return ast.parse(next(path for path in paths if path.is_file()).read_text(encoding="utf-8"))


def _folders(kind: str) -> list[str]:
    """Where a kind's modules are; a package that is imported may have been told of more."""
    package = sys.modules.get(f"edgeprune.{PACKAGES[kind]}")
    return list(package.__path__) if package else [str(Path(__file__).parent / PACKAGES[kind])]
