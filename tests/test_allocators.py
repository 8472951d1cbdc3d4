"""python -m pytest tests/test_allocators.py

Every allocator against its formula, computed the slow way; `tests/test_methods.py` has the contract that all share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch.nn import functional as F

from edgeprune import allocators, solve, vit
from edgeprune.allocators import Task, _gated, cfsp, erk, lapp, latency_ranking, nvit, p3b, pq, ranking, sls, spdy, tas
from edgeprune.console import Console
from edgeprune.errors import Infeasible, UsageError

ROOMS = [7.1, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.6, 0.2, 0.0]
GONE = ((1, 8), (0, 16), (2, 0))  # the shape of a model that was pruned before


@pytest.fixture(scope="module")
def task(make_vit: Callable[..., Any]) -> Task:
    return parts.task(make_vit())


@pytest.fixture(scope="module")
def smaller(make_vit: Callable[..., Any]) -> Task:
    return parts.task(make_vit(), bounds=GONE)


def with_errors(task: Task, seed: int) -> Task:
    """The same with errors drawn at random, convex in no sub-block; a head is worth about 4 neurons."""
    rng = np.random.default_rng(seed)
    levels = [
        replace(
            own, errors=np.append(0.0, rng.exponential(4.0 if own.kind == "attn" else 1.0, len(own.order)).cumsum())
        )
        for own in task.levels
    ]
    errors, costs, counts = allocators.options(levels, task.table, ((3, 24),) * 3)
    return replace(task, levels=levels, errors=errors, costs=costs, counts=counts)


def kept(task: Task, choice: tuple[int, ...]) -> list[int]:
    return [own[option] for own, option in zip(task.counts, choice, strict=True)]


# What they share ----------------------------------------------------------------------------


def test_what_is_clipped_the_others_take() -> None:
    weights = np.array([4.0, 1.0, 1.0])
    np.testing.assert_allclose(allocators.spread(weights, 1 / 2), [1.0, 0.5, 0.5])  # s = 1 / mean
    np.testing.assert_allclose(allocators.spread(weights, 0.1), np.array([4, 1, 1]) / 18)
    assert allocators.spread(weights, 0.0).tolist() == [0, 0, 0] and allocators.spread(weights, 1.0).tolist() == [1] * 3
    assert allocators.spread(np.zeros(2), 0.5).tolist() == [1, 1], "nothing tells them apart"


@pytest.mark.parametrize("room", ROOMS)
def test_ratios_are_the_largest_that_fit_and_rounding_wastes_no_room(task: Task, room: float) -> None:
    weights = np.array([1.0, 2.0, 0.5, 1.5, 0.7, 3.0])
    choice = allocators.by_ratios(task, lambda knob: np.minimum(1, (1 - knob) * 2 * weights), room)
    for knob in np.linspace(0, 1, 20001):  # the slow way: down from everything
        wanted = np.minimum(1, (1 - knob) * 2 * weights) * [3, 24, 3, 24, 3, 24]
        rounded = [
            min(range(len(own)), key=lambda j, i=i: abs(own[j] - wanted[i])) for i, own in enumerate(task.counts)
        ]
        if task.cost(rounded) <= room:
            break
    short = [(kept - own[j]) / own[-1] for kept, own, j in zip(wanted, task.counts, rounded, strict=True)]
    for i in sorted(range(6), key=lambda i: -short[i]):
        more = [option + (at == i) for at, option in enumerate(rounded)]
        if short[i] > 0 and task.cost(more) <= room:
            rounded = more
    assert choice == tuple(rounded)


def test_budgets_nearby_share_what_was_found(task: Task) -> None:
    asked: list[float] = []
    get = allocators.nearby(task, lambda room: asked.append(room) or f"{room}")
    assert [get(room) for room in (5.0, 5.5, 4.4, 3.0, 3.6)] == ["5.0", "5.0", "5.0", "3.0", "3.0"]
    assert asked == [5.0, 3.0]


# Uniform, ERK -------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_uniform_keeps_alike_of_all(task: Task, room: float) -> None:
    choice = allocators.get("uniform").prepare(task)(room)
    shares = [count / own[-1] for count, own in zip(kept(task, choice), task.counts, strict=True)]
    assert max(shares) - min(shares) <= 1 / 3 + 1e-9, "no further apart than one option"
    cheapest_step = min(np.diff(costs).min() for costs in task.costs)
    assert room >= 7.2 or room - task.cost(choice) < max(cheapest_step, 0.5) + 1e-9, "a step of any would not fit"


def published_erk(raw: np.ndarray, sizes: np.ndarray, density: float) -> np.ndarray:
    """Layers above 1 become dense; the factor is solved again for the others, until none is above 1."""
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(raw)) if i not in dense]
        factor = (density * sizes.sum() - sum(sizes[i] for i in dense)) / sum(raw[i] * sizes[i] for i in rest)
        above = [i for i in rest if factor * raw[i] > 1]
        if not above:
            return np.array([1.0 if i in dense else factor * raw[i] for i in range(len(raw))])
        dense.update(above)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8, 0.95])
def test_erk_is_the_published_distribution(density: float) -> None:
    hidden = np.array([64.0, 256.0, 16.0, 1024.0, 64.0, 0.0])
    raw = erk.densities(64, hidden)
    for h, own in zip(hidden[:-1], raw, strict=False):
        assert own == pytest.approx((64 + h) / (64 * h))
    assert raw[-1] == 0, "nothing is there"
    raw, sizes = raw[:-1], 2 * 64 * hidden[:-1]
    want = published_erk(raw, sizes, density)
    low, high = 0.0, 1.0
    for _ in range(60):  # of the one-knob family the member with that density
        middle = (low + high) / 2
        low, high = (middle, high) if allocators.spread(raw, middle) @ sizes <= density * sizes.sum() else (low, middle)
    np.testing.assert_allclose(allocators.spread(raw, low), want, rtol=1e-6)


def test_erk_keeps_more_of_narrow_sub_blocks(task: Task, smaller: Task) -> None:
    """24 neurons are narrower than 3 heads of 16."""
    choice = allocators.get("erk").prepare(task)(4.0)
    shares = np.array(kept(task, choice)) / [3, 24, 3, 24, 3, 24]
    assert shares[1::2].mean() > shares[::2].mean()
    left = kept(smaller, allocators.get("erk").prepare(smaller)(1.0))
    assert all(now <= there for now, there in zip(left, [n for pair in GONE for n in pair], strict=True))


# Rankings -----------------------------------------------------------------------------------


def test_the_lowest_goes_first_but_none_before_those_ahead_of_it() -> None:
    worth = [np.array([1.0, 5.0, 2.0]), np.array([3.0, 4.0]), np.array([6.0])]
    path = ranking.removals(worth)
    assert path.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 2, 0], [2, 2, 0], [3, 2, 0], [3, 2, 1]]
    path = ranking.removals(worth, [1, 1, 1])
    assert path.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 1, 0], [3, 1, 0], [3, 2, 0], [3, 2, 1]]


@pytest.mark.parametrize(("name", "weights"), [("unit-ranking", (1, 1)), ("ranking", (4 * 16 * 48, 2 * 48))])
@pytest.mark.parametrize("seed", range(4))
def test_rankings_remove_unit_after_unit(task: Task, seed: int, name: str, weights: tuple[int, int]) -> None:
    task = with_errors(task, seed)
    floors = [1, 8] * 3  # a tenth, in options of the table
    left = [own[-1] for own in task.counts]
    way = [list(left)]
    for phase in (floors, [0] * 6):
        while any(count > least for count, least in zip(left, phase, strict=True)):
            next_ones = [
                (own.errors[len(own.order) - n + 1] - own.errors[len(own.order) - n]) / weights[own.kind == "mlp"]
                if n > least
                else math.inf
                for own, n, least in zip(task.levels, left, phase, strict=True)
            ]
            left[int(np.argmin(next_ones))] -= 1
            way.append(list(left))
    choose = allocators.get(name).prepare(task)
    for room in ROOMS:
        want = next(own for stop in way if task.cost(own := task.nearest(stop)) <= room)
        assert choose(room) == want


def test_ranking_takes_heads_and_neurons(tiny_vit: Any) -> None:
    """A head's sum over weights is far above a neuron's; worth per weight mixes them."""
    task = parts.task(tiny_vit, "l2")
    shares = np.array(kept(task, allocators.get("ranking").prepare(task)(4.5))) / [3, 24, 3, 24, 3, 24]
    assert shares[::2].min() < 1 and shares[1::2].min() < 1
    whole = np.array(kept(task, allocators.get("unit-ranking").prepare(task)(4.5))) / [3, 24, 3, 24, 3, 24]
    assert whole[::2].sum() > shares[::2].sum() and whole[1::2].sum() < shares[1::2].sum()


def test_a_floor_stops_sub_blocks_from_collapsing(task: Task) -> None:
    """One sub-block is worth next to nothing; still it does not go before all others are at the floor."""
    levels = [replace(own, errors=own.errors * (1e-9 if i == 3 else 1)) for i, own in enumerate(task.levels)]
    choose = allocators.get("ranking").prepare(replace(task, levels=levels))
    assert kept(task, choose(6.0))[3] == 8
    for room in (6.0, 5.0, 4.0, 3.1):
        assert min(choose(room)) > 0
    assert kept(task, choose(2.9))[3] == 0, "but when the budget cannot be met otherwise it is the first to go"


@pytest.mark.parametrize("seed", range(4))
def test_latency_ranking_removes_step_after_step(task: Task, seed: int) -> None:
    task = with_errors(task, seed)
    options = list(task.dense)
    way = [tuple(options)]
    while any(options):
        rates = [
            (e[j - 1] - e[j]) / (c[j] - c[j - 1]) if j else math.inf
            for e, c, j in zip(task.errors, task.costs, options, strict=True)
        ]
        options[int(np.argmin(rates))] -= 1
        way.append(tuple(options))
    choose = allocators.get("latency-ranking").prepare(task)
    for room in ROOMS:
        assert choose(room) == next(stop for stop in way if task.cost(stop) <= room)


def test_of_widths_that_cost_the_same_the_largest_is_taken() -> None:
    assert latency_ranking.faster(np.array([0.0, 0.5, 0.5, 0.5, 0.8])) == [0, 3, 4]
    assert latency_ranking.faster(np.array([0.0, 0.5, 0.8, 0.8])) == [0, 1, 3]
    np.testing.assert_allclose(latency_ranking.per_ms(np.array([9.0, 3.0, 0.0]), np.array([0.0, 2.0, 3.0])), [3, 3])


@pytest.mark.parametrize("widths", [(0, 8, 16, 24), (0, 32, 64, 96)])
@pytest.mark.parametrize("seed", range(3))
def test_nvit_takes_the_step_of_lowest_score(task: Task, seed: int, widths: tuple[int, ...]) -> None:
    task = replace(with_errors(task, seed), counts=[(0, 1, 2, 3), widths] * 3)
    options = list(task.dense)
    way = [list(options)]
    while any(options):
        lost, saved, small = {}, {}, {}
        for i, j in enumerate(options):
            if j:
                lost[i] = task.errors[i][j - 1] - task.errors[i][j]
                saved[i] = task.costs[i][j] - task.costs[i][j - 1]
                small[i] = j == 1 or task.counts[i][j] <= (2 if i % 2 == 0 else 16)
        mean_lost, mean_saved = np.mean(list(lost.values())), np.mean(list(saved.values()))
        score = {i: lost[i] / mean_lost - (0 if small[i] else saved[i] / mean_saved) for i in lost}
        options[min(score, key=score.__getitem__)] -= 1
        way.append(list(options))
    assert nvit.way(task).tolist() == way
    choose = allocators.get("nvit").prepare(task)
    for room in ROOMS:
        assert list(choose(room)) == next(stop for stop in way if task.cost(stop) <= room)


# CFSP, PQ -----------------------------------------------------------------------------------


def test_cfsp_is_the_angle_by_which_blocks_turn_tokens(task: Task) -> None:
    streams: list[list[np.ndarray]] = [[] for _ in range(4)]
    for pixels in task.found.batches:
        with torch.no_grad():
            x = vit.embed(task.model, pixels)
            streams[0].append(x.double().numpy())
            for i, block in enumerate(task.model.blocks):
                x = block(x)
                streams[i + 1].append(x.double().numpy())
    joined = [np.concatenate(own).reshape(-1, 48) for own in streams]
    want = [
        np.mean([math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / math.pi for a, b in zip(x, y, strict=True)])
        for x, y in itertools.pairwise(joined)
    ]
    found = cfsp.angles(task.model, task.found.batches)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    z = [(value - np.mean(want)) / np.std(want) for value in want]
    np.testing.assert_allclose(cfsp.keep(found), [1 / (1 + math.exp(-value)) for value in z], rtol=1e-6)
    assert cfsp.keep(np.full(3, 0.2)).tolist() == [0.5] * 3


def test_cfsp_keeps_least_of_a_block_that_does_nothing(tiny_vit: Any) -> None:
    with torch.no_grad():
        for kind in vit.KINDS:
            vit.output_layer(tiny_vit.blocks[1], kind).weight.zero_()
            vit.output_layer(tiny_vit.blocks[1], kind).bias.zero_()
    assert cfsp.angles(tiny_vit, parts.task(tiny_vit).found.batches)[1] == pytest.approx(0, abs=1e-6)
    task = parts.task(tiny_vit)
    shares = np.array(kept(task, allocators.get("cfsp").prepare(task)(4.0))) / [3, 24, 3, 24, 3, 24]
    assert shares[2:4].max() < shares[[0, 1, 4, 5]].min()


def test_the_pq_index_of_known_vectors() -> None:
    assert pq.pq_index(np.full(7, 3.0)) == pytest.approx(0, abs=1e-12)
    assert pq.pq_index(np.array([0.0, 0.0, 0.0, 2.0])) == pytest.approx(1 - 1 / 4)
    assert pq.pq_index(np.array([1.0, 4.0])) == pytest.approx(1 - 2.25 / 2.5)
    assert pq.pq_index(np.array([1.0, 4.0]), 1.0, 2.0) == pytest.approx(1 - 2.5 / math.sqrt(8.5))
    assert pq.pq_index(np.array([2.0])) == pq.pq_index(np.zeros(3)) == 0
    w, p, q = np.array([0.3, 1.0, 2.0, 7.0]), 0.5, 1.0
    norms = [sum(w**r) ** (1 / r) for r in (p, q)]
    assert pq.pq_index(w) == pq.pq_index(10 * w) == pytest.approx(1 - 4 ** (1 / q - 1 / p) * norms[0] / norms[1])
    assert pq.bound(w) == pytest.approx((1 - pq.pq_index(w)) ** (p * q / (q - p)))
    assert pq.bound(w, 1.0, 2.0, 0.1) == pytest.approx(1.1 ** (2 / -1) * (1 - pq.pq_index(w, 1.0, 2.0)) ** 2)


def test_pq_looks_at_the_norms_of_units_that_are_there(smaller: Task) -> None:
    mlp: Any = smaller.model.blocks[0].mlp
    first, bias, last = (w.detach().double().numpy() for w in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight))
    want = [
        math.sqrt((first[u] ** 2).sum() + bias[u] ** 2 + (last[:, u] ** 2).sum()) for u in smaller.levels[1].kept(8)
    ]
    norms = pq.unit_norms(smaller)
    np.testing.assert_allclose(norms[1], want, rtol=1e-5)
    assert [len(own) for own in norms] == [n for pair in GONE for n in pair]


def test_the_gauge_is_the_index_of_every_sub_block(tiny_vit: Any) -> None:
    found = pq.gauge(tiny_vit)
    assert list(found) == [(i, kind) for i in range(3) for kind in vit.KINDS]
    mlp = tiny_vit.blocks[1].mlp
    squares = mlp.fc1.weight.square().sum(1) + mlp.fc1.bias.square() + mlp.fc2.weight.square().sum(0)
    assert found[1, "mlp"] == pytest.approx(pq.pq_index(squares.sqrt().detach().double().numpy()), rel=1e-5)


def test_pq_prunes_where_units_are_unequal(tiny_vit: Any) -> None:
    with torch.no_grad():
        tiny_vit.blocks[2].mlp.fc1.weight[:20].mul_(1e-3)
        tiny_vit.blocks[2].mlp.fc1.bias[:20].mul_(1e-3)
        tiny_vit.blocks[2].mlp.fc2.weight[:, :20].mul_(1e-3)
    task = parts.task(tiny_vit)
    assert kept(task, allocators.get("pq").prepare(task)(6.0)) == [3, 24, 3, 24, 3, 0]


# SLS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "left"),
    [
        ([0.1, 0.2, 0.4, 0.5, 0.6], 2),  # 0.18 is asked for
        ([0.5, 0.1, 0.5, 0.5, 0.6], 3),  # block 1 stops it, whatever comes before
        ([0.6, 0.6, 0.6, 0.6, 0.6], 1),  # a block is left at least
        ([0.0, 0.1, 0.2, 0.1, 0.6], 5),
        ([-0.2, -0.1, -0.1, -0.01, -0.3], 4),  # -0.09 is asked for
    ],
)
def test_sls_cuts_the_tail_as_long_as_classes_stay_apart(scores: list[float], left: int) -> None:
    asked: list[int] = []

    def separated(block: int) -> float:
        asked.append(block)
        return scores[block]

    assert sls.truncation(separated, 5) == left
    assert asked == list(range(4, max(left - 3, -1), -1)), "from the last down, no further than needed"


def test_separation_is_high_where_classes_are_apart() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    noise = rng.normal(size=(60, 8))
    apart = sls.separation(noise + 20 * np.eye(8)[labels], labels, 0)
    mixed = sls.separation(noise, labels, 0)
    assert apart > 0.6 > 0.2 > mixed
    assert sls.separation(np.ones((60, 8)), labels, 0) == -1


def test_sls_keeps_the_first_blocks(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = sls.class_features(task)
    assert [own.shape for own in features] == [(24, 48)] * 3 and labels.tolist() == [i % 5 for i in range(24)]
    with torch.no_grad():
        x = vit.embed(task.model, torch.cat(task.found.batches))
        for block, own in zip(task.model.blocks, features, strict=True):
            x = block(x)
            np.testing.assert_allclose(own, x[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    whole, nothing = [3, 24], [0, 0]
    for least, most in ((0, 1), (1, 2)):  # the block that ends the model at the earliest, and how many then stay
        alike = [features[i][0, 0] for i in range(least)]
        monkeypatch.setattr(sls, "separation", lambda own, *_, alike=alike: 0.1 if own[0, 0] in alike else 0.5)
        choose = sls.prepare(task)
        assert kept(task, choose(7.2)) == whole * 3, "nothing must go"
        assert kept(task, choose(7.1)) == whole * most + nothing * (3 - most), "the rule"
        assert kept(task, choose(4.8)) == whole * most + nothing * (3 - most)
        assert kept(task, choose(4.7)) == whole + nothing * 2, "the budget"
        assert kept(task, choose(2.3)) == nothing * 3


def test_sls_says_what_labels_it_needs(task: Task) -> None:
    pixels = task.found.batches[0]
    for labels, what in ((torch.zeros(8, dtype=torch.long), "1 classes"), (torch.arange(8), "8 classes")):
        found = replace(task.found, labelled=lambda labels=labels: iter([(pixels, labels)]))
        with pytest.raises(UsageError, match=f"got 8 images of {what}"):
            sls.prepare(replace(task, found=found))


# SPDY ---------------------------------------------------------------------------------------


def test_spdy_solves_weighed_errors(task: Task) -> None:
    weights = np.array([0.1, 2.0, 0.7, 1.0, 0.3, 0.9])
    choice = spdy.weighed(task, weights, 4.0)
    everything = [c for c in itertools.product(range(4), repeat=6) if task.cost(c) <= 4.0]

    def error(c: tuple[int, ...]) -> float:
        return sum(w * e[j] for w, e, j in zip(weights, task.errors, c, strict=True))

    assert error(choice) == pytest.approx(min(map(error, everything)), rel=1e-3)


def test_spdy_finds_coefficients_that_the_loss_likes(task: Task) -> None:
    """The loss wants block 1 whole, which the errors do not say."""
    task = replace(task, seconds=60.0)
    seen: list[tuple[int, ...]] = []

    def loss(choice: tuple[int, ...]) -> float:
        seen.append(choice)
        return float(6 - choice[2] - choice[3])

    found = spdy.coefficients(task, loss, 4.0)
    assert loss(spdy.weighed(task, found, 4.0)) < loss(spdy.weighed(task, np.ones(6), 4.0))
    assert seen[0] == solve.solve(task.errors, task.costs, 4.0), "starts at the knapsack's"
    assert len(seen) == 1 + spdy.RANDOM + spdy.LOCAL + 2
    assert min(6 - c[2] - c[3] for c in seen) == loss(spdy.weighed(task, found, 4.0)), "ends at the best it saw"


def test_spdy_draws_afresh_and_then_near_the_best(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[np.ndarray] = []
    real = spdy.weighed
    monkeypatch.setattr(spdy, "weighed", lambda task, c, room: tried.append(c) or real(task, c, room))
    given = np.random.default_rng(1).random(101).tolist()
    left = iter(given)
    spdy.coefficients(replace(task, seconds=60.0), lambda choice: next(left), 4.0)
    assert (tried[0] == 1).all() and len(tried) == 101
    for step in range(1, 101):
        best = tried[int(np.argmin(given[:step]))]
        assert (tried[step] != best).sum() == (6 if step <= 50 else 1)
        assert ((tried[step] >= 0) & (tried[step] <= 1)).all()


def test_spdy_diverges_no_more_than_the_knapsack(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    judges: list[Any] = []
    real = spdy.Judge
    monkeypatch.setattr(spdy, "Judge", lambda *a: judges.append(real(*a)) or judges[-1])
    choose = spdy.prepare(replace(task, seconds=60.0))
    ours, first = choose(3.0), solve.solve(task.errors, task.costs, 3.0)
    assert judges[0].divergence(ours) == min(judges[0].known.values()) <= judges[0].divergence(first)
    assert task.cost(choose(2.9)) <= 2.9


def test_without_time_spdy_is_the_knapsack(task: Task) -> None:
    assert all(spdy.prepare(task)(room) == solve.solve(task.errors, task.costs, room) for room in ROOMS)


# P3B ----------------------------------------------------------------------------------------


def test_p3b_importance_is_the_scaled_benefit_per_millisecond() -> None:
    benefit, ms = [0.5, -0.2, 0.1, 0.0], [1.2, 0.8, 0.5, 1.0]

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    scaled = [softplus(1.4 * 10 * b / 0.5) - softplus(1.4 * 10 * b / 0.5 - 10) for b in benefit]
    worth = [s / m for s, m in zip(scaled, ms, strict=True)]
    want = [w / np.mean(worth) for w in worth]
    found = p3b.importance(np.array(benefit), np.array(ms))
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert found.mean() == pytest.approx(1) and found[0] == found.max() and found[1] == found.min()
    assert p3b.importance(np.array([-1.0, -3.0]), np.ones(2)).argmax() == 0, "the order stays where nothing helps"
    assert p3b.importance(np.array([1.0, 3.0]), np.array([0.0, 1.0]))[0] == 0
    loud, quiet = [9.0, 1.0], [0.01, 0.09]
    both = p3b.importance(np.array([loud, quiet]), np.ones(2))
    assert both[1] > 0.9, "a kind of probe whose benefits are small counts as much as the other"


@pytest.mark.parametrize("room", [0.5, 2.0, 3.3, 4.4, 9.0])
def test_p3b_keep_ratios_are_clamped_and_solved_again(room: float) -> None:
    found, ms = np.array([0.5, -0.1, 0.1, 0.3, 0.0]), np.array([1.2, 0.8, 0.5, 1.0, 1.0])
    importance = p3b.importance(found, ms)
    full: set[int] = set()
    while len(full) < 5:  # as published: what is above 1 stays whole, the rest is scaled to what is left
        free = [i for i in range(5) if i not in full]
        s = (room - sum(ms[i] for i in full)) / sum(importance[i] * ms[i] for i in free)
        above = [i for i in free if s * importance[i] >= 1]
        if not above:
            break
        full.update(above)
    want = [1.0 if i in full else s * importance[i] for i in range(5)]
    ratios = p3b.keep_ratios(found, ms, room)
    np.testing.assert_allclose(ratios, want, rtol=1e-6, atol=1e-9)
    assert ratios @ ms == pytest.approx(min(room, ms.sum()))


def test_p3b_probes_are_trained_on_both_sides_of_their_sub_block(task: Task) -> None:
    pairs, labels = p3b.read(task.model, task.found.labelled())
    assert [len(own) for own in pairs] == [2] * 6, "the class token and the mean of the patches"
    with torch.no_grad():
        x = vit.embed(task.model, torch.cat(task.found.batches))
        for i, block in enumerate(task.model.blocks):
            middle = x + block.attn(block.norm1(x))
            for own, stream in (
                (pairs[2 * i][:, 0], x),
                (pairs[2 * i][:, 1], middle),
                (pairs[2 * i + 1][:, 0], middle),
            ):
                torch.testing.assert_close(own[0], stream[:, 0])
                torch.testing.assert_close(own[1], stream[:, 1:].mean(1))
            x = block(x)
        torch.testing.assert_close(pairs[5][0, 1], x[:, 0], rtol=1e-4, atol=1e-5)
    want = np.zeros((2, 6))
    for i, probed in itertools.product(range(6), range(2)):
        pair = pairs[i][probed] / pairs[i][probed].square().mean().sqrt()
        probe = torch.nn.Linear(48, 5)
        torch.nn.init.zeros_(probe.weight)
        torch.nn.init.zeros_(probe.bias)
        optimizer = torch.optim.Adam(probe.parameters(), 1e-2)
        for _ in range(100):  # all 18 images fit into one batch
            optimizer.zero_grad()
            loss = sum(F.cross_entropy(probe(side[:18]), labels[:18]) for side in pair)
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            before, after = (float(F.cross_entropy(probe(side[18:]), labels[18:])) for side in pair)
        want[probed, i] = before - after
    found = p3b.benefits(task.model, task.found.labelled(), 3)
    assert found.shape == (2, 6), "probes of the class token, and of the patches"
    np.testing.assert_allclose(found, want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("images, warned", [(49, True), (50, False)])
def test_few_images_per_class_are_warned_of(capsys: pytest.CaptureFixture[str], images: int, warned: bool) -> None:
    allocators.warn_of_few("SLS", torch.zeros(images), 5, Console())
    assert ("SLS: 49 labelled calibration images of 5 classes" in capsys.readouterr().err) == warned


def test_a_sub_block_that_does_nothing_is_of_no_benefit(tiny_vit: Any) -> None:
    with torch.no_grad():
        vit.output_layer(tiny_vit.blocks[1], "mlp").weight.zero_()
        vit.output_layer(tiny_vit.blocks[1], "mlp").bias.zero_()
    found = p3b.benefits(tiny_vit, parts.task(tiny_vit).found.labelled(), 0)
    assert (found[:, 3] == 0).all() and np.abs(np.delete(found, 3, 1)).min() > 0


# LAPP, TAS ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idle(make_vit: Callable[..., Any]) -> Task:
    """Of a model that does not feel what attention in block 1 does, and is unsure of nothing else."""
    model = make_vit(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        vit.output_layer(model.blocks[1], "attn").weight.zero_()
    return parts.task(model)


def test_hard_masks_are_the_sliced_model(task: Task, smaller: Task) -> None:
    for given, choice in ((task, (1, 2, 3, 0, 0, 3)), (smaller, (1, 0, 0, 1, 1, 0))):
        masks = [
            (torch.arange(own[-1]) >= own[-1] - own[option]).float()
            for own, option in zip(given.counts, choice, strict=True)
        ]
        found = _gated.Gated(given).divergence(1, masks)
        pixels = given.found.batches[1][:8]
        with torch.no_grad():
            own = vit.slice_model(given.model, given.plan(choice))(pixels).log_softmax(-1)
            wanted = given.teacher(pixels).log_softmax(-1)
        want = float((wanted.exp() * (wanted - own)).sum(1).mean())
        assert float(found) == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert not any(p.requires_grad for p in _gated.Gated(given).model.parameters())


def test_lapp_masks_are_sigmoids_of_rank_less_threshold() -> None:
    want = [1 / (1 + math.exp(-((u + 0.5) / 8 - 0.3) / lapp.TAU)) for u in range(8)]
    np.testing.assert_allclose(lapp.mask(8, torch.tensor(0.3)).numpy(), want, rtol=1e-5)
    assert lapp.mask(24, torch.tensor(lapp.OPEN)).min() > 0.9
    assert len(lapp.mask(0, torch.tensor(0.3))) == 0


def test_lapp_expects_the_table_between_its_options(task: Task, smaller: Task) -> None:
    for given in (task, smaller):
        counts = [0.7 * own[-1] + 0.1 for own in given.counts]
        counts = [min(count, own[-1]) for count, own in zip(counts, given.counts, strict=True)]
        want = sum(np.interp(n, own, ms) for n, own, ms in zip(counts, given.counts, given.costs, strict=True))
        assert float(lapp.expected_ms(given, [torch.tensor(n) for n in counts])) == pytest.approx(want)


def test_lapp_thresholds_spare_what_the_output_needs(idle: Task) -> None:
    path = lapp.shares(idle)
    assert path[0].tolist() == [1] * 6 and path[-1].tolist() == [0] * 6 and (np.diff(path, axis=0) <= 0).all()
    middle = path[len(path) // 2]
    assert middle[2] == middle.min() and middle[2] < middle[0] and middle[2] < middle[4]


def test_tas_mixes_two_widths_by_their_probability() -> None:
    logits, counts = torch.tensor([0.0, 1.0, -1.0, 0.5]), (0, 8, 16, 24)
    for seed in range(20):
        mask = tas.mixed(logits, counts, 1.0, torch.Generator().manual_seed(seed))
        assert mask.shape == (24,) and (mask.diff() >= -1e-6).all(), "wider ones have all that narrower ones have"
        assert float(mask[-1]) == pytest.approx(1.0, abs=1e-6) or int(mask.count_nonzero()) > 0
        assert len({round(float(m), 4) for m in mask}) <= 3, "two widths make three levels at most"
        generator = torch.Generator().manual_seed(seed)
        noise = [-math.log(float(e)) for e in torch.empty(4).exponential_(generator=generator)]
        perturbed = [float(p) + g for p, g in zip(logits.log_softmax(-1), noise, strict=True)]
        p = torch.tensor(perturbed).softmax(-1) + 1e-12
        first, second = torch.multinomial(p, 2, generator=generator).tolist()
        weight = 1 / (1 + math.exp(perturbed[second] - perturbed[first]))
        want = [weight * (u >= 24 - counts[first]) + (1 - weight) * (u >= 24 - counts[second]) for u in range(24)]
        np.testing.assert_allclose(mask.numpy(), want, rtol=1e-4, atol=1e-6)
    assert tas.mixed(torch.zeros(1), (0,), 1.0, torch.Generator()).shape == (0,)


def test_tas_draws_by_the_logits() -> None:
    logits, generator = torch.log(torch.tensor([0.7, 0.2, 0.1])), torch.Generator().manual_seed(0)
    widest = [float(tas.mixed(logits, (0, 1, 2), 0.05, generator).sum()) for _ in range(400)]
    assert np.mean(np.array(widest) < 0.5) == pytest.approx(0.7, abs=0.08), "at low tau one width decides"


def test_tas_cost_goes_towards_the_budget() -> None:
    for likely, sign in ((6.0, 1), (4.0, -1), (5.2, 0), (4.8, 0)):
        expected = torch.tensor(4.5, requires_grad=True)
        loss = tas.cost_loss(expected, likely, 5.0)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(sign * math.log(4.5))
        assert expected.grad is not None and float(expected.grad) == pytest.approx(sign / 4.5)


def test_tas_covers_what_would_be_drawn(task: Task) -> None:
    p = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(tas.uncovered(p), [-math.log(0.1), -math.log(0.3), -math.log(0.6), 0.0], atol=1e-12)
    choose = tas.prepare(task)
    choice = choose(4.0)
    errors = [tas.uncovered(own) for own in tas.probabilities(task, 4.0)]
    best = min(
        sum(e[j] for e, j in zip(errors, c, strict=True))
        for c in itertools.product(range(4), repeat=6)
        if task.cost(c) <= 4.0
    )
    assert sum(e[j] for e, j in zip(errors, choice, strict=True)) == pytest.approx(best, rel=1e-3)


def test_tas_expects_the_budget_and_spares_what_the_output_needs(idle: Task) -> None:
    found = tas.probabilities(idle, 4.0)
    widths = [float(p @ np.arange(4)) for p in found]
    assert widths[2] < widths[0] - 0.5
    expected = sum(float(p @ ms) for p, ms in zip(found, idle.costs, strict=True))
    assert 3.0 < expected < 5.0


@pytest.mark.parametrize("name", [name for name in allocators.names() if name != "search"])
def test_all_say_what_the_least_is(task: Task, name: str) -> None:
    with pytest.raises(Infeasible, match="cannot be reached"):
        allocators.get(name).prepare(task)(-1.0)
