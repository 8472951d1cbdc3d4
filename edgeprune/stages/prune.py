"""Prune: the plan with the least error whose *measured* latency is within the limit and close to it.

Ask the allocator, slice, export, measure turn by turn with the dense model; where the measurement differs from the
latency table's prediction, rescale the budget and ask again. Then what is left recovers. Writes `plan.json`, `pruned.safetensors` and `search.json`.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from edgeprune import allocators, polish, quantisation, recoveries, recovery, structure, tasks, vit, weightfile
from edgeprune.artifact import PlannedModel, write_plan
from edgeprune.calibration import Calibration
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import Infeasible, UsageError
from edgeprune.latency import choose, devices
from edgeprune.latency.clock import COPIES, Clock
from edgeprune.latency.statistics import MIN_SAMPLES, quantile_ci_ms, quantile_ms
from edgeprune.recoveries import Damage
from edgeprune.report import digits, ms
from edgeprune.shelf import Shelf
from edgeprune.stages import baseline, calibrate, export, profile, simplify
from edgeprune.types import LatencyTable, Plan, Quiet, Shape, int8, left, rank, to_json

AIM = 0.975  # of the limit: room for the measurement's own interval
AIM_UNMEASURED = 0.95  # where the table cannot be compared with the assembled model
MET = 0.992  # of the limit: what a plan within it was measured at, at most; its interval ends within the limit, too
CLOSE = 0.955  # a plan measured below this share of the limit leaves accuracy on the table
SAFE = 0.995  # of the limit, for the upper end of the interval
STEP = 0.97  # a budget found too large is lowered by no more than this at once
ATTEMPTS = 8
SEARCH_SECONDS = 60.0
MEASURE_SECONDS = 25.0
JUDGED = 128  # calibration images on which int8 is compared with float
MIN_ROUNDS = {"p50": 60, "p90": 100, "p99": 700}


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    document, table = profile.read_profile(read["profile"])
    limit = request.latency.limit_ms(table.dense_ms)
    tries: list[dict[str, object]] = []
    if dense_meets(request, document, limit):
        console.say(
            f"the dense model already meets {ms(limit)} ({request.quantile} {ms(document['anchor'][request.quantile])}): nothing is pruned"
        )
        plan, predicted = vit.dense_plan(dense.sizes), table.dense_ms
        pruned = dense.model
    else:
        here = devices.machine(request.device).same(document)
        refuse_unreachable(request, table, limit, AIM if here else AIM_UNMEASURED)
        shelf = Shelf(request.shelf_bytes, out)
        found = calibrate.read(read["calibrate"], dense, request.card.calibration.batch_size, shelf)
        model, bounds = baseline.parent(dense, read)
        plans = planner(request, dense, table, found, model, bounds.shape, limit, console)
        if here:
            anchor, quiet = read["baseline"] / "dense.onnx", Quiet.of(document, table.runtime)
            plan, predicted, tries = search(request, dense, anchor, table, quiet, plans, limit, console)
        else:
            console.say(
                f"nothing can be measured here: the solver aims at {AIM_UNMEASURED:.0%} of the limit, room for the table's error"
            )
            plan = plans(AIM_UNMEASURED * limit)
            predicted = table.predict_ms(plan.shape)
        pruned = recovered(request, dense, model, plan, found, shelf, console)
    kept = plan.shape
    console.say(f"plan: {sum(row[0] for row in kept)} of {sum(row[0] for row in dense.sizes.shape)} heads and "
                f"{sum(row[1] for row in kept)} of {sum(row[1] for row in dense.sizes.shape)} neurons kept{tokens_kept(kept)}{ranks_kept(kept)}")  # fmt: skip
    console.detail(" ".join(map(in_words, kept)))
    weightfile.write(pruned, out / "pruned.safetensors")
    write_plan(PlannedModel.of(request.card, dense.sizes.num_classes, plan, predicted, limit), out / "plan.json")
    (out / "search.json").write_text(json.dumps(to_json({"limit_ms": limit, "tries": tries}), indent=1))


def planner(
    request: Request,
    dense: baseline.Dense,
    table: LatencyTable,
    found: Calibration,
    model: VisionTransformer,
    bounds: Shape,
    limit: float,
    console: Console,
) -> Callable[[float], Plan]:
    """The allocator asked for, as a function from milliseconds by the table to the plan; its Infeasible names `limit`."""
    dims = vit.choosable(request.dims, dense.sizes)
    seconds = SEARCH_SECONDS if request.search_seconds is None else request.search_seconds
    task = allocators.task(
        found, table, bounds, model, dense.model, seconds, request.seed, console, dims, request.reducer
    )
    allocate = allocators.get(request.allocator).prepare(task)

    def plans(budget_ms: float) -> Plan:
        try:
            return task.plan(allocate(budget_ms - table.base_ms))
        except Infeasible as error:
            raise Infeasible(
                f"{ms(limit)} cannot be reached when nothing but {', '.join(request.dims)} may be chosen: the table's lowest is "
                f"about {ms(table.base_ms + task.least_ms)}; allow more --dims, or ask for more"
            ) from error

    return plans


def recovered(
    request: Request,
    dense: baseline.Dense,
    model: VisionTransformer,
    plan: Plan,
    found: Calibration,
    shelf: Shelf,
    console: Console,
) -> VisionTransformer:
    """`model` cut to the plan, its weights recovered without training. Raises UsageError where they are not finite."""
    damage = Damage(dense.model, model, plan, found, request.seed, console)
    pruned = recovery.lower_ranks(dense.sizes, recoveries.get(request.recovery).recover(damage), plan, found)
    if request.polish:
        with console.progress("polishing", dense.sizes.blocks, "blocks") as advance:
            polished = polish.polish(dense.model, pruned, found.batches, found.weights, request.polish, advance, shelf)
        console.say(f"polished: {polished[0]} of {polished[1]} blocks came closer on held-out images")
    quantise(pruned, plan, found, dense.model, console)
    if broken := [k for k, v in pruned.state_dict().items() if not bool(v.isfinite().all())]:
        raise UsageError(
            f"stage prune: the recovery '{request.recovery}' left NaN or infinity in {', '.join(broken[:4])}; choose another --recovery"
        )
    return pruned


def tokens_kept(shape: Shape) -> str:
    """Where the plan drops tokens, in words; "" where it does not."""
    drops = [f"{left(row)} patches after the attention of block {i}" for i, row in enumerate(shape) if left(row)]
    return f"; {', '.join(drops)}" if drops else ""


def ranks_kept(shape: Shape) -> str:
    """Ranks of heads where the plan lowers some, in words; "" where it does not."""
    lower = Counter(filter(None, map(rank, shape)))
    return (
        f"; heads of rank {', '.join(f'{n} in {count} blocks' for n, count in sorted(lower.items()))}" if lower else ""
    )


def in_words(row: tuple[int, ...]) -> str:
    """A row of a shape: `3h/512n/98p/int8:mlp/rank16`."""
    patches, kinds, lower = left(row), "+".join(int8(row)), rank(row)
    parts = [f"{row[0]}h/{row[1]}n", f"{patches}p" if patches else "", f"int8:{kinds}" if kinds else "", f"rank{lower}" if lower else ""]  # fmt: skip
    return "/".join(filter(None, parts))


def quantise(
    pruned: VisionTransformer, plan: Plan, found: Calibration, teacher: VisionTransformer, console: Console
) -> None:
    """Make what the plan has in int8 int8, in place, its ranges from the calibration images."""
    if not plan.quantised:
        return
    quantisation.mark(pruned, plan)
    with console.busy("ranges of activations"):
        quantisation.calibrate(pruned, found.batches)
        images = found.pixels(0, min(found.images, JUDGED))
        with torch.no_grad():
            wanted, task = teacher(images), tasks.of(teacher)
            rounded = float(tasks.divergence(pruned(images), wanted, task)) / len(images)
            with quantisation.exactly(pruned):
                exact = float(tasks.divergence(pruned(images), wanted, task)) / len(images)
    parts = [kind for block in plan.blocks for kind in block.int8]
    console.say(
        f"int8: {parts.count('attn')} attentions and {parts.count('mlp')} MLPs; divergence from the dense model "
        f"{exact:.4f} nats in float, {rounded:.4f} with them"
    )


def dense_meets(request: Request, document: dict[str, dict[str, float]], limit: float) -> bool:
    """Whether the dense model needs no pruning at the gated quantile, with room for noise; not known from too few samples."""
    anchor = document["anchor"]
    return anchor["samples"] >= MIN_SAMPLES.get(request.quantile, 0) and anchor[request.quantile] <= AIM * limit


def lowest_ms(table: LatencyTable) -> float:
    """The lowest latency that the solver can be asked for: what always stays, and no less than the empty model takes."""
    return max(table.empty_ms, table.base_ms)


def refuse_unreachable(request: Request, table: LatencyTable, limit: float, aim: float) -> None:
    """Raise Infeasible, naming the lowest reachable latency, when `aim` times the limit is below it."""
    lowest = lowest_ms(table)
    if limit * aim < lowest:
        raise Infeasible(f"{ms(limit)} cannot be reached: the lowest that {request.card.name} can reach on {request.target.name} "
                         f"is about {ms(lowest / aim)}; ask for more, or start from a smaller model")  # fmt: skip


def search(
    request: Request,
    dense: baseline.Dense,
    anchor: Path,
    table: LatencyTable,
    quiet: Quiet,
    plans: Callable[[float], Plan],
    limit: float,
    console: Console,
) -> tuple[Plan, float, list[dict[str, object]]]:
    """Plan, measure, rescale; returns the plan, its predicted latency in ms, and what was tried.

    Raises Infeasible when no plan was measured within the limit.
    """
    lowest = lowest_ms(table)
    console.say(f"margin: the solver aims at {AIM:.1%} of the limit, so that the measurement's interval fits below it")
    tries: list[dict[str, object]] = []
    best: tuple[float, Plan] | None = None  # the slowest within the limit
    fastest: tuple[float, Plan] | None = None
    seen: dict[Shape, float] = {}
    budget = AIM * limit
    low, high = lowest, table.dense_ms  # budgets known to be met, known to be too large
    with choose.clock(request.conditions, table.runtime, table.threads, console) as clock:
        clock.load("dense", anchor, COPIES, values=False)
        for attempt in range(1, ATTEMPTS + 1):
            plan = plans(budget)
            predicted = table.predict_ms(plan.shape)
            if plan.shape in seen:
                if best is not None or predicted <= lowest:
                    break
                high = budget = predicted * (1 - 1e-9)  # the table's steps are coarse: the next cheaper plan
                continue
            with console.busy("timing the plan"):
                measured, ci, calm = measure(clock, dense, plan, request, quiet)
            seen[plan.shape] = measured
            if fastest is None or measured < fastest[0]:
                fastest = measured, plan
            tries.append(
                {
                    "budget_ms": budget,
                    "predicted_ms": predicted,
                    "measured_ms": measured,
                    "ci_ms": ci,
                    "calm": calm,
                    "shape": plan.shape,
                }
            )
            console.say(f"try {attempt}: predicted {ms(predicted)}, measured {request.quantile} {ms(measured)} "
                        f"[{digits(ci[0])}, {digits(ci[1])}], limit {ms(limit)}")  # fmt: skip
            met = measured <= MET * limit and ci[1] <= limit
            if met and (best is None or measured > best[0]):
                best = (measured, plan)
            if met and measured >= CLOSE * limit:
                break
            low, high = (max(low, budget), high) if met else (low, min(high, budget))
            # the interval must fit below the limit too, and it is wide where the machine is noisy
            rescaled = budget * min(AIM * limit / measured, SAFE * limit / ci[1])
            budget = rescaled if low < rescaled < high else max((low + high) / 2, STEP * high)
    if best is None and not any(one["calm"] for one in tries):
        console.warn(
            "the machine was never calm while plans were measured, and none of them was within the limit: the fastest goes on, "
            "and the stage validate decides"
        )
        best = fastest
    if best is None:
        raise Infeasible(f"no plan was measured within {ms(limit)}; the fastest took {ms(min(seen.values()))}, and the lowest "
                         f"reachable is about {ms(lowest / AIM)}; ask for more, or start from a smaller model")  # fmt: skip
    return best[1], table.predict_ms(best[1].shape), tries


def measure(
    clock: Clock, dense: baseline.Dense, plan: Plan, request: Request, quiet: Quiet
) -> tuple[float, tuple[float, float], bool]:
    """The plan's latency in ms at the gated quantile, its interval, and whether the machine was calm; relative to `dense`."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        exported, path = Path(folder) / "exported.onnx", Path(folder) / "candidate.onnx"
        model = structure.of(dense.model, plan)
        quantisation.pretend(model)
        export.to_onnx(model, dense.sizes.image, exported)
        simplify.simplify(exported, path, model)
        clock.load("candidate", path, COPIES, values=False)
        rounds = MIN_ROUNDS[request.quantile]
        measured = clock.measure(
            ["candidate"], "dense", ci=0.0025, min_rounds=rounds, budget_s=MEASURE_SECONDS, quiet=quiet
        )["candidate"]
        clock.unload("candidate")
    value = quantile_ms(measured, quiet.ms, request.quantile)
    interval = quantile_ci_ms(measured, quiet.ms, request.quantile)
    if value is None or interval is None:
        raise Infeasible(
            f"{request.quantile} needs more samples than {MEASURE_SECONDS:.0f} s give for this model; gate on p50"
        )
    return value, interval, measured.calm
