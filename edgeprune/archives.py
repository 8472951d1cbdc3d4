"""Image sets in one file: a .zip or an uncompressed .tar, whose images are read where they lie and never unpacked.

What an archive says of itself is not trusted: names that lead elsewhere, links, devices, encrypted and oversized
entries are refused when it is opened, and no image is read beyond `MAX_BYTES`. Imports no torch.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgeprune.errors import StorageError, UsageError

SUFFIXES = (".zip", ".tar")
MAX_BYTES = 1 << 28  # of one image file
MAX_HEADER = 1 << 20  # of one header of a tar: long names, not more
COMPRESSED = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".gz",
    ".bz2",
    ".xz",
    ".7z",
    ".rar",
)


def is_archive(path: Path) -> bool:
    """Whether the path is an archive of images. Raises UsageError for a file that is none, or one that is compressed as a whole."""
    if not path.is_file():
        return False
    if path.name.lower().endswith(COMPRESSED):
        raise UsageError(
            f"'{path}' is compressed as a whole, so that no image can be found without unpacking all; give a .zip or a plain .tar"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"'{path}' is no folder; give --data-dir a folder of images, a .zip or a .tar")
    return True


@dataclass(frozen=True)
class Entry:
    """An image file: where it is in a tar, or its name in a zip."""

    size: int
    offset: int = 0
    name: str = ""


class Archive:
    """The image files of an archive by name, in the order in which it holds them, without a folder that all share.

    Raises UsageError for what is refused, StorageError for a file that cannot be read.
    """

    def __init__(self, path: Path, suffixes: tuple[str, ...]) -> None:
        self.path = path
        self._zips: dict[int, zipfile.ZipFile] = {}  # by process: readers in several share no position
        found: dict[str, Entry] = {}
        try:
            for name, entry in self._zipped() if path.suffix.lower() == ".zip" else self._tarred():
                if "__MACOSX" in name.split("/") or not name.lower().endswith(suffixes):
                    continue
                if name in found:
                    raise UsageError(f"'{path}' holds '{name}' twice; make it again")
                if entry.size > MAX_BYTES:
                    raise UsageError(f"'{path}': '{name}' is {entry.size} bytes large, more than any image; remove it")
                found[name] = entry
        except OSError as error:
            raise StorageError(f"'{path}' cannot be read: {error.strerror or error}") from error
        except (
            zipfile.BadZipFile,
            tarfile.TarError,
            ValueError,
            NotImplementedError,
            EOFError,
            OverflowError,
        ) as error:
            raise UsageError(f"'{path}' is no sound {path.suffix[1:]} archive: {error}; make it again") from error
        self.entries = dict(zip(_stripped(list(found)), found.values()))

    def _zipped(self) -> Iterator[tuple[str, Entry]]:
        for info in self._zip().infolist():
            mode = info.external_attr >> 16
            if stat.S_ISLNK(mode) or (stat.S_IFMT(mode) and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)):
                raise self._refused(info.orig_filename, "a link or a device")
            name = self._checked(info.orig_filename)
            if info.orig_filename.endswith("/"):
                continue
            if info.flag_bits & 1:
                raise self._refused(info.orig_filename, "encrypted")
            yield name, Entry(info.file_size, name=info.filename)

    def _tarred(self) -> Iterator[tuple[str, Entry]]:
        end = self.path.stat().st_size
        with _Bounded(self.path) as file, tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for member in tar:
                name = self._checked(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.sparse is not None:
                    raise self._refused(member.name, "a link, a device or a sparse file")
                if not 0 <= member.offset_data <= member.offset_data + member.size <= end:
                    raise ValueError(f"it ends within {name!r}")
                yield name, Entry(member.size, member.offset_data)
                tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory

    def _checked(self, name: str) -> str:
        """The name without `./`; refused if it could lead out of a folder, or into a terminal."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        drive = re.match(r"[A-Za-z]:", name)
        if name.startswith("/") or ".." in parts or "\\" in name or drive or not name.isprintable():
            raise self._refused(name, "named so as to lead out of a folder")
        return "/".join(parts)

    def _refused(self, name: str, what: str) -> UsageError:
        return UsageError(f"'{self.path}': the entry {name[:200]!r} is {what}; make the archive without it")

    def _zip(self) -> zipfile.ZipFile:
        if os.getpid() not in self._zips:
            self._zips = {os.getpid(): zipfile.ZipFile(self.path)}
        return self._zips[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_zips": {}}  # for the readers of other processes

    def read(self, name: str) -> io.BytesIO:
        """The content of an image file. Raises ValueError for one that is damaged, OSError as reading does."""
        entry = self.entries[name]
        if not entry.name:
            with self.path.open("rb") as file:
                file.seek(entry.offset)
                content = file.read(entry.size)
        else:
            try:
                with self._zip().open(entry.name) as member:
                    content = member.read(entry.size + 1)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, KeyError) as error:
                raise ValueError(f"the archive is damaged there: {error}") from error
        if len(content) != entry.size:
            raise ValueError(f"{len(content)} bytes instead of {entry.size}: the archive is damaged there")
        return io.BytesIO(content)


class _Bounded(io.FileIO):
    """A file of which nobody reads much at once: a tar's headers say themselves how long they are."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return super().read(size) or b""


def _stripped(names: list[str]) -> list[str]:
    """The names without leading folders that all of them share."""
    split = [PurePosixPath(name).parts for name in names]
    while split and all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    return ["/".join(parts) for parts in split]
