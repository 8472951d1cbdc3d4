"""python -m pytest tests/test_methods.py

The contract of every part of every method, on a tiny ViT. `test_saliency.py`, `test_allocators.py`, `test_schedules.py` and
`test_recoveries.py` hold each to its formula.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import parts
import pytest
import torch

from edgeprune import allocators, criteria, methods, modules, recoveries, reducers, schedules, vit
from edgeprune.errors import Infeasible, UsageError
from edgeprune.types import REDUCER, BlockPlan, Plan

SUB_BLOCKS = [(i, kind) for i in range(3) for kind in vit.KINDS]
ALL = tuple(range(24))
#: Block 0 keeps a head and 8 neurons, block 1 no attention, block 2 no MLP.
HARSH = Plan((BlockPlan((1,), tuple(range(0, 24, 3))), BlockPlan((), tuple(range(8, 24))), BlockPlan((0, 2), ())))
#: Part of it.
FURTHER = Plan((BlockPlan((1,), tuple(range(0, 24, 6))), BlockPlan((), tuple(range(8, 16))), BlockPlan((2,), ())))


@pytest.fixture
def pruned(tiny_vit: Any) -> Any:
    """In dense shape, with what HARSH removes worth nothing."""
    return vit.in_dense_shape(tiny_vit, HARSH, vit.slice_model(tiny_vit, HARSH))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", criteria.names())
class TestEveryCriterion:
    def test_levels_are_sound_and_repeatable(self, tiny_vit: Any, name: str) -> None:
        given, _ = parts.evidence(tiny_vit, name)
        before = parts.state(tiny_vit)
        first, second = (criteria.score(criteria.get(name), given) for _ in range(2))
        assert same(before, parts.state(tiny_vit)) and not tiny_vit.training
        assert all(p.grad is None for p in tiny_vit.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_vit.modules())
        assert [(level.block, level.kind) for level in first] == SUB_BLOCKS
        for level, again in zip(first, second, strict=True):
            units = given.sizes.units(level.at)
            assert sorted(level.order.tolist()) == list(range(units))
            assert level.errors.dtype == np.float64 and level.errors.shape == (units + 1,)
            assert level.errors[0] == 0 and np.isfinite(level.errors).all() and (np.diff(level.errors) >= 0).all()
            assert np.array_equal(level.order, again.order) and np.array_equal(level.errors, again.errors)
        assert sum(level.errors[-1] for level in first) > 0

    def test_dead_neurons_do_no_harm(self, tiny_vit: Any, name: str) -> None:
        """An MLP whose neurons never fire: all moments zero."""
        with torch.no_grad():
            tiny_vit.blocks[1].mlp.fc1.weight.zero_()
            tiny_vit.blocks[1].mlp.fc1.bias.fill_(-100.0)
        for level in criteria.score(criteria.get(name), parts.evidence(tiny_vit, name)[0]):
            assert np.isfinite(level.errors).all()
            assert sorted(level.order.tolist()) == list(range(len(level.order)))

    def test_labels_matter_only_where_it_says_so(self, tiny_vit: Any, name: str) -> None:
        other = parts.images(24, seed=1)
        other.source.labels = (other.source.labels**2 + 2) % parts.CLASSES  # other classes, not other names of the same
        pair = [parts.evidence(tiny_vit, name)[0], parts.evidence(tiny_vit, name, other)[0]]
        a, b = (criteria.score(criteria.get(name), given) for given in pair)
        alike = all(np.array_equal(x.errors, y.errors) for x, y in zip(a, b, strict=True))
        assert alike == ("labels" not in criteria.get(name).NEEDS)

    def test_what_is_gone_already_goes_first_and_costs_nothing(self, pruned: Any, name: str) -> None:
        given, _ = parts.evidence(pruned, name)
        levels = criteria.score(criteria.get(name), given)
        for level, kept in zip(levels, [u for b in HARSH.blocks for u in (b.heads, b.neurons)], strict=True):
            gone = given.sizes.units(level.at) - len(kept)
            assert level.kept(len(kept)) == kept
            assert level.errors[gone] == pytest.approx(0, abs=1e-6 * max(1e-9, level.errors[-1]))


@pytest.mark.parametrize("name", allocators.names())
class TestEveryAllocator:
    def test_every_budget_is_met(self, tiny_vit: Any, name: str) -> None:
        task = parts.task(tiny_vit)
        choose, again = (allocators.get(name).prepare(task) for _ in range(2))
        for room in (7.2, 5.0, 2.5, 1.0, 0.0):
            choice = choose(room)
            assert len(choice) == 6 and all(0 <= c < len(n) for c, n in zip(choice, task.counts, strict=True))
            assert task.cost(choice) <= room + 1e-9
            assert choice == again(room), "the same task and budget give the same choice"
            assert parts.TABLE.predict_ms(task.plan(choice).shape) <= 1 + room + 1e-9
        with pytest.raises(Infeasible):
            choose(-0.1)

    def test_it_uses_what_it_is_given(self, tiny_vit: Any, name: str) -> None:
        task = parts.task(tiny_vit)
        choose = allocators.get(name).prepare(task)
        assert task.cost(choose(100.0)) >= 0.5 * task.cost(task.dense) > task.cost(choose(1.0))

    def test_nothing_comes_back(self, pruned: Any, tiny_vit: Any, name: str) -> None:
        """On a model that was pruned before."""
        task = parts.task(pruned, teacher=tiny_vit, bounds=HARSH.shape)
        choice = allocators.get(name).prepare(task)(2.0)
        assert task.cost(choice) <= 2.0 + 1e-9
        for (heads, neurons), (most_heads, most) in zip(task.plan(choice).shape, HARSH.shape, strict=True):
            assert heads <= most_heads and neurons <= most


@pytest.mark.parametrize("name", [name for name in schedules.names() if name != "one-shot"])
class TestEverySchedule:
    def test_it_ends_within_the_target(self, make_vit: Callable[..., Any], name: str) -> None:
        ends = []
        for _ in range(2):
            model, teacher = make_vit(), make_vit()
            given = parts.training(model, teacher, target_ms=5.0)
            plan = parts.train(schedules.get(name).coach, given)
            assert parts.TABLE.predict_ms(plan.shape) <= 5.0 + 1e-9
            assert parts.TABLE.predict_ms(plan.shape) > 2.5
            vit.check_plan(plan, vit.anatomy(model))
            assert all(torch.isfinite(p).all() for p in model.parameters())
            assert not same(parts.state(model), parts.state(make_vit())), "it was trained"
            assert same(parts.state(teacher), parts.state(make_vit()))
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
            assert set(parts.state(model)) == set(parts.state(teacher)), "nothing of the training is left in it"
            ends.append((plan, parts.state(model)))
        assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])

    def test_what_it_shuts_is_cut_without_loss(self, make_vit: Callable[..., Any], name: str) -> None:
        """At the end the model under its gates is the one that is cut."""
        model = make_vit()
        given = parts.training(model, make_vit(), target_ms=5.0)
        coach = schedules.get(name).coach(given)
        parts.fit(model, parts.images(40), parts.RECIPE, parts.CONFIG, teacher=given.teacher, seed=0, coach=coach)
        with torch.no_grad():
            x = torch.stack([image for image, _ in parts.images(8, seed=3)])
            plan = coach.plan()
            gated = model(x)
            given.gates.remove()
            torch.testing.assert_close(vit.slice_model(model, plan)(x), gated, rtol=1e-3, atol=1e-4)

    def test_a_pruned_model_can_be_pruned_further(self, pruned: Any, tiny_vit: Any, name: str) -> None:
        given = parts.training(copy.deepcopy(pruned), tiny_vit, target_ms=3.0)
        plan = parts.train(schedules.get(name).coach, given)
        assert parts.TABLE.predict_ms(plan.shape) <= 3.0 + 1e-9


@pytest.mark.parametrize("name", recoveries.names())
class TestEveryRecovery:
    def test_the_plan_is_kept_and_the_dense_model_left_alone(self, tiny_vit: Any, name: str) -> None:
        before = parts.state(tiny_vit)
        given = parts.damage(tiny_vit, HARSH, "fisher")
        first, second = (recoveries.get(name).recover(given) for _ in range(2))
        x = torch.stack([image for image, _ in parts.images(8, seed=3)])
        with torch.no_grad():
            assert torch.isfinite(first(x)).all()
        sliced = vit.slice_model(tiny_vit, HARSH).state_dict()
        assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in sliced.items()}
        assert same(parts.state(first), parts.state(second)), "the same damage gives the same weights"
        assert same(before, parts.state(tiny_vit)) and not first.training
        assert recoveries.get(name).TUNES in ("weights", "adapters")

    def test_nothing_is_lost_where_nothing_was_removed(self, tiny_vit: Any, name: str) -> None:
        given = parts.damage(tiny_vit, vit.dense_plan(vit.anatomy(tiny_vit)))
        x = torch.stack([image for image, _ in parts.images(8, seed=3)])
        with torch.no_grad():
            have, want = recoveries.get(name).recover(given)(x), tiny_vit(x)
        if name != "scratch":  # whose point it is
            torch.testing.assert_close(have, want, rtol=1e-2, atol=1e-2)

    def test_a_pruned_model_can_be_pruned_further(self, pruned: Any, name: str) -> None:
        """Its block 1 has no attention already, block 2 no MLP, and both stay so."""
        given = parts.damage(pruned, FURTHER, "fisher")
        before = parts.state(pruned)
        found = recoveries.get(name).recover(given)
        with torch.no_grad():
            assert torch.isfinite(found(torch.stack([image for image, _ in parts.images(8, seed=3)]))).all()
        sliced = vit.slice_model(pruned, FURTHER).state_dict()
        assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in sliced.items()}
        assert same(before, parts.state(pruned))


@pytest.mark.parametrize("name", reducers.names())
class TestEveryReducer:
    def test_every_image_is_reduced_by_itself_and_always_alike(self, pruned: Any, name: str) -> None:
        """On a model that was pruned before, whose block 1 has no attention."""
        plan = replace(HARSH, blocks=(replace(HARSH.blocks[0], patches=9), *HARSH.blocks[1:]), reducer=name)
        model = vit.slice_model(pruned, plan)
        x = torch.stack([image for image, _ in parts.images(6, seed=3)])
        with torch.no_grad():
            every = model(x)
            assert torch.isfinite(every).all() and torch.equal(every, model(x))
            for i, image in enumerate(x):
                torch.testing.assert_close(model(image[None]), every[i : i + 1], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(every, vit.slice_model(pruned, HARSH)(x)), "tokens did go"

    def test_it_can_be_trained_through(self, tiny_vit: Any, name: str) -> None:
        plan = vit.plan_of_shape(((3, 24, 9), (3, 24), (3, 24)), name)
        model = vit.slice_model(tiny_vit, plan)
        model(torch.stack([image for image, _ in parts.images(6, seed=3)])).square().sum().backward()
        for key in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.2.mlp.fc1.weight"):
            gradient = dict(model.named_parameters())[key].grad
            assert gradient is not None and torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("kind", modules.KINDS)
def test_every_part_says_what_it_is(kind: str) -> None:
    for name in modules.names(kind):
        assert len(modules.doc(kind, name).split("\n")) >= 3, f"{name}: paper, formula, needs, cost"
        assert set(modules.needs(kind, name)) <= {"weights", "activations", "gradients", "labels", "loss", "classes"}
        assert isinstance(modules.get(kind, name).NEEDS, tuple)


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda m: m.name)
def test_every_method_is_made_of_parts_that_are_there(method: methods.Method) -> None:
    for kind, name in method.parts.items():
        modules.check(kind, name)
    modules.check("reducer", method.reducer)
    assert method.about and method.kind in ("method", "reducer", *modules.KINDS)
    assert set(method.dims.split(",")) <= {"", *modules.constant("allocator", method.allocator, "DIMS")}
    assert method.about in methods.describe(method.name)


def test_the_default_method_is_made_of_the_defaults() -> None:
    own = methods.get(methods.DEFAULT)
    assert own.parts == {
        "criterion": criteria.DEFAULT,
        "allocator": allocators.DEFAULT,
        "schedule": schedules.DEFAULT,
        "recovery": recoveries.DEFAULT,
    }


def test_names_are_not_used_twice() -> None:
    names = [method.name for method in methods.METHODS]
    assert len(names) == len(set(names))
    assert not set(names) & set(methods.ABSENT)


def test_artifacts_of_methods_do_not_replace_each_other() -> None:
    from edgeprune import api, publish

    names = [
        publish.artifact_name(api.request("digits", target="cpu-avx2", latency="2x", method=name)[0])
        for name in ("edgeprune", "flap", "ziplm")
    ]
    assert names == ["digits-cpu-avx2-2x", "digits-cpu-avx2-2x-flap", "digits-cpu-avx2-2x-ziplm"]


def test_an_unknown_method_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown method 'edgprune'; did you mean 'edgeprune'"):
        methods.get("edgprune")
    with pytest.raises(UsageError, match="did you mean 'knapsack'"):
        methods.describe("knapsac")


def test_the_listing_needs_no_numpy_and_has_the_default_reducer() -> None:
    code = "import sys, edgeprune.methods as m; m.listing(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert methods.METHODS[0].reducer == REDUCER
