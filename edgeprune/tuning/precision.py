"""Mixed precision where it pays: bfloat16 autocast for layers, float32 for weights, loss and optimiser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from edgeprune.attention import WrittenOut
from edgeprune.console import Console
from edgeprune.errors import UsageError
from edgeprune.tuning.group import has_bfloat16

NAMES = ("auto", "float32", "bfloat16")
#: The first runs take turns; the first one of either is not timed, it also pays for allocations.
TURNS = ("float32", "bfloat16", "bfloat16", "float32") * 2
WORTH = 0.95  # of the time in float32: a smaller gain is within what timing can tell
FEWEST_RUNS = 4 * len(TURNS)  # with fewer there is nothing to gain from choosing


class Precision:
    """What something computes in: what the recipe says, or the faster of the two, found out over the first runs.

    The teacher and the student have one each: a forward pass of a wide model may gain twofold where training a
    narrow one loses. Each process chooses for itself.
    """

    def __init__(self, what: str, asked: str, runs: int, where: torch.device, console: Console) -> None:
        if asked not in NAMES:
            raise UsageError(f"precision must be one of {', '.join(NAMES)} in a recipe, not '{asked}'")
        self.what = what
        self.where = where
        self.console = console
        self.seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}  # per image
        self.turns = list(TURNS) if asked == "auto" and runs >= FEWEST_RUNS and has_bfloat16(where) else []
        self.name = self.turns[0] if self.turns else asked.replace("auto", "float32")

    def autocast(self) -> Any:
        """The context that forward passes run in."""
        if self.name != "bfloat16":
            return nullcontext()
        both = ExitStack()
        both.enter_context(torch.autocast(self.where.type, torch.bfloat16))
        if self.where.type == "cpu":
            both.enter_context(WrittenOut())
        return both

    @contextmanager
    def run(self, images: int) -> Iterator[None]:
        """Around one run on so many images: timed while the choice is open."""
        if not self.turns or not images:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[self.turns.pop(0)].append((time.perf_counter() - start) / images)
        self.name = self.turns[0] if self.turns else self._choose()

    def state(self) -> dict[str, Any]:
        """What has been found out so far, for `restore`."""
        return {"name": self.name, "turns": self.turns, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        self.name, self.turns, self.seconds = state["name"], list(state["turns"]), state["seconds"]

    def _wait(self) -> None:
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)

    def _choose(self) -> str:
        # the least of each: what disturbs a run only ever makes it slower
        ratio = min(self.seconds["bfloat16"][1:]) / min(self.seconds["float32"][1:])
        chosen = "bfloat16" if ratio < WORTH else "float32"
        self.console.say(
            f"{self.what} in {chosen}: bfloat16 takes {ratio:.2f} of the time of float32 here "
            f"(the least of {len(TURNS) // 2 - 1} runs each, in turns, on {self.where.type})"
        )
        return chosen
