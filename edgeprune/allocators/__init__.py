"""How much of every sub-block is kept. One file per allocator; the file name is its name.

An allocator is a module with one function, `prepare(task)`, which returns `choose(room_ms) -> Choice`: for every
sub-block which of its options is taken, with a summed cost in the measured latency table of at most `room_ms`
milliseconds. What all budgets share is done in `prepare`. Raises Infeasible when nothing is cheap enough. Which units
stay is the criterion's order; `NEEDS` names what else is looked at. Heads, neurons and whole sub-blocks are chosen by all; one
that can leave some of these alone, or chooses more, says so in `DIMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, cast

import numpy as np
from torch import Tensor

from edgeprune import modules, vit
from edgeprune.calibration import Calibration
from edgeprune.compat import VisionTransformer
from edgeprune.config import WIDTHS
from edgeprune.console import Console
from edgeprune.errors import Infeasible
from edgeprune.stitch import Choice
from edgeprune.types import PLAIN, REDUCER, BlockPlan, FloatArray, Form, LatencyTable, Levels, Plan, Ranges, Shape

DEFAULT = "search"
HALVINGS = 30  # of a knob's interval: finer than any table's steps
PER_CLASS = 10  # labelled images, for methods that tell classes apart
NEARBY = 0.1  # share of the dense cost within which budgets share what was searched or trained for one of them

Choose = Callable[[float], Choice]
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What an allocator chooses from. Sub-blocks are in the order attn 0, mlp 0, attn 1, ..."""

    levels: list[Levels]
    errors: list[FloatArray]  # per sub-block `[options]`
    costs: list[FloatArray]  # per sub-block `[options]`, in milliseconds
    counts: list[tuple[int, ...]]  # per sub-block: how many units each option keeps, ascending from 0
    table: LatencyTable
    model: VisionTransformer  # what is pruned, in dense shape
    teacher: VisionTransformer  # what it shall stay close to
    found: Calibration
    seconds: float  # for those that search; 0 = not at all
    seed: int
    console: Console
    dims: tuple[str, ...] = WIDTHS  # what may be chosen
    reducer: str = REDUCER
    drops: list[tuple[int, ...]] = field(
        default_factory=list
    )  # per sub-block `[options]`, see `solve.Tokens`; [] = none
    forms: list[tuple[Form, ...]] = field(default_factory=list)  # per sub-block `[options]`; [] = all of them plain
    ranges: Ranges = field(default_factory=dict)  # of the dense model's inputs, where some are int8

    @property
    def sizes(self) -> vit.Anatomy:
        return vit.anatomy(self.model)

    @property
    def dense(self) -> Choice:
        """The choice that keeps all that is there."""
        return tuple(own.index(max(own)) for own in self.counts)

    def cost(self, choice: Sequence[int]) -> float:
        """In milliseconds."""
        return float(sum(cost[option] for cost, option in zip(self.costs, choice, strict=True)))

    @property
    def least_ms(self) -> float:
        """About the lowest cost of any choice: every option at its cheapest, with the fewest tokens where some may go."""
        if not self.drops:
            return float(sum(cost.min() for cost in self.costs))
        return float(sum((cost * own[0]).min() for cost, own in zip(self.costs, self.token_shares, strict=True)))

    @property
    def token_shares(self) -> list[FloatArray]:
        """Per sub-block `[levels, options]`: of its costs with so many tokens."""
        pairs = zip(self.levels, self.every_form, strict=True)
        return [np.stack([self.table.share(level.kind, form) for form in own], axis=1) for level, own in pairs]

    def nearest(self, kept: Sequence[float]) -> Choice:
        """The options that keep about so many units of every sub-block."""
        pairs = zip(self.counts, kept, strict=True)
        return tuple(int(np.abs(np.asarray(own) - count).argmin()) for own, count in pairs)

    def scores(self, at: int) -> FloatArray:
        """What each unit of sub-block `at` is worth, in the order in which units go: `[units]`."""
        return np.diff(self.levels[at].errors)

    def plan(self, choice: Sequence[int]) -> Plan:
        parts = zip(self.levels, self.counts, choice, strict=True)
        kept = [level.kept(own[option]) for level, own, option in parts]
        left = [own[option] for own, option in zip(self.patches, choice, strict=True)]
        forms = [own[option] for own, option in zip(self.every_form, choice, strict=True)]
        blocks = []
        for i in range(0, len(kept), 2):
            kinds = tuple(kind for kind, form in zip(vit.KINDS, forms[i : i + 2], strict=True) if form.int8)
            blocks.append(BlockPlan(kept[i], kept[i + 1], left[i], kinds, forms[i].rank))
        return Plan(tuple(blocks), reducer=self.reducer)

    @property
    def every_form(self) -> list[tuple[Form, ...]]:
        """Per sub-block `[options]`: how it computes."""
        return self.forms or [(PLAIN,) * len(own) for own in self.counts]

    @property
    def patches(self) -> list[list[int | None]]:
        """Per sub-block `[options]`: how many patches stay, None = all that come in."""
        if not self.drops:
            return [[None] * len(own) for own in self.counts]
        return [[None if drop < 0 else self.table.patches[drop] for drop in own] for own in self.drops]


