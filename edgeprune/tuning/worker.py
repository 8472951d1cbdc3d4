"""One of the processes that tune together: `accelerate launch ... -m edgeprune.tuning.worker FOLDER`.

`edgeprune.tuning.launch` writes the folder, starts this and reads what it leaves behind.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

from edgeprune import artifact, config, data, tasks, vit, weightfile
from edgeprune.config import ModelSpec, Recipe
from edgeprune.console import SILENT, Console
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.tuning import judge, loop
from edgeprune.tuning.checkpoint import Checkpoint
from edgeprune.tuning.group import Group, launched
from edgeprune.tuning.launch import JOB
from edgeprune.types import to_json

WATCH_S = 1.0


def main(folder: Path) -> int:
    """Tune; what goes wrong is left in the folder as `error-RANK.json`. Returns the exit code."""
    rank = 0
    try:
        group = launched()
        rank = group.rank
        tune(folder, group)
    except Exception as error:
        known = isinstance(error, EdgepruneError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        document = {"kind": type(error).__name__ if known else "EdgepruneError", "message": message}
        (folder / f"error-{rank}.json").write_text(json.dumps(document))
        return 1
    return 0


def end_with(parent: dict[str, Any]) -> None:
    """End this process once the build that started the group is gone; only seen where it runs on the same machine.

    A build that is killed can end nobody.
    """

    def watch() -> None:
        while True:
            time.sleep(WATCH_S)
            try:
                os.kill(parent["pid"], 0)
            except ProcessLookupError:
                os._exit(1)
            except OSError:
                return

    if parent["node"] == platform.node():
        threading.Thread(target=watch, daemon=True).start()


def tune(folder: Path, group: Group) -> None:
    """The job in `folder`, as one of the group; its first process writes the result."""
    job: dict[str, Any] = artifact.read_json(folder / JOB)
    end_with(job["parent"])
    card = config.parse(ModelSpec, job["card"], JOB)
    recipe = config.parse(Recipe, job["recipe"], JOB)
    planned = artifact.read_plan(folder / "plan.json")
    student = artifact.rebuild(planned, folder / "student.safetensors")
    teacher = vit.create(planned.architecture, planned.kwargs, planned.num_classes, planned.anatomy)
    tasks.mark(teacher, planned.task)
    weightfile.load(teacher, weightfile.read(folder / "teacher.safetensors"), str(folder))
    transforms = data.transform_config(card, teacher)
    check, train = judge.divide(data.load_splits(card, transforms, job["seed"], data.Chosen.find(folder)).train)
    console = Console(verbose=job["verbose"]) if group.rank == 0 else SILENT
    if group.size < max(2, job["processes"]):
        raise UsageError(
            f"accelerate started {group.size} of {job['processes'] or 'several'} processes; "
            "on the CPUs of one machine use --processes N: with its own config file they need mpirun"
        )
    console.say(
        f"{group.size} processes tune on {group.device.type}, each on its share of every {recipe.batch_size} images"
    )
    history = loop.fit(
        student,
        train,
        recipe,
        transforms,
        teacher=teacher,
        check=check,
        seed=job["seed"],
        console=console,
        group=group,
        lesson_bytes=job["lesson_bytes"],
        checkpoint=Checkpoint(Path(job["checkpoint"]), console),
    )
    (folder / f"unreadable-{group.rank}.json").write_text(json.dumps(train.corrupt))
    if group.rank == 0:
        weightfile.write(student, folder / "tuned.safetensors")
        (folder / "history.json").write_text(json.dumps(to_json(history)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
