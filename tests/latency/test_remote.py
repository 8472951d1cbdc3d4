"""python -m pytest tests/latency/test_remote.py

Devices at the other end of a connection: the archive and its protocol without any network, and a real OpenSSH server on
loopback through which a device is added, profiled, built for and validated on.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import sshd
from small import Workspace

from edgeprune import errors
from edgeprune.latency import agent, archive, devices, micro, parcel, remote, ssh
from edgeprune.latency.agent import Agent
from edgeprune.latency.clock import Clock
from edgeprune.latency.machine import Machine, here
from edgeprune.latency.remote import RemoteClock

# Addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "user", "host", "port"),
    [
        ("ssh://pi", "", "pi", 0),
        ("ssh://pi@board-1.example.org:2222", "pi", "board-1.example.org", 2222),
        ("ssh://10.0.0.7/", "", "10.0.0.7", 0),
        ("ssh://me@[fe80::1%eth0]:22", "me", "fe80::1%eth0", 22),
    ],
)
def test_an_address_is_read(text: str, user: str, host: str, port: int) -> None:
    address = ssh.parse(text)
    assert (address.user, address.host, address.port) == (user, host, port)
    assert ssh.parse(address.url) == address


HOSTILE = [
    "ssh://-oProxyCommand=touch pwned", "ssh://-oProxyCommand=x@host", "ssh://host -oProxyCommand=x", "ssh://-l",
    "ssh://me@-oProxyCommand=x", "ssh://a;touch pwned", "ssh://$(touch pwned)", "ssh://", "ssh://@host@", "ssh://host:0x",
    "ssh://host:99999", "ssh://host/path", "ssh://host?x=1", "ssh://me:secret@host", "http://host", "host\n", "ssh://ho\nst",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError):
        ssh.parse(text)


@pytest.mark.parametrize(
    "command",
    [
        ["device", "add", "pi", HOSTILE[0]],
        ["device", "check", HOSTILE[0]],
        ["build", "digits", "--target", "cpu-avx2", "--latency", "2x", "--device", HOSTILE[0]],
        ["profile", "digits", "--device", HOSTILE[0]],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_host_that_is_an_option_is_refused_by_every_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path))
    ended = small.run(*command)
    assert ended.code == errors.UsageError.exit_code
    assert "host name" in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "pwned").exists()


def test_the_command_line_holds_the_host_behind_all_options() -> None:
    command = ssh.parse("ssh://me@host:7").command("echo $1", "a b; touch pwned")
    assert command[:1] == ["ssh"]
    assert command[-3:-1] == ["--", "host"]
    assert "-oStrictHostKeyChecking=yes" in command and "-oBatchMode=yes" in command
    said = subprocess.run(["/bin/sh", "-c", command[-1]], capture_output=True, text=True, check=True).stdout
    assert said == "a b; touch pwned\n"


def test_devices_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(tmp_path))
    with pytest.raises(errors.UsageError, match="edgeprune device add pi"):
        devices.get("pi")
    device = devices.Device("pi", ssh.parse("ssh://me@pi:22"), "/usr/bin/python3", fingerprint={"cpu": "Arm"})
    devices._write({"pi": device})
    assert devices.get("pi") == device
    assert devices.get("ssh://me@pi:22") == device
    assert devices.get("ssh://me@other").python == "python3"
    with pytest.raises(errors.UsageError, match="did you mean 'pi'"):
        devices.get("pie")
    listed = small.run("device", "list", "--format", "json")
    assert [row["name"] for row in listed.document] == ["pi"]
    assert small.run("device", "remove", "pi", "--forget").code == errors.PASSED
    assert devices.known() == {}
    (tmp_path / "devices.json").write_text('{"pi": {"host": 1}}')
    with pytest.raises(errors.UsageError, match=r"devices\.json is damaged"):
        devices.known()


def test_wheels_are_chosen_for_the_device() -> None:
    pi = {"machine": "aarch64", "system": "Linux", "libc": ["glibc", "2.31"]}
    assert devices.platforms(pi)[0] == "manylinux_2_31_aarch64"
    assert devices.platforms(pi)[-1] == "manylinux2014_aarch64"
    assert "manylinux_2_34_aarch64" not in devices.platforms(pi)
    with pytest.raises(errors.TargetUnavailable, match="--python"):
        devices.platforms({**pi, "libc": ["", ""]})


def test_another_machine_is_judged_by_its_own_facts() -> None:
    from edgeprune import config

    neon = config.load_target("cpu-neon")
    facts: dict[str, Any] = {"conditions": {"governor": "", "quota": 2.5}, "cpus": 4, "memory": None, "missing": {}}
    board = Machine({"machine": "aarch64", "cpu": "A72", "flags": "fp asimd"}, **facts, name="pi", url="ssh://pi")
    assert board.unfit(neon) == ""
    assert board.usable_threads(0)[0] == 2
    assert board.detect([neon, config.load_target("cpu-avx2")])[0] == neon
    assert "pi is aarch64" in board.unfit(config.load_target("cpu-avx2"))
    assert here().same({"device": dict(here().fingerprint), "conditions": dict(here().conditions)})


# The archive --------------------------------------------------------------------------------


def test_the_archive_is_small_and_always_the_same() -> None:
    name, content = archive.worker()
    assert len(content) < 200_000
    archive.worker.cache_clear()
    assert archive.worker() == (name, content)


def test_the_archive_is_python_3_9() -> None:
    with zipfile.ZipFile(io.BytesIO(archive.worker()[1])) as packed:
        for name in packed.namelist():
            tree = ast.parse(packed.read(name), name, feature_version=(3, 9))
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                assert not (ast.unparse(call.func) == "zip" and call.keywords), (
                    f"{name}:{call.lineno}: zip(strict=) is of 3.10"
                )
            for node in tree.body:  # run when imported, where annotations are not
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                    assert not any(isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr) and "None" in ast.unparse(part)
                                   for part in ast.walk(node.value)), f"{name}:{node.lineno}: X | None is of 3.10"  # fmt: skip


def oldest_python() -> str:
    """A Python 3.9 of this machine, of pyenv or in the PATH; "" where there is none."""
    for python in ["python3.9", *map(str, Path.home().glob(".pyenv/versions/3.9.*/bin/python"))]:
        path = sshd.found(python)
        if path and not subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
            return path
    return ""


@pytest.mark.parametrize("python", [oldest_python, lambda: sys.executable], ids=["3.9", "this one"])
def test_the_archive_answers_where_nothing_is_installed(python: Callable[[], str], tmp_path: Path) -> None:
    program = python()
    if not program:
        pytest.skip("there is no Python 3.9 here")
    (tmp_path / "worker.pyz").write_bytes(archive.worker()[1])
    command = [program, "-I", "-S", str(tmp_path / "worker.pyz"), str(tmp_path / "kept")]
    requests = '{"op": "hello"}\n{"op": "has", "sha256": "%s"}\n{"op": "turns"}\n' % ("0" * 64)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(requests)
        process.stdin.flush()
        said = [process.stdout.readline() for _ in range(4)]
        process.stdin.close()
    assert said[0].strip() == agent.GREETING
    assert json.loads(said[1])["packages"] == []
    assert json.loads(said[2]) == {"bytes": 0, "whole": False}
    assert json.loads(said[3])["kind"] == "UsageError"


# The agent ----------------------------------------------------------------------------------


def put(at: Agent, content: bytes, part: int = 10, sha256: str = "") -> dict[str, Any]:
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    there = at.has(sha256)
    while not there["whole"]:
        data = content[there["bytes"] : there["bytes"] + part]
        last = there["bytes"] + len(data) >= len(content)
        there = at.put(sha256, there["bytes"], base64.b64encode(data).decode(), last)
    return there


def test_files_come_in_parts_and_go_on_where_they_were_left(tmp_path: Path) -> None:
    content = os.urandom(25)
    sha256 = hashlib.sha256(content).hexdigest()
    first = Agent(tmp_path)
    assert first.put(sha256, 0, base64.b64encode(content[:10]).decode(), False) == {"bytes": 10, "whole": False}
    again = Agent(tmp_path)  # after the connection was lost
    assert again.has(sha256) == {"bytes": 10, "whole": False}
    # an answer that was lost: the part comes twice, and is not kept twice
    assert again.put(sha256, 0, base64.b64encode(content[:10]).decode(), False)["bytes"] == 10
    assert put(again, content) == {"bytes": 25, "whole": True}
    assert (tmp_path / "files" / sha256).read_bytes() == content


def test_a_damaged_file_is_not_kept(tmp_path: Path) -> None:
    at = Agent(tmp_path)
    with pytest.raises(errors.StorageError, match="damaged"):
        put(at, b"one", sha256=hashlib.sha256(b"two").hexdigest())
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize("name", ["../" + "0" * 61, "x" * 64, "0" * 63])
def test_only_hashes_name_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="sha256"):
        Agent(tmp_path).has(name)


def test_a_model_keeps_its_files_together(tmp_path: Path) -> None:
    at = Agent(tmp_path)
    packed = zlib.compress(b"content")
    put(at, packed)
    with pytest.raises(errors.UsageError, match="file name"), at._unpacked({"../x": parcel.name(packed)}, "x"):
        pass
    with at._unpacked({"x.onnx": parcel.name(packed)}, "x.onnx") as path:
        assert path.read_bytes() == b"content"
    assert not path.exists()
    with pytest.raises(errors.StorageError, match="no longer"), at._unpacked({"x": "0" * 64}, "x"):
        pass


def test_the_least_recently_used_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "KEPT_BYTES", 25)
    at = Agent(tmp_path)
    for i, content in enumerate((b"a" * 10, b"b" * 10, b"c" * 10)):
        put(at, content)
        os.utime(tmp_path / "files" / hashlib.sha256(content).hexdigest(), (i, i))
    assert not at.has(hashlib.sha256(b"a" * 10).hexdigest())["whole"]
    assert at.has(hashlib.sha256(b"c" * 10).hexdigest())["whole"]


def test_two_sessions_do_not_measure_at_once(tmp_path: Path) -> None:
    mine, other = Agent(tmp_path), Agent(tmp_path)
    assert mine.claim("a", "me") == {"busy": ""}
    assert Agent(tmp_path).claim("a", "me") == {"busy": ""}  # another runtime's worker of the same build
    assert other.claim("b", "you") == {"busy": "me"}
    assert mine._claim is not None
    mine._claim.close()  # as when its process ends
    assert other.claim("b", "you") == {"busy": ""}


# The clock, without a network ---------------------------------------------------------------


class Local(ssh.Address):
    """The agent as a process here, behind a login shell that greets."""

    def command(self, script: str, *arguments: str) -> list[str]:
        return ["/bin/sh", "-c", 'echo "welcome to the board"; exec "$@"', "sh", sys.executable, "-s", *arguments]


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Callable[..., RemoteClock]]:
    made: list[RemoteClock] = []

    def make(**options: Any) -> RemoteClock:
        (tmp_path / "worker.pyz").write_bytes(archive.worker()[1])
        address = Local("board")
        command = address.command("", str(tmp_path / "worker.pyz"), str(tmp_path / "device"))
        made.append(RemoteClock("onnxruntime", address=address, command=command, threads=1, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "gemm.onnx"
    micro.gemm(path, 8, 64, 64)
    return path


def test_a_remote_clock_measures_and_predicts(clock: Callable[..., RemoteClock], model: Path) -> None:
    x = np.random.default_rng(0).random((11, 8, 64), dtype=np.float32)
    with clock() as there, Clock("onnxruntime", threads=1) as local:
        there.load("gemm", model)
        local.load("gemm", model)
        np.testing.assert_array_equal(there.predict("gemm", x), local.predict("gemm", x))
        assert [node["operator"] for node in there.operators("gemm", runs=3)] == [
            node["operator"] for node in local.operators("gemm", runs=3)
        ]
        there.load("shape", model, values=False)
        assert not np.array_equal(there.predict("shape", x[:1]), local.predict("gemm", x[:1]))
        measured = there.measure(["shape"], "gemm", min_rounds=9, max_rounds=9, budget_s=1)["shape"]
        assert 0.2 < measured.ratio < 5
        assert "edgeprune.latency.agent" in there.modules() and "torch" not in there.modules()
        there.unload("shape")
        with pytest.raises(errors.UsageError):
            there.predict("shape", x)


def test_a_lost_connection_is_made_again(
    clock: Callable[..., RemoteClock], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    rounds: list[int] = []
    with clock(say=said.append) as there:
        there.load("a", model)
        there.load("b", model, 2)

        def kill(turn: int, seconds: float) -> None:
            rounds.append(turn)
            if turn in (5, 12):
                os.killpg(there._process.pid, signal.SIGKILL)

        measured = there.measure(["b"], "a", min_rounds=20, max_rounds=20, budget_s=5, on_round=kill)["b"]
        assert there.losses == 2
        assert rounds == list(range(1, len(rounds) + 1)) and measured.raw_ms.shape[1] == len(rounds) >= 20
        assert there.facts["b"]["copies"] == 2
    assert len([text for text in said if "is lost" in text]) == 2
    assert len([text for text in said if "connected again; 2 models" in text]) == 2


def test_a_worker_that_dies_by_itself_is_not_a_lost_connection(clock: Callable[..., RemoteClock], model: Path) -> None:
    there = clock()
    there.load("a", model)
    there._command = ["/bin/sh", "-c", "exit 3"]
    there._process.kill()
    with pytest.raises(errors.TargetUnavailable, match="exit code 3"):
        there.counters()


def test_a_device_in_use_is_waited_for(
    clock: Callable[..., RemoteClock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BUSY_EVERY_S", 0.05)
    monkeypatch.setattr(remote, "BUSY_S", 0.2)
    other = Agent(tmp_path / "device")
    other.claim("other", "somebody@elsewhere")
    said: list[str] = []
    with pytest.raises(errors.TargetUnavailable, match="in use by somebody@elsewhere"):
        clock(say=said.append)
    assert len(said) == 1 and "waiting" in said[0]
    monkeypatch.setattr(remote, "BUSY_S", 30)
    assert other._claim is not None
    threading.Timer(0.3, other._claim.close).start()
    clock().close()


def test_weights_without_meaning_compress(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "gemm.onnx"
    micro.gemm(path, 4, 256, 512)
    [content] = parcel.pack(path, values=False).values()
    [real] = parcel.pack(path, values=True).values()
    assert len(content) < len(real) / 20
    assert zlib.decompress(real) == path.read_bytes()
    before, after = onnx.load(path), onnx.load_from_string(zlib.decompress(content))
    assert [numpy_helper.to_array(t).shape for t in after.graph.initializer] == [(256, 512)]
    assert before.graph.node == after.graph.node


# A real server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    if reason := sshd.missing():
        pytest.skip(reason)
    running = sshd.start(tmp_path_factory.mktemp("ssh") / "server")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def board(server: sshd.Server) -> Iterator[small.Result]:
    """The server as the device 'board': a Python without packages, 3.9 where there is one, to which they are sent."""
    python = ["--python", oldest_python()] if oldest_python() else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_CONFIG_DIR", str(server.root / "config"))
        yield small.run(
            "device", "add", "board", server.url, "--ssh-config", server.config, "--format", "json", *python
        )


def sessions(server: sshd.Server) -> list[int]:
    """The processes of the server that serve a connection."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def test_a_device_is_added_listed_and_checked(server: sshd.Server, board: small.Result) -> None:
    assert board.code == errors.PASSED, board.err
    assert board.document["fingerprint"] == dict(here().fingerprint)
    assert "onnxruntime starts there" in board.err
    assert (server.home / archive.worker()[0]).stat().st_size < 200_000
    assert list((server.home / "files").iterdir()) == []  # the wheels are unpacked
    [row] = small.run("device", "list", "--format", "json").document
    assert (row["name"], row["url"]) == ("board", server.url)
    checked = small.run("device", "check", "board", "--format", "json")
    assert checked.code in (errors.PASSED, errors.INCONCLUSIVE)  # a machine that runs tests is rarely quiet
    found = checked.document
    assert bool(found["problems"]) == (checked.code == errors.INCONCLUSIVE)
    assert {"numpy", "onnxruntime"} <= set(found["packages"])
    assert found["state"]["load"] is not None
    assert "board (ssh://device)" in small.run("device", "check", "board").out