class Allocator(Protocol):
    __name__: str
    __doc__: str | None
    NEEDS: tuple[str, ...]

    def prepare(self, task: Task) -> Choose: ...


def names() -> list[str]:
    return modules.names("allocator")


def get(name: str) -> Allocator:
    """The allocator module; UsageError with "did you mean" for an unknown name."""
    return cast(Allocator, modules.get("allocator", name))


def task(
    found: Calibration,
    table: LatencyTable,
    bounds: Shape,
    model: VisionTransformer,
    teacher: VisionTransformer,
    seconds: float,
    seed: int,
    console: Console,
    dims: tuple[str, ...] = WIDTHS,
    reducer: str = REDUCER,
) -> Task:
    """bounds: the (heads, neurons) that each block still has; nothing above them is an option. Else as in `Task`."""
    errors, costs, counts = options(found.levels, table, bounds, dims)
    made = Task(
        found.levels, errors, costs, counts, table, model, teacher, found, seconds, seed, console, dims, reducer
    )
    priced = table.priced(dims)
    made = with_forms(made, int8="precision" in priced, ranks="qk" in priced)
    return with_drops(made) if "tokens" in priced else made


def with_forms(task: Task, *, int8: bool, ranks: bool) -> Task:
    """The same where every sub-block that stays may also be int8, and its heads of a lower rank, where that is cheaper.

    The errors of these are then not yet more than those of the plain ones.
    """
    errors, costs, counts, forms = [], [], [], []
    for level, error, cost, count in zip(task.levels, task.errors, task.costs, task.counts, strict=True):
        prices = task.table.by_block[level.block]
        pairs = [(i, PLAIN) for i in range(len(count))]
        for form in sorted(prices.forms(level.kind), key=lambda form: (form.rank or 0, form.int8)):
            if (int8 or not form.int8) and (ranks or not form.rank):
                pairs += [(i, form) for i, n in enumerate(count) if n and prices.ms(level.kind, n, form) < cost[i]]
        kept = [i for i, _ in pairs]
        errors.append(error[kept])
        costs.append(
            np.array([cost[i] if form == PLAIN else prices.ms(level.kind, count[i], form) for i, form in pairs])
        )
        counts.append(tuple(count[i] for i in kept))
        forms.append(tuple(form for _, form in pairs))
    some = any(form != PLAIN for own in forms for form in own)
    return replace(task, errors=errors, costs=costs, counts=counts, forms=forms if some else [])


def with_drops(task: Task) -> Task:
    """The same where every attention that stays may also drop tokens, down to any number that the table has."""
    errors, costs, counts, drops, forms = [], [], [], [], []
    for at, (level, error, cost, count) in enumerate(
        zip(task.levels, task.errors, task.costs, task.counts, strict=True)
    ):
        some = [i for i, units in enumerate(count) if units] if level.kind == "attn" else []
        below = range(len(task.table.patches) - 1)
        pairs = [(i, -1) for i in range(len(count))] + [(i, drop) for drop in below for i in some]
        kept = [i for i, _ in pairs]
        errors.append(error[kept])
        costs.append(cost[kept])
        counts.append(tuple(count[i] for i in kept))
        drops.append(tuple(drop for _, drop in pairs))
        if task.forms:
            forms.append(tuple(task.forms[at][i] for i in kept))
    return replace(task, errors=errors, costs=costs, counts=counts, drops=drops, forms=forms)


