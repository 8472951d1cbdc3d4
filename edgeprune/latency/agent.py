"""The agent: the measuring worker's front on a device at the other end of a connection.

    python worker.pyz FOLDER [PACKAGES]

It speaks the worker's JSON lines and adds what a worker without a shared file system needs: files come in parts, are
kept compressed under their hash in FOLDER/files, and outlive the connection. Until "start" it uses the standard
library alone, so that it can install the packages that measuring takes. Python 3.9 and newer.

    {"op": "hello"}                                  -> what this Python is, and what it can import
    {"op": "has", "sha256"}                          -> {"bytes", "whole"}   of a file, as far as it has come
    {"op": "put", "sha256", "offset", "data", "last"} -> {"bytes", "whole"}  base64; a part, in order
    {"op": "install", "wheels": {file: sha256}}      -> {"packages"}         unpacked wheels under a name of their own
    {"op": "claim", "session", "owner"}              -> {"busy"}  "" = this session may measure; else who measures now
    {"op": "describe"}                               -> the facts of `machine.Machine`
    {"op": "state", "seconds"}                       -> load, temperature, clock rates, other work within these seconds
    {"op": "load", "name", "files": {file: sha256}, "entry", "copies"}   models as zlib streams
    {"op": "predict", "name", "inputs"}              -> {"outputs"}          .npy files as base64 of zlib

All other operations are the worker's own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import IO, Any

from edgeprune import errors
from edgeprune.latency import lines

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

GREETING = '{"edgeprune": "agent/1"}'
PACKAGES = ("numpy", "onnxruntime", "openvino")
#: Bytes of files that are kept; beyond that the least recently used go.
KEPT_BYTES = 4 << 30
#: An agent that nobody asks for so long ends: the other side is gone without a word.
IDLE_S = 3600.0
BLOCK = 1 << 20


class Agent:
    """Files and packages of a device, and the worker in front of which it stands; public methods answer one `op`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = folder / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._worker: Any = None
        self._sets: dict[str, tuple[dict[str, str], str]] = {}  # files and entry of each loaded model
        self._claim: IO[str] | None = None  # locked while this agent lives

    def answer(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        known = (
            "hello",
            "has",
            "put",
            "install",
            "claim",
            "describe",
            "state",
            "start",
            "load",
            "predict",
            "operators",
        )
        if op in known:
            found: dict[str, Any] = getattr(self, op)(**arguments)
            return found
        if self._worker is None or op.startswith("_"):
            raise errors.UsageError(f"the device's worker has no operation '{op}' now")
        answered: dict[str, Any] = getattr(self._worker, op)(**arguments)
        return answered

    # Files --------------------------------------------------------------------------------------

    def hello(self) -> dict[str, Any]:
        return {
            "python": platform.python_version(),
            "implementation": sys.implementation.name,
            "machine": platform.machine(),
            "system": platform.system(),
            "libc": platform.libc_ver(),
            "packages": [name for name in PACKAGES if util.find_spec(name) is not None],
        }

    def has(self, sha256: str) -> dict[str, Any]:
        whole, part = self._paths(sha256)
        if whole.is_file():
            whole.touch()
            return {"bytes": whole.stat().st_size, "whole": True}
        return {"bytes": part.stat().st_size if part.is_file() else 0, "whole": False}

    def put(self, sha256: str, offset: int, data: str, last: bool) -> dict[str, Any]:
        """Append a part; with the last one the file is compared with its hash, and is there."""
        whole, part = self._paths(sha256)
        try:
            with part.open("r+b" if part.is_file() else "wb") as file:
                file.seek(0, io.SEEK_END)
                if file.tell() != offset:  # it came already, or something before it did not
                    return {"bytes": file.tell(), "whole": False}
                file.write(base64.b64decode(data))
            if last:
                if _digest(part) != sha256:
                    part.unlink()
                    raise errors.StorageError("a file arrived damaged on the device; try again")
                part.replace(whole)
                self._make_room()
        except OSError as error:
            raise errors.StorageError(
                f"the device cannot keep a file in {self._files}: {error.strerror}; free some space there"
            ) from error
        return self.has(sha256)

    def install(self, wheels: Mapping[str, str]) -> dict[str, Any]:
        """Unpack wheels that were sent; what they make is known by their hashes and made once. "" = they must come first."""
        name = "packages-" + hashlib.sha256(json.dumps(sorted(wheels.values())).encode()).hexdigest()[:16]
        place = self.folder / name
        wheel_files = [self._paths(sha256)[0] for sha256 in wheels.values()]
        if not place.is_dir():
            if not all(path.is_file() for path in wheel_files):
                return {"packages": ""}
            work = Path(tempfile.mkdtemp(prefix=".packages-", dir=self.folder))
            try:
                for path in wheel_files:
                    with zipfile.ZipFile(path) as archive:
                        archive.extractall(work)  # drops absolute paths and ".."
                work.chmod(0o755)
                work.rename(place)
            except (OSError, zipfile.BadZipFile) as error:
                raise errors.StorageError(f"the device cannot unpack packages in {self.folder}: {error}") from error
            finally:
                shutil.rmtree(work, ignore_errors=True)
        for path in wheel_files:
            if path.is_file():
                path.unlink()
        return {"packages": name}

    def _paths(self, sha256: str) -> tuple[Path, Path]:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise errors.UsageError(f"'{sha256[:80]}' is not a sha256")
        return self._files / sha256, self._files / f"{sha256}.part"

    def _make_room(self) -> None:
        files = sorted((path for path in self._files.iterdir()), key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in files)
        for path in files[:-1]:
            if used <= KEPT_BYTES:
                return
            used -= path.stat().st_size
            path.unlink()

    # Measuring ----------------------------------------------------------------------------------

    def claim(self, session: str, owner: str) -> dict[str, Any]:
        """Ask to measure alone: workers of one session may run together, those of two may not."""
        if fcntl is None or self._claim is not None:
            return {"busy": ""}
        claims = self.folder / "claims"
        claims.mkdir(exist_ok=True)
        with (claims / ".lock").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            for path in claims.iterdir():
                if path.name in (".lock", session):
                    continue
                with path.open("r+") as other:
                    try:
                        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError:
                        return {"busy": other.read() or "somebody"}
                    path.unlink()  # its workers are gone
            self._claim = (claims / session).open("w")
            fcntl.flock(self._claim, fcntl.LOCK_SH)
            self._claim.write(owner)
            self._claim.flush()
        return {"busy": ""}

    def describe(self) -> dict[str, Any]:
        from edgeprune.latency import machine

        return machine.describe()

    def state(self, seconds: float) -> dict[str, Any]:
        from edgeprune.latency import machine, noise

        before = noise.counters()
        time.sleep(seconds)
        return {**machine.state(self.folder), **noise.between(before, noise.counters())}

    def start(self, **arguments: Any) -> dict[str, Any]:
        from edgeprune.latency import worker

        self._worker = worker.Worker()
        started: dict[str, Any] = self._worker.start(**arguments)
        return started

    def load(self, name: str, files: Mapping[str, str], entry: str, copies: int) -> dict[str, Any]:
        with self._unpacked(files, entry) as path:
            facts: dict[str, Any] = self._worker.load(name, str(path), copies)
        self._sets[name] = dict(files), entry
        return facts

    def operators(self, name: str, runs: int) -> dict[str, Any]:
        with self._unpacked(*self._sets[name]) as path:
            self._worker._paths[name] = str(path)  # it opens the file again
            found: dict[str, Any] = self._worker.operators(name, runs)
        return found

    def predict(self, name: str, inputs: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="edgeprune-", dir=self.folder) as work:
            source, result = Path(work) / "inputs.npy", Path(work) / "outputs.npy"
            source.write_bytes(zlib.decompress(base64.b64decode(inputs)))
            self._worker.predict(name, str(source), str(result))
            return {"outputs": base64.b64encode(zlib.compress(result.read_bytes())).decode()}

    @contextlib.contextmanager
    def _unpacked(self, files: Mapping[str, str], entry: str) -> Iterator[Path]:
        """The model's files under their names, while they are read: only compressed ones stay on the device."""
        with tempfile.TemporaryDirectory(prefix="edgeprune-", dir=self.folder) as work:
            for name, sha256 in files.items():
                if Path(name).name != name:
                    raise errors.UsageError(f"'{name}' is no file name")
                whole, _ = self._paths(sha256)
                try:
                    with whole.open("rb") as packed, (Path(work) / name).open("wb") as file:
                        unpack = zlib.decompressobj()
                        while block := packed.read(BLOCK):
                            file.write(unpack.decompress(block))
                        file.write(unpack.flush())
                except FileNotFoundError as error:
                    raise errors.StorageError(f"the device has no longer the file {name}; try again") from error
                except (OSError, zlib.error) as error:
                    raise errors.StorageError(f"the device cannot unpack {name}: {error}") from error
            yield Path(work) / entry


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def main(arguments: list[str]) -> None:
    """FOLDER, where everything is kept, and perhaps the name of a folder of packages in it."""
    folder = Path(arguments[0])
    for name in arguments[1:]:
        sys.path.insert(1, str(folder / name))
    for left in [*folder.glob("edgeprune-*"), *folder.glob(".packages-*")]:
        if time.time() - left.stat().st_mtime > 24 * 3600:  # of an agent that was killed
            shutil.rmtree(left, ignore_errors=True)
    agent = Agent(folder)
    watch = _Watch()

    def answer(op: str, given: dict[str, Any]) -> dict[str, Any]:
        with watch.working():
            return agent.answer(op, given)

    lines.serve(answer, GREETING)


class _Watch:
    """Ends the process when nobody has asked for anything for `IDLE_S`."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield
        finally:
            self._timer = threading.Timer(IDLE_S, os._exit, args=(0,))
            self._timer.daemon = True
            self._timer.start()
