"""python -m pytest tests/test_schedules.py

Every schedule against its formulas, computed the slow way, and against what its paper says that it does.
"""

from __future__ import annotations

import copy
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

from edgeprune import saliency, schedules, vit
from edgeprune.allocators import p3b as benefit
from edgeprune.config import Recipe
from edgeprune.errors import Infeasible
from edgeprune.gates import Gates, units_of
from edgeprune.schedules import Planned, Training, ast, compresso, hesso, hesso_cric, mask_sparsity, p3b, pat, pdp
from edgeprune.stages.sparsify import median_share
from edgeprune.types import Levels, Plan

MLP = (1, "mlp")
UNIT = 7  # of that sub-block
IMAGES = torch.stack([image for image, _ in parts.images(16, seed=3)])


def weighty(make_vit: Callable[..., Any], factor: float = 8.0) -> Any:
    """A tiny ViT in which one neuron matters much."""
    model = make_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, UNIT] *= factor
    return model


def misjudged(given: Training, times: int) -> Training:
    """The criterion holds that neuron for worthless the first so many times."""
    left = [times]

    def score() -> list[Levels]:
        found = given.score()
        left[0] -= 1
        if left[0] < 0:
            return found
        at = next(i for i, level in enumerate(found) if (level.block, level.kind) == MLP)
        costs = dict(zip(found[at].order.tolist(), np.diff(found[at].errors), strict=True)) | {UNIT: 0.0}
        order = [UNIT, *(u for u in found[at].order.tolist() if u != UNIT)]
        errors = np.concatenate([[0.0], np.cumsum([costs[u] for u in order])])
        found[at] = Levels(1, "mlp", np.array(order), errors * found[at].errors[-1] / errors[-1])
        return found

    return replace(given, score=score)


def steps_of(coach: Planned, look: Callable[[int], Any]) -> dict[int, Any]:
    """What `look(step)` says after the coach has begun each step."""
    seen: dict[int, Any] = {}
    before = coach.before

    def spied(step: int, steps: int) -> None:
        before(step, steps)
        seen[step] = look(step)

    coach.before = spied  # type: ignore[method-assign]
    return seen


def for_steps(steps: int, rate: float = 2e-3) -> Recipe:
    return replace(parts.RECIPE, epochs=(steps / 5,), learning_rate=rate)


def train(coach: Planned, recipe: Recipe = parts.RECIPE) -> Plan:
    return parts.train(lambda _: coach, coach.training, recipe)


def columns(model: Any, at: Any) -> torch.Tensor:
    """Norms `[units]` of the units' columns of the last layer."""
    weight = vit.output_layer(model.blocks[at[0]], at[1]).weight.detach()
    return weight.reshape(len(weight), vit.anatomy(model).units(at), -1).square().sum((0, 2)).sqrt()


# What they share


def test_a_share_is_over_at_its_step_and_at_the_last() -> None:
    assert [schedules.over(step, 10, 0.5) for step in range(10)] == [False] * 5 + [True] * 5
    assert schedules.over(0, 1, 0.9) and schedules.over(9, 10, 1.0) and not schedules.over(8, 10, 1.0)


def test_squares_are_sums_over_all_weights_of_a_unit(tiny_vit: Any) -> None:
    attn, mlp = tiny_vit.blocks[1].attn, tiny_vit.blocks[1].mlp
    with torch.no_grad():
        mlp.fc2.weight[:, 3] = 0
        columns = [[h * 16 + d for d in range(16)] for h in range(3)]
        rows = [[part * 48 + own for part in range(3) for own in columns[h]] for h in range(3)]
        head = [
            float(attn.qkv.weight[rows[h]].square().sum() + attn.qkv.bias[rows[h]].square().sum())
            + float(attn.proj.weight[:, columns[h]].square().sum())
            for h in range(3)
        ]
        neuron = [
            float(mlp.fc1.weight[n].square().sum() + mlp.fc1.bias[n] ** 2 + mlp.fc2.weight[:, n].square().sum())
            for n in range(24)
        ]
    neuron[3] = 0.0  # nothing reads it
    np.testing.assert_allclose(schedules.squares(tiny_vit, (1, "attn")).detach(), head, rtol=1e-5)
    own = schedules.squares(tiny_vit, MLP)
    np.testing.assert_allclose(own.detach(), neuron, rtol=1e-5)
    own.sum().backward()
    torch.testing.assert_close(mlp.fc1.weight.grad[5], 2 * mlp.fc1.weight.detach()[5])


