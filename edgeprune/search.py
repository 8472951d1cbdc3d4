"""Search beyond the additive model: which choice of levels diverges least, when all sub-blocks are changed at once.

Sums of errors ignore that one sub-block can make up for another, or needs it. So candidates are stitched and
judged by the KL divergence they really have on calibration images. Two kinds of moves propose them: errors times
random coefficients, solved again (SPDY, arXiv 2201.13096, section 3.2), and an exchange of latency between two
sub-blocks (DarwinLM, arXiv 2502.07780, with the latency table in place of "same type"). The best few are judged
again on other images, so that the search does not fit those it looks at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.solve import solve
from edgeprune.stitch import Choice, Judge
from edgeprune.types import FloatArray

FINALISTS = 8  # choices that the second images decide between
MUTATED = 0.25  # share of the coefficients that a proposal draws anew
SPREAD = 1.0  # standard deviation of their logarithm
STALE = 200  # proposals in a row without a new choice after which there is nothing left to find
BUCKETS = 2_000  # for proposals; the budget is kept whatever the number


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    choice: Choice
    start: float  # divergence of the additive optimum on the second images, in nats
    divergence: float  # of the choice found, there
    judged: int  # how many choices were stitched
    seconds: float


def improve(
    errors: Sequence[FloatArray],
    costs: Sequence[FloatArray],
    budget_ms: float,
    judge: Judge,
    second: Judge,
    seconds: float,
    seed: int,
    *,
    known: Sequence[Choice] = (),
    advance: Callable[[float, str], None] = lambda amount, note: None,
) -> Found:
    """The choice with the least divergence found within `seconds`, its table cost within `budget_ms`.

    Shapes: `errors[i]` and `costs[i]` are `[options of sub-block i]`. known: good choices of earlier searches;
    those within the budget are starts too. Raises Infeasible when no choice is within the budget.
    """
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    additive = solve(errors, costs, budget_ms)
    starts = {additive, *(choice for choice in known if _cost(costs, choice) <= budget_ms)}
    found = {choice: judge.divergence(choice) for choice in starts}
    best = min(found, key=found.__getitem__)
    judge.keep(best)
    coefficients = np.ones(len(errors))
    spent, stale = 0.0, 0
    while stale < STALE and (elapsed := time.monotonic() - began) < seconds:
        advance(elapsed - spent, f"{len(found)} judged, {found[best]:.4f} nats")
        spent = elapsed
        mutated = coefficients
        if rng.random() < 0.5:
            mutated = _mutate(coefficients, rng)
            choice = solve([c * e for c, e in zip(mutated, errors, strict=True)], costs, budget_ms, buckets=BUCKETS)
        else:
            choice = exchange(errors, costs, budget_ms, best, rng)
        stale = stale + 1 if choice in found else 0
        if stale:
            continue
        found[choice] = judge.divergence(choice)
        if found[choice] < found[best]:
            best, coefficients = choice, mutated
            judge.keep(best)
    ranked = sorted(found, key=found.__getitem__)[:FINALISTS]
    finals = {choice: second.divergence(choice) for choice in {*ranked, additive}}
    # Both sets of images are of one kind: a finalist is judged by all of them.
    winner = min(finals, key=lambda choice: finals[choice] + found[choice])
    return Found(winner, finals[additive], finals[winner], len(found), time.monotonic() - began)


def exchange(
    errors: Sequence[FloatArray],
    costs: Sequence[FloatArray],
    budget_ms: float,
    choice: Choice,
    rng: np.random.Generator,
) -> Choice:
    """A neighbour within the budget: one sub-block at another level, another giving or taking the latency.

    After the two, whatever latency is left goes where it lowers the summed errors most.
    """
    new = list(choice)
    first, second = rng.choice(len(new), size=2, replace=False)
    new[first] = _other(len(errors[first]), new[first], rng)
    room = budget_ms - (_cost(costs, new) - costs[second][new[second]])
    fitting = np.flatnonzero(costs[second] <= room)
    if not len(fitting):
        return choice
    new[second] = int(fitting[errors[second][fitting].argmin()])
    return _fill(errors, costs, budget_ms, new)


def _fill(errors: Sequence[FloatArray], costs: Sequence[FloatArray], budget_ms: float, choice: Sequence[int]) -> Choice:
    new = list(choice)
    while True:
        room = budget_ms - _cost(costs, new)
        gains = []
        for i, at in enumerate(new):
            fitting = np.flatnonzero(costs[i] <= costs[i][at] + room)
            option = int(fitting[errors[i][fitting].argmin()])
            gains.append((float(errors[i][at] - errors[i][option]), i, option))
        gain, i, option = max(gains)
        if gain <= 0:
            return tuple(new)
        new[i] = option


def _other(options: int, at: int, rng: np.random.Generator) -> int:
    """Another option, near ones more often."""
    others = np.array([option for option in range(options) if option != at])
    weights = 1.0 / np.abs(others - at)
    return int(rng.choice(others, p=weights / weights.sum()))


def _mutate(coefficients: FloatArray, rng: np.random.Generator) -> FloatArray:
    count = max(1, round(MUTATED * len(coefficients)))
    drawn = rng.choice(len(coefficients), size=count, replace=False)
    new = coefficients.copy()
    new[drawn] = np.exp(SPREAD * rng.standard_normal(count))
    return new


def _cost(costs: Sequence[FloatArray], choice: Sequence[int]) -> float:
    return float(sum(cost[option] for cost, option in zip(costs, choice, strict=True)))
