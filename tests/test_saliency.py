"""python -m pytest tests/test_saliency.py

Criteria in which a unit's worth is one number, each against its formula, computed the slow way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch.nn import functional as F

from edgeprune import criteria, saliency, vit
from edgeprune.criteria import Evidence
from edgeprune.types import SubBlock

IMAGES = 20  # in batches of 8, 8 and 4
SUB_BLOCKS: list[SubBlock] = [(i, kind) for i in range(3) for kind in vit.KINDS]
HEADS, HEAD_DIM, NEURONS, WIDTH = 3, 16, 24, 48


@pytest.fixture(scope="module")
def evidence(make_vit: Callable[..., Any]) -> Evidence:
    return gather(make_vit())


def gather(model: Any) -> Evidence:
    return parts.evidence(model, calibration=parts.images(IMAGES, seed=1))[0]


def images_of(evidence: Evidence) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x[None], y[None]) for pixels, labels in evidence.batches() for x, y in zip(pixels, labels, strict=True)]


def number(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def of_unit(model: Any, at: SubBlock, unit: int, value: Callable[[torch.Tensor], np.ndarray] = number) -> np.ndarray:
    """All numbers of one unit, in a row: its rows and biases of the first layer, its columns of the last."""
    block = model.blocks[at[0]]
    if at[1] == "mlp":
        first, last, rows, columns = block.mlp.fc1, block.mlp.fc2, [unit], [unit]
    else:
        first, last = block.attn.qkv, block.attn.proj
        columns = list(range(unit * HEAD_DIM, (unit + 1) * HEAD_DIM))
        rows = [part * WIDTH + column for part in range(3) for column in columns]
    biases = [] if first.bias is None else [value(first.bias)[rows]]
    return np.concatenate([value(first.weight)[rows].ravel(), *biases, value(last.weight)[:, columns].ravel()])


def gradient_of(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> Callable[[torch.Tensor], np.ndarray]:
    """From a parameter to its gradient of the mean cross entropy."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(F.cross_entropy(model(pixels), labels), parameters)
    by_id = {id(p): number(g) for p, g in zip(parameters, found, strict=True)}
    return lambda p: by_id[id(p)]


def by_unit(value: Callable[[SubBlock, int], float]) -> dict[SubBlock, np.ndarray]:
    units = {at: HEADS if at[1] == "attn" else NEURONS for at in SUB_BLOCKS}
    return {at: np.array([value(at, unit) for unit in range(units[at])]) for at in SUB_BLOCKS}


def columns_of(at: SubBlock, unit: int) -> list[int]:
    return [unit] if at[1] == "mlp" else list(range(unit * HEAD_DIM, (unit + 1) * HEAD_DIM))


def last_weight(evidence: Evidence, at: SubBlock) -> np.ndarray:
    return number(vit.output_layer(evidence.model.blocks[at[0]], at[1]).weight)


def check(name: str, evidence: Evidence, want: dict[SubBlock, np.ndarray], rtol: float = 1e-4) -> None:
    """The criterion removes the least of these units first, and adds up what they are worth."""
    levels = criteria.get(name).score(evidence)
    assert [(level.block, level.kind) for level in levels] == SUB_BLOCKS
    for level in levels:
        own = want[level.block, level.kind]
        np.testing.assert_allclose(own[level.order], np.sort(own), rtol=rtol, atol=1e-12)
        np.testing.assert_allclose(level.errors, [0, *np.cumsum(np.sort(own))], rtol=rtol, atol=1e-12)


# Weights --------------------------------------------------------------------------------------


def test_l1_adds_up_sizes_of_weights(evidence: Evidence) -> None:
    check("l1", evidence, by_unit(lambda at, u: float(sum(abs(of_unit(evidence.model, at, u))))))


def test_l2_adds_up_squares_of_weights(evidence: Evidence) -> None:
    check("l2", evidence, by_unit(lambda at, u: float(sum(of_unit(evidence.model, at, u) ** 2))))


def test_a_layer_without_biases_has_none_to_count(make_vit: Callable[..., Any]) -> None:
    evidence = gather(make_vit(qkv_bias=False))
    assert evidence.model.blocks[0].attn.qkv.bias is None  # type: ignore[union-attr]
    check("l1", evidence, by_unit(lambda at, u: float(sum(abs(of_unit(evidence.model, at, u))))))


