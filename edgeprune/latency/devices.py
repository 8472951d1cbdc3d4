"""Devices: what `edgeprune device add` has prepared, and how it prepares: the worker and the packages go over the wire.

A device is known by a name, kept in `devices.json` in the user's configuration folder, or by its address alone. On the
device everything lies in one folder, `~/.cache/edgeprune-device` (below $XDG_CACHE_HOME where that is set there).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune import artifact, errors, runtimes
from edgeprune.console import SILENT, Console
from edgeprune.latency import archive, parcel, ssh
from edgeprune.latency.clock import Clock
from edgeprune.latency.machine import Machine, here
from edgeprune.latency.remote import RemoteClock

FILE = "devices.json"
OLDEST_PYTHON = (3, 9)
NO_WORKER = 44  # what `RUN` ends with where the worker is not there, or not this one
FRESH_S = 60.0  # so long what a device said of itself is not asked again
#: glibc versions that wheels are built for (PEP 600), from new to old; before them their old names.
GLIBC = ("2_34", "2_31", "2_28", "2_27", "2_24", "2_17")
OLD_NAMES = {"2_17": "manylinux2014"}
WATCHED_S = 2.0  # for `check`

FOLDER = 'd="${XDG_CACHE_HOME:-$HOME/.cache}/edgeprune-device"; '
#: Not `exec`: a Python that is killed shall be told from a connection that is lost.
RUN = FOLDER + f'[ -f "$d/$1" ] || exit {NO_WORKER}; "$2" -s -B "$d/$1" "$d" $3; exit $?'
SEND = (
    FOLDER
    + 'umask 077; mkdir -p "$d" && find "$d" -name "worker-*.pyz" -mtime +30 -delete && cat > "$d/.$1.$$" && mv "$d/.$1.$$" "$d/$1"'
)
REMOVE = FOLDER + 'rm -rf "$d"'
#: Every Python there is, the usual one first.
PYTHONS = """for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
q=$(command -v $p) && "$q" -c 'import sys; print(sys.executable, *sys.version_info[:2])'; done; exit 0"""
VERSION = """"$1" -c 'import sys; print(sys.executable, *sys.version_info[:2])'"""


@dataclass(frozen=True)
class Device:
    """A device that was prepared: how to reach it, what runs the worker there, and what it was found to be."""

    name: str
    address: ssh.Address
    python: str
    packages: str = ""  # the folder of packages that were sent; "" = that Python's own
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    added: str = ""

    def command(self) -> list[str]:
        return self.address.command(RUN, archive.worker()[0], self.python, self.packages)


# What is known ------------------------------------------------------------------------------


def config_file() -> Path:
    """$EDGEPRUNE_CONFIG_DIR/devices.json, else in the user's configuration folder."""
    chosen = os.environ.get("EDGEPRUNE_CONFIG_DIR")
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return (Path(chosen) if chosen else base / "edgeprune") / FILE


