"""Profile: what every sub-block shape costs on this device, in the runtime that will run.

Each shape is timed as a full-depth model whose blocks all have it, so that fusion and caches are as
in deployment, turn by turn with the dense model. Writes `profile.json` and `samples.npz`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgeprune import artifact, runtimes, vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import TargetUnavailable, unknown
from edgeprune.latency import device, table
from edgeprune.latency.clock import Clock, race
from edgeprune.latency.statistics import QUANTILES, half_width
from edgeprune.stages import baseline, export, simplify
from edgeprune.types import LatencyTable, Measurement, to_json

RACE_SECONDS = 15.0
TABLE_SECONDS = 75.0
SCHEMA = "edgeprune.profile/1"


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    anchor = read["baseline"] / "dense.onnx"
    threads, why_threads = device.usable_threads(request.threads or request.target.threads)
    console.say(f"threads: {threads} ({why_threads})")
    candidates = eligible(request, console)
    races = _race(candidates, anchor, request, threads, console)
    runtime = min(races, key=lambda name: races[name].ratio)
    if len(races) > 1:
        others = ", ".join(
            f"{name} {m.ratio / races[runtime].ratio:.2f} times as long" for name, m in races.items() if name != runtime
        )
        console.say(f"runtime: {runtime}, the fastest on the dense model ({others})")
    else:
        console.say(
            f"runtime: {runtime}, {'as asked' if request.runtime else 'the only one that this target can use here'}"
        )
    grid = vit.neuron_grid(dense.sizes.neurons, request.target.neuron_step)
    console.say(f"grid: 0 to {dense.sizes.heads} heads, {len(grid)} MLP widths in steps of {grid[1]} neurons "
                f"(SIMD step {request.target.neuron_step}, at most {vit.MAX_WIDTHS} widths)")  # fmt: skip
    models = shape_models(dense.model, grid, out, console)
    with Clock(runtime, precision=request.precision, threads=threads, max_isa=cap(request), seed=request.seed) as clock:
        clock.load("dense", anchor)
        for name, path in models.items():
            clock.load(name, path)
        with console.progress("latency table", TABLE_SECONDS, "s") as advance:
            last = 0.0

            def on_round(rounds: int, seconds: float) -> None:
                nonlocal last
                advance(seconds - last, f"round {rounds}")
                last = seconds

            measured = clock.measure(
                list(models), "dense", ci=0.007, min_rounds=30, budget_s=TABLE_SECONDS, on_round=on_round
            )
        info, facts = clock.info, clock.facts["dense"]
    for path in models.values():
        path.unlink()
    anchor_samples = next(iter(measured.values())).anchor_ms
    dense_ms = float(np.median(anchor_samples))
    built = table.build_table(
        {int(name[5:]): m for name, m in measured.items() if name.startswith("heads")},
        {int(name[7:]): m for name, m in measured.items() if name.startswith("neurons")},
        heads=dense.sizes.heads, width=dense.sizes.neurons, blocks=dense.sizes.blocks, dense_ms=dense_ms,
        runtime=runtime, precision=request.precision, threads=threads,
    )  # fmt: skip
    for repaired in built.repaired:
        console.detail(f"made monotone: {repaired}")
    console.say(f"dense: {dense_ms:.2f} ms; a head costs {built.attn_ms[-1] / dense.sizes.heads * 1e3:.0f} µs, 8 neurons "
                f"{built.mlp_ms[-1] / dense.sizes.neurons * 8e3:.1f} µs, what always stays {built.base_ms:.2f} ms "
                f"({len(anchor_samples)} rounds, widest interval ± {max(map(half_width, measured.values())):.1%})")  # fmt: skip
    if facts.get("uncapped"):
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in facts["uncapped"].items())
        console.warn(
            f"this CPU has wider instructions than {request.target.max_isa}; {runtime} is held to it but for {kernels}, "
            f"so a true {request.target.name} device may be slower: run `edgeprune validate` there"
        )
    document = {
        "schema": SCHEMA,
        "device": device.fingerprint(),
        "target": request.target,
        "runtime": runtime,
        "anchor_ms": {name: dense_ms * m.ratio / races[runtime].ratio for name, m in races.items()},
        "anchor": {
            **{q: float(np.quantile(anchor_samples, at)) for q, at in QUANTILES.items()},
            "samples": len(anchor_samples),
        },
        "tokens": dense.sizes.tokens,
        "worker": {"info": info, "dense": facts},
        "table": table.table_to_json(built),
        "ratios": {name: {"ratio": m.ratio, "ci": m.ratio_ci} for name, m in measured.items()},
    }
    (out / "profile.json").write_text(json.dumps(to_json(document), indent=1))
    samples: dict[str, Any] = {"dense": anchor_samples, **{name: m.samples_ms for name, m in measured.items()}}
    np.savez_compressed(out / "samples.npz", **samples)


def read_profile(folder: Path) -> tuple[dict[str, Any], LatencyTable]:
    """The profile document and its table."""
    document = artifact.read_json(folder / "profile.json")
    return document, table.table_from_json(document["table"])


def cap(request: Request) -> str:
    """The instruction set to cap runtimes at: the target's, where this CPU has a wider one."""
    return request.target.max_isa if device.needs_cap(request.target) else ""


