"""What a training can be told beside its loss: a coach sees every step, and may add parameters and a penalty."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Coach:
    """Does nothing; what a schedule overrides."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """Trained beside the model's own, at `rate` times its learning rate, without weight decay."""
        return ()

    rate = 1.0

    def before(self, step: int, steps: int) -> None:
        """Before step `step` of `steps`, counted from 0."""

    def penalty(self) -> Tensor | None:
        """Added to the mean loss of the step, a scalar."""
        return None

    def after(self, step: int, steps: int) -> None:
        """After the step; gradients are still there."""
