"""Where NaN and infinity come from: the first module of a model whose output holds one, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import UsageError


def refuse_not_finite(model: nn.Module, pixels: Tensor, logits: Tensor, stage: str, fix: str) -> None:
    """Raise UsageError, naming the stage and the first layer at fault, unless all `logits` of `pixels` are numbers."""
    if bool(logits.isfinite().all()):
        return
    if not bool(pixels.isfinite().all()):
        raise UsageError(
            f"stage {stage}: the images hold NaN or infinity after preprocessing; check mean and std of the card's [transforms]"
        )
    name = first_not_finite(model, pixels)
    raise UsageError(
        f"stage {stage}: NaN or infinity (a value beyond float32) first appears in the output of {name}; {fix}"
    )


@torch.no_grad()
def first_not_finite(model: nn.Module, pixels: Tensor) -> str:
    """The name of the first module, in the order they run, whose output is not all numbers; "" if there is none."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return look

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        model(pixels)
    finally:
        for one in hooks:
            one.remove()
    return found[0] if found else "the model"
