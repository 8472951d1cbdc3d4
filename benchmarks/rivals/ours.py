"""edgeprune: the product's own stages, asked for a latency as a user would. Whatever they become, this follows.

The limit that is asked for is the target plus the tolerance that every method is allowed: the product keeps a
margin below its limit, where the others may be above the target as well as below.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from edgeprune import artifact, config, criteria, pipeline
from edgeprune.compat import VisionTransformer
from edgeprune.types import Latency
from rivals import TOLERANCE, Task


class Edgeprune:
    """criterion: "" = the product's default; dims: what its plans may choose."""

    def __init__(self, criterion: str = "", dims: tuple[str, ...] = config.DIMS) -> None:
        self.criterion, self.dims = criterion, dims

    def prepare(self, task: Task) -> None:
        self.task = task
        self.request = replace(task.request, dims=self.dims, criterion=self.criterion or task.request.criterion)
        done = pipeline.run_stages(self.upto("calibrate"), self.request, task.cache)
        self.seconds = done["calibrate"].seconds  # of the run that made it, if it was kept from an earlier one

    def model(self, aim_ms: float, target_ms: float) -> VisionTransformer:
        limit = aim_ms * (1 + TOLERANCE)
        request = replace(self.request, latency=Latency(f"{limit:.6f}ms", ms=limit))
        done = pipeline.run_stages(self.upto("prune"), request, self.task.cache)
        folder = done["prune"].folder
        return artifact.rebuild(artifact.read_plan(folder / "plan.json"), folder / "pruned.safetensors")

    def upto(self, last: str) -> list[pipeline.Stage]:
        stages = pipeline.stages_of(self.request)
        return stages[: [stage.name for stage in stages].index(last) + 1]


METHODS = {
    "edgeprune": Edgeprune,
    "edgeprune-widths": partial(Edgeprune, dims=config.WIDTHS),  # what all others choose, too
} | {f"edgeprune-{name}": partial(Edgeprune, name) for name in criteria.names()}
