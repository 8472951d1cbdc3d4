"""python -m pytest tests/test_numerics.py

NaN and infinity are found in the stage and the layer where they appear, and a collapse of accuracy is said with its cause.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faults
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from edgeprune import checks, criteria, errors, numerics, obs
from edgeprune.errors import UsageError
from edgeprune.obs import Moments
from edgeprune.stages import calibrate, export, validate


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc1", "blocks.2.mlp.fc2", "head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_the_first_layer_at_fault_is_named(tiny_vit: Any, make_images: Any, name: str, value: float) -> None:
    pixels = make_images(4)
    assert tiny_vit(pixels).isfinite().all()
    numerics.refuse_not_finite(tiny_vit, pixels, tiny_vit(pixels), "x", "y")
    with torch.no_grad():
        tiny_vit.get_submodule(name).weight.fill_(value)
    with pytest.raises(UsageError, match=f"stage calibrate: NaN or infinity .* output of {name.replace('.', '[.]')};"):
        criteria.collect(tiny_vit, [(pixels, torch.zeros(4))], 0, lambda *_: None, uses_loss=True)


def test_images_at_fault_are_told_from_weights(tiny_vit: Any, make_images: Any) -> None:
    pixels = make_images(2)
    pixels[0, 0, 0, 0] = float("inf")
    with pytest.raises(UsageError, match=r"stage x: the images hold NaN or infinity after preprocessing"):
        numerics.refuse_not_finite(tiny_vit, pixels, tiny_vit(pixels), "x", "y")


def test_statistics_beyond_float_are_named() -> None:
    """Every input is a number, but their squares are not."""
    moments = Moments()
    moments.add(torch.tensor([[3e38, 1.0], [-3e38, 1.0]]))
    found = criteria.Statistics({(1, "mlp"): moments}, {}, {})
    with pytest.raises(UsageError, match=r"stage calibrate: the inputs of blocks\.1\.mlp\.fc2 hold NaN"):
        calibrate.refuse_not_finite(found)


def test_weights_that_overflow_are_refused_at_the_start(tmp_path: Path) -> None:
    """Finite weights, infinite activations: said by the baseline, before anything is measured."""
    profile, target = faults.recorded(tmp_path)
    (tmp_path / "small.toml").write_text(small.CARD)
    path = small.random_weights(tmp_path / "small.safetensors")
    state = load_file(path)
    state["blocks.1.mlp.fc1.weight"].fill_(3e38)
    save_file(state, path)
    found = small.run("build", tmp_path / "small.toml", "--target", target, "--profile", profile, "--latency", "2x",
                      "--cache-dir", tmp_path / "cache", "--out", tmp_path / "out", "-q")  # fmt: skip
    assert found.code == errors.UsageError.exit_code
    assert "stage baseline: NaN or infinity" in found.err and "blocks.1.mlp.fc1" in found.err
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_that_says_nan_is_not_exported(tiny_vit: Any, make_images: Any, tmp_path: Path) -> None:
    export.to_onnx(tiny_vit, (3, 32, 32), tmp_path / "model.onnx")
    with torch.no_grad():
        tiny_vit.head.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match=r"stage export: NaN or infinity .* output of head;"):
        export.compare(tiny_vit, tmp_path / "model.onnx", make_images(2))


@pytest.mark.parametrize("what", ["dead units", "all dead", "fewer samples than units", "twins"])
def test_singular_hessians_are_solved(what: str) -> None:
    """Dead and doubled units go first and cost nothing; the refit of what stays is finite."""
    x = torch.randn(5 if what == "fewer samples than units" else 200, 12, generator=torch.Generator().manual_seed(0))
    if what == "dead units":
        x[:, :4] = 0
    elif what == "all dead":
        x[:] = 3.0
    elif what == "twins":
        x[:, 6:] = x[:, :6]
    moments = Moments()
    moments.add(x)
    hessian = obs.damped(moments.covariance)
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    order, cost = obs.removal_order(weight, hessian, 1)
    assert sorted(order) == list(range(12)) and all(torch.isfinite(torch.tensor(cost)))
    if what == "dead units":
        assert set(order[:4]) == {0, 1, 2, 3} and cost[4] < 0.05 * cost[-1]
    kept = torch.tensor(sorted(order[6:]))
    new, bias = obs.refit(weight, torch.zeros(7), moments.mean, hessian, kept)
    assert new.isfinite().all() and bias.isfinite().all()


def accuracy(dense: float, pruned: float) -> checks.Accuracy:
    return checks.Accuracy(dense, pruned, (0.0, 0.0), 50.0, 100)


@pytest.mark.parametrize(
    ("dense", "pruned", "classes", "collapsed"),
    [(98.0, 11.0, 10, True), (98.0, 31.0, 10, True), (98.0, 40.0, 10, False), (98.0, 97.0, 10, False),
     (15.0, 10.0, 10, False), (80.0, 0.1, 1000, True), (80.0, 50.0, 2, True), (100.0, 75.0, 2, False)],
)  # fmt: skip
def test_what_a_collapse_is(dense: float, pruned: float, classes: int, collapsed: bool) -> None:
    """Less than a quarter of what is known beyond guessing is left; a model that only guesses cannot collapse."""
    assert checks.collapsed(accuracy(dense, pruned), classes) == collapsed


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"scale": 1.0, "divergence_before": 2.0, "divergence_after": 1.5, "losses": [1.0] * 9}, "pruning left a divergence of 2.00 nats, and 9 steps of tuning brought it to 1.50; ask for a milder latency"),
        ({"scale": 1.0, "divergence_before": 2.0, "divergence_after": 2.0, "losses": []}, "and nothing was tuned"),
        ({"scale": 1.0, "divergence_before": 0.2, "divergence_after": 0.01, "losses": [1.0]}, "the cause is the export or the runtime"),
    ],
)  # fmt: skip
def test_a_collapse_is_said_with_its_cause(tmp_path: Path, facts: dict[str, Any], says: str) -> None:
    (tmp_path / "finetune.json").write_text(json.dumps(facts))
    text = validate.why_collapsed(accuracy(98, 12), tmp_path, 0.25)
    assert "accuracy has collapsed from 98.00 % to 12.00 %" in text and says in text
