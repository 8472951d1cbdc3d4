"""Finished stages on disk: each in a folder of its own that appears by rename, with a record of every file's hash.

    <cache>/<stage>-<key>/     finished; `done.json` is its sealed record
    <cache>/.<stage>-<key>/    being made: locked by the process that makes it, and left over when that was killed

A lock is the kernel's (flock), so it ends with its process. Where the file system has none, work folders get random
names instead, and two builds do the same work twice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprune import artifact, sealed

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

RECORD = "done.json"
#: In a work folder: what an interrupted stage goes on from. It outlives the process, for so many days.
CHECKPOINT = "checkpoint"
CHECKPOINT_DAYS = 30


def look(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The record of a finished stage, or None and what is wrong with it ("" if there is none)."""
    try:
        record = sealed.read(folder / RECORD)
        for name, digest in record["files"].items():
            if artifact.sha256(folder / name) != digest:
                return None, f"{name} is not as it was written"
    except sealed.Damaged as error:
        return None, f"{RECORD} is damaged: {error}"
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing" if folder.is_dir() else ""
    except OSError as error:
        return None, f"{error.filename or folder} cannot be read: {error.strerror}"
    return record, ""


def digest(record: Mapping[str, Any]) -> str:
    """sha256 over a finished stage's key and files."""
    return hashlib.sha256(json.dumps([record["key"], record["files"]], sort_keys=True).encode()).hexdigest()


def unchanged(folder: Path, wanted: str) -> bool:
    """Whether the record in `folder` still has this digest: no other build has put its own there, or taken it away."""
    try:
        return digest(sealed.read(folder / RECORD)) == wanted
    except (OSError, sealed.Damaged):
        return False


def finish(work: Path, folder: Path, stage: str, key: str, seconds: float) -> dict[str, Any]:
    """Record the files in `work` and make it the finished `folder`; returns the record."""
    files = {path.name: artifact.sha256(path) for path in sorted(work.iterdir())}
    record = sealed.write(work / RECORD, {"stage": stage, "key": key, "seconds": seconds, "files": files})
    put(work, folder)
    return record


def put(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`, whatever is there; what it holds is on the disk before."""
    for path in work.iterdir():
        _sync(path)
    while True:
        try:
            work.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            folder.rename(old / folder.name)
        shutil.rmtree(old, ignore_errors=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def working(work: Path, waiting: Callable[[], None]) -> Iterator[Path]:
    """An empty folder `work` (but for a checkpoint in it) that is this process's alone; removed in the end.

    While another process has it, `waiting` is called once and this one waits. A checkpoint is kept when what is done
    in the folder raises. Raises OSError when the folder cannot be made.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    handle = _claim(work, waiting)
    if handle is None:
        work = Path(tempfile.mkdtemp(prefix=f"{work.name}-", dir=work.parent))
    kept = True
    try:
        _clear(work, but=CHECKPOINT)
        yield work
        kept = False
    finally:
        if handle is None:
            shutil.rmtree(work, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                # Once it is renamed, its name may be the work folder of another process.
                if os.path.samestat(os.stat(work), os.fstat(handle)):
                    if kept and (work / CHECKPOINT).exists():
                        _clear(work, but=CHECKPOINT)
                    else:
                        shutil.rmtree(work, ignore_errors=True)
            os.close(handle)


def _claim(work: Path, waiting: Callable[[], None] | None) -> int | None:
    """Make `work` and lock it; the open folder, which holds the lock. None where there are no locks.

    Without `waiting`, BlockingIOError is raised when another process holds it.
    """
    if fcntl is None:
        return None
    said = False
    while True:
        work.mkdir(exist_ok=True)
        try:
            handle = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is None:
                    raise
                if not said:
                    waiting()
                    said = True
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Who held it may have renamed or removed it: then this is a lock on something else.
            if os.path.samestat(os.stat(work), os.fstat(handle)):
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                with contextlib.suppress(OSError):
                    work.rmdir()
                return None
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _clear(folder: Path, but: str) -> None:
    for path in folder.iterdir():
        if path.name == but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def sweep(parent: Path, stages: frozenset[str]) -> None:
    """Remove what killed builds have left half-made in `parent`; checkpoints of the last days stay."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for path in parent.glob(".*-*"):
            stage = path.name[1:].partition("-")[0]
            if path.is_symlink() or not path.is_dir() or stage not in {*stages, "old"}:
                continue
            age_days = (time.time() - path.stat().st_mtime) / 86400
            if (path / CHECKPOINT).exists() and age_days < CHECKPOINT_DAYS:
                continue
            with contextlib.suppress(OSError):
                handle = _claim(path, None)
                if handle is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(handle)
