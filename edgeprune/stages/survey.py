"""Survey: the profiling report beyond the latency table: operators, ceilings, threads, runtimes, int8, noise.

Not part of a build. Writes `survey.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edgeprune import vit
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import devices, survey
from edgeprune.stages import baseline, profile, shapes
from edgeprune.types import to_json


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    document, table = profile.read_profile(read["profile"])
    profile.refuse_recorded(document, "survey", devices.machine(request.device))
    dense = baseline.load(request, read["baseline"])
    off_grid = shapes.width_models(dense.model, 0, beside_the_grid(dense.sizes, request.target.neuron_step), out)
    facts = survey.survey(
        read["baseline"] / "dense.onnx", request.conditions, table.runtime, table.threads, console,
        table=table, sizes=document["model"], off_grid=off_grid,
    )  # fmt: skip
    for path in off_grid.values():
        path.unlink()
    (out / "survey.json").write_text(json.dumps(to_json(facts), indent=1))


def beside_the_grid(sizes: vit.Anatomy, step: int) -> tuple[int, ...]:
    """Half the dense MLP's width, of the first stage, on the SIMD grid, and widths up to the next step of it: where the
    stairs are. None where an MLP has no widths between.
    """
    if sizes.whole_mlp:
        return ()
    dense = sizes.stages[0].neurons
    half = dense // 2 // step * step
    return tuple(width for width in (half, half + 1, half + step // 2, half + step) if 0 < width < dense)
