"""Search: the choice that diverges least when all sub-blocks are changed at once, looked for around the knapsack's.

KL(dense || pruned) on calibration images, of stitched and then of re-fitted models (`edgeprune.search`, which has the
papers). Where tokens may go, too, the knapsack has their number as a second state, and the error of every drop is
measured, as is that of int8 and of lower ranks, sub-block by sub-block. Needs activations, no labels. Cost:
`--search-seconds`, 60 by default; with 0 it is the knapsack alone.
The first choice has all of that time, later ones, for budgets nearby, a quarter of it and what was found before.
In the search the last quarter of the calibration images only judges re-fitted models; layer statistics and the refit of
what was found are of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune import products, vit
from edgeprune.allocators import Choose, Task, _forms, _tokens, knapsack
from edgeprune.compat import VisionTransformer
from edgeprune.search import Space, improve
from edgeprune.stitch import Choice, Database, Judge, RefitJudge, most_images
from edgeprune.types import PLAIN, Form

NEEDS = ("activations",)

JUDGED, JUDGED_LEAST = 256, 32  # calibration images that a judge of the search looks at, at most and at least
PROBED_LEAST = 12  # of those that tell what dropping tokens or int8 does at one block
PROBE_MACS = 6e12  # multiply-adds that this may take; half of them make errors too low (benchmarks/README.md)
PLANS = 40  # re-fitted plans that the search should have time for; it looks at fewer images rather
PROBED = 8  # images that tell how long one takes


DIMS = ("heads", "mlp", "depth", "tokens", "qk", "precision")


def prepare(task: Task) -> Choose:
    if task.seconds <= 0 and not task.drops and not task.forms:
        return knapsack.prepare(task)
    if task.forms:
        task = _forms.observed(task)
    judging = judges(task)
    if task.forms:
        task = _forms.weighed(task, probe(task, judging[0], _forms.count(task)))
    tokens = _tokens.tokens(task, probe(task, judging[0], task.sizes.blocks * (len(task.table.patches) - 1)))
    known: list[Choice] = []

    def choose(room_ms: float) -> Choice:
        seconds = task.seconds / 4 if known else task.seconds
        space = Space(task.errors, task.costs, room_ms, tokens, narrower(task))
        if task.seconds <= 0:
            return space.solve()
        with task.console.progress("search", seconds, "seconds") as advance:
            found = improve(space, *judging, seconds, task.seed, known=known, advance=advance)
        known.append(found.choice)
        task.console.say(
            f"search: {found.stitched} plans judged stitched, {found.refitted} re-fitted, in {found.seconds:.0f} s; divergence "
            f"from the dense model: {found.start:.4f} nats for the least sum of errors, {found.divergence:.4f} for the best found"
        )
        return found.choice

    return choose


def narrower(task: Task) -> list[list[NDArray[np.bool_]]]:
    """Which options drop no tokens, which are not int8, which are of full rank, and which are all of that; `Space.narrower`."""
    drops = task.drops or [(-1,) * len(own) for own in task.counts]
    found: list[list[NDArray[np.bool_]]] = []
    questions: list[Callable[[int, Form], bool]] = [
        lambda drop, form: drop < 0,
        lambda drop, form: not form.int8,
        lambda drop, form: not form.rank,
        lambda drop, form: drop < 0 and form == PLAIN,
    ]
    for wanted in questions:
        allowed = [np.array(list(map(wanted, *own))) for own in zip(drops, task.every_form, strict=True)]
        some = not all(own.all() for own in allowed)
        if some and not any(all(map(np.array_equal, allowed, other)) for other in found):
            found.append(allowed)
    return found


def judges(task: Task) -> tuple[Judge, RefitJudge]:
    """One that judges models as they are stitched, and one that re-fits them to some images and judges on others.

    The more a model costs, the fewer images each plan is judged on.
    """
    database = Database(
        task.model,
        task.levels,
        task.counts,
        task.found.moments,
        task.patches,
        task.reducer,
        task.forms,
        task.ranges,
        task.found.inputs,
    )
    images = task.found.images
    fit = images - max(1, images // 4)
    most = min(JUDGED, most_images(database.sizes) // 2)
    affordable = task.seconds / (2 * PLANS * seconds_per_image(task.teacher, task.found.pixels(0, PROBED)))
    count = int(min(max(affordable, JUDGED_LEAST), most))
    first, second = slice(0, min(fit, count)), slice(fit, min(fit + count, images))
    weights = None
    if task.found.weights:
        joined = {at: torch.cat(parts) for at, parts in task.found.weights.items()}
        weights = {at: (tokens[first], tokens[second]) for at, tokens in joined.items()}
    fitted, judged = (task.found.pixels(part.start, part.stop) for part in (first, second))
    shelf = task.found.shelf
    stitched = Judge(database, fitted, task.teacher, shelf)
    return stitched, RefitJudge(database, fitted, judged, weights, task.teacher, shelf)


def probe(task: Task, judge: Judge, models: int) -> Judge:
    """For many models that differ from the dense one at one block: a judge on fewer images where models are large.

    Counted in multiply-adds, not in seconds: without a search, the same table gives the same plan.
    """
    each = models / 2 * vit.macs(task.sizes, task.sizes.shape)  # half of the blocks come after
    count = max(int(PROBE_MACS / max(each, 1)), PROBED_LEAST)
    if count >= len(judge.wanted):
        return judge
    return Judge(judge.database, task.found.pixels(0, count), task.teacher, task.found.shelf)


@torch.no_grad()
def seconds_per_image(model: VisionTransformer, images: Tensor) -> float:
    """Of a forward pass here and now, which a re-fit costs about as well."""
    taken = []
    for _ in range(3):  # the first is slower
        began = time.monotonic()
        with products.rounded(), products.layers():
            model(images[:PROBED])
        taken.append(time.monotonic() - began)
    return min(taken) / len(images[:PROBED])
