"""What calibration found: the statistics and levels that allocators choose from and recoveries solve with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from edgeprune.data import Batch
from edgeprune.shelf import MEMORY, Shelf
from edgeprune.types import Levels, SubBlock

#: (mean, damped covariance) of a layer's inputs.
LayerMoments = tuple[Tensor, Tensor]


def uncentred(moments: Mapping[SubBlock, LayerMoments]) -> dict[SubBlock, LayerMoments]:
    """The same with no mean taken off: zero, and the mean of x x^T; solved with them, biases stay as they are."""
    return {at: (torch.zeros_like(mean), second + torch.outer(mean, mean)) for at, (mean, second) in moments.items()}


@dataclass(frozen=True)
class Calibration:
    """What the calibrate stage found, with the images it looked at. Sub-blocks are in the order attn 0, mlp 0, attn 1, ..."""

    levels: list[Levels]
    moments: dict[SubBlock, LayerMoments]  # of the inputs of every prunable layer
    batches: Sequence[Tensor]  # `[n, channels, height, width]`
    #: How much each token counts, per sub-block and batch `[n, tokens]`; None if all count alike.
    weights: dict[SubBlock, list[Tensor]] | None
    labelled: Callable[[], Iterator[Batch]]  # the same images with their labels
    shelf: Shelf = MEMORY  # where what is known of each image waits
    #: (mean, covariance) of what attentions read, by block; empty where their ranks cannot be lowered.
    inputs: Mapping[int, LayerMoments] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return sum(self._lengths)

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    def pixels(self, start: int, stop: int) -> Tensor:
        """The images from `start` to before `stop`, `[stop - start, channels, height, width]`."""
        firsts = itertools.accumulate(self._lengths, initial=0)
        ends = [(i, first, first + n) for i, (first, n) in enumerate(zip(firsts, self._lengths))]
        parts = [
            self.batches[i][max(start - first, 0) : stop - first]
            for i, first, end in ends
            if first < stop and start < end
        ]
        return torch.cat(parts)
