"""python -m pytest tests/test_saliency_b.py

Criteria with one number per unit, each against its formula computed the slow, obvious way on a tiny ViT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import adapters, criteria, saliency, vit
from edgeprune.criteria import Evidence, beta_rank, fmp, lrp, p3b
from edgeprune.errors import UsageError
from edgeprune.gates import Gates
from edgeprune.types import Levels

SUB_BLOCKS = [(i, kind) for i in range(3) for kind in vit.KINDS]


class Doubles:
    """Images in float64, so that what is compared differs by its formula alone."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x.double(), y) for x, y in self.images.batches(size))


@pytest.fixture
def evidence(tiny_vit64: Any) -> Evidence:
    return in_double(tiny_vit64, parts.images(12, seed=1))


def in_double(model: Any, images: Any) -> Evidence:
    given: Any = Doubles(images)
    return parts.evidence(model, calibration=given)[0]


def scores(levels: list[Levels]) -> dict[Any, np.ndarray]:
    """What each unit is worth, `[units]`, per sub-block."""
    found = {}
    for level in levels:
        found[level.block, level.kind] = own = np.empty(len(level.order))
        own[level.order] = np.diff(level.errors)
    return found


def check(criterion: str, evidence: Evidence, want: dict[Any, list[float]], rel: float = 1e-6) -> None:
    levels = criteria.get(criterion).score(evidence)
    for at, own in scores(levels).items():
        assert max(want[at]) > 0
        np.testing.assert_allclose(own, want[at], rtol=rel, atol=rel * max(want[at]))
    for level in levels:
        assert (np.diff(np.diff(level.errors)) >= -1e-9 * level.errors[-1]).all(), "the least go first"


def units(at: Any) -> range:
    return range(3 if at[1] == "attn" else 24)


def columns(at: Any, unit: int) -> slice:
    size = 16 if at[1] == "attn" else 1
    return slice(unit * size, (unit + 1) * size)


# What criteria share ---------------------------------------------------------------------------


def test_no_more_images_than_asked_for(evidence: Evidence) -> None:
    assert [len(y) for _, y in saliency.first(evidence, 10)] == [8, 2]
    assert [len(y) for _, y in saliency.first(evidence, 8)] == [8]
    assert [len(y) for _, y in saliency.first(evidence, 100)] == [8, 4]


def test_drawn_labels_are_the_models_own(evidence: Evidence) -> None:
    """With a classifier that is sure of class 3, gradients are those of label 3, whatever the labels say."""
    with torch.no_grad():
        evidence.model.head.bias[3] += 100.0
    pixels = torch.cat([x for x, _ in evidence.batches()])
    weight = evidence.model.blocks[0].mlp.fc1.weight
    (want,) = torch.autograd.grad(F.cross_entropy(evidence.model(pixels), torch.full((12,), 3)), weight)
    got = [found[0, "mlp"][0] * count / 12 for found, count in saliency.gradients(evidence, drawn=True)]
    torch.testing.assert_close(sum(got), want)


# P3B -------------------------------------------------------------------------------------------


def test_p3b_is_the_squared_gradient_of_gates_per_batch(evidence: Evidence) -> None:
    want = {at: [0.0 for _ in units(at)] for at in SUB_BLOCKS}
    gates = Gates(evidence.model)
    for pixels, labels in evidence.batches():
        gates.watch()
        gradients = torch.autograd.grad(F.cross_entropy(evidence.model(pixels), labels), list(gates.values.values()))
        for at, gradient in zip(gates.values, gradients, strict=True):
            for unit in units(at):
                want[at][unit] += float(1.0 * gradient[unit]) ** 2 / 2  # two batches
    gates.remove()
    check("p3b", evidence, want, rel=1e-5)  # gates are float32


