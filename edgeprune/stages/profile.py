"""Profile: what every sub-block shape costs on this device, in the runtime that will run.

Each shape is timed as a full-depth model whose blocks all have it, so that fusion and caches are as
in deployment, turn by turn with the dense model. Writes `profile.json` and `samples.npz`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import artifact, vit
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import UsageError
from edgeprune.latency import choose, device, table
from edgeprune.latency.statistics import QUANTILES, half_width, quiet_ms, summarise
from edgeprune.stages import baseline, shapes
from edgeprune.types import LatencyTable, Measurement, Shape, to_json

TABLE_SECONDS = 75.0
FITTING_PLANS = 8
SCHEMA = "edgeprune.profile/1"


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    if request.profile is not None:
        adopt(request, dense.sizes, request.profile, out, console)
        return
    anchor = read["baseline"] / "dense.onnx"
    threads, why = device.usable_threads(request.threads or request.target.threads)
    console.say(f"threads: {threads} ({why})")
    runtime, times = choose.fastest(
        request.conditions, dict.fromkeys(choose.eligible(request.conditions, console), anchor), threads
    )
    console.say(f"runtime: {runtime}, {choose.why(request.conditions, runtime, times)}")
    grid = vit.neuron_grid(dense.sizes.neurons, request.target.neuron_step)
    console.say(
        f"grid: 0 to {dense.sizes.heads} heads, {len(grid)} MLP widths in steps of {grid[1]} neurons "
        f"(SIMD step {request.target.neuron_step}, at most {vit.MAX_WIDTHS} widths)"
    )
    models = shapes.shape_models(dense.model, grid, out, console)
    plans = {f"plan{i}": shape for i, shape in enumerate(fitting_shapes(dense.sizes, grid, request.seed))}
    for name, shape in {"empty": ((0, 0),) * dense.sizes.blocks, **plans}.items():
        models[name] = out / f"{name}.onnx"
        shapes.export_shape(dense.model, shape, dense.sizes, models[name])
    measured, worker = measure(request, runtime, threads, anchor, models, console)
    for path in models.values():
        path.unlink()
    dense_ms, how = quiet_ms(next(iter(measured.values())).anchor_ms)
    measured = only_calm(measured, dense_ms, request.seed)
    anchor_samples = next(iter(measured.values())).anchor_ms
    built = table.build_table(
        {int(name[5:]): m for name, m in measured.items() if name.startswith("heads")},
        {int(name[7:]): m for name, m in measured.items() if name.startswith("neurons")},
        measured["empty"], {shape: measured[name] for name, shape in plans.items()},
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
        "model": describe(request, dense.sizes),
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


def fitting_shapes(sizes: vit.Anatomy, grid: tuple[int, ...], seed: int) -> list[Shape]:
    """Plans whose blocks differ, on which the table is fitted; none when there is one block."""
    return shapes.random_shapes(FITTING_PLANS, sizes, grid, (seed, 0)) if sizes.blocks > 1 else []


def describe(request: Request, sizes: vit.Anatomy) -> dict[str, Any]:
    """What of the model a latency table depends on."""
    return {
        "architecture": request.card.architecture, "batch": 1, "tokens": sizes.tokens, "width": sizes.width,
        "blocks": sizes.blocks, "heads": sizes.heads, "head_dim": sizes.head_dim, "neurons": sizes.neurons,
        "classes": sizes.num_classes,
    }  # fmt: skip


def adopt(request: Request, sizes: vit.Anatomy, path: Path, out: Path, console: Console) -> None:
    """Take the recorded profile in `path` instead of measuring; UsageError when it is of something else."""
    document = artifact.read_json(path)
    if document.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} is not a profile of schema {SCHEMA}; write one with `edgeprune profile --export FILE`"
        )
    try:
        recorded = table.table_from_json(document["table"])
        found = {
            "target": document["target"]["name"], "precision": recorded.precision,
            **{f"model's {key}": value for key, value in document["model"].items() if key != "architecture"},
        }  # fmt: skip
        cpu = document["device"]["cpu"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: the profile is damaged ({type(error).__name__}: {error}); record it again"
        ) from error
    wanted = {
        "target": request.target.name, "precision": request.precision,
        **{f"model's {key}": value for key, value in describe(request, sizes).items() if key != "architecture"},
    }  # fmt: skip
    wrong = [f"{key} is {found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value]
    if request.runtime not in ("", recorded.runtime):
        wrong.append(f"runtime is {recorded.runtime}, not {request.runtime}")
    if request.threads not in (0, recorded.threads):
        wrong.append(f"threads are {recorded.threads}, not {request.threads}")
    if wrong:
        raise UsageError(f"{path} was recorded for something else: its {'; its '.join(wrong)}")
    console.say(
        f"profile recorded on {cpu}, {recorded.runtime}, {recorded.threads} threads: dense {recorded.dense_ms:.2f} ms"
    )
    if not measurable(document):
        console.warn(
            "that is another device: the latency of what is built is predicted, not validated; run `edgeprune validate` there"
        )
    (out / "profile.json").write_text(json.dumps(document, indent=1))


def measurable(document: Mapping[str, Any]) -> bool:
    """Whether the profile was recorded on this very device, so that models can be measured against it."""
    return bool(document["device"] == device.fingerprint())


def refuse_recorded(document: Mapping[str, Any], what: str) -> None:
    """Raise UsageError when the profile is another device's."""
    if not measurable(document):
        raise UsageError(
            f"the profile is of {document['device'].get('cpu', 'another device')}: this machine cannot {what} for it"
        )


@contextmanager
def clock_progress(console: Console, what: str, seconds: float) -> Iterator[Callable[[int, float], None]]:
    """Progress of a measurement that may take `seconds`: yields what `Clock.measure` takes as `on_round`."""
    with console.progress(what, seconds, "s") as advance:
        shown = 0.0

        def on_round(rounds: int, now: float) -> None:
            nonlocal shown
            advance(now - shown, f"round {rounds}")
            shown = now

        yield on_round


def measure(
    request: Request, runtime: str, threads: int, anchor: Path, models: Mapping[str, Path], console: Console
) -> tuple[dict[str, Measurement], dict[str, Any]]:
    """Time all shape models turn by turn with the dense model; also returns what the worker says of itself."""
    with choose.clock(request.conditions, runtime, threads) as clock:
        clock.load("dense", anchor)
        for name, path in models.items():
            clock.load(name, path)
        with clock_progress(console, "latency table", TABLE_SECONDS) as on_round:
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
