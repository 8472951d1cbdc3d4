"""Every method of `edgeprune methods` under one contract: the same model, images, budget and measured latency.

    python benchmarks/methods.py                                              all methods on digits, one-shot and tuned
    python benchmarks/methods.py --model cifar10 --data-dir DIR --methods ziplm,flap
    python benchmarks/methods.py --quick                                      a tiny model, few methods: it shows that all of it runs

A row is what `edgeprune build --method NAME` does up to the tuned model, by the product's own stages: its plan was
measured within the limit, turn by turn with the dense model. Methods whose schedule trains have no one-shot row; half
of their tuning steps come before the cut. Finished rows are skipped by the next run. -> results/methods.md and plots
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy
import tables
import torch

from edgeprune import api, artifact, checks, methods, pipeline, schedules, vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import Infeasible, UsageError
from edgeprune.stages import baseline, profile, prune
from edgeprune.tuning.judge import divide
from edgeprune.types import Latency

QUICK_METHODS = "edgeprune,knapsack,magnitude,gradual"
STAGES = ("baseline", "profile", "sparsify", "calibrate", "prune", "finetune")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    with accuracy.quick(options) if options.quick else accuracy.full(options) as request:
        run(request, options, variants(chosen(options.methods)))
    tables.main(["--results", str(options.results), "--label", options.label, "--out", str(options.results.parent)])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names or patterns, comma-separated (default: all)")
    options = arguments(parser, argv, "methods")
    options.methods = options.methods or (QUICK_METHODS if options.quick else "*")
    return options


def arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None, name: str) -> argparse.Namespace:
    """What benchmarks by the product's own stages have in common; `name` is that of the results file."""
    accuracy.shared(parser, model="digits", target=accuracy.fitting().name, threads=1)
    parser.add_argument("--speed-ups", help="(default: 1.5,2,3; quick: 1.5)")
    parser.add_argument("--seeds", help="(default: 0,1; quick: 0)")
    parser.add_argument("--tune-steps", type=int, default=100, help="of fine-tuning, for every method (default: 100)")
    parser.add_argument("--search-seconds", type=float, help="for methods that search (default: the product's)")
    parser.add_argument(
        "--measurements",
        type=int,
        default=prune.ATTEMPTS,
        help="plans to measure for a row, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--measure-seconds", type=float, default=prune.MEASURE_SECONDS, help="for each, at most (default: %(default)s)"
    )
    parser.add_argument("--label", default="", help="of the code that is judged (default: the git commit)")
    parser.add_argument(
        "--results", type=Path, help=f"JSON lines (default: results/{name}.jsonl; quick: quick-{name}.jsonl)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one speed-up, short measurements; for CI")
    options = parser.parse_args(argv)
    file = f"quick-{name}.jsonl" if options.quick else f"{name}.jsonl"
    options.results = options.results or accuracy.HERE / "results" / file
    options.speed_ups = [float(s) for s in (options.speed_ups or ("1.5" if options.quick else "1.5,2,3")).split(",")]
    options.seeds = [int(s) for s in (options.seeds or ("0" if options.quick else "0,1")).split(",")]
    options.label = options.label or accuracy.commit()
    return options


def run(request: Request, options: argparse.Namespace, variants: Mapping[str, dict[str, Any]]) -> None:
    """Every row that the results file does not have yet. variants: by name, what of the request they change."""
    prune.ATTEMPTS, prune.MEASURE_SECONDS = options.measurements, options.measure_seconds
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    book = accuracy.Book(options.results)
    request = replace(request, search_seconds=options.search_seconds, seed=0)
    by_reducer: dict[str, dict[str, dict[str, Any]]] = {}  # each has a latency table of its own, one for all seeds
    for name, changes in variants.items():
        by_reducer.setdefault(changes.get("reducer", request.reducer), {})[name] = changes
    for reducer, some in by_reducer.items():
        done = pipeline.run_stages(
            pipeline.PIPELINE[:2], replace(request, reducer=reducer), options.cache_dir, console=Console()
        )
        recorded = done["profile"].folder / "profile.json"
        for seed in options.seeds:
            bench = Bench(replace(request, reducer=reducer, seed=seed, profile=recorded), options)
            for name, speed_up in itertools.product(some, options.speed_ups):
                if all(bench.key(name, speed_up, steps) in book.rows for steps in bench.steps):
                    continue
                for row in bench.rows(name, some[name], speed_up):
                    if accuracy.key_of(row) not in book.rows:
                        book.add(row)
                        accuracy.show(row)


def variants(found: Sequence[methods.Method]) -> dict[str, dict[str, Any]]:
    """What of a request each method changes; of the default also with the dimensions that all others have."""
    every = {method.name: changes_of(method) for method in found}
    if (default := methods.METHODS[0].name) in every:
        every[f"{default}-widths"] = {**every[default], "dims": vit.WIDTHS}
    return every


def changes_of(method: methods.Method) -> dict[str, Any]:
    """What of a request a method changes."""
    dims = api.dims_of(method.dims, method.allocator)
    return {"method": method.name, **method.parts, "dims": dims, "reducer": method.reducer}