def test_p3b_gradients_are_those_of_the_loss(evidence: Evidence) -> None:
    """A head's output scaled by 1 +- a little."""
    pixels, labels = next(iter(evidence.batches()))
    found = p3b.mask_gradients(evidence, pixels, labels)[1, "attn"]
    weight = evidence.model.blocks[1].attn.proj.weight
    for head in units((1, "attn")):
        losses = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            with torch.no_grad():
                before = weight.clone()
                weight[:, columns((1, "attn"), head)] *= factor
                losses.append(float(F.cross_entropy(evidence.model(pixels), labels)))
                weight.copy_(before)
        assert float(found[head]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


# LRP -------------------------------------------------------------------------------------------


def shared(x: np.ndarray, weight: np.ndarray, out: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """R_i = sum_j x_i W_ji / out_j R_j, for one token."""
    found = np.zeros_like(x)
    for j in range(len(out)):
        found += x * weight[j] / out[j] * relevance[j]
    return found


def normed(norm: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LayerNorm of one token, and the matrix that it is with its standard deviation held."""
    width = len(x)
    matrix = np.diag(array(norm.weight)) @ (np.eye(width) - 1 / width) / np.sqrt(x.var() + norm.eps)
    return matrix @ x + array(norm.bias), matrix


def array(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def relevances(model: Any, image: Tensor) -> dict[Any, np.ndarray]:
    """R `[tokens, inputs]` at the inputs of every `proj` and `fc2`, layer by layer from the top, for one image."""
    with torch.no_grad():
        stream = array(vit.embed(model, image[None]))[0]
        tokens, heads, size = len(stream), 3, 16
        seen: list[dict[str, Any]] = []
        for block in model.blocks:
            now: dict[str, Any] = {"before": stream}
            now["normed"] = [normed(block.norm1, x) for x in stream]
            y = np.array([x for x, _ in now["normed"]])
            qkv = y @ array(block.attn.qkv.weight).T + array(block.attn.qkv.bias)
            now["q"], now["k"], now["v"] = (
                qkv[:, i * 48 : (i + 1) * 48].reshape(tokens, heads, size) for i in range(3)
            )
            logits = np.einsum("thd,shd->hts", now["q"], now["k"]) / np.sqrt(size)
            now["attention"] = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
            now["heads"] = np.einsum("hts,shd->thd", now["attention"], now["v"]).reshape(tokens, 48)
            now["attn"] = now["heads"] @ array(block.attn.proj.weight).T + array(block.attn.proj.bias)
            now["between"] = stream = stream + now["attn"]
            now["normed2"] = [normed(block.norm2, x) for x in stream]
            y = np.array([x for x, _ in now["normed2"]])
            now["fc1"] = y @ array(block.mlp.fc1.weight).T + array(block.mlp.fc1.bias)
            now["gelu"] = array(F.gelu(torch.from_numpy(now["fc1"])))
            now["mlp"] = now["gelu"] @ array(block.mlp.fc2.weight).T + array(block.mlp.fc2.bias)
            now["after"] = stream = stream + now["mlp"]
            seen.append(now)
    last, matrix = normed(model.norm, stream[0])
    logits = array(model.head.weight) @ last + array(model.head.bias)
    np.testing.assert_allclose(logits, array(model(image[None]))[0], rtol=1e-9)
    top = int(logits.argmax())
    relevance = np.zeros_like(stream)  # of the stream, from the class token alone
    r = shared(last, array(model.head.weight)[[top]], logits[[top]], logits[[top]])
    relevance[0] = shared(stream[0], matrix, last, r)
    found: dict[Any, np.ndarray] = {}
    for i in reversed(range(len(seen))):
        now, block = seen[i], model.blocks[i]
        of_mlp = now["mlp"] / now["after"] * relevance
        relevance = now["between"] / now["after"] * relevance
        found[i, "mlp"] = np.zeros((tokens, 24))
        for t in range(tokens):
            r = shared(now["gelu"][t], array(block.mlp.fc2.weight), now["mlp"][t], of_mlp[t])
            found[i, "mlp"][t] = r  # GELU hands on what it gets
            y, matrix = now["normed2"][t]
            r = shared(y, array(block.mlp.fc1.weight), now["fc1"][t], r)
            relevance[t] += shared(now["between"][t], matrix, y, r)
        of_attn = now["attn"] / now["between"] * relevance
        relevance = now["before"] / now["between"] * relevance
        found[i, "attn"] = np.zeros((tokens, 48))
        for t in range(tokens):
            found[i, "attn"][t] = shared(now["heads"][t], array(block.attn.proj.weight), now["attn"][t], of_attn[t])
        of_values = np.zeros((tokens, 48))
        for t in range(tokens):
            for s in range(tokens):
                for h in range(heads):
                    c = slice(h * size, (h + 1) * size)
                    part = now["attention"][h, t, s] * now["v"][s, h] / now["heads"][t, c]
                    of_values[s, c] += part * found[i, "attn"][t, c]
        for t in range(tokens):
            y, matrix = now["normed"][t]
            r = shared(y, array(block.attn.qkv.weight)[96:], now["v"][t].reshape(48), of_values[t])
            relevance[t] += shared(now["before"][t], matrix, y, r)
    return found


def test_lrp_is_relevance_propagated_layer_by_layer(tiny_vit64: Any) -> None:
    evidence = in_double(tiny_vit64, parts.images(3, seed=1))
    want = {at: [0.0 for _ in units(at)] for at in SUB_BLOCKS}
    for image in torch.cat([x for x, _ in evidence.batches()]):
        found = relevances(tiny_vit64, image)
        for at in SUB_BLOCKS:
            for unit in units(at):
                want[at][unit] += abs(float(found[at][:, columns(at, unit)].sum())) / 3
    check("lrp", evidence, want)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_giant_patch14_dinov2"])
def test_lrp_conserves_relevance(name: str, make_vit: Callable[..., Any], make_images: Callable[..., Any]) -> None:
    """What enters block 0 and what biases add is the logit, to the last digit; plain gradients have no such sum.

    In MLPs that are gated, too.
    """
    model, pixels = make_vit(name, double=True), make_images(4, double=True)
    assert vit.anatomy(model).gated == (name != "vit_tiny_patch16_224")
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and "patch_embed" not in name]

    def explained() -> tuple[Tensor, Tensor]:
        stream = vit.embed(model, pixels)
        logits = vit.classify(model, model.blocks(stream))
        gradient, *of_biases = torch.autograd.grad(lrp.predicted(logits), [stream, *biases])
        parts = [(p * g).sum() for p, g in zip(biases, of_biases, strict=True)]
        return (stream * gradient).sum() + torch.stack(parts).sum(), logits

    with lrp.detached(model):
        relevance, logits = explained()
    torch.testing.assert_close(relevance, lrp.predicted(logits))
    plain, same = explained()
    torch.testing.assert_close(logits, same)
    assert abs(plain - relevance) > 1e-2 * abs(relevance)


def test_lrp_refuses_norms_it_has_no_rule_for(make_vit: Callable[..., Any]) -> None:
    model = make_vit(norm_layer="rmsnorm")
    with pytest.raises(UsageError, match=r"knows LayerNorm alone, and 'blocks\.0\.norm1' is a RmsNorm"):
        criteria.get("lrp").score(parts.evidence(model)[0])
    assert not any(m._forward_hooks for m in model.modules())


# Beta-Rank -------------------------------------------------------------------------------------


def seen_by(layer: Any, evidence: Evidence) -> np.ndarray:
    """`[images, tokens, inputs]`"""
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        for pixels, _ in evidence.batches():
            evidence.model(pixels)
    hook.remove()
    return torch.cat(inputs).numpy()


def spread(values: np.ndarray, weights: np.ndarray) -> float:
    mean = (weights * values).sum() / weights.sum()
    return float(np.sqrt((weights * (values - mean) ** 2).sum() / weights.sum()))


def test_beta_rank_is_the_filter_times_the_ratio_of_deviations(evidence: Evidence) -> None:
    labels = torch.cat([y for _, y in evidence.batches()]).tolist()
    weights = np.array([1 / labels.count(label) for label in labels])
    assert len(set(weights)) > 1, "classes of unlike size"
    want: dict[Any, list[float]] = {}
    for at in SUB_BLOCKS:
        sub = vit.sub_block(evidence.model.blocks[at[0]], at[1])
        first, last = vit.first_layer(sub, at[1]), vit.last_layer(sub, at[1])
        x, y = seen_by(first, evidence), seen_by(last, evidence)
        filters = np.abs(array(first.weight)[96:] if at[1] == "attn" else array(first.weight))
        beta = []
        for column in range(y.shape[2]):
            ratios = []
            for token in range(17):
                out = spread(y[:, token, column], weights)
                ratios.append(out / spread(x[:, token].ravel(), np.repeat(weights, 48)))
            beta.append(filters[column].sum() * np.mean(ratios))
        want[at] = [sum(beta[columns(at, unit)]) / sum(beta) for unit in units(at)]
    check("beta-rank", evidence, want)


def test_beta_rank_counts_classes_alike(tiny_vit64: Any) -> None:
    """More images of a class, if they are the same, change nothing."""
    few, many = parts.images(12, seed=1), parts.images(12, seed=1)
    many.indices = np.concatenate([np.arange(12), np.repeat([0, 5, 10], 3)])  # all of class 0, three times more
    a, b = (scores(beta_rank.score(in_double(tiny_vit64, own))) for own in (few, many))
    for at in SUB_BLOCKS:
        np.testing.assert_allclose(a[at], b[at], rtol=1e-6)


# LoRAPrune -------------------------------------------------------------------------------------


def test_loraprune_follows_adapters_while_they_learn(evidence: Evidence) -> None:
    """W + BA written out, AdamW by hand, and importance weight by weight."""
    model = evidence.model
    drawn = copy.deepcopy(model)
    adapters.attach(drawn, seed=0)
    a, b = {}, {}
    for name, layer in adapters.attached(drawn):
        a[name] = layer.parametrizations.weight[0].a.detach()
        b[name] = torch.zeros(len(layer.weight), adapters.RANK).double()
    moments = {key: (torch.zeros_like(x), torch.zeros_like(x)) for part in (a, b) for key, x in keyed(part, part is a)}
    scale = adapters.ALPHA / adapters.RANK
    want = {at: np.zeros(len(units(at))) for at in SUB_BLOCKS}
    own = dict(model.named_parameters())
    for step, (pixels, labels) in enumerate(evidence.batches(), start=1):
        for factor in (*a.values(), *b.values()):
            factor.requires_grad_()
        tuned = {f"{name}.weight": own[f"{name}.weight"] + scale * b[name] @ a[name] for name in a}
        loss = F.cross_entropy(torch.func.functional_call(model, {**own, **tuned}, (pixels,)), labels)
        g_a = dict(zip(a, torch.autograd.grad(loss, list(a.values()), retain_graph=True), strict=True))
        g_b = dict(zip(b, torch.autograd.grad(loss, list(b.values())), strict=True))
        for at in SUB_BLOCKS:
            names = ("attn.qkv", "attn.proj") if at[1] == "attn" else ("mlp.fc1", "mlp.fc2")
            s = []
            for short in names:
                name = f"blocks.{at[0]}.{short}"
                g = g_b[name] @ a[name] + b[name] @ g_a[name] - g_b[name] @ g_a[name]
                s.append(array((g * tuned[f"{name}.weight"]) ** 2))
            matrices = [s[0][i * 48 : (i + 1) * 48] for i in range(3)] if at[1] == "attn" else [s[0]]
            for matrix in [*matrices, s[1].T]:
                sums = np.array([matrix[columns(at, unit)].sum() for unit in units(at)])
                want[at] += 0.1 * 0.9 ** (2 - step) * sums / np.sqrt((sums**2).sum())  # two batches
        with torch.no_grad():
            for part, gradients in ((a, g_a), (b, g_b)):
                for key, _ in keyed(part, part is a):
                    first, second = moments[key]
                    first.mul_(0.9).add_(0.1 * gradients[key[1]])
                    second.mul_(0.999).add_(0.001 * gradients[key[1]] ** 2)
                    change = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                    part[key[1]] = part[key[1]].detach() - 1e-3 * change
    assert all(float(x.detach().abs().max()) > 0 for x in b.values()), "adapters have learnt"
    check("loraprune", evidence, {at: own.tolist() for at, own in want.items()})


def keyed(part: dict[str, Tensor], is_a: bool) -> list[tuple[tuple[bool, str], Tensor]]:
    return [((is_a, name), x) for name, x in part.items()]


# D-Pruner --------------------------------------------------------------------------------------


def test_d_pruner_is_what_the_refined_loss_changes_by(evidence: Evidence) -> None:
    model, generator = evidence.model, torch.Generator().manual_seed(0)
    names = [name for name, _ in model.named_parameters() if "blocks" in name and "norm" not in name]
    weights = [dict(model.named_parameters())[name] for name in names]
    labelled, own = [], []
    for pixels, labels in evidence.batches():
        for image, label in zip(pixels, labels, strict=True):
            logits = model(image[None])
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[0]
            labelled.append(torch.autograd.grad(F.cross_entropy(logits, label[None]), weights, retain_graph=True))
            own.append(torch.autograd.grad(F.cross_entropy(logits, drawn), weights))
    importance = {}
    for i, name in enumerate(names):
        w = array(weights[i])
        slope = np.mean([array(g[i]) for g in labelled], axis=0)
        curvature = np.mean([array(g[i]) ** 2 for g in labelled], axis=0)
        general = np.mean([array(g[i]) ** 2 for g in own], axis=0)
        importance[name] = np.abs(-w * slope + 0.5 * curvature * w**2 + 0.5 * general * w**2)
    want: dict[Any, list[float]] = {}
    for at in SUB_BLOCKS:
        block, first, last = (at[0], "attn.qkv", "attn.proj") if at[1] == "attn" else (at[0], "mlp.fc1", "mlp.fc2")
        rows, bias = importance[f"blocks.{block}.{first}.weight"], importance[f"blocks.{block}.{first}.bias"]
        want[at] = []
        for unit in units(at):
            total = importance[f"blocks.{block}.{last}.weight"][:, columns(at, unit)].sum()
            for matrix in range(3 if at[1] == "attn" else 1):
                own_rows = slice(48 * matrix + columns(at, unit).start, 48 * matrix + columns(at, unit).stop)
                total += rows[own_rows].sum() + bias[own_rows].sum()
            want[at].append(float(total))
    check("d-pruner", evidence, want)


# FMP -------------------------------------------------------------------------------------------


def risen(evidence: Evidence, at: Any, unit: int, step: Tensor | None) -> float:
    """Mean log odds against the labels, with a step `[n, tokens, columns]` added to the unit's columns."""

    def add(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        if step is not None:
            x[..., columns(at, unit)] += step
        return (x,)

    hook = vit.output_layer(evidence.model.blocks[at[0]], at[1]).register_forward_pre_hook(add)
    with torch.no_grad():
        pixels, labels = (torch.cat(part) for part in zip(*evidence.batches(), strict=True))
        p = evidence.model(pixels).softmax(1).gather(1, labels[:, None])
    hook.remove()
    return float(((1 - p) / p).log().mean())


def test_fmp_is_what_a_small_attack_gets(evidence: Evidence) -> None:
    """The first-order rise, by really attacking each unit a little; fewer than 64 units, so no suspects."""
    pixels, labels = (torch.cat(part) for part in zip(*evidence.batches(), strict=True))

    def total(logits: Tensor) -> Tensor:
        p = logits.softmax(1).gather(1, labels[:, None])
        return ((1 - p) / p).log().sum()

    found = saliency.features(evidence.model, pixels, SUB_BLOCKS, total)
    want: dict[Any, list[float]] = {}
    for at in SUB_BLOCKS:
        x, g = found[at]
        eps, little = float(x.square().mean().sqrt()), 1e-6
        steps = [little * g[..., columns(at, unit)].sign() for unit in units(at)]
        before = risen(evidence, at, 0, None)
        want[at] = [eps * (risen(evidence, at, unit, step) - before) / little for unit, step in enumerate(steps)]
    check("fmp", evidence, want, rel=1e-3)


def test_fmp_attacks_as_a_hook_would(evidence: Evidence) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, labels = (torch.cat(part) for part in zip(*evidence.batches(), strict=True))
    steps: dict[Any, dict[int, Tensor]] = {at: {} for at in SUB_BLOCKS}
    for at, unit, width in (((0, "attn"), 2, 16), ((1, "mlp"), 7, 1), ((2, "mlp"), 0, 1)):
        steps[at][unit] = torch.randn(12, 17, width, generator=generator).double()
    found = fmp.attack(evidence, pixels, labels, steps)
    for at, own in steps.items():
        assert found[at].keys() == own.keys()
        for unit, step in own.items():
            rise = risen(evidence, at, unit, step) - risen(evidence, at, unit, None)
            assert found[at][unit] == pytest.approx(rise, rel=1e-6, abs=1e-9)


def test_fmp_lets_a_planted_backdoor_go_first(make_vit: Callable[..., Any]) -> None:
    """A neuron that no clean image wakes, but which decides for class 4 once it is awake."""
    at, planted = (1, "mlp"), 77
    model = make_vit(mlp_ratio=128 / 48)
    clean = criteria.get("fmp").score(parts.evidence(model)[0])[SUB_BLOCKS.index(at)]
    with torch.no_grad():
        mlp = model.blocks[1].mlp
        mlp.fc1.weight[planted], mlp.fc1.bias[planted] = 0.0, -100.0
        mlp.fc2.weight[:, planted] = 10 * model.head.weight[4]
    evidence, _ = parts.evidence(model)
    awake = evidence.moments[at].covariance[planted, planted] + evidence.moments[at].mean[planted].abs()
    assert float(awake) == 0, "statistics of clean images say that it does nothing"
    levels = criteria.get("fmp").score(evidence)
    level = levels[SUB_BLOCKS.index(at)]
    suspects = 128 // fmp.SUSPICIOUS
    assert planted in level.order[:suspects] and planted not in clean.order[:suspects]
    assert level.errors[suspects] == 0 < level.errors[suspects + 1]
    assert all(own.errors[1] > 0 for own in levels if own.kind == "attn"), "no head is a suspect"