def eligible(request: Request, console: Console) -> list[str]:
    """Runtimes that the target names and that can measure it here; says why one cannot.

    Raises TargetUnavailable when none is left, or not the one asked for.
    """
    if request.runtime and request.runtime not in runtimes.names():
        raise unknown("runtime", request.runtime, runtimes.names())
    reasons = {}
    for name in request.target.runtimes:
        runtime = runtimes.get(name)
        reasons[name] = runtime.available()
        if not reasons[name] and cap(request) and runtime.cap_environment(cap(request)) is None:
            reasons[name] = (f"this CPU has wider instructions than {request.target.max_isa}, and {name} cannot be "
                             f"held to {request.target.max_isa}: its times here would say nothing about {request.target.name}")  # fmt: skip
    if request.runtime:
        reason = reasons.get(
            request.runtime, f"target '{request.target.name}' runs {', '.join(request.target.runtimes)}"
        )
        if reason:
            raise TargetUnavailable(f"runtime '{request.runtime}' cannot be used: {reason}")
        return [request.runtime]
    for name, reason in reasons.items():
        if reason:
            console.say(f"{name} is left out: {reason}")
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable:
        raise TargetUnavailable(
            f"no runtime of target '{request.target.name}' can be used here: {'; '.join(reasons.values())}"
        )
    return usable


def _race(names: list[str], anchor: Path, request: Request, threads: int, console: Console) -> dict[str, Measurement]:
    with contextlib.ExitStack() as stack:
        clocks = [stack.enter_context(Clock(name, precision=request.precision, threads=threads, max_isa=cap(request), seed=request.seed))
                  for name in names]  # fmt: skip
        for clock in clocks:
            clock.load("dense", anchor)
        return race_named(names, clocks, "dense")


def race_named(names: list[str], clocks: list[Clock], model: str) -> dict[str, Measurement]:
    """One measurement per runtime of the model loaded under `model`, relative to the first runtime's."""
    budget = RACE_SECONDS if len(names) > 1 else 0.0  # nothing to compare: the fewest rounds will do
    return dict(zip(names, race([(clock, model) for clock in clocks], 0, budget_s=budget), strict=True))


def shape_models(model: VisionTransformer, grid: tuple[int, ...], folder: Path, console: Console) -> dict[str, Path]:
    """ONNX files of full-depth models whose blocks are all alike: `heads0`.., `neurons0`.., dense excluded.

    Exporting takes seconds per model. MLP widths differ in nothing but one dimension, so one export with
    a marker width, a number that is no other size in the graph, is cut to every width of the grid.
    """
    sizes = vit.anatomy(model)
    paths: dict[str, Path] = {}
    shapes = {f"heads{h}": (h, sizes.neurons) for h in range(sizes.heads)}
    marker = marker_width(sizes)
    shapes.update({f"neurons{w}": (sizes.heads, w) for w in grid[:-1] if w == 0 or w > marker})
    with console.progress("shape models", len(shapes) + 1, "exports") as advance:
        for name, shape in shapes.items():
            paths[name] = folder / f"{name}.onnx"
            _export(model, shape, sizes, paths[name])
            advance(1, "")
        marked = folder / "marked.onnx"
        _export(model, (sizes.heads, marker), sizes, marked)
        advance(1, "")
    for width in (w for w in grid[1:-1] if w <= marker):
        paths[f"neurons{width}"] = folder / f"neurons{width}.onnx"
        onnx.save(cut(onnx.load(marked), marker, width), paths[f"neurons{width}"])
    marked.unlink()
    return paths


def _export(model: VisionTransformer, shape: tuple[int, int], sizes: vit.Anatomy, path: Path) -> None:
    exported = path.with_suffix(".exported")
    export.to_onnx(vit.slice_model(model, vit.plan_of_shape((shape,) * sizes.blocks)), sizes.image, exported)
    simplify.simplify(exported, path)
    exported.unlink()


def marker_width(sizes: vit.Anatomy) -> int:
    """The greatest prime below the dense MLP width; no other size of a ViT is a large prime."""
    taken = {sizes.tokens, sizes.tokens - 1, sizes.width, 3 * sizes.width, sizes.num_classes, *sizes.image}
    for number in range(sizes.neurons - 1, 1, -1):
        if number not in taken and all(number % d for d in range(2, int(number**0.5) + 1)):
            return number
    raise ValueError(f"there is no prime below {sizes.neurons}")


def cut(model: onnx.ModelProto, marker: int, width: int) -> onnx.ModelProto:
    """Cut every weight dimension of size `marker` to `width`, which is at most `marker`."""
    if width > marker:
        raise ValueError(f"a model of width {marker} cannot be cut to {width}")
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if marker in values.shape:
            part = values[tuple(slice(width) if size == marker else slice(None) for size in values.shape)]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(part), tensor.name))
        elif values.dtype == np.int64 and marker in values:
            raise ValueError(f"'{tensor.name}' holds the marker width {marker} as a value")
    del model.graph.value_info[:]
    return model
