"""What a training can be told beside its loss: a coach sees every step, and may add a penalty."""

from __future__ import annotations

from typing import Any

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

    def state(self) -> dict[str, Any]:
        """What the next step depends on beside the model, made of what `tuning.frozen` knows."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, with a model that has the weights it had then."""
