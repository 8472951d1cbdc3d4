"""Profile: what every sub-block shape costs on this device, in the runtime that will run.

Each shape is timed as a full-depth model whose blocks all have it, so that fusion and caches are as
in deployment, turn by turn with the dense model. Writes `profile.json` and `samples.npz`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import artifact, vit
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import device, table
from edgeprune.latency.statistics import QUANTILES, half_width, quiet_ms, summarise
from edgeprune.stages import baseline, choose, shapes
from edgeprune.types import LatencyTable, Measurement, to_json

TABLE_SECONDS = 75.0
SCHEMA = "edgeprune.profile/1"


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    anchor = read["baseline"] / "dense.onnx"
    threads, why = device.usable_threads(request.threads or request.target.threads)
    console.say(f"threads: {threads} ({why})")
    runtime, times = choose.fastest(request, dict.fromkeys(choose.eligible(request, console), anchor), threads)
    console.say(f"runtime: {runtime}, {why_runtime(request, runtime, times)}")
    grid = vit.neuron_grid(dense.sizes.neurons, request.target.neuron_step)
    console.say(
        f"grid: 0 to {dense.sizes.heads} heads, {len(grid)} MLP widths in steps of {grid[1]} neurons "
        f"(SIMD step {request.target.neuron_step}, at most {vit.MAX_WIDTHS} widths)"
    )
    models = shapes.shape_models(dense.model, grid, out, console)
    measured, worker = measure(request, runtime, threads, anchor, models, console)
    for path in models.values():
        path.unlink()
    dense_ms, how = quiet_ms(next(iter(measured.values())).anchor_ms)
    measured = only_calm(measured, dense_ms, request.seed)
    anchor_samples = next(iter(measured.values())).anchor_ms
    built = table.build_table(
        {int(name[5:]): m for name, m in measured.items() if name.startswith("heads")},
        {int(name[7:]): m for name, m in measured.items() if name.startswith("neurons")},
        heads=dense.sizes.heads, width=dense.sizes.neurons, blocks=dense.sizes.blocks, dense_ms=dense_ms,
        runtime=runtime, precision=request.precision, threads=threads,
    )  # fmt: skip
    tell(built, measured, worker, request, dense.sizes, console)
    console.say(f"the dense model's {dense_ms:.2f} ms are {how}")
    document = {
        "schema": SCHEMA,
        "device": device.fingerprint(),
        "target": request.target,
        "runtime": runtime,
        "anchor_ms": {name: dense_ms * ratio for name, ratio in times.items()},
        "anchor": {
            **{
                name: dense_ms * float(np.quantile(anchor_samples, q) / np.median(anchor_samples))
                for name, q in QUANTILES.items()
            },
            "samples": len(anchor_samples),
            "how": how,
        },
        "tokens": dense.sizes.tokens,
        "worker": worker,
        "table": table.table_to_json(built),
        "ratios": {name: {"ratio": m.ratio, "ci": m.ratio_ci} for name, m in measured.items()},
    }
    (out / "profile.json").write_text(json.dumps(to_json(document), indent=1))
    samples: dict[str, Any] = {
        "dense": next(iter(measured.values())).raw_ms[1],
        **{name: m.raw_ms[0] for name, m in measured.items()},
    }
    np.savez_compressed(out / "samples.npz", **samples)


def why_runtime(request: Request, runtime: str, times: Mapping[str, float]) -> str:
    """Why this runtime was chosen, in words."""
    if len(times) == 1:
        return "as asked" if request.runtime else "the only one that this target can use here"
    others = ", ".join(f"{name} takes {ratio:.2f} times as long" for name, ratio in times.items() if name != runtime)
    return f"the fastest, measured turn by turn ({others})"


def measure(
    request: Request, runtime: str, threads: int, anchor: Path, models: Mapping[str, Path], console: Console
) -> tuple[dict[str, Measurement], dict[str, Any]]:
    """Time all shape models turn by turn with the dense model; also returns what the worker says of itself."""
    with choose.clock(request, runtime, threads) as clock:
        clock.load("dense", anchor)
        for name, path in models.items():
            clock.load(name, path)
        with console.progress("latency table", TABLE_SECONDS, "s") as advance:
            shown = 0.0

            def on_round(rounds: int, seconds: float) -> None:
                nonlocal shown
                advance(seconds - shown, f"round {rounds}")
                shown = seconds

            measured = clock.measure(
                list(models), "dense", ci=0.007, min_rounds=30, budget_s=TABLE_SECONDS, on_round=on_round
            )
        return measured, {"info": clock.info, "dense": clock.facts["dense"]}


def only_calm(measured: Mapping[str, Measurement], dense_ms: float, seed: int) -> dict[str, Measurement]:
    """The same measurements, counting only rounds as calm as the anchor's quiet latency `dense_ms`."""
    names = list(measured)
    samples = np.stack([*(measured[name].raw_ms[0] for name in names), measured[names[0]].raw_ms[1]])
    return dict(zip(names, summarise([*names, "dense"], samples, len(names), seed, dense_ms), strict=False))


def tell(
    built: LatencyTable, measured: Mapping[str, Measurement], worker: Mapping[str, Any], request: Request,
    sizes: vit.Anatomy, console: Console,
) -> None:  # fmt: skip
    """Print what the table says, what was repaired in it, and what it does not prove."""
    for repaired in built.repaired:
        console.detail(f"made monotone: {repaired}")
    console.say(
        f"dense {built.dense_ms:.2f} ms: a head costs {built.attn_ms[-1] / sizes.heads * 1e3:.0f} µs, 8 neurons "
        f"{built.mlp_ms[-1] / sizes.neurons * 8e3:.1f} µs, what always stays {built.base_ms:.2f} ms "
        f"({built.samples} rounds, widest interval ± {max(map(half_width, measured.values())):.1%})"
    )
    if uncapped := worker["dense"].get("uncapped"):
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in uncapped.items())
        console.warn(
            f"this CPU has wider instructions than {request.target.max_isa}; {built.runtime} is held to it but for "
            f"{kernels}, so a true {request.target.name} device may be slower: run `edgeprune validate` there"
        )


def read_profile(folder: Path) -> tuple[dict[str, Any], LatencyTable]:
    """The profile document and its table."""
    document = artifact.read_json(folder / "profile.json")
    return document, table.table_from_json(document["table"])
