"""SPDY: errors times coefficients, solved by the knapsack; the coefficients are searched for (arXiv 2201.13096).

    choice(c) = argmin sum_i c_i error_i  within the budget        c* = argmin loss(model of choice(c))

c starts at 1; 50 draws from U(0, 1) follow, then 50 steps of a local search that redraws a tenth of the best so
far. It is the allocator of ZipLM too (arXiv 2302.04089). Deviates: candidates are scored by the KL divergence from
the teacher on calibration images, without labels, not by their loss; the errors are the criterion's (SPDY assumes
quadratic ones, ZipLM measures them); SPDY draws 100 times and searches until 100 steps in a row failed, ZipLM tries
some thousand, here 101, or with `--search-seconds 0` the plain knapsack. They are re-fitted as the recovery `obs` does.
Coefficients serve budgets within a tenth of the dense cost of theirs. Needs activations. Cost: a forward pass per
candidate, over 256 images or, where that would take longer than `--search-seconds`, fewer, but no fewer than 32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeprune.allocators import Choose, Task, knapsack, nearby
from edgeprune.allocators.search import PROBED, seconds_per_image
from edgeprune.calibration import uncentred
from edgeprune.solve import solve
from edgeprune.stitch import Choice, Database, Judge
from edgeprune.types import FloatArray

NEEDS = ("activations",)
RANDOM, LOCAL = 50, 50  # candidates
REDRAWN = 0.1  # share of the coefficients that a local step draws again
IMAGES, LEAST = 256, 32  # that score a candidate, at most and at least


def prepare(task: Task) -> Choose:
    if task.seconds <= 0:
        return knapsack.prepare(task)
    database = Database(task.model, task.levels, task.counts, uncentred(task.found.moments))
    found = task.found
    affordable = int(task.seconds / ((1 + RANDOM + LOCAL) * seconds_per_image(task.teacher, found.pixels(0, PROBED))))
    judge = Judge(database, found.pixels(0, min(max(affordable, LEAST), IMAGES)), task.teacher, found.shelf)
    task.console.say(f"SPDY: {1 + RANDOM + LOCAL} candidates, each judged on {len(judge.wanted)} images")

    def search(room_ms: float) -> FloatArray:
        with task.console.progress("SPDY", RANDOM + LOCAL, "candidates") as advance:
            return coefficients(task, judge.divergence, room_ms, advance)

    searched = nearby(task, search)
    return lambda room_ms: weighed(task, searched(room_ms), room_ms)


def weighed(task: Task, weights: FloatArray, room_ms: float) -> Choice:
    return solve([w * errors for w, errors in zip(weights, task.errors, strict=True)], task.costs, room_ms)


def coefficients(
    task: Task,
    loss: Callable[[Choice], float],
    room_ms: float,
    advance: Callable[[float, str], None] = lambda amount, note: None,
) -> FloatArray:
    """Those found whose choice has the least loss; ones if nothing is better."""
    rng = np.random.default_rng(task.seed)
    best = np.ones(len(task.errors))
    least = loss(weighed(task, best, room_ms))
    for step in range(RANDOM + LOCAL):
        trial = rng.random(len(best))
        if step >= RANDOM:
            redrawn = rng.permutation(len(best)) < max(1, round(REDRAWN * len(best)))
            trial = np.where(redrawn, trial, best)
        now = loss(weighed(task, trial, room_ms))
        if now < least:
            best, least = trial, now
        advance(1, f"{least:.4f} nats")
    return best
