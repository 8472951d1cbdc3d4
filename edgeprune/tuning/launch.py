"""Tuning in several processes: starts `accelerate launch` on `edgeprune.tuning.worker` and waits for it.

Only the tuning runs in the group; a build measures latencies, and does that in one process. A job is a folder:
`job.json`, `plan.json`, `student.safetensors`, `teacher.safetensors` and perhaps `chosen.npz` in; `tuned.safetensors`, `history.json`,
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
    from safetensors.torch import save_file

    from edgeprune import vit
    from edgeprune.tuning.loop import History

    folder = Path(tempfile.mkdtemp(prefix=".tuning-", dir=work))
    try:
        save_file({k: v.contiguous() for k, v in student.state_dict().items()}, folder / "student.safetensors")
        save_file({k: v.contiguous() for k, v in teacher.state_dict().items()}, folder / "teacher.safetensors")
        artifact.write_plan(planned, folder / "plan.json")
        job = {
            "card": request.card, "recipe": recipe, "seed": request.seed, "processes": request.processes,
            "lesson_bytes": request.lesson_bytes and request.lesson_bytes // max(1, request.processes),
            "checkpoint": str(work / cache.CHECKPOINT), "verbose": console.verbose, "parent": {"pid": os.getpid(), "node": platform.node()},
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(to_json(job)))
        if chosen is not None:
            chosen.save(folder)
        _run(command(request, folder), environment(request), folder, console)
        for path in sorted(folder.glob("unreadable-*.json")):
            unreadable.update(artifact.read_json(path))
        vit.load_weights(student, vit.read_weights(folder / "tuned.safetensors"), str(folder))
        return History.of(artifact.read_json(folder / "history.json"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(request: Request, folder: Path) -> list[str]:
    """How the group is started."""
    if request.accelerate_config is not None:
        how = ["--config_file", str(request.accelerate_config)]
    else:
        # also on CPUs: --multi_gpu is the launcher that starts several processes by itself, --cpu needs mpirun for that
        how = [
            "--multi_gpu", "--num_processes", str(request.processes), "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", "0",
        ]  # fmt: skip
    return [sys.executable, "-m", "accelerate.commands.launch", *how, "-m", WORKER, str(folder)]


def environment(request: Request) -> dict[str, str]:
    """What the group sees: nothing of a group that this process is in, and its share of the CPUs."""
    import torch

    own = clean(os.environ)
    if request.processes:
        own["OMP_NUM_THREADS"] = str(max(1, device.affinity() // request.processes))
        devices = torch.cuda.device_count()
        if 0 < devices < request.processes:
            raise UsageError(
                f"{request.processes} processes need as many GPUs and {devices} are here; lower --processes"
            )
        if not devices:
            own["ACCELERATE_USE_CPU"] = "true"
    return own


def _run(arguments: list[str], variables: dict[str, str], folder: Path, console: Console) -> None:
    """Run the group to its end; what its first process says is passed on. Raises its error, if it has one."""
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
