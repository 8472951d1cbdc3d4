"""Check: how far the latency table is off, on held-out random plans it was not made from.

Every plan has its own heads and neurons in every block, some sub-blocks removed; its prediction is
compared with the assembled model, timed turn by turn with the dense model. Writes `check.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import choose, devices
from edgeprune.latency.clock import COPIES
from edgeprune.stages import baseline, profile, shapes
from edgeprune.types import Measurement, Quiet, Shape, to_json

CHECK_SECONDS = 60.0
MIN_ROUNDS = 60
HELD_OUT = 1  # another stream of random numbers than the plans that the table was fitted on


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    document, table = profile.read_profile(read["profile"])
    profile.refuse_recorded(document, "check predictions", devices.machine(request.device))
    dense = baseline.load(request, read["baseline"])
    plans = shapes.random_shapes(
        request.check, dense.sizes, [own.mlp_widths for own in table.stages], (request.seed, HELD_OUT), table.patches,
        [*(["precision"] if table.int8 else []), *(["qk"] if table.ranked else [])],
    )  # fmt: skip
    with choose.clock(request.conditions, table.runtime, table.threads, console) as clock:
        clock.load("dense", read["baseline"] / "dense.onnx", COPIES, values=False)
        with console.progress("held-out plans", len(plans), "exports") as advance:
            for i, shape in enumerate(plans):
                path = out / f"plan{i}.onnx"
                shapes.export_shape(dense.model, shape, dense.sizes, path, request.reducer)
                clock.load(f"plan{i}", path, values=False)
                path.unlink()
                advance(1, "")
        with console.timing("held-out plans", CHECK_SECONDS) as on_round:
            measured = clock.measure(
                [f"plan{i}" for i in range(len(plans))], "dense", ci=0.005, min_rounds=MIN_ROUNDS,
                budget_s=CHECK_SECONDS, quiet=Quiet.of(document, table.runtime), on_round=on_round,
            )  # fmt: skip
    predicted = [table.predict_ms(shape) for shape in plans]
    facts = compare(plans, predicted, list(measured.values()), table.dense_ms)
    console.say(
        f"prediction error on {len(plans)} held-out random plans: median {facts['median']:.1%}, "
        f"90 % of them within {facts['p90']:.1%}, at most {facts['max']:.1%} ({facts['rounds']} rounds)"
    )
    (out / "check.json").write_text(json.dumps(to_json(facts), indent=1))


def compare(
    plans: Sequence[Shape], predicted: Sequence[float], measured: Sequence[Measurement], dense_ms: float
) -> dict[str, Any]:
    """Relative errors (predicted / measured - 1) of every plan, and the distribution of their magnitudes."""
    found = np.array([m.ratio for m in measured]) * dense_ms
    errors = np.asarray(predicted) / found - 1
    size = np.abs(errors)
    return {
        "plans": [
            {"shape": shape, "predicted_ms": p, "measured_ms": ms, "ci_ms": [r * dense_ms for r in m.ratio_ci], "error": e}
            for shape, p, ms, m, e in zip(plans, predicted, found, measured, errors, strict=True)
        ],
        "median": np.median(size), "p90": np.quantile(size, 0.9), "max": size.max(), "bias": errors.mean(),
        "rounds": min(len(m.samples_ms) for m in measured), "calm": all(m.calm for m in measured),
    }  # fmt: skip
