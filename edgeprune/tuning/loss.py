"""What tuning minimises (ZipLM's recipe, arXiv 2302.04089, section 3.3; label smoothing: arXiv 1512.00567).

loss = label_weight * cross entropy + logit_weight * T^2 KL(teacher || student)
     + token_weight * mean over layers of ||h_s - h_t||^2 / ||h_t||^2, tokens weighted

Of the last layer only the tokens that the head reads count: the others no longer reach the logits. The residual width is never pruned, so token features compare without a mapping layer. Every term is a
mean over images of something that belongs to one image: a batch may be split over processes at will.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import tasks, vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import CLASSIFY, Recipe


@dataclass(frozen=True)
class Targets:
    """What the teacher says of `n` images: logits `[n, classes]`, per layer token features `[n, tokens, width]`."""

    logits: Tensor
    tokens: tuple[Tensor, ...]

    def __getitem__(self, pick: Tensor) -> Targets:
        return Targets(self.logits[pick], tuple(layer[pick] for layer in self.tokens))

    def to(self, where: torch.device) -> Targets:
        return Targets(self.logits.to(where), tuple(layer.to(where) for layer in self.tokens))


def feature_layers(blocks: int, count: int) -> list[int]:
    """`count` block indices, evenly spread and ending with the last."""
    count = min(count, blocks)
    return [round((i + 1) * blocks / count) - 1 for i in range(count)]


def read_tokens(model: VisionTransformer) -> Tensor:
    """Which tokens of the last block's output reach the logits, `[tokens]` bool: with a CLS token it alone.

    Found by their gradient, so that every kind of pooling is right.
    """
    parameter = next(model.parameters())
    last = vit.anatomy(model).stages[-1]
    draw = torch.randn(1, last.tokens, last.width, generator=torch.Generator().manual_seed(0))
    stream = draw.to(parameter.device, parameter.dtype).requires_grad_()
    with torch.enable_grad():
        said = vit.classify(model, stream)
        # along a random direction: the length of an embedding may be fixed by the norm that ends it
        along = torch.randn(said.shape, generator=torch.Generator().manual_seed(1)).to(said)
        [gradient] = torch.autograd.grad((said * along).sum(), stream)
    return gradient.abs().sum((0, 2)) > 0


def features(streams: Sequence[Tensor], layers: int, read: Tensor) -> tuple[Tensor, ...]:
    """What is compared of the residual streams after each block: some layers, of the last only the tokens `read`."""
    chosen = feature_layers(len(streams), layers)
    return tuple(streams[i] if i < len(streams) - 1 else streams[i][:, read] for i in chosen)


@torch.no_grad()
def teach(teacher: VisionTransformer, pixels: Tensor, recipe: Recipe, read: Tensor) -> Targets:
    """What `teacher` says of images `[n, channels, height, width]`; tokens as float16, so that keeping changes nothing."""
    *hidden, logits = vit.streams(teacher, pixels)
    wanted = recipe.token_layers if recipe.token_weight else 0
    return Targets(logits.float(), tuple(layer.half() for layer in features(hidden, wanted, read)))


def total_loss(
    student: VisionTransformer, pixels: Tensor, labels: Tensor, targets: Targets | None, recipe: Recipe, read: Tensor
) -> Tensor:
    """The loss summed over the images of the batch, in float32."""
    streams, reductions = zip(*vit.reduced_streams(student, pixels), strict=True)
    *hidden, logits = streams
    logits = logits.float()
    loss = logits.new_zeros(())
    if recipe.label_weight:
        own = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
        loss = loss + recipe.label_weight * own
    if targets is None:
        return loss
    if recipe.logit_weight:
        task = tasks.of(student)
        t = recipe.temperature if task == CLASSIFY else 1.0  # a cosine has none
        apart = tasks.divergence(logits / t, targets.logits / t, task)
        loss = loss + recipe.logit_weight * t * t * apart
    if recipe.token_weight and targets.tokens:
        chosen = feature_layers(len(hidden), recipe.token_layers)
        distances = [
            _last_distance(hidden[i], wanted.float(), read, recipe.cls_share)
            if i == len(hidden) - 1
            else _distance(hidden[i], reductions[i](wanted.float()), token_weights(read[: hidden[i].shape[1]], recipe.cls_share))
            for i, wanted in zip(chosen, targets.tokens, strict=True)
        ]  # fmt: skip
        loss = loss + recipe.token_weight * torch.stack(distances).mean()
    return loss


def _last_distance(have: Tensor, wanted: Tensor, read: Tensor, share: float) -> Tensor:
    """Of the tokens that the head reads; of their means where some of them are gone."""
    own = read[: have.shape[1]]
    if int(own.sum()) == wanted.shape[1]:
        return _distance(have[:, own], wanted, token_weights(read, share)[read])
    return _distance(have[:, own].mean(1, keepdim=True), wanted.mean(1, keepdim=True), wanted.new_ones(1))


def token_weights(read: Tensor, share: float) -> Tensor:
    """What each token counts, `[tokens]`, summing to 1: those that the head reads at least `share` together.

    One CLS token among 196 patches would hardly count otherwise, and it is what the logits are made of.
    """
    weights = torch.full((len(read),), 1 / len(read), device=read.device)
    count = int(read.sum())
    if count / len(read) < share:
        weights[read] = share / count
        weights[~read] = (1 - share) / (len(read) - count)
    return weights


def _distance(have: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """||have - wanted||^2 / ||wanted||^2 of token features `[n, tokens, width]`, summed over the images."""
    off, all_ = ((x.float().square().sum(-1) * weights).sum(-1) for x in (have - wanted, wanted))
    return (off / all_).sum()
