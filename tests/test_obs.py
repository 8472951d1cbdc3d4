"""python -m pytest tests/test_obs.py"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import obs
from edgeprune.obs import Moments

Array = np.ndarray


def layer(seed: int, inputs: int = 6, outputs: int = 4, samples: int = 200) -> tuple[Array, Array, Array]:
    """Correlated inputs `[samples, inputs]` with a mean, weight `[outputs, inputs]`, bias `[outputs]`."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs))
    x = rng.normal(size=(samples, inputs)) @ mix + 3 * rng.normal(size=inputs)
    return x, rng.normal(size=(outputs, inputs)), rng.normal(size=outputs)


def moments(x: Array) -> Moments:
    made = Moments()
    made.add(torch.tensor(x))
    return made


def least_squares(x: Array, w: Array, b: Array, kept: list[int]) -> tuple[Array, Array, float]:
    """What the survivors become, by numpy on the raw samples with an intercept; and the mean squared error."""
    design = np.column_stack([x[:, kept], np.ones(len(x))])
    wanted = x @ w.T + b
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    error = float(((design @ solution - wanted) ** 2).sum() / len(x))
    return solution[:-1].T, solution[-1], error


def removal_error(w: Array, h: Array, removed: list[int]) -> float:
    """min over W' of tr((W - W') H (W - W')^T) with the columns `removed` of W' zero; the slow, plain way."""
    kept = [i for i in range(len(h)) if i not in removed]
    full = w @ h @ w.T
    if not kept:
        return float(np.trace(full))
    cross = w @ h[:, kept]
    return float(np.trace(full - cross @ np.linalg.solve(h[np.ix_(kept, kept)], cross.T)))


# Moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_equal_numpys_covariance(mean: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(60, 7, 5)) * [1, 2, 3, 4, 5] + mean * rng.normal(size=5), dtype=dtype)
    made = Moments()
    for batch in x.split([1, 40, 16, 3]):
        made.add(batch)
    flat = x.double().reshape(-1, 5).numpy()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert made.count == len(flat)
    np.testing.assert_allclose(made.mean.numpy(), flat.mean(0), rtol=tolerance / 10)
    np.testing.assert_allclose(made.covariance.numpy(), np.cov(flat.T, bias=True), rtol=tolerance, atol=10 * tolerance)
    assert made.covariance.dtype == torch.float64


def test_a_constant_input_explains_nothing() -> None:
    """What a class token without attention is; its rounding must not tell what `rows` leaves out: what is to be explained."""
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 100.0):
        constant, wanted = scale * torch.randn(4), 5 + torch.randn(90, 3)
        made = Moments(rows=4)
        for batch in wanted.split([33, 1, 56]):
            made.add(torch.cat([constant.expand(len(batch), 4), batch], -1), torch.rand(len(batch)))
        assert made.covariance.shape == (4, 7) and not made.covariance.any()


def test_one_constant_input_of_several() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 1 / 3
    made = Moments()
    for batch in x.split(20):
        made.add(batch)
    assert not made.covariance[1].any() and not made.covariance[:, 1].any()
    np.testing.assert_allclose(made.covariance[::2, ::2], np.cov(x[:, ::2].T.double(), bias=True), rtol=1e-5)


def test_moments_keep_no_graph() -> None:
    made = Moments()
    made.add(torch.ones(3, 2, requires_grad=True) * 2)
    assert not made.mean.requires_grad and not made.covariance.requires_grad


# Refit --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), kept=st.sets(st.integers(0, 5)))
def test_refit_is_least_squares_with_an_intercept(seed: int, kept: set[int]) -> None:
    x, w, b = layer(seed)
    columns = sorted(kept)
    own = moments(x)
    weight, bias = obs.refit(
        torch.tensor(w), torch.tensor(b), own.mean, obs.damped(own.covariance, 1e-12), torch.tensor(columns).long()
    )
    want_weight, want_bias, _ = least_squares(x, w, b, columns)
    np.testing.assert_allclose(weight.numpy(), want_weight, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), want_bias, atol=1e-6)


def test_refit_without_survivors_is_the_mean_output() -> None:
    x, w, b = layer(1)
    own = moments(x)
    weight, bias = obs.refit(
        torch.tensor(w), torch.tensor(b), own.mean, obs.damped(own.covariance), torch.zeros(0).long()
    )
    assert tuple(weight.shape) == (4, 0)
    np.testing.assert_allclose(bias.numpy(), (x @ w.T + b).mean(0), atol=1e-9)


def test_refit_with_everything_kept_is_the_same_layer() -> None:
    x, w, b = layer(2)
    own = moments(x)
    weight, bias = obs.refit(torch.tensor(w), torch.tensor(b), own.mean, obs.damped(own.covariance), torch.arange(6))
    np.testing.assert_allclose(weight.numpy(), w, atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), b, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(6)))
def test_refits_of_nested_sets_are_those_of_each(seed: int, order: list[int]) -> None:
    x, w, b = layer(seed)
    own = moments(x)
    given_ = torch.tensor(w), torch.tensor(b), own.mean, obs.damped(own.covariance)
    counts = [6, 4, 1, 0]
    found = obs.refits(*given_, torch.tensor(order), counts)
    for count, (weight, bias) in zip(counts, found, strict=True):
        want_weight, want_bias = obs.refit(*given_, torch.tensor(order[:count]).long())
        np.testing.assert_allclose(weight.numpy(), want_weight.numpy(), atol=1e-8)
        np.testing.assert_allclose(bias.numpy(), want_bias.numpy(), atol=1e-8)