def test_random_is_drawn_from_the_seed_and_all_units_are_worth_the_same(evidence: Evidence) -> None:
    score = criteria.get("random").score
    for level in score(evidence):
        units = HEADS if level.kind == "attn" else NEURONS
        np.testing.assert_allclose(level.errors, [k / units for k in range(units + 1)])
    orders = [[level.order.tolist() for level in score(replace(evidence, seed=seed))] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][1] != orders[0][3] != sorted(orders[0][3]), "sub-blocks are drawn apart"


# Gradients ------------------------------------------------------------------------------------


def mean_gradient(evidence: Evidence) -> Callable[[torch.Tensor], np.ndarray]:
    """Image by image."""
    found = [gradient_of(evidence.model, x, y) for x, y in images_of(evidence)]
    return lambda p: np.mean([gradient(p) for gradient in found], axis=0)


def test_taylor_adds_up_sizes_of_weight_times_mean_gradient(evidence: Evidence) -> None:
    model, gradient = evidence.model, mean_gradient(evidence)

    def slow(at: SubBlock, u: int) -> float:
        return float(sum(abs(of_unit(model, at, u) * of_unit(model, at, u, gradient))))

    check("taylor", evidence, by_unit(slow), rtol=1e-3)


def test_hessian_is_half_of_squared_weights_times_mean_squared_gradients(evidence: Evidence) -> None:
    model = evidence.model
    found = [gradient_of(model, x, y) for x, y in images_of(evidence)]
    assert len(found) == IMAGES

    def slow(at: SubBlock, u: int) -> float:
        squares = [of_unit(model, at, u, gradient) ** 2 for gradient in found]
        return float(sum(0.5 * of_unit(model, at, u) ** 2 * np.mean(squares, axis=0)))

    check("hessian", evidence, by_unit(slow), rtol=1e-3)


@pytest.mark.parametrize("image", [0, 7, 8, IMAGES - 1])
def test_every_image_counts_in_the_hessian(evidence: Evidence, image: int) -> None:
    """As much as every other: with one label changed, what changes is that image's share."""
    own = parts.images(IMAGES, seed=1)
    own.source.labels[image] = (own.source.labels[image] + 1) % parts.CLASSES
    changed = parts.evidence(evidence.model, calibration=own)[0]
    single, single_changed = images_of(evidence)[image], images_of(changed)[image]
    alone = [
        replace(evidence, batches=lambda: iter([single])),
        replace(changed, batches=lambda: iter([single_changed])),
    ]
    score = criteria.get("hessian").score
    before, after, old, new = ([level.errors[-1] for level in score(e)] for e in (evidence, changed, *alone))
    np.testing.assert_allclose(np.subtract(after, before) * IMAGES, np.subtract(new, old), rtol=1e-2)
    assert all(abs(np.subtract(new, old)) > 1e-3 * np.array(before))


def test_nvit_is_the_mean_over_batches_of_squared_sums(evidence: Evidence) -> None:
    model = evidence.model
    found = [gradient_of(model, x, y) for x, y in evidence.batches()]
    assert len(found) == 3

    def slow(at: SubBlock, u: int) -> float:
        sums = [sum(of_unit(model, at, u) * of_unit(model, at, u, gradient)) for gradient in found]
        return float(np.mean([own**2 for own in sums]))

    check("nvit", evidence, by_unit(slow), rtol=1e-2)


def test_hesso_mixes_five_scores(evidence: Evidence) -> None:
    model, gradient = evidence.model, mean_gradient(evidence)
    places = [(at, u) for at in SUB_BLOCKS for u in range(HEADS if at[1] == "attn" else NEURONS)]
    rows = []
    for at, u in places:
        w, g = of_unit(model, at, u), of_unit(model, at, u, gradient)
        norm, inner = np.linalg.norm(w), float(w @ g)
        rows.append([norm, norm / len(w), inner / norm / np.linalg.norm(g) + 1, abs(inner), 0.5 * inner**2])
    table = np.array(rows)
    mixed = dict(zip(places, (table / np.linalg.norm(table, axis=0)).mean(1), strict=True))
    check("hesso", evidence, by_unit(lambda at, u: mixed[at, u]), rtol=1e-3)


