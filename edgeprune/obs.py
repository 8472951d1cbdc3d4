"""Structured optimal brain surgeon: which units of a linear layer to remove, and what the others become.

The layer is y = W x + b with inputs x of mean mu and covariance C over calibration tokens. Removing
the columns S and re-fitting the others costs, to second order and here exactly,

    score(S) = tr(W_S [(H^-1)_SS]^-1 W_S^T),    H = C + damping * mean(diag C) * I

(Hassibi and Stork 1993; in this structured form ZipLM, arXiv 2302.04089, eq. 3). Units go one at a
time, so of two alike only one goes. With C centred, the bias takes up the mean: b += (W - W') mu.

Which unit is cheapest also depends on what the loss makes of each output. With G the covariance of the
gradients at the outputs, the change that matters is tr(G dW C dW^T) (the Kronecker view of the Fisher
information: K-FAC, Martens and Grosse, arXiv 1503.05671): the same sweep over the rows G^(1/2) W, which
`loss_rows` makes. The best weights of the survivors do not depend on G, the choice of survivors does.
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune import products

DAMPING = 1e-2
STILL = 4e-7  # deviation, as a share of the inputs' magnitude, of what is constant but for float32's rounding
PANEL = 256  # rows of a covariance that one multiplication makes
SWEEP = 512  # eliminations after which inverse and weights are computed afresh, against drift


@dataclass
class Moments:
    """Mean and covariance of a layer's inputs, accumulated batch by batch in float64; tokens may have weights.

    rows: of the covariance, how many of its first rows are wanted; None = all of them. Sums are kept about the
    first batch's mean, so that nothing cancels where means are large.
    """

    rows: int | None = None
    count: float = 0.0  # sum of the weights
    shift: Tensor | None = None  # [inputs]
    total: Tensor | None = None  # [inputs], of x - shift
    product: Tensor | None = None  # [rows, inputs], of (x - shift)(x - shift)^T; its upper triangle

    @products.exact()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in tokens `[..., inputs]`, each counted `weights` `[...]` times (once if None)."""
        x = products.wide(x.detach().reshape(-1, x.shape[-1]))
        if self.shift is None:
            self.shift = x.mean(0)
            self.total = torch.zeros(x.shape[1], dtype=torch.float64)
            self.product = torch.zeros(len(self.shift[: self.rows]), x.shape[1], dtype=torch.float64)
        assert self.total is not None and self.product is not None
        x = x - self.shift
        if weights is None:
            self.count += len(x)
            self.total += x.sum(0).double()
        else:
            weights = weights.reshape(-1)
            self.count += float(weights.sum(dtype=torch.float64))
            self.total += (weights @ x).double()
            x *= weights.sqrt()[:, None]  # on both sides of the product; in place, as a copy is not cheap
        for start in range(0, len(self.product), PANEL):  # the lower triangle is the mirror image of the upper
            panel = slice(start, start + PANEL)
            self.product[panel, start:] += x[:, : self.rows][:, panel].T @ x[:, start:]

    @property
    def mean(self) -> Tensor:
        assert self.shift is not None and self.total is not None
        return self.shift.double() + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """`[rows, inputs]`; exactly 0 where an input is constant, as what is solved for must not follow its rounding."""
        assert self.total is not None and self.product is not None
        offset, square = self.total / self.count, slice(0, len(self.product))
        product = self.product.clone()
        product[:, square] = product[:, square].triu() + product[:, square].triu(1).T
        found = product / self.count - torch.outer(offset[: self.rows], offset)
        variance = found.diagonal()
        still = variance < STILL**2 * (self.mean[: self.rows].square() + variance).mean()
        found[still], found[:, square][:, still] = 0.0, 0.0
        return found


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """C + damping * mean(diag C) * I; positive definite also where units are dead or samples few."""
    ridge = (damping * covariance.diagonal().mean()).clamp_min(1e-30)  # a layer whose inputs are all constant
    return covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)


def loss_rows(weight: Tensor, gradients: Tensor) -> Tensor:
    """G^(1/2) W: rows `[outputs, inputs]` whose squared change is what the loss feels; gradients G `[outputs, outputs]`."""
    values, vectors = torch.linalg.eigh(gradients.double())
    return values.clamp_min(0).sqrt()[:, None] * (vectors.T @ weight.double())


