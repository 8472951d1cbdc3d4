"""What a model is for, and so what it means that two of them say the same: which class, or which embedding.

classify    the KL divergence of the predicted classes, in nats
features    1 - cosine of the embeddings: the KL divergence of unit normals around the normalised embeddings, |u - v|^2 / 2

Both are KL divergences, so whatever is built on one holds for the other: the Fisher information of `criteria`, the
search, distillation.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.config import CLASSIFY, FEATURES

M = TypeVar("M", bound=nn.Module)


def mark(model: M, task: str) -> M:
    """The same model, which from now on knows what it is for; copies of it do too."""
    cast: Any = model
    cast.task = task
    return model


def of(model: nn.Module) -> str:
    """What the model is for; one that was never marked names classes."""
    return str(getattr(model, "task", CLASSIFY))


def divergence(own: Tensor, wanted: Tensor, task: str) -> Tensor:
    """KL(wanted || own) of outputs `[n, classes or dimensions]`, in nats, summed over the images; a scalar."""
    if task == FEATURES:
        return (1 - F.cosine_similarity(own, wanted, dim=-1)).sum()
    return F.kl_div(own.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")


def surprise(outputs: Tensor, task: str, generator: torch.Generator) -> Tensor:
    """-log p(y) with y drawn from what the model itself says, summed over the images: its gradients' covariance is the
    Fisher information. outputs: `[n, classes or dimensions]`."""
    if task == FEATURES:
        unit = F.normalize(outputs, dim=-1)
        noise = torch.randn(unit.shape, generator=generator).to(unit)
        return 0.5 * (unit - (unit.detach() + noise)).square().sum()
    drawn = torch.multinomial(outputs.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(outputs, drawn, reduction="sum")


def scale(outputs: Tensor, task: str) -> float:
    """What divergences are judged against: 1 nat, or how far apart the embeddings `[n, dimensions]` of different images are.

    Embeddings may all point nearly the same way, and their differences are what is searched by.
    """
    if task == CLASSIFY:
        return 1.0
    unit = F.normalize(outputs.double(), dim=-1)
    return max(1e-6, 1 - float(unit.mean(0).square().sum()))


def top1(outputs: Tensor, task: str) -> Tensor:
    """What each of `n` images is taken for, `[n]`: its class, or the other image whose embedding is nearest."""
    if task == FEATURES:
        unit = F.normalize(outputs, dim=-1)
        return (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(-1)
    return outputs.argmax(-1)
