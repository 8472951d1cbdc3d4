"""Sparsify: train the dense-shaped model under gates that a schedule shuts one after another, then cut what is shut.

Only for schedules other than one-shot. Writes `plan.json`, `model.safetensors` and `sparsify.json`; calibration and
pruning go on from there as from a milder model of a gradual family.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgeprune import allocators, cache, criteria, obs, schedules, vit, weightfile
from edgeprune.artifact import PlannedModel, write_plan
from edgeprune.calibration import Calibration
from edgeprune.config import WIDTHS, Request
from edgeprune.console import SILENT, Console
from edgeprune.gates import Gates
from edgeprune.latency import devices
from edgeprune.latency.statistics import MIN_SAMPLES
from edgeprune.schedules import SHARE, Training
from edgeprune.stages import baseline, calibrate, profile, prune
from edgeprune.tuning import launch
from edgeprune.tuning.checkpoint import Checkpoint
from edgeprune.tuning.judge import divide
from edgeprune.tuning.loop import History, fit
from edgeprune.types import LatencyTable, Levels, Plan, Shape, to_json

IMAGES = 128  # calibration images that the criterion sees at each update


def median_share(anchor: Mapping[str, float], quantile: str) -> float:
    """Of the dense model's latency at the gated quantile, what the median is, of which the table is.

    anchor: of the profile. Where its samples are too few for that quantile, the highest that they suffice for says it.
    """
    known = next(q for q in (quantile, "p90", "p50") if anchor["samples"] >= MIN_SAMPLES.get(q, 0))
    return anchor["p50"] / anchor[known]


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    document, table = profile.read_profile(read["profile"])
    limit = request.latency.limit_ms(table.dense_ms)
    plan, history = vit.dense_plan(dense.sizes), History()
    model = copy.deepcopy(dense.model)
    if prune.dense_meets(request, document, limit):
        console.say("the dense model already meets the latency: nothing is trained")
    else:
        aim = prune.AIM if devices.machine(request.device).same(document) else prune.AIM_UNMEASURED
        prune.refuse_unreachable(request, table, limit, aim)
        target = aim * limit * median_share(document["anchor"], request.quantile)
        if launch.wanted(request):
            console.say(
                f"the schedule '{request.schedule}' trains in this process alone; the others join for the tuning after it"
            )
        gates = Gates(model)
        coach = schedules.get(request.schedule).coach(training(request, dense, gates, table, target, console))
        _, images = divide(dense.splits.train)
        recipe = schedules.share(request.card.finetune, SHARE)
        recipe = replace(recipe, epochs=(sum(recipe.epochs),), sizes=())  # a schedule runs once, from start to end
        history = fit(
            model,
            images,
            recipe,
            dense.transforms,
            teacher=dense.model,
            seed=request.seed,
            console=console,
            coach=coach,
            lesson_bytes=request.lesson_bytes,
            checkpoint=Checkpoint(out / cache.CHECKPOINT, console),
        )
        shutil.rmtree(out / cache.CHECKPOINT, ignore_errors=True)
        plan = coach.plan()
        gates.remove()
        kept = sum(row[0] for row in plan.shape), sum(row[1] for row in plan.shape)
        console.say(f"schedule '{request.schedule}': {kept[0]} heads and {kept[1]} neurons are left after {len(history.losses)} steps, "
                    f"{table.predict_ms(plan.shape):.2f} ms by the table")  # fmt: skip
    cut = vit.slice_model(model, plan)
    weightfile.write(cut, out / "model.safetensors")
    planned = PlannedModel.of(request.card, dense.sizes.num_classes, plan, table.predict_ms(plan.shape), limit)
    write_plan(planned, out / "plan.json")
    dense.splits.report(out, console)
    (out / "sparsify.json").write_text(json.dumps(to_json(history)))


def training(
    request: Request, dense: baseline.Dense, gates: Gates, table: LatencyTable, target_ms: float, console: Console
) -> Training:
    """What the schedule's coach is given; the criterion sees at most `IMAGES` calibration images."""
    criterion, allocator = criteria.get(request.criterion), allocators.get(request.allocator)
    size = request.card.calibration.batch_size
    batches = list(dense.splits.calibration.take(IMAGES).batches(size))
    teacher = copy.deepcopy(dense.model)  # training may move its own to another device
    found: list[Calibration] = []  # of the last scores

    def score() -> list[Levels]:
        model = vit.silence(gates.folded())
        evidence, statistics = calibrate.gather(
            request, model, dense.sizes, lambda: iter(batches), sum(len(y) for _, y in batches), SILENT
        )
        levels = criteria.score(criterion, evidence)
        moments = {at: (own.mean, obs.damped(own.covariance)) for at, own in statistics.moments.items()}
        pixels = [x for x, _ in batches]
        found[:] = [Calibration(levels, moments, pixels, statistics.weights or None, evidence.batches)]
        return levels

    def allocate(levels: list[Levels], budget_ms: float, bounds: Shape = dense.sizes.shape) -> Plan:
        if not found:
            score()
        # an update has no time to search
        task = allocators.task(
            replace(found[0], levels=levels), table, bounds, gates.folded(), teacher,
            0.0, request.seed, SILENT, tuple(dim for dim in request.dims if dim in WIDTHS),
        )  # fmt: skip
        return task.plan(allocator.prepare(task)(budget_ms - table.base_ms))

    return Training(
        model=gates.model, gates=gates, teacher=dense.model, table=table, target_ms=target_ms, score=score, allocate=allocate,
        batches=lambda: iter(batches), labelled=lambda: dense.splits.calibration.batches(size), seed=request.seed,
        console=console,
    )  # fmt: skip
