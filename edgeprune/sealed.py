"""JSON files that carry their own sha256, written whole or not at all: one flipped bit anywhere in them is found.

The last key of the document is `sha256`, of the file's bytes with that value as zeros. It guards against accidents,
not against an author: who writes a file can seal it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "sha256"
ZEROS = "0" * 64
_TAIL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n\}\Z')


class Damaged(ValueError):
    """The file is not as it was written; the message says why, without the file's name."""


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its sha256 as the last key."""
    own = {key: value for key, value in document.items() if key != KEY}
    return {**own, KEY: hashlib.sha256(_text(own, ZEROS)).hexdigest()}


def _text(own: Mapping[str, Any], digest: str) -> bytes:
    return json.dumps({**own, KEY: digest}, indent=1).encode()


def write(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Seal and write the document, in place of what was there; returns it sealed. Raises OSError."""
    sealed = seal(document)
    own = {key: value for key, value in sealed.items() if key != KEY}
    write_whole(path, _text(own, sealed[KEY]))
    return sealed


def read(path: Path) -> dict[str, Any]:
    """The document that `write` wrote, sealed. Raises Damaged, and OSError for a file that cannot be read."""
    return parse(path.read_bytes())


def parse(content: bytes) -> dict[str, Any]:
    """The document in a sealed file's content. Raises Damaged."""
    tail = _TAIL.search(content)
    if tail is None:
        raise Damaged("it does not end with its own sha256")
    start, end = tail.span(1)
    if hashlib.sha256(content[:start] + ZEROS.encode() + content[end:]).hexdigest().encode() != tail[1]:
        raise Damaged("it does not have its own sha256")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise Damaged("it is not a JSON object")
    return document


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, to the disk, and rename it: a reader finds the old content or the new."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