def test_squares_of_a_gated_neuron_are_of_its_two_rows(make_vit: Callable[..., Any]) -> None:
    model = make_vit("vit_giant_patch14_dinov2")
    mlp = model.blocks[1].mlp
    n = mlp.fc2.in_features
    with torch.no_grad():
        want = [
            sum(float(mlp.fc1.weight[row].square().sum() + mlp.fc1.bias[row] ** 2) for row in (u, n + u))
            + float(mlp.fc2.weight[:, u].square().sum())
            for u in range(n)
        ]
    np.testing.assert_allclose(schedules.squares(model, MLP).detach(), want, rtol=1e-5)


def test_milliseconds_are_the_tables_and_linear_between() -> None:
    shape = ((3, 16), (0, 8), (2, 24))
    units = {(i, k): torch.tensor(float(n)) for i, own in enumerate(shape) for k, n in zip(vit.KINDS, own, strict=True)}
    assert float(schedules.milliseconds(parts.TABLE, units)) == pytest.approx(parts.TABLE.predict_ms(shape))
    units[1, "mlp"] = torch.tensor(11.0, requires_grad=True)
    got = schedules.milliseconds(parts.TABLE, units)
    assert float(got.detach()) == pytest.approx(parts.TABLE.predict_ms(shape) + 0.4 * 3 / 8)
    got.backward()
    assert float(units[1, "mlp"].grad or 0) == pytest.approx(0.4 / 8)


def test_widest_is_the_slowest_of_all_thresholds(tiny_vit: Any) -> None:
    given = parts.training(tiny_vit, tiny_vit, target_ms=4.9)
    generator = torch.Generator().manual_seed(0)
    worth = {at: torch.rand(len(gate), generator=generator) for at, gate in given.gates.values.items()}
    best = (0.0, {})
    for threshold in sorted(float(w) for own in worth.values() for w in own):
        kept = {}
        for at, own in worth.items():
            count = sum(float(w) >= threshold for w in own)
            grid = range(4) if at[1] == "attn" else (0, 8, 16, 24)
            count = min(grid, key=lambda n: (abs(n - count), n))
            kept[at] = tuple(sorted(sorted(range(len(own)), key=lambda u: -float(own[u]))[:count]))
        ms = parts.TABLE.predict_ms(tuple((len(kept[i, "attn"]), len(kept[i, "mlp"])) for i in range(3)))
        if best[0] < ms <= 4.9:
            best = (ms, kept)
    assert units_of(schedules.widest(given, worth)) == best[1]
    with pytest.raises(Infeasible, match=r"without any unit it is 1\.000 ms"):
        schedules.widest(replace(given, target_ms=0.9), worth)


def test_fold_leaves_what_is_kept_as_it_was(tiny_vit: Any) -> None:
    gates = Gates(tiny_vit)
    plan = vit.plan_of_shape(((2, 16), (3, 8), (0, 24)))
    gates.keep(plan)
    gates.values = {at: gate * torch.linspace(0.5, 1.5, len(gate)) for at, gate in gates.values.items()}
    with torch.no_grad():
        want = tiny_vit(IMAGES)
        schedules.fold(gates, plan)
        torch.testing.assert_close(tiny_vit(IMAGES), want)
    assert {float(v) for gate in gates.values.values() for v in gate} == {0.0, 1.0}


@pytest.mark.parametrize("name", ["pdp", "compresso", "p3b", "pat"])
def test_soft_gates_are_folded_into_what_is_kept(make_vit: Callable[..., Any], name: str) -> None:
    """With the weights at rest, all that changes is their columns, by the last gates."""
    model = make_vit()
    coach = schedules.get(name).coach(parts.training(model, make_vit(), target_ms=5.0))
    gates = coach.training.gates
    seen = steps_of(coach, lambda _: {at: gate.detach().clone() for at, gate in gates.values.items()})
    before = {at: columns(model, at) for at in gates.values}
    plan = train(coach, for_steps(60, rate=0.0))
    soft = seen[59 if name == "pat" else 53]  # of the last step before they are hard
    if name == "compresso":
        soft = {at: compresso.mean(own.detach()) for at, own in coach.numbers.items()}
    for at, units in units_of(plan).items():
        kept = list(units)
        torch.testing.assert_close(columns(model, at)[kept], (before[at] * soft[at])[kept], rtol=1e-4, atol=1e-5)
    assert any(0.05 < float(gate) < 0.95 for own in soft.values() for gate in own)