def test_a_build_through_ssh_survives_a_lost_connection(
    server: sshd.Server, board: small.Result, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert board.code == errors.PASSED, board.err
    space: Workspace = small.workspace(tmp_path_factory.getbasetemp())
    turns, real = 0, Clock._ask

    def ask(self: Clock, op: str, **arguments: Any) -> dict[str, Any]:
        nonlocal turns
        turns += op == "turns"
        if turns == 25 and op == "turns":  # in the middle of the latency table
            for pid in sessions(server):
                os.kill(pid, signal.SIGKILL)
        return real(self, op, **arguments)

    monkeypatch.setattr(Clock, "_ask", ask)
    options = ("--device", "board", "--latency", "1.2x", "--epochs", "0", "--search-seconds", "0")
    built = space.build(*options, card=space.one, cache=tmp_path / "cache", out=tmp_path / "out")
    assert built.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), built.err
    assert "the connection to ssh://device is lost" in built.err
    assert "connected again" in built.err
    assert "accuracy is judged on this machine" in built.err
    [folder] = (tmp_path / "out").iterdir()
    again = space.build(*options, card=space.one, cache=tmp_path / "cache", out=tmp_path / "out")
    assert "profile: done before" in again.err
    with small.quick():
        checked = small.run("validate", folder, "--device", "board", "--data", "digits", "--accuracy-on", "device",
                            "--format", "json")  # fmt: skip
    assert checked.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), checked.err
    found = checked.document
    assert (found["device"], found["same_device"]) == (server.url, True)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert found["accuracy"]["accuracy"] == pytest.approx(manifest["pruned"]["accuracy"], abs=0.2)
    assert not list(server.home.glob("edgeprune-*")), "temporary files stay on the device"


