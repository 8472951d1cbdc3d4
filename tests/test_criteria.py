"""python -m pytest tests/test_criteria.py"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch.nn import functional as F

from edgeprune import criteria, obs, recovery, vit
from edgeprune.console import SILENT
from edgeprune.criteria import Evidence
from edgeprune.errors import UsageError
from edgeprune.types import Plan

SIZES = [5, 3, 1, 4]  # of the batches
SUB_BLOCKS = [(i, kind) for i in range(3) for kind in vit.KINDS]


@pytest.fixture(scope="module")
def evidence(make_vit: Callable[..., Any], make_images: Callable[..., Any]) -> Evidence:
    return gather(make_vit(), list(make_images(sum(SIZES)).split(SIZES)))


def gather(model: Any, pixels: list[torch.Tensor], label: int = 0, uses_loss: bool = False) -> Evidence:
    def batches() -> Iterator[Any]:
        for part in pixels:
            yield part, torch.full((len(part),), label)

    found = criteria.collect(model, batches(), 0, lambda done, info: None, uses_loss=uses_loss)
    return Evidence(
        model=model, sizes=vit.anatomy(model), moments=found.moments, gradients=found.gradients, batches=batches, images=sum(map(len, pixels)),
        neuron_grids=(vit.neuron_grid(24, 8),), seed=0, console=SILENT,
    )  # fmt: skip


def test_the_shipped_criteria_are_found() -> None:
    assert {"fisher", "kl", "magnitude", "ziplm"} <= set(criteria.names())
    assert criteria.DEFAULT in criteria.names()


def test_an_unknown_criterion_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown criterion 'fischer'; did you mean 'fisher'"):
        criteria.get("fischer")


def weights_of(evidence: Evidence, at: tuple[int, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Weight and damped covariance of a sub-block's last layer, the covariance by numpy."""
    layer, x = vit.output_layer(evidence.model.blocks[at[0]], at[1]), parts.inputs_of(evidence, at)
    covariance = np.cov(x.T, bias=True)
    h = covariance + obs.DAMPING * np.diag(covariance).mean() * np.eye(len(covariance))
    return layer.weight.detach().double().numpy(), h


@pytest.mark.parametrize("at", SUB_BLOCKS)
def test_moments_are_those_of_all_tokens(evidence: Evidence, at: tuple[int, Any]) -> None:
    _, h = weights_of(evidence, at)
    np.testing.assert_allclose(obs.damped(evidence.moments[at].covariance).numpy(), h, rtol=1e-4, atol=1e-6)
    assert evidence.moments[at].count == sum(SIZES) * 17


@pytest.mark.parametrize("at", SUB_BLOCKS)
def test_magnitude_is_the_share_of_squared_norm(evidence: Evidence, at: tuple[int, Any]) -> None:
    level = criteria.get("magnitude").score(evidence)[SUB_BLOCKS.index(at)]
    w, size = weights_of(evidence, at)[0], evidence.sizes.unit_size(at)
    norms = [float((w[:, u * size : (u + 1) * size] ** 2).sum()) for u in range(len(level.order))]
    assert level.order.tolist() == sorted(range(len(norms)), key=norms.__getitem__)
    for k in range(len(norms) + 1):
        assert level.errors[k] == pytest.approx(sum(norms[u] for u in level.order[:k]) / sum(norms), rel=1e-5)


@pytest.mark.parametrize("at", SUB_BLOCKS)
def test_ziplm_is_the_relative_error_of_the_best_survivors(evidence: Evidence, at: tuple[int, Any]) -> None:
    level = criteria.get("ziplm").score(evidence)[SUB_BLOCKS.index(at)]
    (w, _), size = weights_of(evidence, at), evidence.sizes.unit_size(at)
    covariance, mean = evidence.moments[at].covariance.numpy(), evidence.moments[at].mean.numpy()
    second = covariance + np.outer(mean, mean)
    h = second + obs.DAMPING * np.diag(second).mean() * np.eye(len(second))
    for k in range(len(level.order) + 1):
        kept = sorted(u * size + i for u in level.order[k:] for i in range(size))
        new = np.zeros_like(w)
        if kept:
            new[:, kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ w.T).T
        change = w - new
        want = np.trace(change @ h @ change.T) / np.trace(w @ h @ w.T)
        assert level.errors[k] == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert level.errors[-1] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("at", SUB_BLOCKS)