def known() -> dict[str, Device]:
    """Every device that was added, by name. UsageError when the file is damaged."""
    path = config_file()
    if not path.is_file():
        return {}
    try:
        return {
            name: Device(**{**entry, "name": name, "address": ssh.Address(**entry["address"])})
            for name, entry in artifact.read_json(path).items()
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise errors.UsageError(f"{path} is damaged ({error}); remove it and add the devices again") from error


def get(name: str) -> Device:
    """The device of this name, or at this `ssh://` address; UsageError when there is none."""
    devices = known()
    if name.startswith(ssh.SCHEME):
        address = ssh.parse(name)
        return next((device for device in devices.values() if device.address.url == address.url), None) or Device(
            address.url, address, "python3"
        )
    if name not in devices:
        if not devices:
            raise errors.UsageError(
                f"there is no device '{name}'; add it with: edgeprune device add {name} ssh://user@host"
            )
        raise errors.unknown("device", name, devices)
    return devices[name]


def _write(devices: Mapping[str, Device]) -> None:
    path = config_file()
    entries = {
        name: {key: value for key, value in asdict(device).items() if key != "name"} for name, device in devices.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(prefix=f".{FILE}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        Path(work).replace(path)
    except OSError as error:
        raise errors.StorageError(
            f"cannot write {path}: {error.strerror}; set EDGEPRUNE_CONFIG_DIR elsewhere"
        ) from error


# What a measurement asks for ----------------------------------------------------------------


def machine(name: str) -> Machine:
    """The machine that measurements are for: "" = this one, else the device of this name or address.

    Raises TargetUnavailable when it cannot be reached or is not prepared.
    """
    return _machine(name, int(time.monotonic() / FRESH_S)) if name else here()


@functools.lru_cache(maxsize=64)
def _machine(name: str, when: int) -> Machine:
    device = get(name)
    with connected(device) as link:
        need_packages(device, link.hello)
        return Machine(**link.ask("describe"), name=device.name, url=device.address.url)


def clock(name: str, runtime: str, *, console: Console = SILENT, **options: Any) -> Clock:
    """A clock on this machine (""), or on a device; options as `Clock` takes them."""
    if not name:
        return Clock(runtime, **options)
    device, facts = get(name), machine(name)
    return RemoteClock(
        runtime, address=device.address, command=device.command(), memory=facts.memory, say=console.say, **options
    )


# A connection to ask questions, without a runtime -------------------------------------------


class Link(RemoteClock):
    """A connection to a device's agent before any runtime is chosen."""

    hello: dict[str, Any]

    def _begin(self) -> dict[str, Any]:
        self.hello = self._ask("hello")
        return dict(self.hello)

    def _reopened(self) -> dict[str, Any]:
        return self._begin()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        return self._ask(op, **arguments)


@contextmanager
def connected(device: Device) -> Iterator[Link]:
    """A link to a device that has this very worker; where it has not, the worker is sent first."""
    link = _linked(device)
    try:
        yield link
    finally:
        link.close()


def _linked(device: Device) -> Link:
    for attempt in range(2):
        try:
            return Link("device", address=device.address, threads=1, command=device.command())
        except errors.TargetUnavailable as error:
            if attempt or f"exit code {NO_WORKER}" not in str(error):
                raise _worded(device, error) from error
        send_worker(device.address)
    raise AssertionError  # the second attempt returns or raises


def _worded(device: Device, error: errors.TargetUnavailable) -> errors.TargetUnavailable:
    if "exit code 127" in str(error) or "exit code 126" in str(error):
        return errors.TargetUnavailable(
            f"{device.name} has no Python '{device.python}'; install python3 there, or add the device again with --python PATH"
        )
    return error


def send_worker(address: ssh.Address) -> None:
    """Put the worker's archive on a device, instead of older ones."""
    name, content = archive.worker()
    code, _ = address.run(SEND, name, data=content)
    if code:
        raise errors.StorageError(
            f"{address.url} cannot keep the worker in ~/.cache/edgeprune-device; is its disk full?"
        )


def need_packages(device: Device, hello: Mapping[str, Any]) -> None:
    """Raise TargetUnavailable unless the device's Python has numpy and a runtime."""
    there = set(hello["packages"])
    if "numpy" not in there or not there & set(runtimes.names()):
        raise errors.TargetUnavailable(
            f"{device.name} has Python {hello['python']} without numpy and a runtime; "
            f"send them once with: edgeprune device add NAME {device.address.url}"
        )


# Preparing ----------------------------------------------------------------------------------


def add(
    name: str, url: str, *, python: str = "", wheels: str | Path | None = None, runtime: Sequence[str] = (),
    ssh_config: str | Path = "", console: Console = SILENT,
) -> Device:  # fmt: skip
    """Prepare a device and remember it under `name`; what is there already is not sent again.

    python: the one to run the worker with, "" = the first from 3.9 on. wheels: a folder to take numpy and the runtimes
    from, None = those of the package index that fit the device. runtime: which to send; () = onnxruntime, where the device's Python has none.

    Raises UsageError, TargetUnavailable when the device or a package for it cannot be had, StorageError.
    """
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise errors.UsageError(f"'{name}' is no name for a device; use letters, digits, '-', '_' and '.'")
    for one in runtime:
        if one not in runtimes.names():
            raise errors.unknown("runtime", one, runtimes.names())
    if wheels is not None and not Path(wheels).is_dir():
        raise errors.UsageError(f"there is no folder '{wheels}' of wheels")
    address = ssh.parse(url, ssh_config)
    device = Device(name, address, find_python(address, python), added=time.strftime("%Y-%m-%d %H:%M"))
    console.say(f"{address.url}: {device.python}")
    with connected(device) as link:
        hello = link.hello
        console.say(
            f"Python {hello['python']} on {hello['system']} {hello['machine']} with {', '.join(hello['packages']) or 'no packages that it takes'}"
        )
        wanted = list(runtime) or [one for one in runtimes.names() if one in hello["packages"]][:1] or ["onnxruntime"]
        if missing := [one for one in ("numpy", *wanted) if one not in hello["packages"]]:
            with fetched(["numpy", *wanted], hello, wheels, console) as files:
                names = {path.name: parcel.name(path.read_bytes()) for path in files}
                if not (packages := link.ask("install", wheels=names)["packages"]):
                    send(link, files, console)
                    packages = link.ask("install", wheels=names)["packages"]
                device = replace(device, packages=packages)
            console.say(f"{len(files)} packages are there now, for {' and '.join(missing)}")
    with connected(device) as link:
        need_packages(device, link.hello)
        facts = link.ask("describe")
    device = replace(device, fingerprint=facts["fingerprint"])
    for one in wanted:
        with clock_of(device, one):
            console.say(f"{one} starts there")
    _write({**known(), name: device})
    _machine.cache_clear()
    return device


def send(link: Link, files: Sequence[Path], console: Console) -> None:
    with console.progress("packages", sum(path.stat().st_size for path in files) / 1e6, "MB") as advance:
        for path in files:
            link.send(path.read_bytes())
            advance(path.stat().st_size / 1e6, path.name)


def clock_of(device: Device, runtime: str) -> RemoteClock:
    """A clock with one thread on a device, whether it is known by name or not yet."""
    return RemoteClock(runtime, address=device.address, command=device.command(), threads=1)


def find_python(address: ssh.Address, asked: str) -> str:
    """The device's Python to run the worker with: the one asked for, or the first from 3.9 on."""
    code, said = address.run(VERSION, asked) if asked else address.run(PYTHONS)
    found = [
        (path, (int(major), int(minor)))
        for path, major, minor in (line.rsplit(" ", 2) for line in said.splitlines() if line.count(" ") >= 2)
    ]
    if asked and (code or not found):
        raise errors.UsageError(
            f"'{asked}' is no Python on {address.url}; give the path of one from 3.9 on with --python"
        )
    fitting = [path for path, version in found if version >= OLDEST_PYTHON]
    if not fitting:
        has = ", ".join(f"{path} {major}.{minor}" for path, (major, minor) in found) or "no python3"
        raise errors.TargetUnavailable(
            f"{address.url} has {has}, and the worker needs Python 3.9 or newer; install one there, or give --python PATH"
        )
    return fitting[0]


@contextmanager
def fetched(
    packages: Sequence[str], hello: Mapping[str, Any], wheels: str | Path | None, console: Console
) -> Iterator[list[Path]]:
    """The wheels of packages and all that they need, for the device's Python, system and processor; removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
            "--dest", folder, "--python-version", ".".join(hello["python"].split(".")[:2]), "--implementation", "cp",
            *(f"--platform={platform}" for platform in platforms(hello)),
            *(["--no-index", "--find-links", str(wheels)] if wheels is not None else []), *packages,
        ]  # fmt: skip
        console.say(
            f"fetching {', '.join(packages)} for Python {hello['python']} on {hello['machine']} from {wheels or 'the package index'}"
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = next(
                (line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip()[-300:]
            )
            raise errors.TargetUnavailable(
                f"no wheels of {', '.join(packages)} for Python {hello['python']} on {hello['machine']} ({last.removeprefix('ERROR: ')}); "
                "give a folder of them with --wheels, or install them on the device and give --python"
            )
        yield sorted(Path(folder).glob("*.whl"))


def platforms(hello: Mapping[str, Any]) -> list[str]:
    """The wheel platforms that a device runs, from new to old. TargetUnavailable for a system without wheels of its own."""
    machine, (libc, version) = hello["machine"], hello["libc"]
    if hello["system"] != "Linux" or libc != "glibc":
        raise errors.TargetUnavailable(
            f"there are no packages to send for {hello['system']} with {libc or 'another C library than glibc'}; "
            "install numpy and a runtime there yourself and give that Python with --python"
        )
    own = tuple(int(part) for part in version.split(".")[:2])
    fitting = [glibc for glibc in GLIBC if tuple(map(int, glibc.split("_"))) <= own]
    names = [f"manylinux_{glibc}_{machine}" for glibc in fitting]
    return names + [f"{OLD_NAMES[glibc]}_{machine}" for glibc in fitting if glibc in OLD_NAMES]


def check(name: str) -> dict[str, Any]:
    """How a device is just now; JSON types. `problems` says in words what would disturb a measurement; [] = nothing seen.

    Raises TargetUnavailable when it cannot be reached or is not prepared.
    """
    from edgeprune.latency import noise

    device = get(name)
    began = time.monotonic()
    with connected(device) as link:
        seconds = time.monotonic() - began
        need_packages(device, link.hello)
        facts, state = link.ask("describe"), link.ask("state", seconds=WATCHED_S)
        hello = link.hello
    problems = noise.disturbances(state)
    if device.fingerprint and facts["fingerprint"] != device.fingerprint:
        problems.append("it is another device than the one that was added, or its microcode has changed: add it again")
    mhz, most = state["mhz"], state["max_mhz"]
    if mhz and most and state["governor"] == "powersave" and mhz < 0.7 * most:
        problems.append(f"its governor is powersave: {mhz:.0f} of {most:.0f} MHz")
    return {
        "name": device.name, "url": device.address.url, "python": hello["python"], "packages": hello["packages"],
        "connect_s": seconds, **facts, "state": state, "problems": problems,
    }  # fmt: skip


def told(found: Mapping[str, Any]) -> str:
    """What `check` found, for people; what the device does not show is left out."""
    state = found["state"]
    shown = {
        "cpus": (found["cpus"], "{} CPUs"),
        "memory": (found["memory"] and found["memory"] / 1e9, "{:.1f} GB of memory free"),
        "disk": (state["disk"] / 1e9, "{:.1f} GB of disk free"),
        "load": (state["load"], "load {:.2f}"),
        "others": (state["others_cpus"], "{:.1f} CPUs' worth of other work"),
        "mhz": (state["mhz"], "{:.0f} MHz"),
        "max_mhz": (state["max_mhz"], "of {:.0f} MHz"),
        "governor": (state["governor"] or None, "governor {}"),
        "temperature": (state["temperature_c"], "{:.0f} °C"),
        "throttled": (state["throttled"], "throttled {:.0f} times"),
    }
    facts = ", ".join(text.format(value) for value, text in shown.values() if value is not None)
    head = f"{found['name']} ({found['url']}): {found['fingerprint']['cpu']}, Python {found['python']} with {', '.join(found['packages'])}"
    rest = [f"{name} cannot be used: {reason}" for name, reason in found["missing"].items()]
    verdict = [f"not quiet: {problem}" for problem in found["problems"]] or [
        "nothing is seen that would disturb a measurement"
    ]
    return "\n".join([head, facts, *rest, *verdict])


def remove(name: str, *, forget: bool = False) -> None:
    """Remove what was sent to a device, and forget it; with `forget` only that, for one that is gone."""
    device = get(name)
    if not forget:
        code, _ = device.address.run(REMOVE)
        if code:
            raise errors.StorageError(f"{device.address.url} does not let its ~/.cache/edgeprune-device be removed")
    _write({own: other for own, other in known().items() if own != device.name})
    _machine.cache_clear()
