"""Tensors that wait for their turn: in memory up to a limit, what is above it in a file without a name.

What comes back is what was put there, bit by bit, so a limit changes how long work takes and not what it finds.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

#: A tensor that was put on a shelf: call it to have it back.
Item = Callable[[], Tensor]


@dataclass(frozen=True)
class InMemory:
    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class OnDisk:
    shelf: Shelf
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        content = memoryview(bytearray(self.shape.numel() * self.dtype.itemsize))
        read = 0
        while read < len(content):
            got = os.preadv(self.shelf.handle, [content[read:]], self.offset + read)
            if not got:
                raise OSError("the file of tensors that wait is shorter than it was written")
            read += got
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)


class Shelf:
    """limit: bytes of tensors that may wait in memory, None = any number; folder: where the file of the others is.

    Places in the file are used again once nobody refers to what was put there.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder
        self.held = 0
        self.end = 0
        self.free: dict[int, list[int]] = {}  # by size: offsets that nobody uses any more
        self._handle: int | None = None

    def put(self, tensor: Tensor) -> Item:
        """Keep the tensor, which nobody changes meanwhile. Raises OSError where the file cannot be written."""
        size = tensor.numel() * tensor.element_size()
        if self.limit is None or not size:
            return InMemory(tensor)
        if self.held + size <= self.limit:
            kept = InMemory(tensor)
            self.held += size
            weakref.finalize(kept, self._release, size).atexit = False
            return kept
        offsets = self.free.setdefault(size, [])
        offset = offsets.pop() if offsets else self.end
        self.end = max(self.end, offset + size)
        rest, at = memoryview(tensor.detach().contiguous().numpy().data).cast("B"), offset
        while rest:
            written = os.pwrite(self.handle, rest, at)
            rest, at = rest[written:], at + written
        waits = OnDisk(self, offset, tensor.shape, tensor.dtype)
        weakref.finalize(waits, offsets.append, offset).atexit = False
        return waits

    def keep(self, tensors: Iterable[Tensor]) -> Sequence[Tensor]:
        """All of them, each put where there is room as it comes."""
        return Kept([self.put(tensor) for tensor in tensors])

    @property
    def handle(self) -> int:
        if self._handle is None:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                self._handle = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._handle)
        return self._handle

    def _release(self, size: int) -> None:
        self.held -= size


class Kept(Sequence[Tensor]):
    """A list of tensors that are read when they are asked for."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, at: int | slice) -> Tensor | Sequence[Tensor]:
        return Kept(self.items[at]) if isinstance(at, slice) else self.items[at]()


#: No limit: everything waits in memory.
MEMORY = Shelf()
