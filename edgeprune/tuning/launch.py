"""Tuning in several processes: starts `accelerate launch` on `edgeprune.tuning.worker` and waits for it.

Only the tuning runs in the group; a build measures latencies, and does that in one process. Where the group spans
machines, the build starts the processes of its own and `edgeprune join` those of every other. A job is a folder:
`job.json` (the last to appear), `plan.json`, `student.safetensors`, `teacher.safetensors` and perhaps `chosen.npz` in; `tuned.safetensors`, `history.json`,
`unreadable-RANK.json` and `error-RANK.json` out. Imports no torch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import artifact, cache, errors, extras
from edgeprune.config import Recipe, Request
from edgeprune.console import Console
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.latency import device
from edgeprune.types import to_json

if TYPE_CHECKING:
    from edgeprune.compat import VisionTransformer
    from edgeprune.data import Chosen
    from edgeprune.tuning.loop import History

WORKER = "edgeprune.tuning.worker"
JOB, FOLDER = "job.json", ".tuning-"
POLL_S = 1.0
#: What launchers leave in the environment of their processes, and what must not reach a group within a group.
LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "FSDP_", "MASTER_", "LOCAL_")
LAUNCHED = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


def wanted(request: Request) -> bool:
    """Whether several processes are to tune."""
    return request.processes > 1 or request.accelerate_config is not None


def check_request(processes: int, accelerate_config: Path | None) -> None:
    """Raise UsageError for what cannot be launched."""
    if processes < 0:
        raise UsageError(f"processes must be 0 (this one alone) or more, not {processes}")
    if processes and accelerate_config is not None:
        raise UsageError("the file of --accelerate-config says how many processes there are; leave --processes out")
    if accelerate_config is not None and not accelerate_config.is_file():
        raise UsageError(f"there is no file '{accelerate_config}'; `accelerate config --config_file FILE` writes one")
    if processes > 1 or accelerate_config is not None:
        extras.need("tuning in several processes", extras.ACCELERATE, "pip install 'edgeprune[accelerate]'")


def fit(
    student: VisionTransformer, teacher: VisionTransformer, planned: artifact.PlannedModel, recipe: Recipe,
    request: Request, unreadable: dict[str, str], work: Path, console: Console, chosen: Chosen | None = None,
) -> History:  # fmt: skip
    """`loop.fit` on the request's data, or on what is `chosen` of it, in the processes that it asks for; `student` gets the weights it returns.

    Images that cannot be read are noted in `unreadable`. `work` is an existing folder, on a file system that all
    machines of the group share. Raises what the processes raise.
    """
    from edgeprune import weightfile
    from edgeprune.tuning.loop import History

    folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=work))
    try:
        weightfile.write(student, folder / "student.safetensors")
        weightfile.write(teacher, folder / "teacher.safetensors")
        artifact.write_plan(planned, folder / "plan.json")
        job = {
            "card": request.card, "recipe": recipe, "seed": request.seed, "processes": request.processes,
            "lesson_bytes": request.lesson_bytes and request.lesson_bytes // max(1, request.processes),
            "checkpoint": str(work / cache.CHECKPOINT), "verbose": console.verbose, "parent": {"pid": os.getpid(), "node": platform.node()},
        }  # fmt: skip
        if chosen is not None:
            chosen.save(folder)
        (folder / "job").write_text(json.dumps(to_json(job)))
        (folder / "job").rename(folder / JOB)
        _run(folder, request.processes, request.accelerate_config, console)
        for path in sorted(folder.glob("unreadable-*.json")):
            unreadable.update(artifact.read_json(path))
        weightfile.load(student, weightfile.read(folder / "tuned.safetensors"), str(folder))
        return History.of(artifact.read_json(folder / "history.json"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join(accelerate_config: Path, cache_dir: Path, jobs: int, console: Console) -> dict[str, int]:
    """Start this machine's processes of every tuning that a build elsewhere begins in `cache_dir`, which both share.

    Until `jobs` of them are done; 0 = until interrupted. What fails is said, and the next one waited for. Returns how
    many `tunings` there were and how many `failed`. Raises UsageError for what cannot be launched.
    """
    check_request(0, accelerate_config)
    known: set[Path] = set()
    failed = 0
    console.say(f"waiting for a build that tunes in '{cache_dir}'")
    while not jobs or len(known) < jobs:
        for path in sorted(set(cache_dir.glob(f".*/{FOLDER}*/{JOB}")) - known):
            known.add(path)
            console.say(f"joining {path.parent}")
            try:
                _run(path.parent, 0, accelerate_config, console)
            except EdgepruneError as error:
                failed += 1
                console.warn(str(error))
        time.sleep(POLL_S)
    return {"tunings": len(known), "failed": failed}


def command(folder: Path, processes: int, accelerate_config: Path | None) -> list[str]:
    """How this machine's processes of the group are started."""
    if accelerate_config is not None:
        how = ["--config_file", str(accelerate_config)]
    else:
        # also on CPUs: --multi_gpu is the launcher that starts several processes by itself, --cpu needs mpirun for that
        how = [
            "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", "0",
        ]  # fmt: skip
    return [sys.executable, "-m", "accelerate.commands.launch", *how, "-m", WORKER, str(folder)]


