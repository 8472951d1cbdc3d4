"""Structured optimal brain surgeon: which units of a linear layer to remove, and what the others become.

The layer is y = W x + b with inputs x of mean mu and covariance C over calibration tokens. Removing
the columns S and re-fitting the others costs, to second order and here exactly,

    score(S) = tr(W_S [(H^-1)_SS]^-1 W_S^T),    H = C + damping * mean(diag C) * I

(Hassibi and Stork 1993; in this structured form ZipLM, arXiv 2302.04089, eq. 3). Units go one at a
time, so of two alike only one goes. With C centred, the bias takes up the mean: b += (W - W') mu.
Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-2
REINVERT = 256  # eliminations after which the running inverse is computed afresh, against drift


@dataclass
class Moments:
    """Mean and covariance of a layer's inputs, accumulated batch by batch in float64.

    Sums are kept about the first batch's mean, so that nothing cancels where means are large.
    """

    count: int = 0
    shift: Tensor | None = None  # [inputs]
    total: Tensor | None = None  # [inputs], of x - shift
    product: Tensor | None = None  # [inputs, inputs], of (x - shift)(x - shift)^T

    def add(self, x: Tensor) -> None:
        """Take in tokens `[..., inputs]`."""
        x = x.detach().reshape(-1, x.shape[-1])
        if self.shift is None:
            self.shift = x.mean(0)
            self.total = torch.zeros(x.shape[1], dtype=torch.float64)
            self.product = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        assert self.total is not None and self.product is not None
        x = x - self.shift
        self.count += len(x)
        self.total += x.sum(0, dtype=torch.float64)
        self.product += x.T @ x

    @property
    def mean(self) -> Tensor:
        assert self.shift is not None and self.total is not None
        return self.shift.double() + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        assert self.total is not None and self.product is not None
        offset = self.total / self.count
        return self.product / self.count - torch.outer(offset, offset)


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """C + damping * mean(diag C) * I; positive definite also where units are dead or samples few."""
    ridge = (damping * covariance.diagonal().mean()).clamp_min(1e-30)  # a layer whose inputs are all constant
    return covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)


def removal_order(weight: Tensor, hessian: Tensor, unit_size: int) -> tuple[list[int], list[float]]:
    """Remove every unit, cheapest first; returns the order and the error after each removal.

    Shapes: weight `[outputs, inputs]`, hessian `[inputs, inputs]` (damped, positive definite), units of
    `unit_size` neighbouring inputs. The error is tr((W - W') H (W - W')^T) of the best W' without the
    units removed so far; the list starts with 0.0 and has one entry more than there are units.
    """
    w = weight.double().clone()
    h = hessian.double()
    inverse = _inverse(h)
    alive = list(range(len(h) // unit_size))
    order: list[int] = []
    errors = [0.0]
    while alive:
        # rows and columns of removed units are gone from w and inverse: position p holds unit alive[p]
        scores = _scores(w, inverse, unit_size)
        p = int(scores.argmin())
        span = slice(p * unit_size, (p + 1) * unit_size)
        rows = torch.linalg.solve(inverse[span, span], inverse[span])
        w -= w[:, span] @ rows
        inverse -= inverse[:, span] @ rows
        order.append(alive.pop(p))
        errors.append(errors[-1] + max(float(scores[p]), 0.0))
        keep = torch.cat([torch.arange(span.start), torch.arange(span.stop, len(inverse))])
        w, inverse = w[:, keep], inverse[keep][:, keep]
        if alive and len(order) % REINVERT == 0:
            columns = (torch.tensor(alive)[:, None] * unit_size + torch.arange(unit_size)).flatten()
            inverse = _inverse(h[columns][:, columns])
    return order, errors


def _scores(w: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    if unit_size == 1:
        return w.square().sum(0) / inverse.diagonal()
    units = len(inverse) // unit_size
    blocks = torch.stack([inverse[s : s + unit_size, s : s + unit_size] for s in range(0, len(inverse), unit_size)])
    columns = w.T.reshape(units, unit_size, -1)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns, upper=False)
    return whitened.square().sum((1, 2))


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def refit(weight: Tensor, bias: Tensor, mean: Tensor, hessian: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The best weight `[outputs, kept]` and bias `[outputs]` when only the input columns `kept` remain.

    Least squares on the survivors: exactly what the updates of `removal_order` end in, without their drift.
    """
    w, h = weight.double(), hessian.double()
    if not len(kept):
        return w[:, kept], bias.double() + w @ mean
    factor = torch.linalg.cholesky(h[kept][:, kept])
    new = torch.cholesky_solve(h[kept] @ w.T, factor).T
    return new, bias.double() + w @ mean - new @ mean[kept]
