"""Which other files an ONNX file wants to read, found without any library: it is asked before a runtime opens the file.

ONNX is protobuf. Only the messages that can hold a tensor are walked; field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgeprune.errors import StorageError, UsageError

#: message -> field number -> message: where tensors can be.
_HOLDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE, _LOCATION, _EXTERNAL = 1, 2, 14, 1
MAX_DEPTH = 64  # messages within messages; ours have 4


def external(path: Path) -> list[str]:
    """The locations of external tensor data that an .onnx file names, as written; "?" for one that names none.

    Raises UsageError for a file that is no protobuf, StorageError for one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise UsageError(f"'{path}' is empty, and not an ONNX model")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return sorted(set(_locations(content, 0, len(content), "model", 0)))
    except ValueError as error:
        raise UsageError(f"'{path}' is not an ONNX model: {error}") from error
    except OSError as error:
        raise StorageError(f"'{path}' cannot be read: {error.strerror or error}") from error


def refuse_external(path: Path) -> None:
    """Raise UsageError when the file reads any other file: its hash says nothing of that one."""
    if path.suffix == ".onnx" and (found := external(path)):
        raise UsageError(
            f"'{path}' keeps weights in another file ({found[0]!r}); only models in one file are accepted here"
        )


def refuse_outside(path: Path) -> None:
    """Raise UsageError when the file reads files outside its folder, or by a link that leads there."""
    if path.suffix != ".onnx":
        return
    root = path.parent.resolve()
    for location in external(path):
        there = (root / location).resolve() if "\0" not in location else root
        if location.startswith(("/", "\\")) or ".." in Path(location).parts or not there.is_relative_to(root):
            raise UsageError(
                f"'{path}' wants to read {location!r}, which is outside its folder; keep its weights beside it"
            )


def _locations(content: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise ValueError(f"messages nested more than {MAX_DEPTH} deep")
    holds = _HOLDS.get(message, {})
    outside, where = False, ""
    for field, kind, value, stop in _fields(content, start, end):
        if message == "tensor" and field == _LOCATION and kind == 0:
            outside = value == _EXTERNAL
        elif field in holds and kind == 2:
            if holds[field] == "entry":
                pair = {
                    f: content[v:s].decode("utf-8", "replace") for f, k, v, s in _fields(content, value, stop) if k == 2
                }
                if pair.get(_KEY) == "location":
                    where, outside = pair.get(_VALUE, "?"), True
            else:
                yield from _locations(content, value, stop, holds[field], depth + 1)
    if outside:
        yield where or "?"


def _fields(content: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, value or start, end) of every field of a message."""
    while at < end:
        tag, at = _varint(content, at, end)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(content, at, end)
            yield field, kind, value, at
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(content, at, end)
        if size is None or not field:
            raise ValueError(f"a field of wire type {kind}")
        if at + size > end:
            raise ValueError("a field that ends beyond its message")
        yield field, kind, at, at + size
        at += size


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number that does not end")
