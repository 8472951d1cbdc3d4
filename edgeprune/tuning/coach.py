"""What a training can be told beside its loss: a coach sees every step, and may add a penalty."""

from __future__ import annotations

from torch import Tensor


class Coach:
    """Does nothing; what a schedule overrides."""

    def before(self, step: int, steps: int) -> None:
        """Before step `step` of `steps`, counted from 0."""

    def penalty(self) -> Tensor | None:
        """Added to the mean loss of the step, a scalar."""
        return None

    def after(self, step: int, steps: int) -> None:
        """After the step; gradients are still there."""