@pytest.mark.slow
def test_an_onnx_file_is_profiled_on_the_device(board: small.Result, tmp_path: Path) -> None:
    assert board.code == errors.PASSED, board.err
    micro.gemm(tmp_path / "model.onnx", 8, 64, 64)
    with small.quick():
        found = small.run("profile", tmp_path / "model.onnx", "--device", "board", "--threads", "1", "--runtime",
                          "onnxruntime", "--format", "json")  # fmt: skip
    assert found.code == errors.PASSED, found.err
    assert found.document["survey"]["operators"]


def test_a_runtime_that_is_not_there_is_told_from_one_here(board: small.Result, tmp_path: Path) -> None:
    assert board.code == errors.PASSED, board.err
    ended = small.run("build", "digits", "--target", "cpu-avx2", "--latency", "2x", "--device", "board",
                      "--runtime", "openvino", "--cache-dir", tmp_path, "--out", tmp_path, "-q")  # fmt: skip
    assert ended.code == errors.TargetUnavailable.exit_code
    assert "board" in ended.err


def test_a_changed_host_key_is_refused(server: sshd.Server, board: small.Result) -> None:
    assert board.code == errors.PASSED, board.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "FRESH_S", 1e-3)  # what the device said before is forgotten
        server.new_host_key()
        try:
            for command in (
                ["device", "check", "board"],
                ["device", "add", "again", server.url, "--ssh-config", server.config],
            ):
                began = time.monotonic()
                ended = small.run(*command)
                assert ended.code == errors.TargetUnavailable.exit_code
                assert "its host key has changed" in ended.err and "Traceback" not in ended.err
                assert time.monotonic() - began < 60  # not the minutes that a lost connection is given
        finally:
            known = (server.root / "host_key.pub").read_text().split()
            (server.root / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {known[0]} {known[1]}\n")


def test_an_unknown_host_key_is_refused(server: sshd.Server, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        server.config.read_text().replace(str(server.root / "known_hosts"), str(tmp_path / "nobody"))
        + "  StrictHostKeyChecking no\n"  # ours is stricter
    )
    ended = small.run("device", "add", "other", server.url, "--ssh-config", tmp_path / "config")
    assert ended.code == errors.TargetUnavailable.exit_code
    assert "its host key is not known" in ended.err


def test_a_device_without_a_fitting_python_is_refused(server: sshd.Server) -> None:
    ended = small.run("device", "add", "other", server.url, "--ssh-config", server.config, "--python", "/bin/false")
    assert ended.code == errors.UsageError.exit_code
    assert "'/bin/false' is no Python on ssh://device" in ended.err


def test_a_removed_device_keeps_nothing(server: sshd.Server, board: small.Result) -> None:
    assert board.code == errors.PASSED, board.err
    assert server.home.is_dir()
    assert small.run("device", "remove", "board").code == errors.PASSED
    assert not server.home.exists()
    assert small.run("device", "check", "board").code == errors.UsageError.exit_code
