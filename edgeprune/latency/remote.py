"""The remote clock: the same worker, at the other end of an SSH connection that may be lost and found again."""

from __future__ import annotations

import base64
import contextlib
import getpass
import io
import os
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import errors
from edgeprune.latency import agent, device, parcel, ssh
from edgeprune.latency.clock import Clock

PART = 1 << 20  # bytes of a file that travel in one request
IMAGES = 8  # that travel in one request
#: How long a lost connection is tried again, and how often the same request may lose it.
PATIENCE_S = 300.0
LOSSES = 3
#: How long a device that another session measures on is waited for.
BUSY_S, BUSY_EVERY_S = 900.0, 5.0
#: Until the time of a reloaded model is stable again.
WARM_RUNS, WARM_S = 10, 1.0
#: All workers of this process measure together; those of another wait.
SESSION = f"{os.getpid()}-{os.urandom(6).hex()}"


class RemoteClock(Clock):
    """A `Clock` whose worker is `command` at the other end of a connection to `address`.

    A lost connection is made again: models are kept on the device, so the worker is where it was within seconds.
    memory: bytes free on the device; None = unknown. say: where waiting is told of.

    Raises TargetUnavailable when the device cannot be reached, is in use for too long, or its worker dies.
    """

    def __init__(
        self, runtime: str, *, address: ssh.Address, memory: int | None = None,
        say: Callable[[str], None] = lambda text: None, **options: Any,
    ) -> None:  # fmt: skip
        self._address, self._memory, self._say = address, memory, say
        self._sent: dict[str, tuple[Mapping[str, str], str, int]] = {}  # files, entry and copies of loaded models
        super().__init__(runtime, greeting=agent.GREETING, **options)

    def load(self, name: str, path: Path | str, copies: int = 1, *, values: bool = True) -> dict[str, Any]:
        path = Path(path).resolve()
        if not path.is_file():
            raise errors.StorageError(f"there is no model file {path}")
        size = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.is_file())
        copies = min(copies, device.copies_in(self._memory, size))
        contents = parcel.pack(path, values)
        files = {file: self.send(content) for file, content in contents.items()}
        self._sent[name] = files, path.name, max(1, copies)
        facts: dict[str, Any] = self._ask("load", name=name, files=files, entry=path.name, copies=max(1, copies))[
            "facts"
        ]
        facts["copies"] = max(1, copies)
        self.facts[name] = facts
        return facts

    def unload(self, name: str) -> None:
        super().unload(name)
        del self._sent[name]

    def send(self, content: bytes) -> str:
        """Have the device keep a file, from where it was left off; returns its name, its sha256."""
        sha256 = parcel.name(content)
        there = self._ask("has", sha256=sha256)
        while not there["whole"]:
            offset = there["bytes"]
            data = content[offset : offset + PART]
            last = offset + len(data) >= len(content)
            there = self._ask("put", sha256=sha256, offset=offset, data=base64.b64encode(data).decode(), last=last)
        return sha256

    def predict(self, name: str, inputs: NDArray[Any]) -> NDArray[Any]:
        self._known([name])
        if not len(inputs):
            raise errors.UsageError("there are no images to run")
        outputs = []
        for i in range(0, len(inputs), IMAGES):
            packed = io.BytesIO()
            np.save(packed, np.ascontiguousarray(inputs[i : i + IMAGES]))
            sent = base64.b64encode(zlib.compress(packed.getvalue(), 1)).decode()
            count = len(inputs[i : i + IMAGES])
            answer = self._ask("predict", inferences=count, name=name, inputs=sent)["outputs"]
            outputs.append(np.load(io.BytesIO(zlib.decompress(base64.b64decode(answer))), allow_pickle=False))
        return np.concatenate(outputs)

    def _begin(self) -> dict[str, Any]:
        """Wait until the device is free, then have the worker load its runtime."""
        self._claim(self._ask)
        return super()._begin()

    def _claim(self, ask: Callable[..., dict[str, Any]]) -> None:
        """Wait until the device is free, or TargetUnavailable."""
        end = None
        while busy := ask("claim", session=SESSION, owner=_owner())["busy"]:
            if end is None:
                end = time.monotonic() + BUSY_S
                self._say(f"{self._address.url} is in use by {busy}; waiting for up to {BUSY_S / 60:.0f} minutes")
            elif time.monotonic() >= end:
                raise errors.TargetUnavailable(
                    f"{self._address.url} is in use by {busy}; two measurements at once would disturb each other: try again later"
                )
            time.sleep(BUSY_EVERY_S)

    def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """As `Clock._ask`; when the connection is lost, from where the worker was."""
        for losses in range(LOSSES + 1):
            try:
                return super()._ask(op, **arguments)
            except errors.TargetUnavailable as error:
                if not self._lost(error):
                    raise
                if self._address.final(self._said) or losses == LOSSES or not self.info:
                    raise errors.TargetUnavailable(self._address.why(self._said)) from error
                self._again()
        raise AssertionError  # the loop returns or raises

    def _lost(self, error: errors.TargetUnavailable) -> bool:
        """Whether the connection is gone, and not the worker at its end: by ssh's exit code, below 0 if ssh was killed."""
        code = self._process.returncode
        return (code == ssh.LOST or code < 0) and "did not answer" not in str(error)

    def _again(self) -> None:
        """Connect again, and bring the new worker to where the lost one was."""
        end, pause = time.monotonic() + PATIENCE_S, 1.0
        self.losses += 1
        self._say(
            f"the connection to {self._address.url} is lost; connecting again for up to {PATIENCE_S / 60:.0f} minutes"
        )
        while True:
            time.sleep(pause)
            try:
                self._open()
                super()._ask("hello")
                break
            except errors.TargetUnavailable as error:
                if not self._lost(error):
                    raise
                if self._address.final(self._said) or time.monotonic() >= end:
                    raise errors.TargetUnavailable(self._address.why(self._said)) from error
                pause = min(2 * pause, 15.0)
        asked = self.info.get("max_isa"), self.info.get("version")
        self.info = {**self.info, **self._reopened()}
        if (self.info.get("max_isa"), self.info.get("version")) != asked:
            raise errors.TargetUnavailable(
                f"{self._address.url} has another runtime since the connection was lost; begin again"
            )
        for name, (files, entry, copies) in self._sent.items():
            super()._ask("load", name=name, files=files, entry=entry, copies=copies)
            super()._ask("warm", name=name, max_runs=WARM_RUNS, max_s=WARM_S)
        self._say(f"connected again; {len(self._sent)} models are loaded as before")

    def _reopened(self) -> dict[str, Any]:
        self._claim(super()._ask)
        info: dict[str, Any] = super()._ask("start", **self._start)["info"]
        return info


def _owner() -> str:
    """Who measures, for whoever has to wait."""
    user = "somebody"
    with contextlib.suppress(KeyError, OSError):
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()} (process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M')})"
