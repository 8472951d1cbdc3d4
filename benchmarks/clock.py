"""How well does a latency measurement repeat? edgeprune's clock against the loops that others run.

    python benchmarks/clock.py [--rounds 200] [--repeats 5] [--runtime NAME] [--threads N] [--load SHARE]

Estimates the ratio of two models' latencies, B/A, and B's milliseconds again and again, in one worker and
with equally many timed runs:

contiguous  A is loaded, warmed up and run in one go, then B; the ratio of their means, medians or minima, as
            timeit, OpenVINO's benchmark_app and ONNX Runtime's perf test are used to compare two models.
turns       edgeprune's clock: A and B turn by turn in random order; the median of the ratios within rounds.

The machine does not change between repeats, so whatever differs between them is the method's error. The
order of the methods alternates. By default A is the shipped digits model and B one of about half its width.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.latency import device, noise
from edgeprune.latency.clock import WARM_RUNS, Clock

LOOPS = {"mean": np.mean, "median": np.median, "minimum": np.min}
METHODS = [*(f"contiguous, {name}" for name in LOOPS), "edgeprune, turns"]
#: Burns one core for a share (argument 1) of every 100 ms, and ends with its parent, which closes its stdin.
LOAD = """
import os, sys, threading, time
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    begin = time.perf_counter()
    while time.perf_counter() < begin + 0.1 * float(sys.argv[1]): pass
    time.sleep(max(0.0, begin + 0.1 - time.perf_counter()))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        models = [str(path) for path in options.models or export_models(Path(folder))]
        threads, reason = device.usable_threads(options.threads)
        load = None
        if options.load:
            load = subprocess.Popen([sys.executable, "-c", LOAD, str(options.load)], stdin=subprocess.PIPE)
        try:
            with Clock(options.runtime, threads=threads, timeout_s=3600) as clock:
                before = clock.counters()
                results = repeat(clock, models, options.rounds, options.repeats)
                facts = noise.between(before, clock.counters())
                info = clock.info
        finally:
            if load is not None:
                load.kill()
                load.communicate()
    rows = summarise(results)
    print(f"{device.cpu_model()}, {device.affinity()} CPUs; {info['runtime']} {info['version']}, {info['precision']}, "
          f"{threads} threads ({reason}); other load: {options.load:g} of one CPU")  # fmt: skip
    print(f"A {Path(models[0]).name}, B {Path(models[1]).name}; {options.rounds} timed runs of each model "
          f"per estimate, {options.repeats} estimates\n")  # fmt: skip
    print(table(rows))
    known = ", ".join(f"{name} {value:.4g}" for name, value in facts.items() if value is not None)
    print(f"\nThe whole run: {known}")
    for sentence in noise.disturbances(facts) or ["nothing disturbed the machine that it shows"]:
        print(f"- {sentence}")
    if options.json:
        raw = {"options": vars(options), "info": info, "cpu": device.cpu_model(), "noise": facts}
        options.json.write_text(json.dumps({**raw, "summary": rows, "estimates": results}, indent=1, default=str))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How well a latency measurement repeats, method by method.")
    parser.add_argument("--models", nargs=2, type=Path, metavar=("A", "B"), help="two ONNX files")
    parser.add_argument("--rounds", type=int, default=200, help="timed runs of each model per estimate, at least 9")
    parser.add_argument("--repeats", type=int, default=5, help="estimates of each method, at least 2")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=0, help="0 = all that this process may use")
    parser.add_argument("--load", type=float, default=0.0, metavar="SHARE", help="burn this share of one core beside")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every estimate and all samples")
    options = parser.parse_args(arguments)
    if options.rounds < 9 or options.repeats < 2 or not 0 <= options.load <= 1:
        parser.error("--rounds must be 9 or more, --repeats 2 or more, and --load between 0 and 1")
    return options


def repeat(clock: Clock, models: Sequence[str], rounds: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Per method, an estimate per repeat: `ratio`, `ms` (of B), `seconds` it took, and all samples."""
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for i in range(repeats):
        clock.seed = i  # another order of turns each time
        for measure in (contiguous, turns)[:: 1 if i % 2 == 0 else -1]:
            began = time.monotonic()
            estimates, samples = measure(clock, models, rounds)
            facts = {"seconds": time.monotonic() - began, "samples_ms": samples}
            for method, (ratio, ms) in estimates.items():
                results[method].append({"ratio": ratio, "ms": ms, **facts})
    return results


def contiguous(clock: Clock, models: Sequence[str], rounds: int) -> tuple[dict[str, tuple[float, float]], Any]:
    """One loop per model. The worker precedes each timed run by an untimed one, here as for `turns`."""
    samples = []
    for path in models:
        clock.load("model", path)
        clock._ask("warm", name="model", max_runs=WARM_RUNS, max_s=60.0)
        samples.append(clock._ask("turns", names=["model"] * rounds, copies=[0] * rounds, turn=0)["ms"])
        clock.unload("model")
    values = {f"contiguous, {name}": [float(loop(part)) for part in samples] for name, loop in LOOPS.items()}
    return {method: (b / a, b) for method, (a, b) in values.items()}, samples


def turns(clock: Clock, models: Sequence[str], rounds: int) -> tuple[dict[str, tuple[float, float]], Any]:
    for name, path in zip("AB", models, strict=True):
        clock.load(name, path)
    b = clock.measure(["B"], "A", min_rounds=rounds, max_rounds=rounds, budget_s=3600)["B"]
    for name in "AB":
        clock.unload(name)
    return {METHODS[-1]: (b.ratio, float(np.median(b.samples_ms)))}, [b.anchor_ms.tolist(), b.samples_ms.tolist()]


def summarise(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per method. The loops share their runs, so they share their seconds."""
    rows = []
    for method, estimates in results.items():
        ratio, ms, seconds = (np.array([e[key] for e in estimates]) for key in ("ratio", "ms", "seconds"))
        rows.append({
            "method": method, "ratio": float(ratio.mean()), "spread": float(ratio.max() / ratio.min() - 1),
            "deviation": float(ratio.std(ddof=1) / ratio.mean()), "ms": float(ms.mean()),
            "ms_spread": float(ms.max() / ms.min() - 1), "seconds": float(seconds.mean()),
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'method':<20} {'ratio B/A':>10} {'spread %':>9} {'std %':>7} {'B ms':>9} {'spread %':>9} {'seconds':>8}"
    return "\n".join([head, *(
        f"{row['method']:<20} {row['ratio']:>10.4f} {100 * row['spread']:>9.2f} {100 * row['deviation']:>7.2f} "
        f"{row['ms']:>9.3f} {100 * row['ms_spread']:>9.2f} {row['seconds']:>8.1f}" for row in rows
    )])  # fmt: skip


def export_models(folder: Path) -> list[Path]:
    """The shipped digits model, and the same with half the neurons and about half the heads in every block."""
    from edgeprune import config, vit
    from edgeprune.stages import baseline, export, simplify

    dense = baseline.load_source(config.load_card("digits"), None)
    sizes = vit.anatomy(dense)
    half = vit.slice_model(
        dense, vit.plan_of_shape((((sizes.only.heads + 1) // 2, sizes.only.neurons // 2),) * sizes.blocks)
    )
    paths = []
    for name, model in (("dense", dense), ("half", half)):
        export.to_onnx(model, sizes.image, folder / "exported.onnx")
        paths.append(folder / f"{name}.onnx")
        simplify.simplify(folder / "exported.onnx", paths[-1])
    return paths


if __name__ == "__main__":
    main()
