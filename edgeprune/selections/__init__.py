"""Which training images calibrate, and are tuned on where that is not all. One file per selection; the file name is its name.

A selection is a module with one function, `choose(pool, left, count)`: of the positions `left` in the pool, ascending,
`count` that are worth most. The pool is in an order drawn by the seed. `NEEDS` names what is looked at, of the training
images alone: images that a model is judged on are never in the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune import modules, vit
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.data import Chosen, Images
from edgeprune.errors import UsageError
from edgeprune.types import FloatArray

HALVINGS = 200  # of the interval of a multiplier: down to the last bit

#: Positions in the pool, or numbers of images.
Counts = NDArray[np.int64]


@dataclass
class Pool:
    """All training images, those to calibrate on included, and what selections look at; read when it is asked for."""

    images: Images
    model: VisionTransformer  # the dense one, on the CPU
    batch_size: int
    seed: int
    console: Console

    @cached_property
    def labels(self) -> Counts:
        """`[n]`; -1 for an image that cannot be read, where labels are not listed."""
        if (listed := self.images.listed_labels()) is not None:
            return listed
        labels = np.full(len(self.images), -1, dtype=np.int64)
        with self.console.progress("labels", len(self.images), "images") as advance:
            for places, (_, own) in self.images.placed(np.arange(len(self.images)), self.batch_size):
                labels[places] = own.numpy()
                advance(len(places), "")
        return labels

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """What the model's classifier reads of each image `[n, features]`; NaN for one that cannot be read."""
        features = np.full((len(self.images), self.model.num_features), np.nan, dtype=np.float32)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)
        try:
            with torch.no_grad(), self.console.progress("embedding", len(self.images), "images") as advance:
                for places, (pixels, _) in self.images.placed(np.arange(len(self.images)), self.batch_size):
                    stream = vit.embed(self.model, pixels.to(device))
                    for block in self.model.blocks:
                        stream = block(stream)
                    features[places] = vit.features(self.model, stream).cpu().numpy()
                    advance(len(places), "")
        finally:
            self.model.cpu()
        return features


class Selection(Protocol):
    __name__: str
    __doc__: str | None
    NEEDS: tuple[str, ...]

    def choose(self, pool: Pool, left: Counts, count: int) -> Counts: ...


def names() -> list[str]:
    return modules.names("selection")


def get(name: str) -> Selection:
    """The selection module; UsageError with "did you mean" for an unknown name."""
    return cast(Selection, modules.get("selection", name))


def divide(selection: Selection, pool: Pool, calibration: int, share: float) -> Chosen:
    """So many images of the pool to calibrate on and, of the others, the `share` that is worth most to tune on.

    Both stay in the pool's order: whoever takes only the first of them takes no extremes. Raises UsageError when
    fewer than 2 would be left to tune on, of which one must judge the tuning.
    """
    everything = np.arange(len(pool.images))
    calibrating = np.sort(selection.choose(pool, everything, calibration))
    others = np.setdiff1d(everything, calibrating)
    count = round(share * len(others))
    if count < 2:
        raise UsageError(f"{share:g} of {len(others)} training images are too few to tune on; raise --tune-on")
    training = others if count == len(others) else np.sort(selection.choose(pool, others, count))
    return Chosen(pool.images.indices[calibrating], pool.images.indices[training])


def quotas(wanted: FloatArray, sizes: Counts, count: int) -> Counts:
    """How many to take of groups of these sizes: `count` in all, or all there are, as near to `wanted` as can be.

    The x that minimise sum (x - wanted)^2 while sum x = count and 1 <= x <= sizes (arXiv 2401.04578), or
    0 <= x where there are more groups than images to take. They are wanted - m, cut off at those bounds, with the one m
    that makes the sum right; then the greatest fractions are rounded up. Of equal ones the first.
    """
    count = min(count, int(sizes.sum()))
    low = np.minimum(1 if count >= len(sizes) else 0, sizes)
    least, most = float((wanted - sizes).min()), float((wanted - low).max())  # all of everything, and the least of it
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if np.clip(wanted - middle, low, sizes).sum() > count else (least, middle)
    exact = np.clip(wanted - most, low, sizes)
    taken = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(np.round(taken - exact, 9), kind="stable")
    order = order[taken[order] < sizes[order]]
    taken[order[: count - int(taken.sum())]] += 1
    return taken