def test_gradients_are_of_the_first_images_and_their_mean_counts_images_alike(evidence: Evidence) -> None:
    sizes = [count for _, count in saliency.gradients(evidence, 11)]
    assert sizes == [8, 3]
    assert [count for _, count in saliency.gradients(evidence, 11, each=True)] == [1] * 11
    pixels, labels = (torch.cat(part)[:11] for part in zip(*evidence.batches(), strict=True))
    gradient = gradient_of(evidence.model, pixels, labels)
    for at, found in saliency.mean_gradients(evidence, 11).items():
        for tensor, g in zip(saliency.group(evidence.model, at), found, strict=True):
            np.testing.assert_allclose(number(g), gradient(tensor), rtol=1e-3, atol=1e-7)


# Activations ----------------------------------------------------------------------------------


def z_scores(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def fluctuations(evidence: Evidence, at: SubBlock) -> np.ndarray:
    """Of every column; of `proj`, squared."""
    x, w = parts.inputs_of(evidence, at), last_weight(evidence, at)
    found = np.array([x[:, j].var() * sum(w[:, j] ** 2) for j in range(w.shape[1])])
    return found**2 if at[1] == "attn" else found


def test_flap_standardises_columns_and_shifts_all_sub_blocks_alike(evidence: Evidence) -> None:
    z = {at: z_scores(fluctuations(evidence, at)) for at in SUB_BLOCKS}
    scores = by_unit(lambda at, u: float(np.mean(z[at][columns_of(at, u)])))
    least = min(own.min() for own in scores.values())
    assert least < -0.1
    check("flap", evidence, {at: own - least for at, own in scores.items()}, rtol=1e-3)


def test_flap_standardises_what_is_left(tiny_vit: Any) -> None:
    """Neurons that were cut off before do not shift the others."""
    at: SubBlock = (1, "mlp")
    gone, kept = list(range(10)), list(range(10, NEURONS))
    with torch.no_grad():
        tiny_vit.blocks[1].mlp.fc2.weight[:, gone] = 0
    evidence = gather(tiny_vit)
    level = criteria.score(criteria.get("flap"), evidence)[SUB_BLOCKS.index(at)]
    want = np.sort(z_scores(fluctuations(evidence, at)[kept]))
    assert sorted(level.order[:10]) == gone
    np.testing.assert_allclose(np.diff(np.diff(level.errors)[10:]), np.diff(want), rtol=1e-3, atol=1e-6)


def test_vbp_is_the_share_of_the_variance_of_a_kind(evidence: Evidence) -> None:
    x = {at: parts.inputs_of(evidence, at) for at in SUB_BLOCKS}
    scores = by_unit(lambda at, u: float(sum(x[at][:, j].var() for j in columns_of(at, u))))
    totals = {kind: sum(own.sum() for at, own in scores.items() if at[1] == kind) for kind in vit.KINDS}
    check("vbp", evidence, {at: own / totals[at[1]] for at, own in scores.items()})


def test_wanda_adds_up_sizes_of_weights_times_norms_of_inputs(evidence: Evidence) -> None:
    x = {at: parts.inputs_of(evidence, at) for at in SUB_BLOCKS}

    def slow(at: SubBlock, u: int) -> float:
        norms, w = np.sqrt((x[at] ** 2).mean(0)), last_weight(evidence, at)
        return float(sum(abs(w[i, j]) * norms[j] for i in range(WIDTH) for j in columns_of(at, u)))

    check("wanda", evidence, by_unit(slow))


def test_cfsp_is_the_mean_part_in_every_row_times_the_norm(evidence: Evidence) -> None:
    x = {at: parts.inputs_of(evidence, at) for at in SUB_BLOCKS}

    def column(at: SubBlock, j: int) -> float:
        block: Any = evidence.model.blocks[at[0]]
        norms, w2 = np.sqrt((x[at] ** 2).mean(0)), last_weight(evidence, at)
        w1 = number(block.mlp.fc1.weight if at[1] == "mlp" else block.attn.qkv.weight[2 * WIDTH :])
        part = 0.0
        for i in range(WIDTH):
            part += abs(w2[i, j]) * norms[j] / sum(abs(w2[i]) * norms)
            part += abs(w1[j, i]) / sum(abs(w1[:, i]))
        return float(part / WIDTH * norms[j])

    check("cfsp", evidence, by_unit(lambda at, u: sum(column(at, j) for j in columns_of(at, u))))