def removal_order(weight: Tensor, hessian: Tensor, unit_size: int) -> tuple[list[int], list[float]]:
    """Remove every unit, cheapest first; returns the order and the error after each removal.

    Shapes: weight `[outputs, inputs]`, hessian `[inputs, inputs]` (damped, positive definite), units of
    `unit_size` neighbouring inputs. The error is tr((W - W') H (W - W')^T) of the best W' without the
    units removed so far; the list starts with 0.0 and has one entry more than there are units.
    """
    w, h = weight.double(), hessian.double()
    alive = torch.arange(len(h) // unit_size)
    order: list[int] = []
    errors = [0.0]
    while len(alive):
        kept = (alive[:, None] * unit_size + torch.arange(unit_size)).flatten()
        factor = torch.linalg.cholesky(h[kept][:, kept])
        survivors = torch.cholesky_solve(h[kept] @ w.T, factor).T
        inverse = torch.cholesky_inverse(factor)
        sweep = _sweep if unit_size == 1 else _sweep_groups
        removed, scores = sweep(survivors, inverse, unit_size)
        order += alive[removed].tolist()
        for score in scores:
            errors.append(errors[-1] + max(score, 0.0))
        alive = alive[torch.isin(torch.arange(len(alive)), torch.tensor(removed), invert=True)]
    return order, errors


def _sweep(w: Tensor, inverse: Tensor, _: int) -> tuple[list[int], list[float]]:
    """Remove up to `SWEEP` single inputs; their positions, in order, and scores.

    The updates of the inverse and of the weights are kept as factors, inverse - U^T U and w - C^T U, and only
    the row and column that a step needs are formed: a step reads `[inputs, steps so far]`, not `[inputs, inputs]`,
    nor the weights, whose inner products are known.
    """
    steps, inputs = min(SWEEP, len(inverse)), len(inverse)
    u = torch.empty(steps, inputs, dtype=torch.float64)
    c = torch.empty(steps, len(w), dtype=torch.float64)
    cw = torch.empty(steps, inputs, dtype=torch.float64)  # C w
    gram = w.T @ w
    diagonal, norms = inverse.diagonal().clone(), w.square().sum(0)
    gone = torch.zeros(inputs, dtype=torch.bool)
    removed, scores = [], []
    for k in range(steps):
        j = int(torch.where(gone, torch.inf, norms / diagonal).argmin())
        root = diagonal[j].sqrt()
        row = (inverse[j] - u[:k, j] @ u[:k]) / root
        column = (w[:, j] - u[:k, j] @ c[:k]) / root
        score = float(column @ column)
        cw[k] = (gram[j] - u[:k, j] @ cw[:k]) / root
        shared = cw[k] - (c[:k] @ column) @ u[:k]  # inner products of the column with the weights as they now are
        norms = (norms - 2 * row * shared + score * row.square()).clamp_min(0)
        gone[j] = True
        diagonal = torch.where(gone, 1.0, (diagonal - row.square()).clamp_min(1e-300))
        u[k], c[k] = row, column
        removed.append(j)
        scores.append(score)
    return removed, scores


def _sweep_groups(w: Tensor, inverse: Tensor, unit_size: int) -> tuple[list[int], list[float]]:
    """Remove units of several inputs, eagerly: there are few; their positions, in order, and scores."""
    alive = list(range(len(inverse) // unit_size))
    removed, scores = [], []
    for _ in range(min(len(alive), max(1, SWEEP // unit_size))):
        # rows and columns of removed units are gone from w and inverse: position p holds unit alive[p]
        found = _scores(w, inverse, unit_size)
        p = int(found.argmin())
        span = slice(p * unit_size, (p + 1) * unit_size)
        rows = torch.linalg.solve(inverse[span, span], inverse[span])
        keep = torch.cat([torch.arange(span.start), torch.arange(span.stop, len(inverse))])
        w = (w - w[:, span] @ rows)[:, keep]
        inverse = (inverse - inverse[:, span] @ rows)[keep][:, keep]
        removed.append(alive.pop(p))
        scores.append(float(found[p]))
    return removed, scores


def _scores(w: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    """What removing each unit costs, `[units]`."""
    units = len(inverse) // unit_size
    blocks = torch.stack([inverse[s : s + unit_size, s : s + unit_size] for s in range(0, len(inverse), unit_size)])
    columns = w.T.reshape(units, unit_size, -1)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns, upper=False)
    return whitened.square().sum((1, 2))


def refits(
    weight: Tensor, bias: Tensor, mean: Tensor, hessian: Tensor, order: Tensor, counts: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """`refit` when the first so many columns of `order` remain, for each of `counts`.

    One factor serves all: that of the first columns is a part of it, as is what it makes of the right-hand side.
    """
    w, h = weight.double(), hessian.double()
    factor = torch.linalg.cholesky(h[order][:, order])
    half = torch.linalg.solve_triangular(factor, h[order] @ w.T, upper=False)
    whole = bias.double() + w @ mean
    for count in counts:
        new = torch.linalg.solve_triangular(factor[:count, :count].T, half[:count], upper=True).T
        yield new, whole - new @ mean[order[:count]]


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
