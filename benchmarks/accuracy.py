"""Accuracy at equal measured latency: edgeprune against every method of `benchmarks/rivals`.

    python benchmarks/accuracy.py --model cifar10 --weights FILE --data-dir DIR       one-shot, all methods
    python benchmarks/accuracy.py ... --tune-steps 400 --methods edgeprune,ziplm      and after equal fine-tuning
    python benchmarks/accuracy.py --quick                                             all of it, small; two minutes
    python benchmarks/tables.py                                                       results -> table and plot

Every method is brought to the same measured latency: its model is exported, timed turn by turn with the dense one,
and the method is asked again until the two agree within 2 %. Then it is judged on all test images. Finished rows
are appended to the results file and skipped by the next run. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rivals
import torch
from numpy.typing import NDArray
from rivals import TOLERANCE, Rival, Shape, Task

from edgeprune import api, artifact, checks, config, pipeline, train, vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.data import Images, transform_config
from edgeprune.errors import Infeasible, UsageError
from edgeprune.latency import choose, device
from edgeprune.latency.clock import COPIES, Clock
from edgeprune.stages import baseline, export, profile, prune, simplify
from edgeprune.tuning.judge import divide
from edgeprune.tuning.loop import fit
from edgeprune.types import LatencyTable, Quiet, to_json

HERE = Path(__file__).parent
ATTEMPTS = 10  # models asked of a method for one row, of which `--measurements` may be new shapes
CHECKED = 32  # images on which the ONNX must agree with torch
BATCH = 500
SCREENING = 5  # every so manieth test image is enough to tell Torch-Pruning's variants apart

DEFAULT_METHODS = "edgeprune,ziplm,nvit,flap,vbp,random,magnitude,tp-*"
QUICK_METHODS = "edgeprune,ziplm,nvit,flap,vbp,random,magnitude"  # what needs no package of its own


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    with quick(options) if options.quick else full(options) as request:
        run(request, options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared(parser, model="cifar10", target="cpu-avx512", threads=1)
    parser.add_argument("--methods", help=f"names or patterns (default: {DEFAULT_METHODS}; quick: {QUICK_METHODS})")
    parser.add_argument("--speed-ups", help="(default: 1.5,2,3,4,5; quick: 1.5)")
    parser.add_argument(
        "--seeds", help="each draws the calibration images and everything random (default: 0,1; quick: 0)"
    )
    parser.add_argument("--tune-steps", type=int, default=0, help="also fine-tune each model for so many steps")
    parser.add_argument(
        "--sibling-minutes", type=float, default=0.0, help="to train each dense sibling; 0 = no sibling"
    )
    parser.add_argument(
        "--sibling-teacher", type=Path, help="network by teacher.py that taught the dense model, if one did"
    )
    parser.add_argument("--sibling-weights", type=Path, help="of one that reference.py has trained so long")
    parser.add_argument("--screen", type=int, default=0, help="measure only so many variants of Torch-Pruning; 0 = all")
    parser.add_argument("--measure-seconds", type=float, default=10.0, help="longest measurement of one shape")
    parser.add_argument("--measurements", type=int, default=6, help="of new shapes, at most, for one row")
    parser.add_argument("--label", default="", help="of the code that is judged (default: the git commit)")
    parser.add_argument("--results", type=Path, help="JSON lines (default: results/accuracy.jsonl; quick: quick.jsonl)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one speed-up, short measurements; for CI")
    options = parser.parse_args(argv)
    name = "quick" if options.quick else "accuracy"
    options.results = options.results or HERE / "results" / f"{name}.jsonl"
    options.methods = options.methods or (QUICK_METHODS if options.quick else DEFAULT_METHODS)
    options.speed_ups = options.speed_ups or ("1.5" if options.quick else "1.5,2,3,4,5")
    options.seeds = options.seeds or ("0" if options.quick else "0,1")
    options.speed_ups = [float(text) for text in options.speed_ups.split(",")]
    options.seeds = [int(text) for text in options.seeds.split(",")]
    options.label = options.label or commit()
    if min(options.speed_ups) <= 1:
        parser.error("--speed-ups must be above 1")
    if options.sibling_weights and len(options.speed_ups) * len(options.seeds) > 1:
        parser.error("--sibling-weights are of one model: give one of --speed-ups and one of --seeds")
    return options


def shared(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """What every benchmark of a card takes."""
    parser.add_argument("--model", help="card (default: %(default)s)")
    parser.add_argument("--weights", default="", help="of the dense model, instead of the card's")
    parser.add_argument("--data-dir", default="", help="folder of images with train/ and test/")
    parser.add_argument("--target", default="", help="(default: %(default)s)")
    parser.add_argument("--runtime", default="openvino", help="(default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, help="of the runtime; 0 = all; a shared machine disturbs 1 least (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=0, help="test images; 0 = all")
    parser.add_argument("--cache-dir", type=Path, default=pipeline.default_cache_dir())
    parser.set_defaults(**defaults)


def fitting() -> config.Target:
    """The shipped target that fits this machine."""
    return device.detect(config.load_target(name) for name in config.names("targets"))[0]


def commit() -> str:
    """The short hash of the code, with + where it was changed since."""
    found = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True)
    return found.stdout.decode().strip() or "unknown"


@contextmanager
def full(options: argparse.Namespace) -> Iterator[Request]:
    """What edgeprune is asked for, but for latency and seed."""
    request, _ = api.request(
        options.model, target=options.target, latency="2x", weights=options.weights or None,
        data_dir=options.data_dir, runtime=options.runtime, threads=options.threads, epochs=None,
    )  # fmt: skip
    yield request


#: Trained on the spot in seconds by `--quick`: 4 blocks, 96 wide, 65 tokens.
QUICK_CARD = """
description = "4 blocks, 96 wide, 32 pixels in patches of 4, on digits"
architecture = "vit_tiny_patch16_224"
num_classes = 10
weights = "quick.safetensors"
kwargs = { img_size = 32, patch_size = 4, embed_dim = 96, depth = 4, num_heads = 3 }
data = { name = "digits" }
transforms = { crop_pct = 1.0 }
calibration = { images = 128, batch_size = 32 }
finetune = { epochs = [1.0], batch_size = 32, learning_rate = 5e-4 }
train = { epochs = [8.0], batch_size = 32, learning_rate = 2e-3, label_weight = 1.0, logit_weight = 0.0, token_weight = 0.0 }
"""


@contextmanager
def quick(options: argparse.Namespace) -> Iterator[Request]:
    """A model small enough for CI, on whatever this machine is, and short measurements: it shows that all of it runs."""
    profile.TABLE_SECONDS, choose.RACE_SECONDS = 4.0, 2.0
    prune.MEASURE_SECONDS, prune.SEARCH_SECONDS, prune.ATTEMPTS = 1.0, 5.0, 3
    options.measure_seconds, options.measurements = 1.0, min(options.measurements, 2)
    target = fitting()
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        card = Path(folder) / "quick.toml"
        card.write_text(QUICK_CARD)
        train.train(str(card), out=card.with_suffix(".safetensors"))
        options.cache_dir = Path(folder) / "cache"
        request, _ = api.request(
            str(card), target=target.name, latency="2x", runtime=options.runtime, threads=options.threads
        )
        yield request


def run(request: Request, options: argparse.Namespace) -> None:
    """Every row that the results file does not have yet."""
    console = Console()
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    book = Book(options.results)
    methods = chosen(options.methods)
    with open_bench(request, options, console) as bench:
        worth = screen(bench, methods) if options.screen else {}
        for seed in options.seeds:
            task: Task | None = None
            for method in methods:
                speed_ups = [s for s in options.speed_ups if method in worth.get(s, methods)]
                wanted = [(speed_up, bench.keys(method, speed_up, seed)) for speed_up in speed_ups]
                if all(key in book.rows for _, keys in wanted for key in keys):
                    continue
                if task is None:
                    task = bench.task(seed)
                began = time.monotonic()
                rival = rivals.make(method)
                if getattr(rival, "trained", False) and not (options.sibling_minutes and options.tune_steps):
                    raise UsageError(f"'{method}' is trained from scratch: give --sibling-minutes and --tune-steps")
                rival.prepare(task)
                # what was kept from an earlier run still took its time
                prepared_s = getattr(rival, "seconds", None) or time.monotonic() - began
                for speed_up, keys in wanted:
                    for row in rows(bench, task, rival, speed_up, keys, book):
                        row["seconds"] = {"prepare": prepared_s, **row["seconds"]}
                        book.add(row)
                        show(row)


def chosen(patterns: str) -> list[str]:
    """Methods by name or pattern, in the order asked for. Raises UsageError for one that matches nothing."""
    names: list[str] = []
    for pattern in patterns.split(","):
        found = fnmatch.filter(rivals.makers(), pattern)
        if not found:
            raise UsageError(f"there is no method '{pattern}'; known: {', '.join(rivals.makers())}")
        names += [name for name in found if name not in names]
    return names


def screen(bench: Bench, methods: list[str]) -> dict[float, list[str]]:
    """The methods that are worth measuring at every speed-up: of Torch-Pruning's variants only the best `--screen`.

    Their models of the first seed are judged on some test images at the latency that the table predicts. What
    was found is kept beside the results, so that an interrupted run goes on with the same variants.
    """
    path = bench.options.results.with_suffix(".screen.json")
    found: dict[str, dict[str, float]] = artifact.read_json(path) if path.is_file() else {}
    variants = [method for method in methods if method.startswith("tp-")]
    task: Task | None = None
    worth = {}
    for name in variants:
        rival: Rival | None = None
        for speed_up in bench.options.speed_ups:
            scores = found.setdefault(f"{bench.weights[:12]} {speed_up:g}x {bench.options.label}", {})
            if name in scores:
                continue
            task = task or bench.task(bench.options.seeds[0])
            if rival is None:
                rival = rivals.make(name)
                rival.prepare(task)
            target_ms = bench.table.dense_ms / speed_up
            model = rival.model(target_ms, target_ms)
            slower = rivals.predict_ms(task, rivals.shape_of(model)) / target_ms - 1
            # what cannot reach the latency is worth less than anything that can
            scores[name] = 100 * float(bench.judge(model, SCREENING).mean()) - 100 * (slower > TOLERANCE)
            path.write_text(json.dumps(found, indent=1))
    for speed_up in bench.options.speed_ups:
        scores = found.get(f"{bench.weights[:12]} {speed_up:g}x {bench.options.label}", {})
        ranked = sorted(variants, key=lambda name: -scores[name])
        worth[speed_up] = [m for m in methods if m not in variants or m in ranked[: bench.options.screen]]
        print(f"{speed_up:g}x, screened: {', '.join(f'{name} {scores[name]:.1f}' for name in ranked)}", flush=True)
    return worth


# Results ------------------------------------------------------------------------------------

#: sha256 of the weights, method, speed-up, seed, tuned steps, label
Key = tuple[str, str, float, int, int, str]


class Book:
    """Rows as JSON lines; a row is written once it is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        artifact.must_be_writable(path, "--results", folder=False)
        for row in read(path):
            self.rows[key_of(row)] = row

    def add(self, row: dict[str, Any]) -> None:
        self.rows[key_of(row)] = row
        with self.path.open("a") as file:
            file.write(json.dumps(to_json(row)) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Raises UsageError for a line that is no row."""
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} has a damaged line ({error}); was a run interrupted? Remove that line") from error


def key_of(row: dict[str, Any]) -> Key:
    return row["weights"], row["method"], row["speed_up"], row["seed"], row["tune_steps"], row["label"]


def show(row: dict[str, Any]) -> None:
    seconds = sum(value for name, value in row["seconds"].items() if name != "prepare")
    print(
        f"{row['method']:24} {row['speed_up']:g}x seed {row['seed']} {row['tune_steps']:4} steps: {row['status']:11} "
        + (f"{row['measured_speed_up']:.3f}x {row['accuracy']:6.2f} % [{row['drop_ci'][0]:+.2f}, {row['drop_ci'][1]:+.2f}] lost, "
           if row["accuracy"] is not None else f"{row['reason']} ")
        + f"{row['seconds']['prepare']:.0f} s + {seconds:.0f} s", flush=True,
    )  # fmt: skip


# The bench ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """A shape beside the dense model, turn by turn."""

    ms: float
    ci_ms: tuple[float, float]  # 95 %
    rounds: int
    calm: bool


@dataclass
class Bench:
    """What all rows share: the dense model, the test images, the clock, the latency table."""

    request: Request
    options: argparse.Namespace
    weights: str  # sha256
    dense: baseline.Dense
    table: LatencyTable
    quiet: Quiet
    clock: Clock
    pixels: torch.Tensor  # [n, channels, height, width]
    labels: torch.Tensor  # [n]
    right: NDArray[np.bool_]  # [n], of the dense model
    timings: dict[tuple[int, Shape], Timing]  # by residual width and shape: all that latency depends on

    def keys(self, method: str, speed_up: float, seed: int) -> list[Key]:
        steps = [0, self.options.tune_steps] if self.options.tune_steps else [0]
        return [(self.weights, method, speed_up, seed, count, self.options.label) for count in steps]

    def task(self, seed: int) -> Task:
        """What methods are given for this seed: its calibration images, the one latency table."""
        request = replace(self.request, seed=seed)
        done = pipeline.run_stages(pipeline.PIPELINE[:1], request, self.options.cache_dir)
        dense = baseline.load(request, done["baseline"].folder)
        return Task(request, dense.model, dense.sizes, dense.splits, self.table, self.options.cache_dir)

    def judge(self, model: VisionTransformer, every: int = 1) -> NDArray[np.bool_]:
        """Which test images, or every so manieth of them, the model names rightly `[n]`."""
        return judge(model, self.pixels[::every], self.labels[::every])

    def time(self, model: VisionTransformer) -> Timing:
        """Export, check against torch, and time turn by turn with the dense model; once per shape."""
        at = (model.embed_dim, rivals.shape_of(model))
        if at not in self.timings:
            with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
                exported, path = Path(folder) / "exported.onnx", Path(folder) / "candidate.onnx"
                export.to_onnx(model, self.dense.sizes.image, exported)
                simplify.simplify(exported, path)
                export.compare(model, path, self.pixels[:CHECKED])
                self.clock.load("candidate", path, COPIES)
            measured = self.clock.measure(
                ["candidate"], "dense", ci=0.005, min_rounds=60, budget_s=self.options.measure_seconds, quiet=self.quiet
            )["candidate"]
            self.clock.unload("candidate")
            low, high = measured.ratio_ci
            self.timings[at] = Timing(
                self.quiet.ms * measured.ratio, (self.quiet.ms * low, self.quiet.ms * high),
                len(measured.samples_ms), measured.calm,
            )  # fmt: skip
        return self.timings[at]


@contextmanager
def open_bench(request: Request, options: argparse.Namespace, console: Console) -> Iterator[Bench]:
    """The dense model and the latency table, made by the product's stages for seed 0; test images; the clock."""
    done = pipeline.run_stages(pipeline.PIPELINE[:2], replace(request, seed=0), options.cache_dir, console=console)
    recorded = done["profile"].folder / "profile.json"
    document, table = profile.read_profile(done["profile"].folder)
    dense = baseline.load(replace(request, seed=0), done["baseline"].folder)
    images = spaced(dense.splits.evaluation, options.images)
    pixels, labels = (torch.cat(part) for part in zip(*images.batches(BATCH), strict=True))
    with choose.clock(request.conditions, table.runtime, table.threads) as clock:
        clock.load("dense", done["baseline"].folder / "dense.onnx", COPIES)
        bench = Bench(
            replace(request, profile=recorded), options, artifact.sha256(done["baseline"].folder / "dense.safetensors"),
            dense, table, Quiet.of(document, table.runtime), clock, pixels, labels, np.empty(0, dtype=bool), {},
        )  # fmt: skip
        bench.right = bench.judge(dense.model)
        print(f"dense: {100 * bench.right.mean():.2f} % on {len(labels)} test images, {table.dense_ms:.3f} ms in {table.runtime} "
              f"on {device.cpu_model()}; label {options.label}", flush=True)  # fmt: skip
        yield bench


def spaced(images: Images, count: int) -> Images:
    """So many of the images, evenly spaced, as folders hold one class after another; 0 = all."""
    if not 0 < count < len(images):
        return images
    return Images(images.source, images.indices[:: -(-len(images) // count)], images.transform, images.what)


@torch.inference_mode()
def judge(model: VisionTransformer, pixels: torch.Tensor, labels: torch.Tensor) -> NDArray[np.bool_]:
    """Which images `[n, channels, height, width]` the model names rightly `[n]`."""
    batches = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([model(x).argmax(-1) == y for x, y in batches]).numpy()


# A row --------------------------------------------------------------------------------------


@dataclass
class Found:
    """A method's model at a speed-up."""

    model: VisionTransformer
    aim_ms: float  # what the method was asked for in the end
    timing: Timing
    measurements: int


def rows(
    bench: Bench, task: Task, rival: Rival, speed_up: float, keys: list[Key], book: Book
) -> Iterator[dict[str, Any]]:
    """The missing rows of one method at one speed-up: one-shot, then tuned."""
    target_ms = bench.table.dense_ms / speed_up
    if all(key in book.rows for key in keys):
        return
    known = book.rows.get(keys[0])
    if known and known["status"] == "no one-shot":
        known = None
    began = time.monotonic()
    seconds: dict[str, float] = {}
    common = {
        "model": bench.request.card.name, "target": bench.request.target.name, "runtime": bench.table.runtime,
        "machine": machine(bench.table), "when": time.strftime("%Y-%m-%d %H:%M"),
        "target_ms": target_ms, "dense_ms": bench.table.dense_ms, "dense_accuracy": 100 * float(bench.right.mean()),
        "images": len(bench.right), "dense_right": packed(bench.right),
    }  # fmt: skip
    try:
        found = (again(rival, known, target_ms) if known else None) or hit(bench, rival, target_ms)
    except Infeasible as error:
        for key in keys:
            if key not in book.rows:
                yield described(key, common, "unreachable", str(error), {"search": time.monotonic() - began})
        return
    seconds["search"] = time.monotonic() - began
    status, reason = verdict(found.timing.ms, target_ms)
    scratch = getattr(rival, "trained", False)
    for key in keys:
        if key in book.rows:
            continue
        if scratch and not key[4]:
            seconds_so_far = dict(seconds)
            yield described(key, common, "no one-shot", "a sibling is nothing before it is trained", seconds_so_far)
            continue
        if key[4]:
            began = time.monotonic()
            if scratch:
                given = bench.options
                rival.train(found.model, given.sibling_minutes, given.sibling_teacher, given.sibling_weights)
            else:
                tune(task, found.model, key[4])
            seconds["tune"] = 60 * bench.options.sibling_minutes if scratch else time.monotonic() - began
        began = time.monotonic()
        right = bench.judge(found.model)
        seconds["judge"] = time.monotonic() - began
        yield {**described(key, common, status, reason, dict(seconds)), **judged(bench, found, right)}


def hit(bench: Bench, rival: Rival, target_ms: float) -> Found:
    """Ask, measure and ask again until the measurement is within the tolerance of the target.

    Else the slowest model within it; else the fastest there is. Raises Infeasible when the method has no model.
    """
    aim, low, high = target_ms, 0.0, math.inf  # low: known to be met, high: known to be too slow
    tries: list[Found] = []
    before = len(bench.timings)
    for _ in range(ATTEMPTS):
        model = rival.model(aim, target_ms)
        timing = bench.time(model)
        tries.append(Found(model, aim, timing, len(bench.timings) - before))
        if abs(timing.ms / target_ms - 1) <= TOLERANCE or tries[-1].measurements >= bench.options.measurements:
            break
        low, high = (aim, high) if timing.ms < target_ms else (low, aim)
        rescaled = aim * target_ms / timing.ms
        if low < rescaled < high:
            aim = rescaled
        elif math.isfinite(high):
            aim = (low + high) / 2
        else:
            aim = 1.1 * low
    return best(tries, target_ms)


def best(tries: list[Found], target_ms: float) -> Found:
    """The closest within the tolerance; else the slowest that meets the target; else the fastest."""
    close = [one for one in tries if abs(one.timing.ms / target_ms - 1) <= TOLERANCE]
    if close:
        return min(close, key=lambda one: abs(one.timing.ms - target_ms))
    met = [one for one in tries if one.timing.ms <= target_ms]
    return max(met, key=lambda one: one.timing.ms) if met else min(tries, key=lambda one: one.timing.ms)


def verdict(ms: float, target_ms: float) -> tuple[str, str]:
    """Status and reason: within the tolerance, faster than asked, or slower."""
    if abs(ms / target_ms - 1) <= TOLERANCE:
        return "ok", ""
    if ms < target_ms:
        return "coarse", f"no shape was found between {ms:.3f} ms and the target of {target_ms:.3f} ms"
    return "unreachable", f"the fastest model takes {ms:.3f} ms, the target is {target_ms:.3f} ms"


def again(rival: Rival, row: dict[str, Any], target_ms: float) -> Found | None:
    """The model of a finished one-shot row, made again without measuring; None, and says so, where it comes out otherwise.

    Raises Infeasible where there was none.
    """
    if row["plan"] is None:
        raise Infeasible(row["reason"])
    model = rival.model(row["aim_ms"], target_ms)
    if row["target_ms"] != target_ms or to_json(rivals.shape_of(model)) != row["plan"]:
        print(
            f"{row['method']} {row['speed_up']:g}x: the profile or the method is not that of the one-shot row; measured afresh"
        )
        return None
    timing = Timing(row["latency_ms"], row["latency_ci_ms"], row["rounds"], row["calm"])
    return Found(model, row["aim_ms"], timing, row["measurements"])


def tune(task: Task, model: VisionTransformer, steps: int) -> None:
    """The card's recipe for so many steps, taught by the dense model and judged along the way as in a build."""
    recipe, (check, images) = task.request.card.finetune, divide(task.splits.train)
    epochs = steps / math.ceil(len(images) / recipe.batch_size)
    recipe = replace(recipe, epochs=(epochs,), sizes=())
    transforms = transform_config(task.request.card, task.model)
    fit(model, images, recipe, transforms, teacher=task.model, check=check, seed=task.seed)


def machine(table: LatencyTable) -> str:
    return f"{device.cpu_model()}, {table.threads} thread{'s' if table.threads > 1 else ''}"


def described(key: Key, common: dict[str, Any], status: str, reason: str, seconds: dict[str, float]) -> dict[str, Any]:
    """A row without a model."""
    names = ("weights", "method", "speed_up", "seed", "tune_steps", "label")
    empty = dict.fromkeys(("plan", "accuracy", "accuracy_ci", "drop", "drop_ci", "latency_ms", "measured_speed_up"))
    return {
        **dict(zip(names, key, strict=True)),
        "status": status,
        "reason": reason,
        **common,
        **empty,
        "seconds": seconds,
    }


def judged(bench: Bench, found: Found, right: NDArray[np.bool_]) -> dict[str, Any]:
    """What a row says of its model."""
    drop, drop_ci = paired(bench.right, right)
    return {
        "plan": rivals.shape_of(found.model), "width": found.model.embed_dim,
        "params": vit.parameters(found.model), "aim_ms": found.aim_ms,
        "latency_ms": found.timing.ms, "latency_ci_ms": found.timing.ci_ms, "rounds": found.timing.rounds,
        "calm": found.timing.calm, "measured_speed_up": bench.table.dense_ms / found.timing.ms,
        "measurements": found.measurements, "accuracy": 100 * float(right.mean()),
        "accuracy_ci": checks.wilson(int(right.sum()), len(right)), "drop": drop, "drop_ci": drop_ci,
        "right": packed(right),
    }  # fmt: skip


def paired(dense: NDArray[np.bool_], pruned: NDArray[np.bool_]) -> tuple[float, tuple[float, float]]:
    """Points lost on the same images, with their 95 % interval. Both `[n]`."""
    drops = dense.astype(float) - pruned
    low, high = checks.drop_interval(drops)
    return 100 * float(drops.mean()), (100 * low, 100 * high)


def packed(right: NDArray[np.bool_]) -> str:
    """One bit per test image, so that any two rows can be compared on the same images."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(text: str, images: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=images)
    return bits.astype(bool)


if __name__ == "__main__":
    main()
