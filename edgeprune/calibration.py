"""What calibration found: the statistics and levels that allocators choose from and recoveries solve with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from edgeprune.data import Batch
from edgeprune.types import Levels, SubBlockKind

#: (mean, damped covariance) of a layer's inputs.
LayerMoments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Calibration:
    """What the calibrate stage found, with the images it looked at. Sub-blocks are in the order attn 0, mlp 0, attn 1, ..."""

    levels: list[Levels]
    moments: dict[tuple[int, SubBlockKind], LayerMoments]  # of the inputs of every prunable layer
    batches: list[Tensor]  # `[n, channels, height, width]`
    #: How much each token counts, per sub-block and batch `[n, tokens]`; None if all count alike.
    weights: dict[tuple[int, SubBlockKind], list[Tensor]] | None
    labelled: Callable[[], Iterator[Batch]]  # the same images with their labels
