"""What the survivors of a plan become before any tuning. One file per recovery; the file name is its name.

A recovery is a module with one function, `recover(damage) -> VisionTransformer`, the pruned model with its new weights.
`NEEDS` names what it looks at; `TUNES` what fine-tuning may change afterwards: "weights", or "adapters" alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch import Tensor

from edgeprune import modules, vit
from edgeprune.calibration import Calibration
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.gates import units_of
from edgeprune.types import Plan, SubBlock

DEFAULT = "refit"


@dataclass(frozen=True)
class Damage:
    """What is to be made good: a plan, the model it is cut from, and what calibration found there."""

    dense: VisionTransformer  # the teacher
    model: VisionTransformer  # what the plan is cut from, in dense shape; the dense model unless it was trained since
    plan: Plan
    found: Calibration
    seed: int
    console: Console


class Recovery(Protocol):
    __name__: str
    __doc__: str | None
    NEEDS: tuple[str, ...]
    TUNES: Literal["weights", "adapters"]

    def recover(self, damage: Damage) -> VisionTransformer: ...


def names() -> list[str]:
    return modules.names("recovery")


def get(name: str) -> Recovery:
    """The recovery module; UsageError with "did you mean" for an unknown name."""
    return cast(Recovery, modules.get("recovery", name))


def cut(damage: Damage) -> Iterator[tuple[SubBlock, Tensor, Tensor]]:
    """Every sub-block that loses units, with the input columns of its last layer that stay and those that go."""
    sizes = vit.anatomy(damage.model)
    for at, units in units_of(damage.plan).items():
        every = range(sizes.units(at))
        gone = tuple(sorted(set(every) - set(units)))
        if gone:
            size = sizes.unit_size(at)
            yield at, vit.columns(units, size), vit.columns(gone, size)
