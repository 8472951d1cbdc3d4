"""Validate: latency and accuracy of the compiled artifact beside the dense model's, in the same runtime.

Writes `validation.json`: checks, latency, accuracy; the raw samples in `validation.npz`; what both models said of
every image in `answers.npz`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import artifact, checks, inspection, neighbours, vit
from edgeprune.config import FEATURES, Request
from edgeprune.console import Console
from edgeprune.data import Images
from edgeprune.errors import UsageError
from edgeprune.latency import choose, device, devices
from edgeprune.latency.clock import COPIES, Clock
from edgeprune.latency.statistics import MIN_SAMPLES, latency_ms
from edgeprune.stages import baseline, profile
from edgeprune.types import Check, FloatArray, Quiet

BATCH = 64
LITTLE = 0.1  # nats: a model that diverges less does not lose most of its accuracy by it


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    document, table = profile.read_profile(read["profile"])
    planned = artifact.read_plan(read["finetune"] / "plan.json")
    compiled = artifact.read_json(read["compile"] / "compile.json")
    runtime = compiled["runtime"]
    here = devices.machine(request.device).same(document)
    files = {"dense": read["baseline"] / "dense.onnx", "pruned": read["compile"] / compiled["entry"]}
    apart = not here or (request.device and request.accuracy_on == "build")  # judged by another worker than timed
    with contextlib.ExitStack() as stack:
        if here:
            clock = stack.enter_context(choose.clock(request.conditions, runtime, table.threads, console))
            clock.load("dense", files["dense"], COPIES)
            clock.load("pruned", files["pruned"], COPIES)
            timed = time_it(clock, request, document, planned, console)
            worker = clock.info
        else:
            timed = predict_it(request, document, planned)
        if apart:
            stack.close()  # others may measure on the device meanwhile
            if request.device:
                console.say("accuracy is judged on this machine; --accuracy-on device judges it there")
            clock = stack.enter_context(accuracy_clock(request, runtime, table.threads))
            for name, path in files.items():
                clock.load(name, path)
            worker = worker if here else clock.info
        classes, judge = dense.sizes.num_classes, None
        answering: neighbours.Predictor = clock
        if request.card.task == FEATURES:
            answering = judge = judged_by_neighbours(clock, request, dense, out, console)
            classes = judge.references["pruned"].classes
        parts = dense.splits.domains or {"": dense.splits.evaluation}
        said = {
            name: inspection.predictions(answering, "dense", "pruned", _arrays(dense.served(images), classes, console))
            for name, images in parts.items()
        }
    inspection.save(said, out / "answers.npz")
    answers = {name: own.answers for name, own in said.items()}
    held_out = request.card.data.held_out_domain or None
    accuracy = checks.summary(*(own for name, own in answers.items() if name != held_out))
    domains = [checks.domain_facts(name, own, held_out=name == held_out) for name, own in answers.items() if held_out]
    if checks.collapsed(accuracy, classes):
        console.warn(why_collapsed(accuracy, read["finetune"], planned.limit_ms / table.dense_ms))
    gates = [timed.check]
    if request.max_drop is not None:
        gates.append(checks.accuracy_check(accuracy, request.max_drop))
    for check in gates:
        console.say(f"{check.name}: {check.verdict} ({check.reason})")
    embedded = features_facts(judge, said) if judge is not None else {}
    if embedded:
        cosine = embedded["cosine"]
        console.say(f"cosine similarity to the dense embeddings: {cosine['mean']:.4f} on average, below {cosine['p1']:.4f} for 1 % of the images; "
                    f"accuracy is that of {embedded['neighbours']} nearest neighbours among {embedded['reference']} reference images")  # fmt: skip
    for found in domains:
        console.say(f"domain '{found['name']}'{', held out' * found['held_out']}: {found['dense']:.2f} % dense, "
                    f"{found['pruned']:.2f} % pruned on {found['images']} images")  # fmt: skip
    anchor = document["anchor"]
    dense_latency = {
        key: anchor[key] * timed.anchor_ms / table.dense_ms if anchor["samples"] >= MIN_SAMPLES.get(key, 0) else None
        for key in ("p50", "p90")
    }
    facts = {
        "runtime": runtime,
        "measured": here,
        "checks": [asdict(check) for check in gates],
        "dense": {"accuracy": accuracy.dense, "latency_ms": dense_latency, "params": _params(read), "macs": vit.macs(dense.sizes, dense.sizes.shape)},
        "pruned": {
            "accuracy": accuracy.pruned, "latency": timed.latency, "ratio": timed.ratio, "drift": timed.drift,
            "params": vit.parameters(artifact.rebuild(planned, read["finetune"] / "model.safetensors")),
            "macs": vit.macs(dense.sizes, planned.plan.shape),
        },
        "accuracy": asdict(accuracy),
        "data": dense.splits.facts,
        **({"domains": domains} if domains else {}),
        **({"features": embedded} if embedded else {}),
        "worker": worker,
    }  # fmt: skip
    (out / "validation.json").write_text(json.dumps(facts, indent=1))
    dense.splits.report(out, console)
    np.savez_compressed(out / "validation.npz", pruned=timed.samples_ms[0], dense=timed.samples_ms[1])


def decided(folder: Path) -> bool:
    """Whether the stage came to a verdict on all that it measured; what was predicted stays so."""
    found = artifact.read_json(folder / "validation.json")
    return not found["measured"] or all(check["verdict"] != "inconclusive" for check in found["checks"])


def judged_by_neighbours(
    clock: Clock, request: Request, dense: baseline.Dense, out: Path, console: Console
) -> neighbours.Judge:
    """The loaded embedding models as classifiers, by labelled training images; these are written to `out`."""
    asked, images = request.card.features, dense.splits.train.take(request.card.features.reference)
    classes = len(dense.splits.classes) or 1 + int(
        max(_labels(part).max() for part in (images, dense.splits.evaluation))
    )
    with console.progress("reference", len(images), "images") as advance:

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for pixels, labels in dense.served(images).batches(BATCH):
                yield pixels.numpy(), labels.numpy()
                advance(len(labels), "")

        found = neighbours.refer(clock, inspection.MODELS, batches(), asked.neighbours, classes)
    for name, reference in found.items():
        neighbours.save(reference, out / f"{name}-{neighbours.FILE}")
    return neighbours.Judge(clock, found)


def _labels(images: Images) -> NDArray[np.int64]:
    """`[n]`; read with the images where the data set lists none."""
    listed = images.listed_labels()
    return listed if listed is not None else np.concatenate([labels.numpy() for _, labels in images.batches(BATCH)])


def features_facts(judge: neighbours.Judge, said: Mapping[str, inspection.Predictions]) -> dict[str, Any]:
    """How near the pruned model's embeddings of the evaluation images are to the dense one's, and who can search for whom."""
    dense, pruned = (judge.embeddings(name) for name in inspection.MODELS)
    labels = np.concatenate([own.labels for own in said.values()])
    cosines = (dense * pruned).sum(-1) / np.maximum(
        np.linalg.norm(dense, axis=-1) * np.linalg.norm(pruned, axis=-1), 1e-12
    )
    index = judge.references["dense"]
    return {
        "dimensions": dense.shape[1],
        "classes": index.classes,
        "neighbours": index.neighbours,
        "reference": len(index.labels),
        "cosine": {
            "mean": float(cosines.mean()),
            "p1": float(np.quantile(cosines, 0.01)),
            "least": float(cosines.min()),
        },
        "in_dense_index": 100 * float((index.logits(pruned).argmax(-1) == labels).mean()),
    }


def why_collapsed(accuracy: checks.Accuracy, tuned: Path, share: float) -> str:
    """In words: how far accuracy fell, and which stage it fell in, as the divergence along the way tells."""
    facts = artifact.read_json(tuned / "finetune.json")
    before, after, steps = facts["divergence_before"], facts["divergence_after"], len(facts["losses"])
    fell = f"accuracy has collapsed from {accuracy.dense:.2f} % to {accuracy.pruned:.2f} %"
    if after < LITTLE * facts["scale"]:
        return (
            f"{fell}, though the torch model diverges from the dense one by {after:.4f} nats only: the cause is the export "
            "or the runtime, or evaluation images unlike the training ones; this is worth a report"
        )
    tuning = f"{steps} steps of tuning brought it to {after:.2f}" if steps else "nothing was tuned"
    return (
        f"{fell}: at {share:.0%} of the dense latency pruning left a divergence of {before:.2f} nats, and {tuning}; "
        "ask for a milder latency, give more --epochs, or prune in steps with --gradual"
    )


@dataclass(frozen=True)
class Timed:
    """The artifact's latency, measured here or predicted for a device that is not."""

    check: Check
    latency: dict[str, Any]  # as statistics.latency_ms has it; None for what was not measured
    ratio: float  # to the dense model
    drift: float | None
    anchor_ms: float
    samples_ms: FloatArray  # [2, all rounds]: artifact and dense model