def environment(processes: int) -> dict[str, str]:
    """What the group sees: nothing of a group that this process is in, and its share of the CPUs."""
    import torch

    own, devices = clean(os.environ), torch.cuda.device_count()
    if not devices:
        own["ACCELERATE_USE_CPU"] = "true"
    if processes:
        own["OMP_NUM_THREADS"] = str(max(1, device.affinity() // processes))
        if 0 < devices < processes:
            raise UsageError(f"{processes} processes need as many GPUs and {devices} are here; lower --processes")
    return own


def _run(folder: Path, processes: int, accelerate_config: Path | None, console: Console) -> None:
    """Run this machine's part of the group to its end; what its first process says is passed on. Raises its error."""
    arguments, variables = command(folder, processes, accelerate_config), environment(processes)
    last: deque[str] = deque(maxlen=12)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=variables
    ) as process:
        try:
            assert process.stdout is not None
            for line in map(str.rstrip, process.stdout):
                last.append(line)
                _relay(line, console)
        except BaseException:
            process.terminate()  # accelerate ends its processes in turn
            raise
    for path in sorted(folder.glob("error-*.json")):
        error = artifact.read_json(path)
        raise getattr(errors, str(error["kind"]), EdgepruneError)(str(error["message"]))
    if process.returncode:
        raise EdgepruneError(
            f"the tuning processes ended with code {process.returncode}: {' | '.join(line for line in last if line)}"
        )


def _relay(line: str, console: Console) -> None:
    """Lines of edgeprune's console begin with two spaces; everything else is for -v."""
    if line.startswith("  warning: "):
        console.warn(line.removeprefix("  warning: "))
    elif line.startswith("  ") and line[2:3].isalnum():
        console.say(line.strip())
    elif line:
        console.detail(line)


def clean(environment: Any) -> dict[str, str]:
    """The environment without what a launcher has put there for its own processes."""
    return {k: v for k, v in environment.items() if not k.startswith(LAUNCHERS) and k not in LAUNCHED}


def lead_or_leave(arguments: list[str]) -> bool:
    """For `accelerate launch -m edgeprune build ...`: True if this process has nothing to do.

    The first process of the group becomes `edgeprune build ... --processes N`, outside any group, and starts the
    others again when it comes to tuning; they would only disturb what it measures before.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        raise UsageError(
            "on several machines give the launcher's file to edgeprune: edgeprune build ... --accelerate-config FILE"
        )
    if arguments[:1] != ["build"]:
        raise UsageError("only `edgeprune build` uses several processes; run this command without a launcher")
    if os.environ.get("RANK") != "0":
        return True
    os.execve(
        sys.executable, [sys.executable, "-m", "edgeprune", *arguments, "--processes", str(size)], clean(os.environ)
    )
