"""Fine-tune: distil the dense model into the pruned one; `edgeprune.tuning` is the loop."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from edgeprune import adapters, artifact, cache, numerics, quantisation, recoveries, schedules, tasks, vit, weightfile
from edgeprune.artifact import PlannedModel
from edgeprune.compat import VisionTransformer
from edgeprune.config import Recipe, Request
from edgeprune.console import Console
from edgeprune.errors import UsageError
from edgeprune.stages import baseline
from edgeprune.tuning import launch
from edgeprune.tuning.checkpoint import Checkpoint
from edgeprune.tuning.group import Group
from edgeprune.tuning.judge import Judge, divide
from edgeprune.tuning.loop import History, fit
from edgeprune.types import to_json

UNTUNED = 64  # images that tell how far a model that is not tuned is from the dense one
NEGLIGIBLE = 1e-3  # nats, or of `tasks.scale`; AdamW's first steps alone move a model further than that


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    """Writes `model.safetensors`, `plan.json` (unchanged) and `finetune.json`; what adapters learnt to a file of their own."""
    dense = baseline.load(request, read["baseline"])
    planned = artifact.read_plan(read["prune"] / "plan.json")
    student = artifact.rebuild(planned, read["prune"] / "pruned.safetensors")
    recipe = request.card.finetune
    if request.schedule != schedules.DEFAULT:
        recipe = schedules.share(recipe, 1 - schedules.SHARE)
    shutil.copyfile(read["prune"] / "plan.json", out / "plan.json")
    check, _ = divide(dense.splits.train)
    if sum(recipe.epochs) <= 0:
        check = check.take(UNTUNED)
    adapted = recoveries.get(request.recovery).TUNES == "adapters"
    if adapted:
        adapters.attach(student, seed=request.seed)
    judge = Judge(dense.model, check, recipe.batch_size, Group(torch.device("cpu")))
    after = before = judge(student)
    if not math.isfinite(before):
        pixels, _ = judge.batches[0]
        numerics.refuse_not_finite(student, pixels, student(pixels).detach(), "prune", "choose another --recovery")
        raise UsageError(
            "stage finetune: the pruned model's divergence from the dense one is no number; choose another --recovery"
        )
    scale = tasks.scale(torch.cat([wanted for _, wanted in judge.batches]), tasks.of(dense.model))
    history = History()
    if planned.plan == vit.dense_plan(dense.sizes):
        console.say("nothing was pruned: no tuning")
    elif sum(recipe.epochs) <= 0:
        console.say("no tuning: 0 epochs were asked for")
    elif before < NEGLIGIBLE * scale:
        console.say(
            f"no tuning: on {len(check)} unseen images the pruned model diverges from the dense one by {before:.1e} nats, "
            f"less than {NEGLIGIBLE * scale:.0e}; there is nothing to recover"
        )
    else:
        history = tune(student, planned, dense, recipe, request, out, console)
        shutil.rmtree(out / cache.CHECKPOINT, ignore_errors=True)
        after = judge(student)
        console.say(
            f"divergence from the dense model on {len(check)} images kept out of tuning: "
            f"{before:.4f} nats before, {after:.4f} after {len(history.losses)} steps"
        )
        if not after < before:
            console.warn("tuning did not bring the model closer to the dense one; the untuned weights are kept")
        if planned.plan.quantised:
            batches = dense.splits.calibration.batches(request.card.calibration.batch_size)
            exact, old, after = quantisation.control(student, (pixels for pixels, _ in batches), judge)
            console.say(
                f"int8: {exact:.4f} nats in float, {after:.4f} with int8 layers"
                + (f", whose ranges were taken anew ({old:.4f} before)" if after < old else "")
            )
    if adapted:
        adapters.save(student, dense.model, planned.plan, out / artifact.ADAPTERS)
        adapters.merge(student)
    weightfile.write(student, out / "model.safetensors")
    if adapted:
        few, all_ = ((out / name).stat().st_size / 1e6 for name in (artifact.ADAPTERS, "model.safetensors"))
        console.say(f"adapters and what else was tuned: {few:.2f} MB, of {all_:.2f} MB of weights")
    dense.splits.report(out, console)
    document = {
        "divergence_before": before,
        "divergence_after": after,
        "scale": scale,
        "epochs": recipe.epochs,
        **to_json(history),
    }
    (out / "finetune.json").write_text(json.dumps(document))


def tune(
    student: VisionTransformer, planned: PlannedModel, dense: baseline.Dense, recipe: Recipe, request: Request,
    work: Path, console: Console,
) -> History:  # fmt: skip
    """Tune `student`, which is `planned`, in place: in this process, or in as many as the request asks for.

    It ends no further from the dense model on the check images than it began. `work`: an existing folder.
    """
    check, train = divide(dense.splits.train)
    if launch.wanted(request):
        return launch.fit(
            student, dense.model, planned, recipe, request, train.corrupt, work, console, dense.splits.chosen
        )
    return fit(
        student, train, recipe, dense.transforms,
        teacher=dense.model, check=check, seed=request.seed, console=console,
        checkpoint=Checkpoint(work / cache.CHECKPOINT, console), lesson_bytes=request.lesson_bytes,
    )  # fmt: skip
