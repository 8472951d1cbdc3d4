"""Does the latency contract hold? Four experiments on the digits model; each prints a table.

    python benchmarks/contract.py repeat|predict|solve|trials [--runtime NAME] [--target NAME] [--count N] [--out DIR]

repeat   the same device profile taken `count` times (default 3): seconds, and how far its ratios differ.
predict  held-out random plans (default 20): what the table predicts against the assembled model.
solve    limits from 1.3x to 5x (default 20): the plan that the search settles on, as it measured it, and as a
         fresh worker measures it again.
trials   `edgeprune validate` (default 20 times) of one artifact while another process burns one core half of the
         time, with limits 10 % away on both sides, which must be decided rightly, and limits within 3 %, where
         nothing but a wrong pass or a wrong fail is wrong. The truth is a long measurement without that load.

Stages that are done are taken from the cache ($EDGEPRUNE_CACHE_DIR). Raw results go to DIR as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from clock import LOAD

from edgeprune import api, artifact, checks, pipeline, recheck
from edgeprune.config import Request
from edgeprune.console import SILENT, Console
from edgeprune.latency import choose, device
from edgeprune.latency.clock import COPIES
from edgeprune.stages import baseline, calibrate, profile, prune
from edgeprune.types import Latency, Quiet, to_json

COUNTS = {"repeat": 3, "predict": 20, "solve": 20, "trials": 20}
#: Limits of `trials` as shares of the true latency; the verdicts that are right there.
LIMITS = {0.9: {"fail"}, 1.1: {"pass"}, 0.97: {"fail", "inconclusive"}, 1.03: {"pass", "inconclusive"}}
TRUTH_SECONDS, TRUTH_ROUNDS = 120.0, 500


def main() -> None:
    options = parse()
    request, _ = api.request(
        options.model, target=options.target, latency="2x", runtime=options.runtime, epochs=0, threads=options.threads
    )
    cache = pipeline.default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{options.experiment}: {options.model}, target {options.target}, {options.runtime or 'fastest runtime'} on {device.cpu_model()}, "
          f"{device.affinity()} CPUs, {time.strftime('%d %B %Y %H:%M')}", flush=True)  # fmt: skip
    results = EXPERIMENTS[options.experiment](request, cache, options)
    path = options.out / f"{options.experiment}-{options.runtime or 'fastest'}.json"
    path.write_text(json.dumps(to_json(results), indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(COUNTS))
    parser.add_argument("--model", default="digits")
    parser.add_argument("--target", default="cpu-avx512")
    parser.add_argument("--runtime", default="")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("contract"))
    options = parser.parse_args()
    options.count = options.count or COUNTS[options.experiment]
    return options


def repeat(request: Request, cache: Path, options: argparse.Namespace) -> Any:
    """The profile stage again and again; they share the dense model and what is remembered of the quiet device."""
    done = pipeline.run_stages(pipeline.PIPELINE[:1], request, cache, console=SILENT)
    stage, found = pipeline.PIPELINE[1], []
    for i in range(options.count):
        began = time.monotonic()
        made = pipeline.run_stage(stage, request, f"repeat{i}-{options.runtime}", done, cache, True, "", SILENT)
        document, table = profile.read_profile(made.folder)
        shutil.copytree(made.folder, options.out / f"repeat{i}-{options.runtime}", dirs_exist_ok=True)
        found.append({name: entry["ratio"] for name, entry in document["ratios"].items()})
        print(
            f"profile {i}: {time.monotonic() - began:.0f} s, dense {table.dense_ms:.3f} ms, {table.samples} rounds per entry",
            flush=True,
        )
    ratios = np.array([list(entry.values()) for entry in found])
    spread = ratios.max(axis=0) / ratios.min(axis=0) - 1
    worst = list(found[0])[int(spread.argmax())]
    print(f"{len(spread)} ratios: spread (largest / smallest - 1) median {np.median(spread):.2%}, 90 % within "
          f"{np.quantile(spread, 0.9):.2%}, at most {spread.max():.2%} ({worst})")  # fmt: skip
    return found


def predict(request: Request, cache: Path, options: argparse.Namespace) -> Any:
    stages = [stage for stage in pipeline.PROFILING if stage.name != "survey"]
    done = pipeline.run_stages(stages, replace(request, check=options.count), cache, console=Console())
    facts = json.loads((done["check"].folder / "check.json").read_text())
    for plan in facts["plans"]:
        print(f"{plan['predicted_ms']:7.3f} ms predicted {plan['measured_ms']:7.3f} measured {plan['error']:+6.1%}")
    print(
        f"median {facts['median']:.2%}, 90 % within {facts['p90']:.2%}, at most {facts['max']:.2%}, {facts['rounds']} rounds"
    )
    return facts


def solve(request: Request, cache: Path, options: argparse.Namespace) -> Any:
    """The search of the prune stage at every limit; nothing is re-fitted or tuned: latency depends on shapes alone."""
    done = pipeline.run_stages(pipeline.PIPELINE[:3], request, cache, console=SILENT)
    dense = baseline.load(request, done["baseline"].folder)
    anchor = done["baseline"].folder / "dense.onnx"
    document, table = profile.read_profile(done["profile"].folder)
    quiet = Quiet.of(document, table.runtime)
    found = calibrate.read(done["calibrate"].folder, dense, request.card.calibration.batch_size)
    unsearched = replace(request, search_seconds=0)
    planner = prune.Planner(unsearched, table, found, dense.model, dense.sizes.shape, dense.model, SILENT)
    rows = []
    for speed_up in np.geomspace(1.3, 5, options.count):
        limit = table.dense_ms / speed_up
        one = replace(request, latency=Latency(f"{speed_up:.2f}x", fraction=1 / speed_up))
        began = time.monotonic()
        plan, predicted, tries = prune.search(one, dense, anchor, table, quiet, planner, limit, SILENT)
        seconds = time.monotonic() - began
        measured = next(t["measured_ms"] for t in tries if t["shape"] == plan.shape)
        with choose.clock(one.conditions, table.runtime, table.threads) as clock:
            clock.load("dense", anchor, COPIES)
            again, ci, _ = prune.measure(clock, dense, plan, one, quiet)
        rows.append({"speed_up": speed_up, "limit": limit, "predicted": predicted, "tries": len(tries),
                     "measured": measured, "again": again, "again_ci": ci, "seconds": seconds})  # fmt: skip
        print(f"{speed_up:5.2f}x limit {limit:6.3f} ms: predicted {predicted / limit:6.1%}, measured {measured / limit:6.1%}, "
              f"measured again {again / limit:6.1%} [{ci[0] / limit:.1%}, {ci[1] / limit:.1%}], "
              f"{len(tries)} tries, {seconds:.0f} s", flush=True)  # fmt: skip
    for name in ("measured", "again"):
        shares = np.array([row[name] / row["limit"] for row in rows])
        print(
            f"{name}: within the limit {np.sum(shares <= 1)} of {len(shares)}, above 95 % of it {np.sum(shares > 0.95)}"
        )
    return rows


def trials(request: Request, cache: Path, options: argparse.Namespace) -> Any:
    built = pipeline.build(request, [request.latency], out=options.out, cache_dir=cache)[0]
    truth = true_latency(built.folder)
    print(f"the artifact takes {truth:.3f} ms (long measurement without load)", flush=True)
    shares = [share for _ in range(options.count) for share in LIMITS][: options.count]
    rows = []
    with burning(0.5):
        for share in shares:
            document = json.loads((built.folder / "manifest.json").read_text())
            document["request"]["latency_ms"] = truth * share
            folder = options.out / "trial"
            shutil.copytree(built.folder, folder, dirs_exist_ok=True)
            artifact.write_manifest(folder, document)
            began = time.monotonic()
            found = recheck.validate_artifact(folder)
            check = found["checks"][0]
            right = check["verdict"] in LIMITS[share]
            rows.append({"limit_share": share, "right": right, "seconds": time.monotonic() - began, **check})
            print(f"limit {share:.0%} of the truth: {check['verdict']:12} {'right' if right else 'WRONG'}, "
                  f"{rows[-1]['seconds']:.0f} s; {check['reason']}", flush=True)  # fmt: skip
    print(f"right: {sum(row['right'] for row in rows)} of {len(rows)}")
    return rows


def true_latency(folder: Path) -> float:
    """The artifact's p50 in milliseconds, from at least `TRUTH_ROUNDS` calm rounds."""
    usual = checks.SECONDS, checks.MIN_ROUNDS
    checks.SECONDS, checks.MIN_ROUNDS = TRUTH_SECONDS, dict.fromkeys(checks.MIN_ROUNDS, TRUTH_ROUNDS)
    try:
        found = recheck.validate_artifact(folder)
    finally:
        checks.SECONDS, checks.MIN_ROUNDS = usual
    if found["latency"]["samples"] < TRUTH_ROUNDS:
        raise SystemExit(
            f"the machine was not quiet for {TRUTH_ROUNDS} rounds: there is no truth to compare with; try later"
        )
    return float(found["latency"]["p50"])


@contextlib.contextmanager
def burning(share: float) -> Iterator[None]:
    """Another process burns `share` of one core, wherever the scheduler puts it."""
    load = subprocess.Popen([sys.executable, "-c", LOAD, str(share)], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        load.kill()
        load.communicate()


EXPERIMENTS = {"repeat": repeat, "predict": predict, "solve": solve, "trials": trials}

if __name__ == "__main__":
    main()
