"""Tokens in the solver, the search, the refit, the table and the tuning. python -m pytest tests/test_token_plans.py"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from edgeprune import allocators, api, config, pipeline, recoveries, recovery, vit
from edgeprune.allocators import _tokens, search
from edgeprune.config import Recipe
from edgeprune.errors import Infeasible, UsageError
from edgeprune.latency import table as tables
from edgeprune.recoveries import Damage
from edgeprune.search import Space, exchange
from edgeprune.solve import BUCKETS, Tokens, solve, solve_jointly
from edgeprune.stages import baseline, candidates, export, shapes, simplify
from edgeprune.tuning import loss
from edgeprune.types import FloatArray, LatencyTable, Measurement

TABLE = replace(
    parts.TABLE,
    patches=(4, 9, 16),
    attn_share=np.array([0.2, 0.5, 1.0]),
    mlp_share=np.array([0.3, 0.6, 1.0]),
    reduce_ms=0.01,
)


# The solver ---------------------------------------------------------------------------------


def random_case(seed: int, blocks: int = 2, levels: int = 3) -> tuple[list[FloatArray], list[FloatArray], Tokens]:
    """Attention with 2 sizes that may drop, MLP with 3 sizes that may not."""
    rng = np.random.default_rng(seed)
    errors, costs, drops, plain, shares, token_errors = [], [], [], [], [], []
    share = np.append(np.sort(rng.uniform(0.1, 0.9, levels - 1)), 1.0)
    for _ in range(blocks):
        some = [(0, -1), (1, -1)] + [(1, drop) for drop in range(levels - 1)]
        for units in ([i for i, _ in some], [0, 1, 2]):
            sizes = max(units) + 1
            error, cost = -np.sort(-rng.uniform(0, 3, sizes)), np.append(0.0, np.sort(rng.uniform(0.1, 2, sizes - 1)))
            errors.append(error[units])
            costs.append(cost[units])
            drops.append(tuple(drop for _, drop in some) if sizes == 2 else (-1,) * 3)
            plain.append(tuple(units))
            shares.append(share)
            token_errors.append(np.append(-np.sort(-rng.uniform(0, 2, levels - 1)), 0.0))
    return errors, costs, Tokens(shares, drops, token_errors, plain, 0.05)


def walk(
    errors: list[FloatArray], costs: list[FloatArray], tokens: Tokens, choice: tuple[int, ...]
) -> tuple[float, float]:
    """(error, cost) of a choice, the slow way; infinite where it drops to more tokens than came in."""
    level, error, cost = tokens.top, 0.0, 0.0
    for at, option in enumerate(choice):
        error += errors[at][option]
        cost += costs[at][option] * tokens.shares[at][level]
        drop = tokens.drops[at][option]
        if drop >= 0:
            if drop >= level:
                return math.inf, math.inf
            error += tokens.errors[at][drop] - tokens.errors[at][level]
            cost += tokens.reduce_ms
            level = drop
    return float(error), float(cost)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.integers(0, 1000).map(lambda n: n / 1000))
def test_joint_solutions_equal_brute_force(seed: int, share: float) -> None:
    errors, costs, tokens = random_case(seed)
    budget = share * sum(float(c.max()) for c in costs)
    found = [walk(errors, costs, tokens, c) for c in itertools.product(*(range(len(e)) for e in errors))]
    picked = solve_jointly(errors, costs, tokens, budget)
    error, cost = walk(errors, costs, tokens, picked)
    assert cost <= budget + 1e-9
    rounding = len(costs) * budget / BUCKETS + 1e-9
    assert error <= min((e for e, c in found if c <= budget - rounding), default=math.inf) + 1e-9
    assert error >= min(e for e, c in found if c <= budget + 1e-9) - 1e-9


def test_without_drops_the_joint_solution_is_the_plain_one() -> None:
    errors, costs, tokens = random_case(3)
    none = replace(tokens, drops=[(-1,) * len(e) for e in errors])
    for budget in (0.7, 1.9, 3.1):
        plain, joint = solve(errors, costs, budget), solve_jointly(errors, costs, none, budget)
        assert sum(e[i] for e, i in zip(errors, plain, strict=True)) == pytest.approx(
            sum(e[i] for e, i in zip(errors, joint, strict=True)), abs=2e-3
        )


def test_an_impossible_budget_is_infeasible() -> None:
    errors, costs, tokens = random_case(0)
    with pytest.raises(Infeasible, match="these widths and numbers of tokens"):
        solve_jointly(errors, [c + 1 for c in costs], tokens, 0.5)


# The search ---------------------------------------------------------------------------------


def test_exchanges_are_within_the_budget_and_never_bring_tokens_back() -> None:
    errors, costs, tokens = random_case(5, blocks=3)
    budget = 0.5 * sum(float(c.max()) for c in costs)
    space, rng = Space(errors, costs, budget, tokens), np.random.default_rng(0)
    choice, seen = space.solve(), set()
    for _ in range(300):
        choice = exchange(space, choice, rng)
        error, cost = walk(errors, costs, tokens, choice)
        assert math.isfinite(error) and cost <= budget + 1e-9 and space.cost(choice) == pytest.approx(cost)
        seen.add(tuple(tokens.drops[at][option] for at, option in enumerate(choice)))
    assert len(seen) > 5, "the schedule of tokens changes too"


def test_a_search_starts_from_what_narrower_questions_answer_too() -> None:
    errors, costs, tokens = random_case(5, blocks=3)
    budget = 0.7 * sum(float(c.max()) for c in costs)
    none = [np.asarray(own) < 0 for own in tokens.drops]
    first, second = Space(errors, costs, budget, tokens, [none]).starts()
    assert first == Space(errors, costs, budget, tokens).solve()
    assert all(own[option] for own, option in zip(none, second, strict=True))
    plain = solve([e[own] for e, own in zip(errors, none, strict=True)], [c[own] for c, own in zip(costs, none, strict=True)], budget)  # fmt: skip
    assert sum(e[own][i] for e, own, i in zip(errors, none, plain, strict=True)) == pytest.approx(
        sum(e[i] for e, i in zip(errors, second, strict=True)), abs=2e-3
    )
    _, least = Space(errors, costs, 0.0, tokens, [none]).starts()
    assert math.isfinite(walk(errors, costs, tokens, least)[0]), "where the narrower question has no answer, some start"


def test_a_drop_to_more_than_came_in_becomes_none() -> None:
    errors, costs, tokens = random_case(5)
    space = Space(errors, costs, 9.0, tokens)
    low, high = (tokens.drops[0].index(level) for level in (0, 1))
    assert space.legal((low, 2, high, 2)) == (low, 2, 1, 2)
    assert space.legal((high, 2, low, 2)) == (high, 2, low, 2)


# Stitched models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(make_vit: Callable[..., Any]) -> allocators.Task:
    model = make_vit()
    found = parts.calibration(model, "fisher")
    return allocators.task(found, TABLE, ((3, 24),) * 3, model, model, 0.3, 0, parts.SILENT, config.DIMS)


def choice_of(task: allocators.Task, *rows: tuple[int, int, int]) -> tuple[int, ...]:
    """Of (heads, neurons, level or -1) per block."""
    choice: list[int] = []
    for i, (heads, neurons, drop) in enumerate(rows):
        attn = zip(task.counts[2 * i], task.drops[2 * i], strict=True)
        choice += [list(attn).index((heads, drop)), task.counts[2 * i + 1].index(neurons)]
    return tuple(choice)


def test_every_attention_that_stays_offers_drops(task: allocators.Task) -> None:
    assert task.counts[0] == (0, 1, 2, 3, 1, 2, 3, 1, 2, 3)
    assert task.drops[0] == (-1, -1, -1, -1, 0, 0, 0, 1, 1, 1) and set(task.drops[1]) == {-1}
    plan = task.plan(choice_of(task, (3, 24, 1), (2, 24, -1), (3, 16, 0)))
    assert plan.shape == ((3, 24, 9), (2, 24), (3, 16, 4))
    assert task.plan(task.dense).shape == ((3, 24),) * 3


@pytest.mark.parametrize("macs, images", [(0.0, 4), (1e30, 0)])
def test_what_drops_do_is_asked_of_fewer_images_where_models_are_large(
    task: allocators.Task, monkeypatch: pytest.MonkeyPatch, macs: float, images: int
) -> None:
    monkeypatch.setattr(search, "PROBE_MACS", macs)
    monkeypatch.setattr(search, "PROBED_LEAST", 4)
    judge, _ = search.judges(task)
    probe = search.probe(task, judge, 6)
    assert len(probe.wanted) == images if images else probe is judge
    own = _tokens.drop_errors(task, probe)[0]
    assert own[-1] == 0 < own[0]


def test_stitched_reductions_are_those_of_the_sliced_model(task: allocators.Task) -> None:
    judge, _ = search.judges(task)
    images = torch.cat(task.found.batches)[: len(judge.wanted)]
    judge.keep(task.dense)
    for choice in (choice_of(task, (3, 24, 1), (2, 24, -1), (3, 16, 0)), choice_of(task, (3, 24, -1), (3, 24, -1), (1, 16, 1))):  # fmt: skip
        small = recovery.survivors(task.model, task.plan(choice), task.found.moments)
        with torch.no_grad():
            own, want = small(images).log_softmax(-1), task.model(images).log_softmax(-1)
        assert judge.divergence(choice) == pytest.approx(float(F.kl_div(own, want, log_target=True, reduction="batchmean")), rel=1e-3)  # fmt: skip


def test_what_a_judge_holds_changes_nothing_about_tokens(task: allocators.Task) -> None:
    base, other = (
        choice_of(task, (3, 24, 1), (2, 24, -1), (3, 16, 0)),
        choice_of(task, (3, 24, 1), (2, 16, -1), (3, 16, -1)),
    )
    for kind in (0, 1):
        fresh, holding = search.judges(task)[kind], search.judges(task)[kind]
        holding.keep(base)
        assert holding.divergence(other) == pytest.approx(fresh.divergence(other), rel=1e-4)


def test_drop_errors_are_twice_the_divergence_of_one_drop(task: allocators.Task) -> None:
    judge, _ = search.judges(task)
    found = _tokens.drop_errors(task, judge)
    assert all(own[-1] == 0 and (np.diff(own) <= 0).all() for own in found) and found[1].max() == 0
    images = torch.cat(task.found.batches)[: len(judge.wanted)]
    rows = [(3, 24, -1), (3, 24, 0), (3, 24, -1)]
    with torch.no_grad():
        own = vit.slice_model(task.model, task.plan(choice_of(task, *rows)))(images).log_softmax(-1)
        want = task.model(images).log_softmax(-1)
    assert found[2][0] == pytest.approx(
        2 * float(F.kl_div(own, want, log_target=True, reduction="batchmean")), rel=1e-3
    )


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_plans_drop_tokens_within_the_budget(task: allocators.Task, seconds: float) -> None:
    own = replace(task, seconds=seconds)
    room = 0.45 * own.cost(own.dense)
    plan = own.plan(search.prepare(own)(room))
    assert TABLE.predict_ms(plan.shape) <= TABLE.base_ms + room + 1e-6
    vit.check_plan(plan, task.sizes)


def test_widths_alone_never_drop(task: allocators.Task) -> None:
    own = allocators.task(task.found, TABLE, ((3, 24),) * 3, task.model, task.model, 0.0, 0, parts.SILENT)
    assert own.drops == []
    assert {left for row in own.patches for left in row} == {None}


@pytest.mark.parametrize("dims, attn, mlp", [(("heads",), (1, 2, 3), (24,)), (("mlp", "depth"), (0, 3), TABLE.stages[0].mlp_widths), (("depth",), (0, 3), (0, 24))])  # fmt: skip
def test_dimensions_limit_the_options(task: allocators.Task, dims: tuple[str, ...], attn: Any, mlp: Any) -> None:
    _, costs, counts = allocators.options(task.levels, TABLE, ((3, 24),) * 3, dims)
    assert counts[0] == attn and counts[1] == tuple(mlp)
    assert costs[0][-1] == TABLE.stages[0].attn_ms[-1]


def test_what_is_gone_stays_gone_whatever_the_dimensions(task: allocators.Task) -> None:
    _, _, counts = allocators.options(task.levels, TABLE, ((0, 16),) * 3, ("mlp",))
    assert counts[0] == (0,) and max(counts[1]) == 16


# Recovery and tuning ------------------------------------------------------------------------


@pytest.mark.parametrize("name", recoveries.names())
def test_every_recovery_takes_reduced_plans(task: allocators.Task, name: str) -> None:
    plan = task.plan(choice_of(task, (3, 24, 1), (2, 16, -1), (1, 16, 0)))
    pruned = recoveries.get(name).recover(Damage(task.model, task.model, plan, task.found, 0, parts.SILENT))
    out = pruned(torch.cat(task.found.batches))
    assert out.shape[1] == 5 and bool(torch.isfinite(out).all())
    assert [getattr(block, "patches", None) for block in pruned.blocks] == [9, None, 4]


def test_the_refit_brings_a_reduced_model_closer(task: allocators.Task) -> None:
    plan = task.plan(choice_of(task, (3, 24, 1), (2, 16, -1), (1, 16, 0)))
    images = torch.cat([x for x, _ in parts.images(64, seed=7).batches(32)])
    found = parts.calibration(task.model, "fisher", parts.images(160, seed=5))
    with torch.no_grad():
        want = task.model(images).log_softmax(-1)
        off = []
        for model in (
            recovery.survivors(task.model, plan, found.moments),
            recoveries.get("refit").recover(Damage(task.model, task.model, plan, found, 0, parts.SILENT)),
        ):
            off.append(float(F.kl_div(model(images).log_softmax(-1), want, log_target=True, reduction="batchmean")))
    assert off[1] < 0.95 * off[0]


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}])
def test_features_of_a_reduced_student_compare_with_the_teachers_same_tokens(
    make_vit: Callable[..., Any], kwargs: dict[str, Any]
) -> None:
    teacher = make_vit(**kwargs)
    recipe = Recipe(logit_weight=0.0, token_weight=1.0, token_layers=3)
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    read = loss.read_tokens(teacher)
    targets = loss.teach(teacher, images, recipe, read)
    blocks = vit.dense_plan(vit.anatomy(teacher)).blocks
    last = vit.slice_model(teacher, vit.Plan((*blocks[:2], replace(blocks[2], patches=5))))
    first = vit.slice_model(teacher, vit.Plan((replace(blocks[0], patches=5), *blocks[1:])))
    distances = [
        float(loss.total_loss(m, images, labels, targets, recipe, read).detach()) for m in (teacher, last, first)
    ]
    assert distances[0] < 1e-4, "float16 targets"
    if kwargs:  # the head reads patches: their mean changes
        assert distances[0] < distances[1]
    else:  # the tokens that are left are as they were
        assert distances[1] < 1e-4
    assert distances[2] > 1e-3
    total = loss.total_loss(first, images, labels, targets, recipe, read)
    total.backward()  # type: ignore[no-untyped-call]
    assert all(bool(torch.isfinite(p.grad).all()) for p in first.parameters() if p.grad is not None)


# The table ----------------------------------------------------------------------------------


def measured(ms: float) -> Measurement:
    rounds = np.full(60, ms)
    anchor, both = np.full(60, 12.0), np.full((2, 60), ms)
    return Measurement("m", rounds, anchor, ms / 12, (ms / 12, ms / 12), both, np.zeros((2, 60)), anchor)


def made(**more: Any) -> LatencyTable:
    """4 blocks, 3 heads, 64 neurons, 12 ms; attention alone takes 6 ms, MLPs alone 8, neither 2.5."""
    attn, mlp = {0: measured(8.0), 1: measured(9.0), 2: measured(10.5)}, {0: measured(6.0), 32: measured(10.0)}
    return tables.build_table(
        [tables.Measured(4, 3, 64, attn, mlp)], measured(2.5), {}, dense_ms=12.0, runtime="null", precision="fp32",
        threads=1, **more,
    )  # fmt: skip


def test_shares_are_what_fewer_tokens_cost_of_all() -> None:
    fewer = {8: (measured(3.2), measured(4.0)), 12: (measured(4.6), measured(7.4))}
    shape = ((3, 64, 12),) * 4
    own = made(fewer=fewer, reducing=(shape, measured(10.0)), patches=16)
    assert own.patches == (8, 12, 16)
    np.testing.assert_allclose(own.attn_share, [0.7 / 3.5, 2.1 / 3.5, 1])
    # dense 12 = 2 of what stays, 4 of attention, 6 of MLPs; of attention 0.8 and 2.4 are left
    np.testing.assert_allclose(own.mlp_share, [1.2 / 6, 3.0 / 6, 1])
    assert own.base_ms + own.attn_share[0] * 4 + own.mlp_share[0] * 6 == pytest.approx(4.0), "as the whole was measured"
    assert own.predict_ms(shape) == pytest.approx(10.0), "the price of dropping makes up the difference"
    base, attn, mlp = own.base_ms, own.stages[0].attn_ms[-1], own.stages[0].mlp_ms[-1]
    want = base + attn + mlp + attn + own.reduce_ms + 0.5 * mlp + 2 * (0.6 * attn + 0.5 * mlp)
    assert own.predict_ms(((3, 64), (3, 64, 12), (3, 64), (3, 64))) == pytest.approx(want)
    again = tables.table_from_json(tables.table_to_json(own))
    assert again.predict_ms(shape) == own.predict_ms(shape) and again.patches == own.patches


def test_models_with_fewer_tokens_are_predicted_as_measured_after_the_fit_too() -> None:
    """All plans take half a millisecond more than the sums of their prices."""
    attn, mlp = {0: measured(8.0), 1: measured(9.0), 2: measured(10.5)}, {0: measured(6.0), 32: measured(10.0)}
    plain, dropping = made(), ((3, 64, 8),) * 4
    shapes_ = [
        ((3, 64), (0, 64), (2, 0), (1, 32)),
        ((0, 0), (3, 32), (3, 64), (2, 64)),
        ((3, 0), (1, 0), (0, 64), (3, 64)),
    ]
    own = tables.build_table(
        [tables.Measured(4, 3, 64, attn, mlp)], measured(2.5), {one: measured(plain.predict_ms(one) + 0.5) for one in shapes_},
        dense_ms=12.0, runtime="null", precision="fp32", threads=1,
        fewer={8: (measured(3.9), measured(4.5))}, reducing=(dropping, measured(9.5)), patches=16,
    )  # fmt: skip
    assert own.fit["shift_ms"] == pytest.approx(0.5)
    [stage], (attn_share, _), (mlp_share, _) = own.stages, own.attn_share, own.mlp_share
    assert own.base_ms + 4 * (attn_share * stage.attn_ms[-1] + mlp_share * stage.mlp_ms[-1]) == pytest.approx(4.5)
    assert own.predict_ms(dropping) == pytest.approx(9.5)


@pytest.mark.parametrize("few", [False, True])
def test_what_is_saved_outside_of_the_blocks_is_in_no_share(make_vit: Callable[..., Any], few: bool) -> None:
    """Dropping tokens saves half a millisecond of what always stays, and measured in a quarter of the blocks not four times that."""
    sizes = vit.anatomy(make_vit(depth=4))
    *fewer, patches = shapes.patch_counts(sizes)
    blocks = 1 if few else 4

    def ms(depth: int, heads: int, neurons: int, left: int = patches) -> Measurement:
        return measured(2.0 - 0.5 * (left < patches) + depth * left / patches * (heads / 3 + 1.5 * neurons / 24))

    entries = [shapes.Entry(0, "attn", 0), shapes.Entry(0, "mlp", 0), shapes.Entry(0, "mlp", 8)]
    found = {
        one.name: ms(blocks, 0 if one.kind == "attn" else 3, 24 if one.kind == "attn" else one.kept) for one in entries
    }
    found |= {"shallow": ms(1, 3, 24), "empty": ms(4, 0, 0), "reducing": measured(8.0)}
    for left in fewer:
        for kind, heads, neurons in (("none", 0, 0), ("attn", 3, 0), ("whole", 3, 24)):
            found[f"tokens{left}.{kind}"] = ms(4, heads, neurons, left)
    paths = dict.fromkeys(entries, Path("unused"))
    asked = candidates.Candidates(
        sizes, ((0, 8, 24),), blocks, paths, (*fewer, patches), few={one.name for one in entries} if few else set()
    )
    table = asked.tabulated(found, dense_ms=12.0, runtime="null", precision="fp32", threads=1)
    np.testing.assert_allclose(table.stages[0].attn_ms[-1], 1.0)
    for shares in (table.attn_share, table.mlp_share):
        np.testing.assert_allclose(shares, np.array([*fewer, patches]) / patches)


def test_a_table_without_tokens_is_read_as_before() -> None:
    document = tables.table_to_json(made())
    for key in tables.TOKENS:
        del document[key]
    assert tables.table_from_json(document).predict_ms(((3, 64), (3, 0)) * 2) == made().predict_ms(
        ((3, 64), (3, 0)) * 2
    )


@pytest.mark.parametrize("change", [{"patches": [8, 8]}, {"patches": [8, 16, 24]}, {"attn_share": [0.5, 0.9]}, {"mlp_share": [2.0, 1.0]}, {"reduce_ms": -1.0}])  # fmt: skip
def test_damaged_token_prices_are_refused(change: dict[str, Any]) -> None:
    own = made(fewer={8: (measured(3.2), measured(4.0))}, reducing=(((3, 64, 8),) * 4, measured(9.0)), patches=16)
    with pytest.raises(UsageError, match="damaged"):
        tables.table_from_json({**tables.table_to_json(own), **change})


def with_tokens(model: Any, tokens: int) -> vit.Anatomy:
    sizes = vit.anatomy(model)
    return replace(sizes, stages=(replace(sizes.only, tokens=tokens),))


def test_counts_are_multiples_of_eight_with_the_prefix(tiny_vit: Any) -> None:
    sizes = with_tokens(tiny_vit, 197)
    counts = shapes.patch_counts(sizes)
    assert counts[-1] == 196 and all((count + 1) % 8 == 0 for count in counts[:-1]) and 5 <= len(counts) <= 7
    assert shapes.patch_counts(with_tokens(tiny_vit, 9)) == (7, 8)


def test_random_plans_with_tokens_are_plans(tiny_vit: Any) -> None:
    sizes = vit.anatomy(tiny_vit)
    found = shapes.random_shapes(20, sizes, [(0, 8, 24)], (0,), (7, 11, 16))
    for shape in found:
        vit.check_plan(vit.plan_of_shape(shape), sizes)
    assert sum(any(len(row) > 2 for row in shape) for shape in found) >= 7


# The command line's words -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"dims": "heads,token"}, "token"),
        ({"dims": "tokens", "allocator": "uniform"}, "allocator 'uniform' always chooses heads, mlp, depth"),
        ({"reducer": "tomme"}, "tomme"),
    ],
)
def test_unknown_dimensions_are_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        api.request("digits", target="cpu-avx2", latency="2x", **options)


def test_what_may_be_chosen_is_what_the_allocator_knows() -> None:
    assert api.request("digits", target="cpu-avx2", latency="2x")[0].dims == config.DIMS
    assert api.request("digits", target="cpu-avx2", latency="2x", method="flap")[0].dims == config.WIDTHS
    assert api.request("digits", target="cpu-avx2", latency="2x", dims="mlp, tokens")[0].dims == ("mlp", "tokens")
    tome = api.request("digits", target="cpu-avx2", latency="2x", method="tome")[0]
    assert (tome.dims, tome.reducer) == (("tokens",), "tome")


# The whole, on real images ------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_images_get_the_same_answer_in_both_runtimes(tmp_path: Path) -> None:
    """The digits model with two drops: top-1 of the files agrees with torch on 99.9 % of the images or more.

    What is left are ties: two tokens that matter nearly alike change places between runtimes.
    """
    import onnxruntime
    import openvino

    request, _ = api.request("digits", target="cpu-avx2", latency="2x")
    done = pipeline.run_stages(pipeline.PIPELINE[:1], request, tmp_path)
    dense = baseline.load(request, done["baseline"].folder)
    rows = [(3, 768)] * 3 + [(3, 768, 111)] + [(3, 768)] * 3 + [(3, 768, 47)] + [(3, 768)] * 4
    model = vit.slice_model(dense.model, vit.plan_of_shape(tuple(rows)))
    exported, path = tmp_path / "exported.onnx", tmp_path / "model.onnx"
    export.to_onnx(model, dense.sizes.image, exported)
    simplify.simplify(exported, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    agreed = {"onnxruntime": 0, "openvino": 0}
    for pixels, _ in dense.splits.train.take(1000).batches(50):
        with torch.no_grad():
            want = model(pixels).argmax(-1).tolist()
        for image, top in zip(pixels.numpy(), want, strict=True):
            agreed["onnxruntime"] += int(session.run(None, {"pixels": image[None]})[0].argmax()) == top
            agreed["openvino"] += int(compiled(image[None])[0].argmax()) == top
    assert min(agreed.values()) >= 999, agreed
