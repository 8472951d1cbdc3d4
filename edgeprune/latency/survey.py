"""Survey: where a model's time goes on this device, against what the device can do, and what would change it.

Takes ONNX files and numbers, so that it works where there is no torch. Everything that is compared is
timed turn by turn; what could not be measured is named in `left_out` with its reason.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.config import Conditions
from edgeprune.console import Console
from edgeprune.errors import EdgepruneError, TargetUnavailable, UsageError
from edgeprune.latency import choose, devices, micro, noise, roofline
from edgeprune.latency.clock import Clock, race
from edgeprune.latency.statistics import latency_ms, quiet_ms
from edgeprune.types import LatencyTable, to_json

SCHEMA = "edgeprune.survey/1"
#: Time budgets of the three measurements, in seconds.
MODEL_SECONDS = 12.0
THREADS_SECONDS = 5.0
PRECISIONS_SECONDS = 9.0
MIN_ROUNDS = 60
OPERATOR_RUNS = 20


def survey(
    model: Path,
    under: Conditions,
    runtime: str,
    threads: int,
    console: Console,
    *,
    table: LatencyTable | None = None,
    sizes: Mapping[str, Any] | None = None,
    off_grid: Mapping[int, Path] | None = None,
    compare: bool = True,
) -> dict[str, Any]:
    """All that a performance engineer wants to know of the ONNX file `model`, as JSON.

    under: target, precision and seed. runtime, threads: what is surveyed; others are compared with it.
    table, sizes: the latency table of a Vision Transformer and its tokens, width, heads, head_dim and
    neurons; without them there are no sub-blocks. off_grid: models of uniform MLP widths beside the grid. compare: with other
    thread counts, runtimes and int8 too, which takes as long again.
    """
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as work:
        micros = _made(left_out, "the compute and memory ceilings", lambda: _ceiling_models(Path(work)))
        with choose.clock(under, runtime, threads) as clock:
            document = _model(clock, model, {**(off_grid or {}), **micros}, console)
        measured: dict[Any, float] = document.pop("measured")
        uncapped = document.pop("uncapped")
        document["ceilings"] = _ceilings({at: measured[at] for at in micros}, uncapped) if micros else None
        if table is not None and sizes is not None:
            document["sub_blocks"] = _sub_blocks(table, sizes, document["ceilings"])
            document["off_grid"] = [{"width": width, "ms": measured[width]} for width in off_grid or {}]
        document["threads_scaling"] = _thread_scaling(model, under, runtime, threads) if compare else []
        document["precisions"] = (
            _precisions(model, Path(work), under, runtime, threads, left_out, console) if compare else []
        )
    for reason in left_out:
        console.say(f"left out: {reason}")
    for sentence in document["noise"]["disturbances"]:
        console.say(f"while surveying, {sentence}")
    return {"schema": SCHEMA, "runtime": runtime, "threads": threads, **document, "left_out": left_out}


def _made(left_out: list[str], what: str, make: Callable[[], dict[Any, Path]]) -> dict[Any, Path]:
    """What `make` makes, or nothing and the reason in `left_out`."""
    try:
        return make()
    except EdgepruneError as error:
        left_out.append(f"{what}: {error}")
        return {}


def _ceiling_models(work: Path) -> dict[Any, Path]:
    models: dict[Any, Path] = {}
    for shape in micro.GEMMS:
        models[shape] = work / f"gemm{'x'.join(map(str, shape))}.onnx"
        micro.gemm(models[shape], *shape)
    models["stream"] = work / "stream.onnx"
    micro.stream(models["stream"])
    return models


def _model(clock: Clock, model: Path, others: Mapping[Any, Path], console: Console) -> dict[str, Any]:
    """The model's own latency, noise and operators, and the milliseconds of `others` by key (`measured`)."""
    clock.load("dense", model, values=False)
    for key, path in others.items():
        clock.load(str(key), path, values=False)
    before = clock.counters()
    with console.timing("surveying", MODEL_SECONDS) as on_round:
        measured = clock.measure(
            ["dense", *map(str, others)], "dense", ci=0.005, min_rounds=MIN_ROUNDS, budget_s=MODEL_SECONDS,
            on_round=on_round,
        )  # fmt: skip
    facts = noise.between(before, clock.counters())
    own, raw = measured["dense"].anchor_ms, measured["dense"].raw_ms[1]
    dense_ms, how = quiet_ms(own)
    return {
        "latency_ms": {**latency_ms(measured["dense"], None), "quiet": dense_ms, "how": how},
        "noise": {
            **noise.stability(raw),
            "disturbed_rounds": len(raw) - len(own),
            **facts,
            "disturbances": noise.disturbances(facts),
        },
        "operators": by_operator(clock.operators("dense", OPERATOR_RUNS)),
        "uncapped": any(clock.facts[str(key)].get("uncapped") for key in others if not isinstance(key, int)),
        "measured": {key: measured[str(key)].ratio * dense_ms for key in others},
    }


