"""Validate: latency and accuracy of the compiled artifact beside the dense model's, in the same runtime.

Writes `validation.json`: checks, latency, accuracy, and the raw samples in `validation.npz`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from edgeprune import artifact, checks, vit
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.data import Images
from edgeprune.errors import UsageError
from edgeprune.latency.statistics import latency_ms
from edgeprune.stages import baseline, choose, profile

BATCH = 64


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    document, table = profile.read_profile(read["profile"])
    planned = artifact.read_plan(read["finetune"] / "plan.json")
    compiled = artifact.read_json(read["compile"] / "compile.json")
    runtime = compiled["runtime"]
    anchor_ms = document["anchor_ms"][runtime]
    with choose.clock(request, runtime, table.threads) as clock:
        clock.load("dense", read["baseline"] / "dense.onnx")
        clock.load("pruned", read["compile"] / compiled["entry"])
        console.say(f"timing {runtime}, turn by turn with the dense model")
        measured = checks.measure(
            clock, "dense", "pruned", request.quantile, None if request.strict_clock else anchor_ms
        )
        images = dense.splits.evaluation
        accuracy = checks.accuracy(clock, "dense", "pruned", _arrays(images, dense.sizes.num_classes, console))
    anchor_ms, drift = checks.corrected(measured, anchor_ms, strict=request.strict_clock, console=console)
    gates = [checks.latency_check(measured, anchor_ms, planned.limit_ms, request.quantile)]
    if request.max_drop is not None:
        gates.append(checks.accuracy_check(accuracy, request.max_drop))
    for check in gates:
        console.say(f"{check.name}: {check.verdict} ({check.reason})")
    dense_latency = {key: document["anchor"][key] * anchor_ms / table.dense_ms for key in ("p50", "p90")}
    facts = {
        "runtime": runtime,
        "checks": [asdict(check) for check in gates],
        "dense": {"accuracy": accuracy.dense, "latency_ms": dense_latency, "params": _params(read), "macs": vit.macs(dense.sizes, dense.sizes.shape)},
        "pruned": {
            "accuracy": accuracy.pruned, "latency": latency_ms(measured, anchor_ms), "ratio": measured.ratio, "drift": drift,
            "params": vit.parameters(artifact.rebuild(planned, read["finetune"] / "model.safetensors")),
            "macs": vit.macs(dense.sizes, planned.plan.shape),
        },
        "accuracy": asdict(accuracy),
        "data": dense.splits.facts,
        "worker": clock.info,
    }  # fmt: skip
    (out / "validation.json").write_text(json.dumps(facts, indent=1))
    dense.splits.report(out, console)
    np.savez_compressed(out / "validation.npz", pruned=measured.samples_ms, dense=measured.anchor_ms)


def _params(read: Mapping[str, Path]) -> int:
    return int(artifact.read_json(read["baseline"] / "baseline.json")["params"])


def _arrays(images: Images, num_classes: int, console: Console) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with console.progress("evaluation", len(images), "images") as advance:
        for pixels, labels in images.batches(BATCH):
            if int(labels.max()) >= num_classes or int(labels.min()) < 0:
                raise UsageError(
                    f"the evaluation data has a label {int(labels.max())}, the model only {num_classes} classes"
                )
            yield pixels.numpy(), labels.numpy()
            advance(len(labels), "")