# GraNet


def test_granet_takes_back_what_is_missed(make_vit: Callable[..., Any]) -> None:
    kept = {}
    for name in ("granet", "gradual"):
        given = misjudged(parts.training(weighty(make_vit), weighty(make_vit), target_ms=6.0), times=1)
        coach = schedules.get(name).coach(given)
        gates = steps_of(coach, lambda _, own=given.gates: float(own.values[MLP].detach()[UNIT]))
        kept[name] = UNIT in units_of(train(coach))[MLP]
        assert gates[0] == 0, "it was shut"
    assert kept == {"granet": True, "gradual": False}


def test_granet_regrows_within_the_budget_and_not_at_the_end(make_vit: Callable[..., Any]) -> None:
    given = parts.training(make_vit(), make_vit(), target_ms=5.0)
    coach = schedules.get("granet").coach(given)
    planned: list[Plan] = []

    def allocate(levels: list[Levels], budget: float) -> Plan:
        planned.append(given.allocate(levels, budget))
        return planned[-1]

    coach.training = replace(given, allocate=allocate)
    plans = steps_of(coach, lambda _: coach.plan())
    train(coach)
    assert [plans[step].shape for step in range(10)] == [plan.shape for plan in planned]
    assert sum(plans[step] != planned[step] for step in range(10)) > 3, "units came back"
    assert planned[-1] == plans[9] == plans[14], "none at the last update, nor after it"


# PDP


@pytest.mark.parametrize("kept", [0, 1, 5, 8])
def test_pdp_masks_are_its_formula(kept: int) -> None:
    squares = np.random.default_rng(0).uniform(0.1, 2, 8)
    tau = 0.1 * squares.std()
    order = sorted(squares, reverse=True)
    above = order[kept - 1] if kept else order[0] + squares.std()
    below = order[kept] if kept < 8 else max(0.0, order[-1] - squares.std())
    t = (math.sqrt(above) + math.sqrt(below)) / 2
    want = [math.exp(w / tau) / (math.exp(w / tau) + math.exp(t * t / tau)) for w in squares]
    got = pdp.mask(torch.from_numpy(squares), kept)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert int((got > 0.5).sum()) == kept


def test_pdp_a_lone_unit_is_open_or_shut() -> None:
    assert float(pdp.mask(torch.ones(1), 1)) > 0.9 and float(pdp.mask(torch.ones(1), 0)) < 0.1


def test_pdp_all_weights_keep_gradients_and_a_small_unit_that_matters_grows_back(make_vit: Callable[..., Any]) -> None:
    given = parts.training(weighty(make_vit, 0.4), weighty(make_vit, 4.0), target_ms=6.0)
    coach = schedules.get("pdp").coach(given)
    seen = steps_of(coach, lambda _: (float(given.gates.values[MLP].detach()[UNIT]), least()))

    def least() -> float:
        """The least gradient of a column, of the last backward pass."""
        gradient = given.model.blocks[1].mlp.fc2.weight.grad
        return math.inf if gradient is None else float(gradient.abs().sum(0).min())

    plan = train(coach, for_steps(60, rate=5e-3))
    assert min(gate for gate, _ in seen.values()) < 0.1, "it was almost shut"
    assert all(least > 0 for _, least in list(seen.values())[:50]), "soft masks"
    assert UNIT in units_of(plan)[MLP]


# HESSO


@pytest.mark.parametrize("steps", [1, 2, 7, 15, 100])
def test_hesso_periods_are_in_order_and_end_in_time(steps: int) -> None:
    found = hesso.periods(steps)
    assert 1 <= len(found) <= hesso.PERIODS and all(len(period) for period in found)
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))
    assert found[0].start <= 0.1 * steps and found[-1].stop <= max(1, 2 / 3 * steps)