def time_it(
    clock: Clock, request: Request, document: Mapping[str, Any], planned: artifact.PlannedModel, console: Console
) -> Timed:
    """Time the loaded `pruned` turn by turn with the loaded `dense`."""
    profiled_ms = document["anchor_ms"][clock.runtime]
    console.say(f"timing {clock.runtime}, turn by turn with the dense model")
    anchor_ms = None if request.strict_clock else profiled_ms
    check = functools.partial(
        checks.latency_check, anchor_ms=anchor_ms, limit_ms=planned.limit_ms, quantile=request.quantile
    )
    quiet = Quiet.of(document, clock.runtime)
    measured = checks.measure(
        clock, "dense", "pruned", request.quantile, quiet, check, strict=request.strict_clock, console=console
    )
    drift = checks.drift(measured, profiled_ms, strict=request.strict_clock, console=console)
    now = float(np.median(measured.anchor_ms))
    return Timed(
        check(measured), latency_ms(measured, anchor_ms), measured.ratio, drift, anchor_ms or now, measured.raw_ms
    )


def predict_it(request: Request, document: Mapping[str, Any], planned: artifact.PlannedModel) -> Timed:
    """What the recorded profile of another device predicts; never more than inconclusive."""
    dense_ms = document["table"]["dense_ms"]
    reason = (
        f"predicted {planned.predicted_ms:.2f} ms, not validated: the profile is of {document['device']['cpu']}; "
        "run `edgeprune validate` there"
    )
    check = Check(f"latency {request.quantile}", None, planned.limit_ms, "inconclusive", reason)
    latency = {"p50": None, "p90": None, "p99": None, "ci": None, "samples": 0}
    return Timed(check, latency, planned.predicted_ms / dense_ms, None, dense_ms, np.empty((2, 0)))


def accuracy_clock(request: Request, runtime: str, threads: int) -> Clock:
    """A worker that only answers: as many threads as there are here, no instruction set cap."""
    count, _ = device.usable_threads(threads)
    return Clock(runtime, precision=request.precision, threads=count, seed=request.seed)


def _params(read: Mapping[str, Path]) -> int:
    return int(artifact.read_json(read["baseline"] / "baseline.json")["params"])


def _arrays(images: Images, num_classes: int, console: Console) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of places, pixels and labels."""
    with console.progress("evaluation", len(images), "images") as advance:
        for places, (pixels, labels) in images.placed(np.arange(len(images)), BATCH):
            if int(labels.max()) >= num_classes or int(labels.min()) < 0:
                raise UsageError(
                    f"the evaluation data has a label {int(labels.max())}, the model only {num_classes} classes"
                )
            yield places, pixels.numpy(), labels.numpy()
            advance(len(labels), "")
