"""P3B: a sub-block keeps as much as it helps a linear probe to classify (Glandorf et al., arXiv 2506.23675).

Two linear probes per sub-block, one for the class token and one for the mean of the patches, read the stream before
and after it, trained on both with labelled images; nothing flows back into the model.

    benefit_b = CE(probe(before)) - CE(probe(after))
    scaled    = softplus(1.4 x) - softplus(1.4 x - 10),  x = 10 benefit / max benefit
    imp_b     = mean over its probes of (scaled_b / milliseconds_b) / mean over b
    keep_b    = min(1, s imp_b),  s solved for the budget

Adapted: the paper divides by parameters, here by a sub-block's latency; its probe of the patches is a small convolutional
network, which takes as long to train as the model; benefits are taken once, on the quarter of the images that the
probes are not trained on, where the paper averages them over a training; where no benefit is above 0 the largest size
scales them, as the paper's maximum would turn their signs. Needs activations and labels, several images per class. Cost: one pass over the calibration
images and seconds for the probes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import vit
from edgeprune.allocators import Choose, Task, by_ratios, spread, warn_of_few
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.data import Batch
from edgeprune.types import FloatArray

NEEDS = ("activations", "labels")
STEPS, BATCH, RATE = 100, 64, 1e-2  # of the probes' training
HELD_OUT = 0.25  # share of the images on which benefits are taken
TOP = 10.0  # of the scaled benefits
HALVINGS = 60


def prepare(task: Task) -> Choose:
    found = benefits(task.model, task.found.labelled(), task.seed, task.console)
    weights = importance(found, np.array([own[-1] for own in task.costs]))
    return lambda room_ms: by_ratios(task, lambda knob: spread(weights, 1 - knob), room_ms)


def benefits(
    model: VisionTransformer, batches: Iterable[Batch], seed: int, console: Console | None = None
) -> FloatArray:
    """`[probes, sub-blocks]` in the order attn 0, mlp 0, ...: by how many nats each sub-block lowers its probes' losses."""
    read_pairs, labels = read(model, batches)
    if console:
        warn_of_few("P3B's probes", labels, model.num_classes, console)
    alike = [own / own.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12) for own in read_pairs]
    widest = max(own.shape[-1] for own in alike)  # zeros leave a probe as it is
    pairs = torch.stack([F.pad(own, (0, widest - own.shape[-1])) for own in alike], 1).flatten(0, 1)
    fit = len(labels) - max(1, round(HELD_OUT * len(labels)))
    weight, bias = train(pairs[:, :, :fit], labels[:fit], model.num_classes, seed)
    with torch.no_grad():
        before, after = losses(pairs[:, :, fit:], labels[fit:], weight, bias).unbind(1)
    return (before - after).double().reshape(-1, len(read_pairs)).numpy()


def train(pairs: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probes, all at once: weight `[probes, width, classes]`, bias `[probes, classes]`; from zero, by Adam."""
    weight = torch.zeros(len(pairs), pairs.shape[-1], classes, requires_grad=True)
    bias = torch.zeros(len(pairs), classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        drawn = torch.randperm(len(labels), generator=generator)[:BATCH]
        loss = losses(pairs[:, :, drawn], labels[drawn], weight, bias).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight, bias


def losses(pairs: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cross entropy `[probes, 2]` of each probe before and after its sub-block."""
    logits = pairs @ weight[:, None] + bias[:, None, None]  # [probes, 2, n, classes]
    wanted = labels.expand(logits.shape[:3])
    return F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").reshape(wanted.shape).mean(2)


def importance(found: FloatArray, ms: FloatArray) -> FloatArray:
    """What benefits `[probes, sub-blocks]` are worth per millisecond, 1 on average; 0 for what costs nothing, and is gone.

    Each kind of probe has a scale of its own: their worths are averaged, not their benefits.
    """
    every: FloatArray = np.mean([_worth(own, ms) for own in np.atleast_2d(found)], axis=0)
    return every


def _worth(found: FloatArray, ms: FloatArray) -> FloatArray:
    """Of one kind of probe `[sub-blocks]`."""
    top = found.max() if found.max() > 0 else np.abs(found).max()
    x = TOP * found / top if top > 0 else np.zeros(len(found))
    scaled = np.logaddexp(0, 1.4 * x) - np.logaddexp(0, 1.4 * x - TOP)
    worth = np.where(ms > 0, scaled / np.where(ms > 0, ms, 1), 0.0)
    return np.asarray(worth / worth.mean() if worth.any() else worth)


def keep_ratios(found: FloatArray, ms: FloatArray, room_ms: float) -> FloatArray:
    """min(1, s imp) `[sub-blocks]` of benefits `[probes, sub-blocks]`, s such that sub-blocks of these ms, thinned in proportion, take `room_ms`."""
    weights = importance(found, ms)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spread(weights, middle) @ ms <= room_ms else (low, middle)
    return np.ones(len(ms)) if ms.sum() <= room_ms else spread(weights, low)


@torch.no_grad()
def read(model: VisionTransformer, batches: Iterable[Batch]) -> tuple[list[Tensor], Tensor]:
    """What probes read before and after every sub-block, `[probes, 2, n, width]` each, and labels `[n]`.

    First the class token, then the mean of the patches; in a model that has no class token only that.
    """
    found: list[list[Tensor]] = [[] for _ in range(len(vit.KINDS) * len(model.blocks))]
    labels = []
    for pixels, own in batches:
        stream = vit.embed(model, pixels)
        for i, at in enumerate((block, kind) for block in range(len(model.blocks)) for kind in vit.KINDS):
            before = vit.entered(model.blocks[at[0]], stream) if at[1] == "attn" else stream
            stream = vit.step(model.blocks[at[0]], at[1], before)
            pair = torch.stack([before, stream])  # [2, n, tokens, width]
            patches = pair[:, :, model.num_prefix_tokens :].mean(2)
            found[i].append(torch.stack([pair[:, :, 0], patches] if model.has_class_token else [patches]))
        labels.append(own)
    return [torch.cat(parts, 2) for parts in found], torch.cat(labels)