def test_hesso_moves_the_least_valuable_to_zero_along_a_line(make_vit: Callable[..., Any]) -> None:
    model = make_vit()
    given = parts.training(model, make_vit(), target_ms=5.0)
    coach = schedules.get("hesso").coach(given)
    before = {at: columns(model, at) for at in given.gates.values}
    seen = steps_of(coach, lambda _: ({at: columns(model, at) for at in before}, getattr(coach, "doomed", {})))
    levels = given.score()
    kept = units_of(given.allocate(levels, 5.0))
    train(coach, for_steps(60, rate=0.0))
    period = coach.periods[0]
    doomed = [(at, u) for at, own in seen[period.start][1].items() for u in own.nonzero()[:, 0].tolist()]
    costs = {
        (level.block, level.kind, int(u)): c for level in levels for c, u in zip(np.diff(level.errors), level.order)
    }
    outside = sorted((c, key) for key, c in costs.items() if key[2] not in kept[key[:2]])
    assert {(*at, unit) for at, unit in doomed} == {key for _, key in outside[: math.ceil(len(outside) / 6)]}
    for step in period:
        for at, unit in doomed:
            share = (len(period) - (step - period.start)) / len(period)
            assert float(seen[step][0][at][unit]) == pytest.approx(share * float(before[at][unit]), rel=1e-4)
        others = [(at, u) for at, own in before.items() for u in range(len(own)) if (at, u) not in doomed]
        assert all(seen[step][0][at][u] == before[at][u] for at, u in others)
    assert all(seen[period.stop][0][at][unit] == 0 for at, unit in doomed)


@pytest.mark.parametrize("name", ["hesso", "hesso-cric"])
def test_hesso_is_cut_without_any_loss(make_vit: Callable[..., Any], name: str) -> None:
    """Without the gates, too: all that goes is exactly zero, whatever the optimizer's momentum."""
    model = make_vit()
    plan = parts.train(schedules.get(name).coach, parts.training(model, make_vit(), target_ms=5.0))
    for at, units in units_of(plan).items():
        gone = [u for u in range(vit.anatomy(model).units(at)) if u not in units]
        assert not columns(model, at)[gone].any() and columns(model, at)[list(units)].all()
    with torch.no_grad():
        torch.testing.assert_close(vit.slice_model(model, plan)(IMAGES), model(IMAGES))


def test_cric_rises_are_slopes_on_the_way_to_zero(make_vit: Callable[..., Any]) -> None:
    model, teacher = make_vit(), make_vit(seed=1)
    given = parts.training(model, teacher, target_ms=5.0)
    candidates = {at: [0, 2] if at[1] == "attn" else [1, UNIT, 20] for at in given.gates.values}
    got = hesso_cric.rises(given, candidates)
    want = {at: torch.zeros(len(gate)) for at, gate in given.gates.values.items()}
    given.gates.remove()
    pixels = torch.cat([x for x, _ in given.batches()])
    for trial in (0.25, 0.5, 0.75):
        nearer = copy.deepcopy(model)
        for at, units in candidates.items():
            size = vit.anatomy(model).unit_size(at)
            with torch.no_grad():
                layer = vit.output_layer(nearer.blocks[at[0]], at[1])
                layer.weight[:, vit.columns(tuple(units), size)] *= 1 - trial
        F.kl_div(
            nearer(pixels).log_softmax(-1), teacher(pixels).log_softmax(-1), log_target=True, reduction="batchmean"
        ).backward()
        for at in want:
            size = vit.anatomy(model).unit_size(at)
            old = vit.output_layer(model.blocks[at[0]], at[1]).weight
            gradient = vit.output_layer(nearer.blocks[at[0]], at[1]).weight.grad
            want[at] -= (old * gradient).sum(0).reshape(-1, size).sum(1).detach() / 3
    for at, own in want.items():
        torch.testing.assert_close(got[at][candidates[at]], own[candidates[at]], rtol=1e-3, atol=1e-5)


def test_cric_exempts_what_was_misjudged(make_vit: Callable[..., Any]) -> None:
    kept = {}
    for name in ("hesso", "hesso-cric"):
        given = misjudged(parts.training(weighty(make_vit, 4), weighty(make_vit, 4), target_ms=7.0), times=1000)
        plan = parts.train(schedules.get(name).coach, given)
        kept[name] = UNIT in units_of(plan)[MLP]
        assert not any(p.grad_fn for p in given.model.parameters()) and not given.model.training
    assert kept == {"hesso": False, "hesso-cric": True}


