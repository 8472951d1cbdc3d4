"""Prune: the plan with the least error whose *measured* latency is within the limit and close to it.

Solve on the latency table, search on from there with stitched models, slice, export, measure turn by turn with
the dense model; where the measurement differs from the prediction, rescale the budget and solve again. Then the
survivors are re-fitted. Writes `plan.json`, `pruned.safetensors` and `search.json`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgeprune import polish, recovery, vit
from edgeprune.artifact import PlannedModel, write_plan
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import Infeasible
from edgeprune.latency import choose, device
from edgeprune.latency.clock import COPIES, Clock
from edgeprune.latency.statistics import quantile_ci_ms, quantile_ms
from edgeprune.search import Space, improve
from edgeprune.solve import solve
from edgeprune.stages import baseline, calibrate, export, profile, simplify
from edgeprune.stitch import Choice, Database, Judge, RefitJudge
from edgeprune.types import BlockPlan, FloatArray, LatencyTable, Levels, Plan, Quiet, Shape, to_json

AIM = 0.975  # of the limit: room for the measurement's own interval
AIM_UNMEASURED = 0.95  # where the table cannot be compared with the assembled model
CLOSE = 0.955  # a plan measured below this share of the limit leaves accuracy on the table
SAFE = 0.995  # of the limit, for the upper end of the interval
STEP = 0.97  # a budget found too large is lowered by no more than this at once
ATTEMPTS = 8
SEARCH_SECONDS = 60.0
JUDGED, JUDGED_LEAST = 256, 32  # calibration images that a judge of the search looks at, at most and at least
PLANS = 40  # re-fitted plans that the search should have time for; it looks at fewer images rather
PROBED = 8  # images that tell how long one takes
MEASURE_SECONDS = 25.0
MIN_ROUNDS = {"p50": 60, "p90": 100, "p99": 700}


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    document, table = profile.read_profile(read["profile"])
    limit = request.latency.limit_ms(table.dense_ms)
    tries: list[dict[str, object]] = []
    if dense_meets(request, document, limit):
        console.say(
            f"the dense model already meets {limit:.2f} ms ({request.quantile} {document['anchor'][request.quantile]:.2f} ms): nothing is pruned"
        )
        plan, predicted = vit.dense_plan(dense.sizes), table.dense_ms
        pruned = dense.model
    else:
        here = device.same(document)
        refuse_unreachable(request, table, limit, AIM if here else AIM_UNMEASURED)
        found = calibrate.read(read["calibrate"], dense, request.card.calibration.batch_size)
        model, bounds = baseline.parent(dense, read)
        planner = Planner(request, table, found, model, bounds.shape, dense.model, console)
        if here:
            anchor, quiet = read["baseline"] / "dense.onnx", Quiet.of(document, table.runtime)
            plan, predicted, tries = search(request, dense, anchor, table, quiet, planner, limit, console)
        else:
            console.say(
                f"nothing can be measured here: the solver aims at {AIM_UNMEASURED:.0%} of the limit, room for the table's error"
            )
            plan = planner.plan(AIM_UNMEASURED * limit)
            predicted = table.predict_ms(plan.shape)
        pruned = recovery.survivors(model, plan, found.moments)
        same = model is dense.model  # a tuned parent's units are no longer the dense model's
        accepted, tried = recovery.sequential(dense.model, pruned, found.batches, found.weights, plan if same else None)
        console.say(
            f"refit on the pruned model's own inputs: {accepted} of {tried} sub-blocks came closer on held-out images"
        )
        if request.polish:
            with console.progress("polishing", dense.sizes.blocks, "blocks") as advance:
                polished = polish.polish(dense.model, pruned, found.batches, found.weights, request.polish, advance)
            console.say(f"polished: {polished[0]} of {polished[1]} blocks came closer on held-out images")
    kept = plan.shape
    console.say(f"plan: {sum(h for h, _ in kept)} of {sum(h for h, _ in dense.sizes.shape)} heads and "
                f"{sum(n for _, n in kept)} of {sum(n for _, n in dense.sizes.shape)} neurons kept")  # fmt: skip
    console.detail(" ".join(f"{h}h/{n}n" for h, n in kept))
    save_file({k: v.contiguous() for k, v in pruned.state_dict().items()}, out / "pruned.safetensors")
    planned = PlannedModel(
        request.card.architecture, request.card.kwargs, dense.sizes.num_classes, plan, predicted, limit
    )
    write_plan(planned, out / "plan.json")
    (out / "search.json").write_text(json.dumps(to_json({"limit_ms": limit, "tries": tries}), indent=1))


def dense_meets(request: Request, document: dict[str, dict[str, float]], limit: float) -> bool:
    """Whether the dense model needs no pruning at the gated quantile, with room for noise."""
    return document["anchor"][request.quantile] <= AIM * limit


def lowest_ms(table: LatencyTable) -> float:
    """The lowest latency that the solver can be asked for: what always stays, and no less than the empty model takes."""
    return max(table.empty_ms, table.base_ms)


def refuse_unreachable(request: Request, table: LatencyTable, limit: float, aim: float) -> None:
    """Raise Infeasible, naming the lowest reachable latency, when `aim` times the limit is below it."""
    lowest = lowest_ms(table)
    if limit * aim < lowest:
        raise Infeasible(f"{limit:.2f} ms cannot be reached: the lowest that {request.card.name} can reach on {request.target.name} "
                         f"is about {lowest / aim:.2f} ms; ask for more, or start from a smaller model")  # fmt: skip


def options(
    levels: list[Levels], table: LatencyTable, bounds: Shape
) -> tuple[list[FloatArray], list[FloatArray], list[tuple[int, ...]]]:
    """Per sub-block: errors and costs `[options]` in milliseconds, and how many units each option keeps.

    bounds: the (heads, neurons) that each block still has; nothing above them is an option.
    """
    errors, costs, counts = [], [], []
    for level in levels:
        attn = level.kind == "attn"
        grid = tuple(range(len(table.attn_ms))) if attn else table.mlp_widths
        grid = tuple(kept for kept in grid if kept <= bounds[level.block][0 if attn else 1])
        errors.append(np.array([level.errors[len(level.order) - kept] for kept in grid]))
        costs.append(np.asarray(table.attn_ms if attn else table.mlp_ms)[: len(grid)])
        counts.append(grid)
    return errors, costs, counts


class Planner:
    """Plans for a latency budget: the additive optimum, and what a search finds from there.

    The first plan has the whole of the request's search time, later ones, for budgets nearby, a quarter of it
    and what was found before. The last quarter of the calibration images only judges re-fitted models.
    """

    def __init__(
        self,
        request: Request,
        table: LatencyTable,
        found: calibrate.Calibration,
        model: VisionTransformer,
        bounds: Shape,
        teacher: VisionTransformer,
        console: Console,
    ) -> None:
        """model: what is pruned, in dense shape, of which `bounds` is still there; teacher: what it shall stay close to."""
        self.levels, self.table, self.console = found.levels, table, console
        self.seconds = SEARCH_SECONDS if request.search_seconds is None else request.search_seconds
        self.seed = request.seed
        self.errors, self.costs, self.counts = options(found.levels, table, bounds)
        self.known: list[Choice] = []
        if self.seconds > 0:
            database = Database(model, found.levels, self.counts, found.moments)
            self.judges = judges(database, found, teacher, self.seconds)

    def plan(self, budget_ms: float) -> Plan:
        """The best plan that the table predicts within `budget_ms`; Infeasible when there is none."""
        room = budget_ms - self.table.base_ms
        if self.seconds <= 0:
            return self.of(solve(self.errors, self.costs, room))
        seconds = self.seconds / 4 if self.known else self.seconds
        space = Space(self.errors, self.costs, room)
        with self.console.progress("search", seconds, "seconds") as advance:
            found = improve(space, *self.judges, seconds, self.seed, known=self.known, advance=advance)
        self.known.append(found.choice)
        self.console.say(
            f"search: {found.stitched} plans judged stitched, {found.refitted} re-fitted, in {found.seconds:.0f} s; divergence "
            f"from the dense model: {found.start:.4f} nats for the least sum of errors, {found.divergence:.4f} for the best found"
        )
        return self.of(found.choice)

    def of(self, choice: Choice) -> Plan:
        kept = [
            level.kept(counts[option]) for level, counts, option in zip(self.levels, self.counts, choice, strict=True)
        ]
        return Plan(tuple(BlockPlan(kept[i], kept[i + 1]) for i in range(0, len(kept), 2)))


def judges(
    database: Database, found: calibrate.Calibration, teacher: VisionTransformer, seconds: float
) -> tuple[Judge, RefitJudge]:
    """One that judges models as they are stitched, and one that re-fits them to some images and judges on others.

    seconds: of the search; the more a model costs, the fewer images each plan is judged on.
    """
    images = torch.cat(found.batches)
    fit = len(images) - max(1, len(images) // 4)
    most = min(JUDGED, Judge.most_images(database) // 2)
    affordable = seconds / (2 * PLANS * seconds_per_image(teacher, images))
    count = int(min(max(affordable, JUDGED_LEAST), most))
    first, second = slice(0, min(fit, count)), slice(fit, fit + count)
    weights = None
    if found.weights:
        joined = {at: torch.cat(parts) for at, parts in found.weights.items()}
        weights = {at: (tokens[first], tokens[second]) for at, tokens in joined.items()}
    stitched = Judge(database, images[first], teacher)
    return stitched, RefitJudge(database, images[first], images[second], weights, teacher)


@torch.no_grad()
def seconds_per_image(model: VisionTransformer, images: Tensor) -> float:
    """Of a forward pass here and now, which a re-fit costs about as well."""
    taken = []
    for _ in range(3):  # the first is slower
        began = time.monotonic()
        model(images[:PROBED])
        taken.append(time.monotonic() - began)
    return min(taken) / len(images[:PROBED])


def search(
    request: Request,
    dense: baseline.Dense,
    anchor: Path,
    table: LatencyTable,
    quiet: Quiet,
    planner: Planner,
    limit: float,
    console: Console,
) -> tuple[Plan, float, list[dict[str, object]]]:
    """Solve, measure, rescale; returns the plan, its predicted latency in ms, and what was tried.

    Raises Infeasible when no plan was measured within the limit.
    """
    lowest = lowest_ms(table)
    console.say(f"margin: the solver aims at {AIM:.1%} of the limit, so that the measurement's interval fits below it")
    tries: list[dict[str, object]] = []
    best: tuple[float, Plan] | None = None
    seen: dict[Shape, float] = {}
    budget = AIM * limit
    low, high = lowest, table.dense_ms  # budgets known to be met, known to be too large
    with choose.clock(request.conditions, table.runtime, table.threads) as clock:
        clock.load("dense", anchor, COPIES)
        for attempt in range(1, ATTEMPTS + 1):
            plan = planner.plan(budget)
            predicted = table.predict_ms(plan.shape)
            if plan.shape in seen:
                if best is not None or predicted <= lowest:
                    break
                high = budget = predicted * (1 - 1e-9)  # the table's steps are coarse: the next cheaper plan
                continue
            measured, ci = measure(clock, dense, plan, request, quiet)
            seen[plan.shape] = measured
            tries.append(
                {
                    "budget_ms": budget,
                    "predicted_ms": predicted,
                    "measured_ms": measured,
                    "ci_ms": ci,
                    "shape": plan.shape,
                }
            )
            console.say(f"try {attempt}: predicted {predicted:.2f} ms, measured {request.quantile} {measured:.2f} ms "
                        f"[{ci[0]:.2f}, {ci[1]:.2f}], limit {limit:.2f} ms")  # fmt: skip
            met = measured <= 0.992 * limit and ci[1] <= limit
            if met and (best is None or measured > best[0]):
                best = (measured, plan)
            if met and measured >= CLOSE * limit:
                break
            low, high = (max(low, budget), high) if met else (low, min(high, budget))
            # the interval must fit below the limit too, and it is wide where the machine is noisy
            rescaled = budget * min(AIM * limit / measured, SAFE * limit / ci[1])
            budget = rescaled if low < rescaled < high else max((low + high) / 2, STEP * high)
    if best is None:
        raise Infeasible(f"no plan was measured within {limit:.2f} ms; the fastest took {min(seen.values()):.2f} ms, and the lowest "
                         f"reachable is about {lowest / AIM:.2f} ms; ask for more, or start from a smaller model")  # fmt: skip
    return best[1], table.predict_ms(best[1].shape), tries


def measure(
    clock: Clock, dense: baseline.Dense, plan: Plan, request: Request, quiet: Quiet
) -> tuple[float, tuple[float, float]]:
    """The plan's latency in ms at the gated quantile, with its interval, relative to the loaded `dense`."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        exported, path = Path(folder) / "exported.onnx", Path(folder) / "candidate.onnx"
        export.to_onnx(vit.slice_model(dense.model, plan), dense.sizes.image, exported)
        simplify.simplify(exported, path)
        clock.load("candidate", path, COPIES)
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
    return value, interval
