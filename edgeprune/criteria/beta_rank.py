"""Beta-Rank: L1 norm of a unit's filter times how much it spreads what it is given (Homayounfar et al., arXiv 2304.07461).

For filter f with token t's inputs x_t and output y_t, over all calibration images and with classes counting alike,

    beta(f) = ||f||_1 mean over tokens t of ( std over images of y_t / std over images and channels of x_t )

A neuron's filter is its row of `fc1`, and y its output after GELU. A head has one filter per column, the rows of its
values, with y its columns of the input of `proj`; they are summed. error(level) = sum of beta over the removed units
/ sum over the sub-block. The method is made for imbalanced medical data: an image counts 1 / (images of its class).
Needs weights, activations and labels. Cost: one forward pass per image.

The authors' README divides by the output's deviation, their code by the input's. This follows the code and the
paper's argument: a filter that answers alike to all images is worth nothing. Adapted: the authors scale a layer's
scores to [0, 1] and choose each layer's share by hand; here they are shares of the sub-block, and the allocator
chooses. Outputs are taken after the activation, the authors' before batch normalisation. Queries and keys do not count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgeprune import saliency, vit
from edgeprune.criteria import Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights", "activations", "labels")


class Spread:
    """Weighed variance over images, token by token: of every channel, or of all channels taken together."""

    def __init__(self, *, together: bool) -> None:
        self.together = together
        self.weight, self.first, self.second = 0.0, torch.zeros(()).double(), torch.zeros(()).double()

    def add(self, x: Tensor, weights: Tensor) -> None:
        """x: `[n, tokens, channels]`; weights: `[n]`, float64."""
        x = x.detach().double()
        moments = x, x.square()
        if self.together:
            moments = moments[0].mean(2), moments[1].mean(2)
        self.weight += float(weights.sum())
        self.first = self.first + torch.einsum("n,n...->...", weights, moments[0])
        self.second = self.second + torch.einsum("n,n...->...", weights, moments[1])

    def deviation(self) -> Tensor:
        """`[tokens, channels]`, or `[tokens]` for all together."""
        return (self.second / self.weight - (self.first / self.weight).square()).clamp_min(0).sqrt()


def score(evidence: Evidence) -> list[Levels]:
    inputs = {at: Spread(together=True) for at in evidence.moments}
    outputs = {at: Spread(together=False) for at in evidence.moments}
    share = _class_shares(evidence)
    with evidence.console.progress("deviations", evidence.images, "images") as advance:
        for pixels, labels in evidence.batches():
            for at, (x, y) in _seen(evidence, pixels).items():
                inputs[at].add(x, share(labels))
                outputs[at].add(y, share(labels))
            advance(len(pixels), "")
    return saliency.levels(evidence, {at: _beta(evidence, at, inputs[at], outputs[at]) for at in evidence.moments})


def _class_shares(evidence: Evidence) -> Callable[[Tensor], Tensor]:
    """How much an image counts, `[n]` for labels `[n]`: every class that there is counts 1."""
    counts = torch.bincount(torch.cat([labels for _, labels in evidence.batches()]))
    return lambda labels: 1 / counts[labels].double()


@torch.no_grad()
def _seen(evidence: Evidence, pixels: Tensor) -> dict[SubBlock, tuple[Tensor, Tensor]]:
    """Inputs of the first and of the last layer of every sub-block, `[n, tokens, channels]`."""
    found: dict[tuple[SubBlock, str], Tensor] = {}
    hooks = []
    for at in evidence.moments:
        sub = vit.sub_block(evidence.model.blocks[at[0]], at[1])
        for which, layer in (("first", vit.first_layer(sub, at[1])), ("last", vit.last_layer(sub, at[1]))):

            def keep(_: object, x: tuple[Tensor, ...], key: tuple[SubBlock, str] = (at, which)) -> None:
                found[key] = x[0]

            hooks.append(layer.register_forward_pre_hook(keep))
    try:
        evidence.model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return {at: (found[at, "first"], found[at, "last"]) for at in evidence.moments}


def _beta(evidence: Evidence, at: SubBlock, inputs: Spread, outputs: Spread) -> Tensor:
    """`[units]`, 1 in all."""
    deviations = outputs.deviation()
    filters = saliency.group(evidence.model, at)[0].detach().double()[-deviations.shape[1] :]  # of qkv, the values
    ratio = deviations / inputs.deviation()[:, None].clamp_min(1e-30)
    beta = saliency.of_columns(evidence, at, filters.abs().sum(1) * ratio.mean(0))
    return beta / beta.sum().clamp_min(1e-300)