# Removal order ------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), unit_size=st.sampled_from([1, 2, 3]))
def test_summed_scores_are_the_true_errors(seed: int, unit_size: int) -> None:
    """After every removal the error equals that of a fresh least-squares fit on the survivors."""
    x, w, b = layer(seed)
    order, errors = obs.removal_order(
        torch.tensor(w), obs.damped(torch.tensor(np.cov(x.T, bias=True)), 1e-12), unit_size
    )
    units = 6 // unit_size
    assert sorted(order) == list(range(units)) and len(errors) == units + 1 and errors[0] == 0.0
    for k in range(units + 1):
        kept = [u * unit_size + i for u in sorted(order[k:]) for i in range(unit_size)]
        assert errors[k] == pytest.approx(least_squares(x, w, b, kept)[2], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("unit_size", "units"), [(1, 6), (2, 4), (4, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_every_removal_is_the_cheapest_by_brute_force(unit_size: int, units: int, seed: int) -> None:
    x, w, _ = layer(seed, inputs=unit_size * units)
    h = obs.damped(torch.tensor(np.cov(x.T, bias=True)))
    order, errors = obs.removal_order(torch.tensor(w), h, unit_size)
    gone: list[int] = []
    for k, unit in enumerate(order):
        trials = {
            u: removal_error(w, h.numpy(), [c * unit_size + i for c in [*gone, u] for i in range(unit_size)])
            for u in range(units)
            if u not in gone
        }
        assert unit == min(trials, key=trials.__getitem__)
        assert errors[k + 1] == pytest.approx(trials[unit], rel=1e-8)
        gone.append(unit)


def test_of_two_twins_one_stays() -> None:
    """Magnitude would drop both twins early; the first goes for nothing, then the other is worth double."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 5))
    x[:, 4] = x[:, 1]
    w = np.ones((3, 5))
    order, errors = obs.removal_order(torch.tensor(w), obs.damped(torch.tensor(np.cov(x.T, bias=True)), 1e-6), 1)
    assert order[0] in (1, 4)
    assert errors[1] < 1e-3
    assert {1, 4} - {order[0]} == {order[-1]}


def test_dead_inputs_go_first() -> None:
    x, w, _ = layer(3)
    x[:, [0, 4]] = [7.0, 0.0]
    w[:, [0, 4]] = 100.0
    order, errors = obs.removal_order(torch.tensor(w), obs.damped(torch.tensor(np.cov(x.T, bias=True)), 1e-9), 1)
    assert set(order[:2]) == {0, 4}
    assert np.isfinite(errors).all() and errors[2] < 1e-2 * errors[3]


@pytest.mark.parametrize("unit_size", [1, 2])
def test_fewer_samples_than_inputs(unit_size: int) -> None:
    x, w, _ = layer(4, inputs=20, samples=5)
    order, errors = obs.removal_order(torch.tensor(w), obs.damped(moments(x).covariance), unit_size)
    assert sorted(order) == list(range(20 // unit_size))
    assert np.isfinite(errors).all() and (np.diff(errors) >= 0).all()


@pytest.mark.parametrize("unit_size", [1, 2])
def test_nothing_but_dead_inputs(unit_size: int) -> None:
    """A layer that only ever sees one input costs nothing to remove, and the bias takes it over."""
    own = moments(np.full((30, 6), 2.0))
    w, h = torch.ones(3, 6), obs.damped(own.covariance)
    order, errors = obs.removal_order(w, h, unit_size)
    assert sorted(order) == list(range(6 // unit_size))
    assert np.isfinite(errors).all() and max(errors) < 1e-6
    weight, bias = obs.refit(w, torch.zeros(3), own.mean, h, torch.arange(unit_size))
    assert torch.isfinite(weight).all()
    np.testing.assert_allclose((weight @ own.mean[:unit_size] + bias).numpy(), [12.0] * 3)


@pytest.mark.parametrize("unit_size", [1, 2])
def test_the_inverse_computed_afresh_changes_nothing(monkeypatch: pytest.MonkeyPatch, unit_size: int) -> None:
    x, w, _ = layer(5, inputs=24, outputs=8)
    h = obs.damped(torch.tensor(np.cov(x.T, bias=True)))
    want_order, want_errors = obs.removal_order(torch.tensor(w), h, unit_size)
    calls = 0
    name = "_sweep" if unit_size == 1 else "_sweep_groups"
    sweep = getattr(obs, name)

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return sweep(*arguments)

    monkeypatch.setattr(obs, "SWEEP", 3 * unit_size)
    monkeypatch.setattr(obs, name, counted)
    order, errors = obs.removal_order(torch.tensor(w), h, unit_size)
    assert calls == 24 // unit_size // 3
    assert order == want_order
    np.testing.assert_allclose(errors, want_errors, rtol=1e-8)


def test_inputs_are_left_alone() -> None:
    x, w, _ = layer(6)
    weight, h = torch.tensor(w), obs.damped(torch.tensor(np.cov(x.T, bias=True)))
    before = weight.clone(), h.clone()
    obs.removal_order(weight, h, 1)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])


def test_damping_is_relative_to_the_mean_variance() -> None:
    covariance = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    np.testing.assert_allclose(obs.damped(covariance, 0.1).numpy(), np.diag([1.2, 3.2]))


def test_removal_error_is_an_independent_oracle() -> None:
    """The oracle itself: no W' on the survivors does better than the one it assumes."""
    x, w, b = layer(7)
    h = np.cov(x.T, bias=True)
    for removed in itertools.combinations(range(6), 2):
        kept = [i for i in range(6) if i not in removed]
        assert removal_error(w, h, list(removed)) == pytest.approx(least_squares(x, w, b, kept)[2], rel=1e-6)