# MaskSparsity


def test_mask_sparsity_penalises_the_doomed_alone(make_vit: Callable[..., Any]) -> None:
    model = make_vit()
    given = parts.training(model, make_vit(), target_ms=5.0)
    coach = schedules.get("mask-sparsity").coach(given)
    coach.before(0, 15)
    kept = units_of(coach.plan())
    norms = [
        float(square) ** 0.5
        for at in kept
        for u, square in enumerate(schedules.squares(model, at).tolist())
        if u not in kept[at]
    ]
    penalty = coach.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.3 * sum(norms) / len(norms) ** 0.5, rel=1e-5)
    penalty.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert math.sqrt(sum(float(g.square().sum()) for g in gradients)) == pytest.approx(0.3, rel=1e-4)
    for at, units in kept.items():
        group = [g.grad for g in saliency.group(model, at)]
        sums = saliency.unit_sums([g.abs() for g in group if g is not None], vit.anatomy(model).unit_size(at))
        assert [u for u, s in enumerate(sums.tolist()) if s == 0] == list(units)


def test_mask_sparsity_lands_softly(make_vit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the penalty what goes gets small, less is lost at the cut, and what stays is as large as without."""
    lost, kept, gone = {}, {}, {}
    for strength in (0.3, 0.0):
        monkeypatch.setattr(mask_sparsity, "STRENGTH", strength)
        model = make_vit()
        given = parts.training(model, make_vit(), target_ms=5.0)
        plan = parts.train(schedules.get("mask-sparsity").coach, given, for_steps(60, rate=1e-2))
        with torch.no_grad():
            lost[strength] = float((vit.slice_model(model, plan)(IMAGES) - model(IMAGES)).square().mean())
        norms = {at: schedules.squares(model, at).detach().sqrt() for at in units_of(plan)}
        kept[strength] = sum(float(norms[at][list(units)].sum()) for at, units in units_of(plan).items())
        gone[strength] = sum(float(own.sum()) for own in norms.values()) - kept[strength]
    assert gone[0.3] < 0.5 * gone[0.0] and lost[0.3] < 0.7 * lost[0.0]
    assert kept[0.3] == pytest.approx(kept[0.0], rel=0.05)


# Compresso


def test_compresso_gates_are_hard_concrete() -> None:
    alpha = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    u = torch.rand(4, generator=torch.Generator().manual_seed(1)).double()
    got = compresso.sample(alpha, torch.Generator().manual_seed(1))
    for i in range(4):
        s = 1 / (1 + math.exp(-(math.log(u[i]) - math.log(1 - u[i]) + float(alpha[i])) / (2 / 3)))
        assert float(got[i]) == pytest.approx(min(1, max(0, 1.2 * s - 0.1)), abs=1e-5)
    many = compresso.sample(alpha.repeat(20000, 1), torch.Generator().manual_seed(2))
    torch.testing.assert_close((many > 0).float().mean(0), compresso.probability(alpha), atol=0.01, rtol=0)
    assert float(compresso.mean(torch.tensor(9.0))) == 1 and float(compresso.mean(torch.tensor(-9.0))) == 0


def test_compresso_learns_its_way_to_the_target(make_vit: Callable[..., Any]) -> None:
    """The expected latency, before anything is rounded; and what matters stays."""
    given = parts.training(weighty(make_vit), weighty(make_vit), target_ms=5.0)
    coach = schedules.get("compresso").coach(given)
    seen = steps_of(
        coach,
        lambda _: (float(coach.expected().detach()) * 8.2, [float(n.detach().min()) for n in coach.numbers.values()]),
    )
    plan = train(coach, for_steps(60))
    assert seen[0][0] > 8.0 and seen[53][0] == pytest.approx(5.0, abs=0.3)
    for at, units in units_of(plan).items():
        alpha = coach.numbers[at].detach()
        gone = [u for u in range(len(alpha)) if u not in units]
        assert not units or not gone or float(alpha[list(units)].min()) >= float(alpha[gone].max())
    assert UNIT in units_of(plan)[MLP]
    assert seen[54][1] == seen[59][1], "the gates are fixed at the end"


# P3B


def test_p3b_masks_are_sigmoids_in_rank() -> None:
    score = torch.tensor([0.3, 0.1, 0.9, 0.5, 0.2])  # ranks 2, 0, 4, 3, 1
    got = p3b.mask(score, 2.0, 0.1)
    want = [1 / (1 + math.exp(-math.log(9) * (r - 3 + 0.5) / 0.5)) for r in (2, 0, 4, 3, 1)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert p3b.mask(score, 2.0, 0.0).tolist() == [0, 0, 1, 1, 0]
    assert float(p3b.mask(torch.arange(100), 50, 0.1)[60]) == pytest.approx(0.9, abs=0.01), "as far above as tau says"


def test_p3b_scores_are_of_the_masks_gradients(make_vit: Callable[..., Any]) -> None:
    model = make_vit()
    coach = schedules.get("p3b").coach(parts.training(model, make_vit(), target_ms=5.0))
    coach.before(0, 60)
    gates = coach.training.gates
    want = torch.zeros(24)
    for labels in (torch.zeros(16).long(), torch.ones(16).long()):
        F.cross_entropy(model(IMAGES), labels).backward()
        want += gates.gradient(MLP).square()  # all are 1
        coach.after(0, 60)
    torch.testing.assert_close(coach.scores[MLP], want)
    assert float(want.min()) > 0


def test_p3b_late_blocks_regain_width_once_they_carry_the_signal(make_vit: Callable[..., Any]) -> None:
    """Before the transfer the first block's attention tells the classes apart, after it the last one's."""

    def carried_by(block: int) -> Any:
        model = make_vit()
        with torch.no_grad():
            for i in range(3):
                model.blocks[i].attn.proj.weight *= 2.0 if i == block else 0.05
        return model

    model = carried_by(0)
    given = parts.training(model, carried_by(2), target_ms=3.5)
    first = benefit.benefits(carried_by(0), given.batches(), 0)
    coach = schedules.get("p3b").coach(given)
    seen = steps_of(coach, lambda _: given.gates.values[2, "mlp"].detach().clone())
    plan = train(coach, for_steps(160, rate=2e-3))
    before, after = (benefit.importance(found, np.ones(6)) for found in (first, coach.benefits))
    assert before[0] > before[4] and after[0] < after[4], "attention of the first and of the last block"
    narrowest = min(seen.values(), key=lambda own: float(own.sum()))
    revived = [u for u in units_of(plan)[2, "mlp"] if narrowest[u] < 0.5]
    assert float(narrowest.sum()) < 6 and len(units_of(plan)[2, "mlp"]) >= 8 and len(revived) >= 3
    assert len(units_of(plan)[2, "attn"]) > len(units_of(plan)[0, "attn"])


# AST


def test_ast_shut_units_get_straight_through_gradients(make_vit: Callable[..., Any]) -> None:
    model = make_vit()
    coach = schedules.get("ast").coach(parts.training(model, make_vit(), target_ms=5.0))
    coach.before(0, 15)
    layer = model.blocks[1].mlp.fc2
    seen: dict[str, torch.Tensor] = {}
    layer.register_forward_pre_hook(lambda _, x: seen.update(h=x[0].detach()), prepend=True)  # before the gates

    def keep(_: object, x: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        y.retain_grad()
        seen["y"] = y

    layer.register_forward_hook(keep)
    F.cross_entropy(model(IMAGES), torch.arange(16) % 5).backward()
    assert seen["y"].grad is not None
    want = torch.einsum("nto,nti->oi", seen["y"].grad, seen["h"])
    torch.testing.assert_close(layer.weight.grad, want, rtol=1e-3, atol=1e-6)
    shut = [u for u in range(24) if u not in units_of(coach.plan())[MLP]]
    assert shut and float(want[:, shut].abs().min()) > 0


def test_ast_shut_units_decay(make_vit: Callable[..., Any]) -> None:
    model = make_vit()
    coach = schedules.get("ast").coach(parts.training(model, make_vit(), target_ms=5.0))
    before = {at: schedules.squares(model, at).detach() for at in coach.training.gates.values}
    plan = train(coach, for_steps(60, rate=0.0))
    factor = math.prod(1 - ast.DECAY / 60 * min(1, step / 30) for step in range(40))
    for at, units in units_of(plan).items():
        left = schedules.squares(model, at).detach() / before[at]
        want = [1.0 if u in units else factor**2 for u in range(len(left))]
        np.testing.assert_allclose(left, want, rtol=1e-4)
        assert set(units) == set(before[at].argsort(descending=True)[: len(units)].tolist()), "the largest"


def test_ast_what_is_missed_grows_until_it_is_chosen(make_vit: Callable[..., Any]) -> None:
    given = parts.training(weighty(make_vit, 0.9), weighty(make_vit, 4.0), target_ms=6.0)
    with torch.no_grad():
        for model in (given.model, given.teacher):
            model.blocks[1].mlp.fc1.weight[UNIT] *= 0.9
            model.blocks[1].mlp.fc1.bias[UNIT] *= 0.9
    coach = schedules.get("ast").coach(given)
    gates = steps_of(coach, lambda _: float(given.gates.values[MLP].detach()[UNIT]))
    plan = train(coach, for_steps(60, rate=5e-3))
    assert gates[0] == ast.LEAK, "shut at first"
    assert gates[40] == gates[59] == 1 and UNIT in units_of(plan)[MLP]


# PAT


def test_pat_gates_begin_at_one_and_sharpen() -> None:
    m = torch.tensor([-0.5, 0.0, 0.5])
    assert pat.gate(torch.zeros(3), 0, 100).tolist() == [1, 1, 1]
    for step in (1, 30, 80):
        tau = 1 / (1 - math.log(step) / math.log(100) + 1e-6)
        want = [1 / (1 + math.exp(-tau * float(x))) + max(0.5 - step / 100, 0) for x in m]
        np.testing.assert_allclose(pat.gate(m, step, 100), want, rtol=1e-5)


def test_pat_penalty(make_vit: Callable[..., Any]) -> None:
    coach = schedules.get("pat").coach(parts.training(make_vit(), make_vit(), target_ms=5.0))
    coach.before(0, 60)
    generator = torch.Generator().manual_seed(0)
    for own in coach.numbers.values():
        own.data = torch.randn(own.shape, generator=generator)
    counts = {at: float((own >= 0).sum()) for at, own in coach.numbers.items()}
    ms = 1 + sum(
        np.interp(n, range(4) if at[1] == "attn" else (0, 8, 16, 24), [0, 0.5, 0.9, 1.2]) for at, n in counts.items()
    )
    every = torch.cat([own.detach() for own in coach.numbers.values()])
    high, low = every[every > 0], every[every <= 0]
    want = 10 * abs(ms - 5) / 5 + float(((high - 0.5) ** 2).mean()) + float(((low + 0.5) ** 2).mean())
    penalty = coach.penalty()
    assert penalty is not None and float(penalty.detach()) == pytest.approx(want, rel=1e-4)


def test_pat_trains_adapters_and_a_mask_that_is_frozen(make_vit: Callable[..., Any]) -> None:
    model, base = weighty(make_vit), weighty(make_vit)
    coach = schedules.get("pat").coach(parts.training(model, base, target_ms=5.0))
    gates = coach.training.gates
    seen = steps_of(coach, lambda _: {at: gate.detach().clone() for at, gate in gates.values.items()})
    plan = train(coach, for_steps(60, rate=5e-3))
    for i in range(3):
        for kind in vit.KINDS:
            old, new = (vit.first_layer(vit.sub_block(own.blocks[i], kind), kind).weight for own in (base, model))
            change = (new - old).detach()
            assert 0 < int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 8, "of the adapters' rank"
    assert torch.equal(model.patch_embed.proj.weight, base.patch_embed.proj.weight), "frozen"
    for at, own in seen[48].items():
        assert torch.equal(own, seen[59][at])
        assert (own > 0).nonzero()[:, 0].tolist() == list(units_of(plan)[at])
    assert all(p.requires_grad for p in model.parameters())
    assert UNIT in units_of(plan)[MLP]


@pytest.mark.parametrize(
    "quantile, samples, share",
    [("p50", 5, 1.0), ("p90", 64, 0.8), ("p90", 63, 1.0), ("p99", 64, 0.8), ("p99", 662, 0.5)],
)
def test_a_quantile_that_few_samples_tell_of_is_not_aimed_at(quantile: str, samples: int, share: float) -> None:
    anchor = {"p50": 8.0, "p90": 10.0, "p99": 16.0, "samples": samples}
    assert median_share(anchor, quantile) == share