def test_fisher_equals_a_slow_loop_over_images(evidence: Evidence, at: tuple[int, Any]) -> None:
    """The directional derivative of -log p(y), image by image, from the gradient of weight and bias."""
    level = criteria.get("fisher").score(evidence)[SUB_BLOCKS.index(at)]
    model, sizes = evidence.model, evidence.sizes
    layer, size, units = vit.output_layer(model.blocks[at[0]], at[1]), sizes.unit_size(at), sizes.units(at)
    hessian, mean = obs.damped(evidence.moments[at].covariance), evidence.moments[at].mean
    generator, gradients = torch.Generator().manual_seed(0), []
    for pixels, _ in evidence.batches():
        with torch.no_grad():
            drawn = torch.multinomial(model(pixels).softmax(-1), 1, generator=generator)[:, 0]
        for image, label in zip(pixels, drawn, strict=True):
            loss = F.cross_entropy(model(image[None]), label[None])
            gradients.append(torch.autograd.grad(loss, [layer.weight, layer.bias]))
    want = [0.0]
    removed = [units - kept for kept in reversed(evidence.grid(at))]
    for gone in removed[1:]:
        columns = torch.tensor(sorted(int(u) * size + i for u in level.order[gone:] for i in range(size))).long()
        new, bias = obs.refit(layer.weight.detach(), layer.bias.detach(), mean, hessian, columns)
        dw, db = -layer.weight.detach().double(), bias - layer.bias.detach()
        dw[:, columns] += new
        error = np.mean([float((gw * dw).sum() + (gb * db).sum()) ** 2 for gw, gb in gradients])
        want.append(max(float(error), want[-1]))
    assert want[-1] > 0
    np.testing.assert_allclose(level.errors[removed], want, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(level.errors, np.interp(range(units + 1), removed, want), rtol=1e-3, atol=1e-12)


def test_fisher_in_small_groups_is_the_same(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.criteria import fisher

    want = fisher.score(evidence)
    monkeypatch.setattr(fisher, "CHANGES_BYTES", 1)
    for a, b in zip(want, fisher.score(evidence), strict=True):
        assert np.array_equal(a.order, b.order)
        np.testing.assert_allclose(a.errors, b.errors, rtol=1e-5)


def test_make_levels_makes_errors_monotone() -> None:
    level = criteria.make_levels((1, "mlp"), [2, 0, 1], np.array([0.0, 2.0, 1.0, 3.0]))
    assert level.errors.tolist() == [0.0, 2.0, 2.0, 3.0] and level.kept(1) == (1,)


# Statistics that know the loss ----------------------------------------------------------------


def test_the_loss_weighs_tokens(make_vit: Callable[..., Any], make_images: Callable[..., Any]) -> None:
    model, images = make_vit(), make_images(6)
    found = criteria.collect(model, [(images, torch.zeros(6))], 0, lambda *_: None, uses_loss=True)
    for at in SUB_BLOCKS:
        (weights,) = found.weights[at]
        assert weights.shape == (6, 17)
        torch.testing.assert_close(weights.mean(1), torch.ones(6))  # images count alike
        assert found.gradients[at].shape == (48, 48)
        assert found.gradients[at].trace() == pytest.approx(1, rel=1e-4)
    last = found.weights[2, "mlp"][0]
    torch.testing.assert_close(last[:, 1:], torch.full((6, 16), criteria.FLOOR))  # nothing reads them any more


def test_weights_count_as_repeats(make_vit: Callable[..., Any], make_images: Callable[..., Any]) -> None:
    x = torch.randn(5, 4, 3)
    times = torch.randint(1, 4, (5, 4))
    weighed, repeated = obs.Moments(), obs.Moments()
    weighed.add(x, times.float())
    repeated.add(x.flatten(0, 1).repeat_interleave(times.flatten(), 0))
    torch.testing.assert_close(weighed.mean, repeated.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighed.covariance, repeated.covariance, rtol=1e-5, atol=1e-6)


def test_the_loss_decides_which_unit_goes(make_vit: Callable[..., Any], make_images: Callable[..., Any]) -> None:
    """Outputs that the loss ignores do not make a unit worth keeping."""
    evidence = gather(make_vit(), [make_images(8)])
    at = (1, "mlp")
    weight = evidence.layer(at)[0]
    ignoring = torch.zeros(48, 48, dtype=torch.float64)
    ignoring[0, 0] = 1.0
    aware = replace(evidence, gradients={at: ignoring})
    order, errors, everything = criteria.obs_order(aware, at)
    hessian = obs.damped(evidence.moments[at].covariance)
    want, want_errors = obs.removal_order(weight[:1], hessian, 1)
    assert order == want
    np.testing.assert_allclose(errors, want_errors, rtol=1e-6, atol=1e-9)
    assert everything == pytest.approx(errors[-1], rel=1e-6)


def test_kl_is_the_divergence_of_single_substitutions(
    make_vit: Callable[..., Any], make_images: Callable[..., Any]
) -> None:
    evidence = gather(make_vit(), [make_images(6), make_images(5, seed=1)], uses_loss=True)
    levels = criteria.get("kl").score(evidence)
    assert [(level.block, level.kind) for level in levels] == SUB_BLOCKS
    images = torch.cat([pixels for pixels, _ in evidence.batches()])
    moments = {at: (own.mean, obs.damped(own.covariance)) for at, own in evidence.moments.items()}
    level = levels[3]
    for kept in evidence.grid((0, "mlp")):
        plan = vit.dense_plan(evidence.sizes)
        blocks = list(plan.blocks)
        blocks[1] = replace(blocks[1], neurons=level.kept(kept))
        pruned = recovery.survivors(evidence.model, replace(plan, blocks=tuple(blocks)), moments)
        with torch.no_grad():
            own, wanted = pruned(images).log_softmax(-1), evidence.model(images).log_softmax(-1)
        want = float(F.kl_div(own, wanted, log_target=True, reduction="batchmean"))
        assert level.errors[24 - kept] >= want * (1 - 1e-3) - 1e-7  # made monotone: never below
    assert level.errors[24] == pytest.approx(want_all(evidence, moments, images), rel=0.5)


def want_all(evidence: Evidence, moments: Any, images: torch.Tensor) -> float:
    blocks = list(vit.dense_plan(evidence.sizes).blocks)
    blocks[1] = replace(blocks[1], neurons=())
    pruned = recovery.survivors(evidence.model, Plan(tuple(blocks)), moments)
    with torch.no_grad():
        own, wanted = pruned(images).log_softmax(-1), evidence.model(images).log_softmax(-1)
    return float(F.kl_div(own, wanted, log_target=True, reduction="batchmean"))
