"""Builds that are killed: a process that has imported everything forks one for each, so that fifty take minutes.

`python faults.py CARD TARGET PROFILE` answers each JSON line on stdin, {"cache", "out", "after", "signal"}, with one on
stdout: {"code", "seconds", "err"}. `after`: seconds until the build gets the signal; null = it runs to its end.
The profile is of another device: then nothing is measured, and all that a build makes depends on its inputs alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import small


def recorded(folder: Path, blocks: int = 3, heads: int = 3, width: int = 48, tokens: int = 17) -> tuple[Path, Path]:
    """A profile that a device which is not here has recorded of the small card, and its target."""
    import platform

    from edgeprune import config
    from edgeprune.types import to_json

    machine = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    target = folder / "board.toml"
    lines = (f'machine = ["{machine}"]' if x.startswith("machine") else x for x in small.TARGET.splitlines())
    target.write_text("\n".join(lines))
    widths = list(range(0, 4 * width + 1, 32))
    prices = {"attn_ms": [0.2 * h for h in range(heads + 1)], "mlp_ms": [0.01 * n for n in widths]}
    dense = 1.0 + blocks * (prices["attn_ms"][-1] + prices["mlp_ms"][-1])
    document = {
        "schema": "edgeprune.profile/1", "device": {"cpu": "a board", "machine": machine}, "conditions": {},
        "target": to_json(config.load_target(str(target))), "runtime": "onnxruntime",
        "anchor_ms": {"onnxruntime": dense}, "anchor": {"p50": dense, "p90": dense, "p99": dense, "samples": 99, "slope": 0.5},
        "model": {"architecture": "vit_tiny_patch16_224", "batch": 1, "tokens": tokens, "width": width, "blocks": blocks,
                  "heads": heads, "head_dim": width // heads, "neurons": 4 * width, "classes": 10},
        "worker": {"info": {"version": "1"}},
        "table": {"runtime": "onnxruntime", "precision": "fp32", "threads": 1, "base_ms": 1.0,
                  "stages": [{"blocks": blocks, "mlp_widths": widths, **prices}], "dense_ms": dense, "empty_ms": 1.0, "samples": 99, "repaired": [], "fit": {}},
    }  # fmt: skip
    (folder / "board.json").write_text(json.dumps(document))
    return folder / "board.json", target


class Builds:
    """The forking process. A context manager."""

    def __init__(self, card: Path, target: Path, profile: Path, code: str = "") -> None:
        """code: run in it before anything else, to change constants of edgeprune."""
        own = "import runpy, sys; sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')"
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}\n{own}", __file__, card, target, profile],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )  # fmt: skip

    def __enter__(self) -> Builds:
        assert self.process.stdout is not None
        while self.process.stdout.readline().strip() != '"ready"':
            assert self.process.poll() is None
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(
        self, cache: Path, out: Path, after: float | None = None, number: int = signal.SIGKILL, when: str = ""
    ) -> dict[str, Any]:
        """when: a pattern of files in the cache; the signal comes as soon as there is one."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"cache": str(cache), "out": str(out), "after": after, "signal": int(number), "when": when}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def child(arguments: list[str], err: str) -> None:
    from edgeprune import cli

    log = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["edgeprune", *arguments]
    code = 70
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(card: str, target: str, profile: str) -> None:
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import onnxsim  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch.onnx

    from edgeprune import pipeline  # noqa: F401

    torch.set_num_threads(1)
    # What exporting imports when it is first used; nothing here starts a thread, which a fork would lose.
    torch.onnx.export(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), dynamo=True, opset_version=20, verbose=False)
    common = [card, "--target", target, "--profile", profile, "--latency", "60%", "--search-seconds", "0"]
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        err = f"{request['out']}.log"
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(["build", *common, "--cache-dir", request["cache"], "--out", request["out"]], err)
        status = None
        while status is None:
            ended, found = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = found
            elif (request["after"] is not None and time.monotonic() - start >= request["after"]) or (
                request["when"] and any(Path(request["cache"]).glob(request["when"]))
            ):
                os.kill(pid, request["signal"])
                status = os.waitpid(pid, 0)[1]
            else:
                time.sleep(0.002)
        print(json.dumps({
            "code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start,
            "err": Path(err).read_text() if os.path.exists(err) else "", "pid": pid,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:4])
