"""Families of timm models, each rewritten exactly into timm's VisionTransformer. One file per family.

Slicing, criteria, refit, tables and export know one anatomy: a VisionTransformer of pre-norm Blocks whose attention
has `qkv` and `proj`, and whose MLP `fc1` and `fc2`. Blocks are of one size, or of one per stage, where a `MergingBlock`
begins a stage. A family is a module with

- `CLASSES`: names of the timm classes it is for;
- `obstacle(model) -> str`: what edgeprune cannot slice, in words; "" if there is nothing. Shapes are enough: the model
  may be on the meta device;
- `rewrite(model) -> VisionTransformer`: the same function of pixels; parameters that `rename` brings may be on meta;
- `rename(state) -> state`: a state_dict in timm's names as one in the rewritten model's.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from edgeprune.anatomies._described import Described
from edgeprune.anatomies._parts import MergingBlock
from edgeprune.anatomies._positions import PositionalAttention, WindowAttention
from edgeprune.compat import VisionTransformer

__all__ = [
    "Family", "MergingBlock", "PositionalAttention", "WindowAttention", "canonical", "classes", "find", "names",
]  # fmt: skip


class Family(Protocol):
    CLASSES: tuple[type[nn.Module], ...]

    def obstacle(self, model: Any) -> str: ...

    def rewrite(self, model: Any) -> VisionTransformer: ...

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]: ...


def names() -> list[str]:
    """The families there are: the names of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> Family:
    return cast(Family, importlib.import_module(f"edgeprune.anatomies.{name}"))


def classes() -> list[type[nn.Module]]:
    """The timm classes of all families."""
    return [cls for name in names() for cls in get(name).CLASSES]


def find(model: nn.Module, anatomy: Mapping[str, str]) -> Family | None:
    """The family that a model is of, or what a card's [anatomy] says of it; None for a class that no family names.

    Classes derived from a family's may differ: they are none's.
    """
    if anatomy:
        return Described(anatomy)
    return next((family for family in map(get, names()) if type(model) in family.CLASSES), None)


def canonical(model: nn.Module, family: Family) -> VisionTransformer:
    """The model, in eval mode, as the VisionTransformer that everything else knows; it shares the model's tensors.

    `timm_shapes` is what a file of weights in timm's names has to hold, `rename` makes this model's tensors of them.
    """
    state = model.eval().state_dict()
    made: Any = family.rewrite(model).eval()
    made.timm_shapes = {name: tensor.shape for name, tensor in state.items()}
    made.rename = family.rename
    made.load_state_dict(family.rename(dict(state)), strict=True, assign=True)
    return cast(VisionTransformer, made)