def by_operator(nodes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Nodes of a graph, as `runtimes` list them, summed by operator and kernel; the costliest first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in nodes:
        found[node["operator"], node["kernel"]].append(node["ms"])
    total = sum(map(sum, found.values()))
    rows = [
        {"operator": operator, "kernel": kernel, "count": len(times), "ms": sum(times), "share": sum(times) / total}
        for (operator, kernel), times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _ceilings(measured: Mapping[Any, float], uncapped: bool) -> dict[str, Any]:
    """GFLOP/s of every matrix product and the best of them; GB/s of the memory-bound one."""
    gemms = [
        {"m": m, "k": k, "n": n, "ms": ms, "gflops": micro.gemm_flops(m, k, n) / ms / 1e6}
        for (m, k, n), ms in ((at, ms) for at, ms in measured.items() if at != "stream")
    ]
    return {
        "uncapped": uncapped,  # the instruction set cap does not reach these kernels
        "gemms": gemms,
        "gflops": max(row["gflops"] for row in gemms),
        "gb_per_s": micro.stream_bytes() / measured["stream"] / 1e6,
    }


def _sub_blocks(
    table: LatencyTable, sizes: Mapping[str, Any], ceilings: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Every sub-block of the table, its share of the dense model's time, and how near it is to the ceiling."""
    batch, found = sizes.get("batch", 1), []
    for number, (own, stage) in enumerate(zip(table.stages, sizes.get("stages", [sizes]), strict=True)):
        tokens, width, head_dim = stage["tokens"], stage["width"], stage["head_dim"]
        window = stage.get("window", 0)
        rows = [
            ("attention", f"{heads} heads", float(own.attn_ms[heads]), roofline.attention(tokens, width, heads, head_dim, batch, window))
            for heads in range(len(own.attn_ms) - 1, 0, -1)
        ] + [
            ("MLP", f"{neurons} neurons", float(ms), roofline.mlp(tokens, width, neurons, batch))
            for neurons, ms in reversed(list(zip(own.mlp_widths, own.mlp_ms, strict=True)))
            if neurons
        ]  # fmt: skip
        found += [
            {"kind": kind, "stage": number, "kept": kept, "ms": ms, "share": own.blocks * ms / table.dense_ms}
            | (roofline.achieved(cost, ms, ceilings["gflops"], ceilings["gb_per_s"]) if ceilings and ms > 0 else {})
            for kind, kept, ms, cost in rows
        ]
    return found


def _thread_scaling(model: Path, under: Conditions, runtime: str, threads: int) -> list[dict[str, Any]]:
    """The model at 1, 2, 4 .. `threads` threads, turn by turn."""
    counts = sorted({*(2**i for i in range(threads.bit_length())), threads})
    if len(counts) == 1:
        return [{"threads": 1, "speedup": 1.0, "ci": [1.0, 1.0], "efficiency": 1.0}]
    with contextlib.ExitStack() as stack:
        entries = []
        for count in counts:
            clock = stack.enter_context(choose.clock(under, runtime, count))
            clock.load("dense", model, values=False)
            entries.append((clock, "dense"))
        measured = race(entries, 0, budget_s=THREADS_SECONDS, seed=under.seed)
    return [
        {"threads": n, "speedup": 1 / m.ratio, "ci": [1 / m.ratio_ci[1], 1 / m.ratio_ci[0]], "efficiency": 1 / m.ratio / n}
        for n, m in zip(counts, measured, strict=True)
    ]  # fmt: skip


def _precisions(
    model: Path, work: Path, under: Conditions, runtime: str, threads: int, left_out: list[str], console: Console
) -> list[dict[str, Any]]:
    """Every runtime that can be used here, in fp32 and int8, turn by turn; ratios to `runtime` in fp32."""
    int8 = _made(left_out, "int8", lambda: _int8_models(model, work, under.seed))
    others = [name for name in choose.eligible(replace(under, runtime=""), console) if name != runtime]
    names = []
    with contextlib.ExitStack() as stack:
        entries: list[tuple[Clock, str]] = []
        for name in (runtime, *others):
            try:
                clock = stack.enter_context(choose.clock(under, name, threads))
            except EdgepruneError as error:
                left_out.append(f"{name}: {error}")
                continue
            for scheme, path in {under.precision: model, **int8}.items():
                if scheme == "int8 dynamic" and name != "onnxruntime":
                    continue  # its integer operators are ONNX Runtime's own
                try:
                    clock.load(scheme, path)
                except EdgepruneError as error:
                    left_out.append(f"{scheme} in {name}: {error}")
                    continue
                entries.append((clock, scheme))
                names.append((name, scheme))
        if len(entries) < 2:
            return []
        measured = race(entries, 0, budget_s=PRECISIONS_SECONDS, seed=under.seed)
    return [
        {"runtime": name, "precision": scheme, "ratio": m.ratio, "ci": list(m.ratio_ci), "rounds": len(m.samples_ms)}
        for (name, scheme), m in zip(names, measured, strict=True)
    ]


def _int8_models(model: Path, work: Path, seed: int) -> dict[Any, Path]:
    paths: dict[Any, Path] = {"int8 dynamic": work / "dynamic.onnx", "int8 QDQ": work / "qdq.onnx"}
    micro.dynamic_int8(model, paths["int8 dynamic"])
    micro.qdq_int8(model, paths["int8 QDQ"], seed=seed)
    return paths


def survey_file(path: Path, under: Conditions, console: Console) -> dict[str, Any]:
    """The survey of any ONNX file, with the device and the conditions; no latency table."""
    machine = devices.machine(under.device)
    if reason := machine.unfit(under.target):
        raise TargetUnavailable(
            f"target '{under.target.name}' is not here: {reason}; leave --target out to take one that fits"
        )
    if under.precision not in under.target.precisions:
        raise UsageError(
            f"precision '{under.precision}' is not one of target '{under.target.name}': {', '.join(under.target.precisions)}"
        )
    threads, why = machine.usable_threads(under.threads or under.target.threads)
    console.say(f"threads: {threads} ({why})")
    runtime, times = choose.fastest(under, dict.fromkeys(choose.eligible(under, console), path), threads)
    console.say(f"runtime: {runtime}, {choose.why(under, runtime, times)}")
    return {
        "schema": SCHEMA,
        "file": {"name": path.name, "bytes": path.stat().st_size},
        "device": machine.fingerprint,
        "target": to_json(under.target),
        "runtime": runtime,
        "survey": to_json(survey(path, under, runtime, threads, console)),
    }