def chosen(patterns: str) -> list[methods.Method]:
    """Methods by name or pattern, in the product's order. Raises UsageError for a pattern that matches nothing."""
    names = [method.name for method in methods.METHODS]
    found: set[str] = set()
    for pattern in patterns.split(","):
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"there is no method '{pattern}'; known: {', '.join(names)}")
        found |= set(fnmatch.filter(names, pattern))
    return [method for method in methods.METHODS if method.name in found]


class Bench:
    """One seed: its calibration images, the test images, and what the dense model says of them."""

    def __init__(self, request: Request, options: argparse.Namespace) -> None:
        assert request.profile is not None
        self.options, self.steps = options, (0, options.tune_steps)
        _, self.table = profile.read_profile(request.profile.parent)
        folder = pipeline.run_stages(pipeline.PIPELINE[:1], request, options.cache_dir)["baseline"].folder
        dense = baseline.load(request, folder)
        self.weights = artifact.sha256(folder / "dense.safetensors")
        images = accuracy.spaced(dense.splits.evaluation, options.images)
        self.pixels, self.labels = (torch.cat(part) for part in zip(*images.batches(accuracy.BATCH), strict=True))
        self.right = accuracy.judge(dense.model, self.pixels, self.labels)
        recipe = request.card.finetune
        epochs = options.tune_steps / math.ceil(len(divide(dense.splits.train)[1]) / recipe.batch_size)
        self.request = replace(
            request, card=replace(request.card, finetune=replace(recipe, epochs=(epochs,), sizes=()))
        )

    def key(self, name: str, speed_up: float, steps: int) -> accuracy.Key:
        return self.weights, name, speed_up, self.request.seed, steps, self.options.label

    def rows(self, name: str, changes: dict[str, Any], speed_up: float) -> Iterator[dict[str, Any]]:
        """What the product makes of the changed request: one-shot, then tuned."""
        one_shot, tuned = (self.key(name, speed_up, steps) for steps in self.steps)
        latency = Latency(f"{speed_up:g}x", fraction=1 / speed_up)
        request = replace(self.request, latency=latency, **changes)
        common = {
            "model": request.card.name, "target": request.target.name, "runtime": self.table.runtime,
            "machine": accuracy.machine(self.table), "when": time.strftime("%Y-%m-%d %H:%M"),
            "target_ms": self.table.dense_ms / speed_up, "dense_ms": self.table.dense_ms, "parts": changes,
            "dense_accuracy": 100 * float(self.right.mean()), "images": len(self.right),
            "dense_right": accuracy.packed(self.right),
        }  # fmt: skip
        began = time.monotonic()
        try:
            stages = [stage for stage in pipeline.stages_of(request) if stage.name in STAGES]
            done = pipeline.run_stages(stages, request, self.options.cache_dir)
        except (Infeasible, UsageError) as error:  # out of reach, or not for this model and its data
            status = "unreachable" if isinstance(error, Infeasible) else "not applicable"
            for key in (one_shot, tuned):
                yield accuracy.described(key, common, status, str(error), {"prepare": time.monotonic() - began})
            return
        spent = {name: entry.seconds for name, entry in done.items()}
        seconds = {"prepare": spent.get("sparsify", 0.0) + spent["calibrate"], "search": spent["prune"]}
        if request.schedule == schedules.DEFAULT:
            model = rebuilt(done["prune"].folder, "pruned")
            yield {
                **accuracy.described(one_shot, common, "ok", "", seconds),
                **self.judged(model, done["prune"].folder),
            }
        else:
            yield accuracy.described(one_shot, common, "no one-shot", "its schedule trains before the cut", seconds)
        seconds = {**seconds, "tune": spent["finetune"]}
        model = rebuilt(done["finetune"].folder, "model")
        yield {**accuracy.described(tuned, common, "ok", "", seconds), **self.judged(model, done["prune"].folder)}

    def judged(self, model: VisionTransformer, folder: Path) -> dict[str, Any]:
        """What a row says of a model whose plan the stage in this folder chose and measured."""
        plan = artifact.read_plan(folder / "plan.json").plan
        tries = artifact.read_json(folder / "search.json")["tries"]
        dense_ms = self.table.dense_ms  # which is kept as it is where it is within the limit
        if not tries:
            tries = [{"shape": plan.shape, "measured_ms": dense_ms, "ci_ms": [dense_ms, dense_ms], "calm": True}]
        [tried] = [one for one in tries if tuple(map(tuple, one["shape"])) == plan.shape]
        right = accuracy.judge(model, self.pixels, self.labels)
        drop, drop_ci = accuracy.paired(self.right, right)
        return {
            "plan": plan.shape, "params": vit.parameters(model), "latency_ms": tried["measured_ms"],
            "latency_ci_ms": tried["ci_ms"], "measurements": len(tries), "calm": tried["calm"],
            "measured_speed_up": dense_ms / tried["measured_ms"], "accuracy": 100 * float(right.mean()),
            "accuracy_ci": checks.wilson(int(right.sum()), len(right)), "drop": drop, "drop_ci": drop_ci,
            "right": accuracy.packed(right),
        }  # fmt: skip


def rebuilt(folder: Path, name: str) -> VisionTransformer:
    return artifact.rebuild(artifact.read_plan(folder / "plan.json"), folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