def options(
    levels: list[Levels], table: LatencyTable, bounds: Shape, dims: tuple[str, ...] = WIDTHS
) -> tuple[list[FloatArray], list[FloatArray], list[tuple[int, ...]]]:
    """Per sub-block: errors and costs `[options]` in milliseconds, and how many units each option keeps."""
    errors, costs, counts = [], [], []
    for level in levels:
        attn = level.kind == "attn"
        every, ms = table.by_block[level.block].of(level.kind)
        bound = bounds[level.block][0 if attn else 1]
        grid = tuple(kept for kept in every if kept <= bound and (kept == bound or _may_keep(kept, attn, dims)))
        errors.append(np.array([level.errors[len(level.order) - kept] for kept in grid]))
        costs.append(np.array([ms[every.index(kept)] for kept in grid]))
        counts.append(grid)
    return errors, costs, counts


def _may_keep(kept: int, attn: bool, dims: tuple[str, ...]) -> bool:
    """Whether a sub-block may be left with so many of its units, fewer than it has."""
    return ("heads" if attn else "mlp") in dims if kept else "depth" in dims


def slowest_within(task: Task, family: Callable[[float], Choice], room_ms: float) -> Choice:
    """Of a family of choices, from all kept at 0 to nothing at 1, the first that is within `room_ms`, by bisection.

    Costs must fall along it. Raises Infeasible when even the last is above.
    """
    best = family(1.0)
    if task.cost(best) > room_ms:
        raise Infeasible(
            f"{room_ms:.3f} ms cannot be reached: the least that can be kept takes {task.cost(best):.3f} ms"
        )
    if task.cost(first := family(0.0)) <= room_ms:
        return first
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        choice = family(middle)
        if task.cost(choice) <= room_ms:
            best, high = choice, middle
        else:
            low = middle
    return best


def by_ratios(task: Task, ratios: Callable[[float], FloatArray], room_ms: float) -> Choice:
    """Of all sub-blocks about the shares `ratios(knob)` `[sub-blocks]`, for the least knob that is within `room_ms`.

    Shares fall from 1 at knob 0 to 0 at knob 1. They are rounded to options; the room that rounding leaves goes to
    those that were rounded down, the furthest down first. Raises Infeasible when nothing is cheap enough.
    """
    there = np.array([own[-1] for own in task.counts])
    wanted: dict[Choice, FloatArray] = {}

    def family(knob: float) -> Choice:
        kept = ratios(knob) * there
        choice = task.nearest(kept)
        wanted[choice] = kept
        return choice

    choice = slowest_within(task, family, room_ms)
    pairs = zip(wanted[choice], task.counts, choice, strict=True)
    short = {i: (kept - own[option]) / own[-1] for i, (kept, own, option) in enumerate(pairs) if kept > own[option]}
    for i in sorted(short, key=lambda i: -short[i]):
        raised = (*choice[:i], choice[i] + 1, *choice[i + 1 :])
        if task.cost(raised) <= room_ms:
            choice = raised
    return choice


def spread(weights: FloatArray, amount: float) -> FloatArray:
    """min(1, s * weights), with s from 0 at amount 0 to infinity at amount 1: what is clipped, the others take."""
    if amount >= 1:
        return np.ones(len(weights))
    weights = weights if weights.any() else np.ones(len(weights))
    return np.minimum(1.0, amount / (1 - amount) * weights / weights.mean())


def warn_of_few(who: str, labels: Tensor, classes: int, console: Console) -> None:
    """Warn where labelled images are too few to say anything about their classes."""
    if len(labels) < PER_CLASS * classes:
        console.warn(f"{who}: {len(labels)} labelled calibration images of {classes} classes are few, {PER_CLASS} per class or more say something; "
                     f"raise [calibration] images")  # fmt: skip


def between(widths: Sequence[int], costs: FloatArray, kept: Tensor) -> Tensor:
    """The cost of so many units (a scalar), in proportion between the neighbouring widths, with a gradient."""
    i = int(np.clip(np.searchsorted(widths, float(kept.detach()), side="right"), 1, len(widths) - 1))
    slope = float(costs[i] - costs[i - 1]) / (widths[i] - widths[i - 1])
    return float(costs[i - 1]) + slope * (kept - widths[i - 1])


def nearby(task: Task, find: Callable[[float], T]) -> Callable[[float], T]:
    """`find(room_ms)`, or what it found for another budget no further than `NEARBY`."""
    found: dict[float, T] = {}

    def get(room_ms: float) -> T:
        nearest = min(found, key=lambda ms: abs(ms - room_ms), default=None)
        if nearest is None or abs(nearest - room_ms) > NEARBY * task.cost(task.dense):
            nearest = room_ms
            found[room_ms] = find(room_ms)
        return found[nearest]

    return get
