"""Mixed precision where it pays: bfloat16 autocast for layers, float32 for weights, loss and optimiser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from edgeprune.console import Console
from edgeprune.errors import UsageError
from edgeprune.tuning.group import Group, has_bfloat16

NAMES = ("auto", "float32", "bfloat16")
#: The first steps take turns; the first one of either is not timed, it also pays for allocations.
TURNS = ("float32", "bfloat16", "bfloat16", "float32") * 2
WORTH = 0.95  # of the time in float32: a smaller gain is within what timing can tell
FEWEST_STEPS = 4 * len(TURNS)  # shorter runs have nothing to gain from choosing


class Precision:
    """What a step computes in: what the recipe says, or the faster one of the two, found out over the first steps."""

    def __init__(self, asked: str, steps: int, group: Group, console: Console) -> None:
        if asked not in NAMES:
            raise UsageError(f"precision must be one of {', '.join(NAMES)} in a recipe, not '{asked}'")
        self.group = group
        self.console = console
        self.seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
        self.turns = list(TURNS) if asked == "auto" and steps >= FEWEST_STEPS and has_bfloat16(group.device) else []
        self.name = self.turns[0] if self.turns else asked.replace("auto", "float32")

    def autocast(self) -> Any:
        """The context that forward passes run in."""
        on = self.name == "bfloat16"
        return torch.autocast(self.group.device.type, torch.bfloat16) if on else nullcontext()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward and backward pass of one step: times it while the choice is open."""
        if not self.turns:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[self.turns.pop(0)].append(time.perf_counter() - start)
        self.name = self.turns[0] if self.turns else self._choose()

    def _wait(self) -> None:
        if self.group.device.type == "cuda":
            torch.cuda.synchronize(self.group.device)

    def _choose(self) -> str:
        # the least of each: what disturbs a step only ever makes it slower
        ratio = self.group.agreed(min(self.seconds["bfloat16"][1:]) / min(self.seconds["float32"][1:]))
        chosen = "bfloat16" if ratio < WORTH else "float32"
        self.console.say(
            f"precision: {chosen}; a step in bfloat16 takes {ratio:.2f} of the time in float32 "
            f"(the least of {len(TURNS) // 2 - 1} each, in turns, on {self.group.device.type})"
        )
        return chosen
