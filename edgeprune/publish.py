"""Publish: the finished stages become an artifact directory, whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import artifact, cache, checks, intake, methods, neighbours, provenance, report
from edgeprune.config import Request
from edgeprune.console import SILENT, Console
from edgeprune.errors import EdgepruneError
from edgeprune.latency import parcel, table
from edgeprune.report import changes, page
from edgeprune.types import INT8, Check, Form

if TYPE_CHECKING:
    from edgeprune.pipeline import Done


@dataclass(frozen=True)
class Artifact:
    """A finished artifact directory with its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def checks(self) -> list[Check]:
        return [Check(**check) for check in self.manifest["checks"]]

    @property
    def exit_code(self) -> int:
        return checks.exit_code(self.checks)


def artifact_name(request: Request) -> str:
    """<model>-<target>-<latency>, and the method where it is not the default; safe as a folder name."""
    latency = request.latency.text.replace("%", "pct")
    method = "" if request.method == methods.DEFAULT else f"-{request.method}"
    return f"{request.card.name}-{request.target.name}-{latency}{method}"


def point(request: Request, stages: Mapping[str, Done]) -> dict[str, Any]:
    """One artifact as a point between latency and accuracy: name, verdict, ms (None = only predicted), ci, percent."""
    facts = artifact.read_json(stages["validate"].folder / "validation.json")
    latency = facts["pruned"]["latency"]
    return {
        "name": artifact_name(request),
        "predicted_ms": artifact.read_plan(stages["finetune"].folder / "plan.json").predicted_ms,
        "ms": latency["p50"],
        "ci": latency["ci"],
        "accuracy": facts["pruned"]["accuracy"],
        "verdict": report.word(facts["checks"]),
    }


def publish(
    request: Request,
    done: Sequence[Done],
    folder: Path,
    environment: dict[str, Any],
    family: Sequence[dict[str, Any]] = (),
    console: Console = SILENT,
) -> Artifact:
    """Write the artifact directory beside its place and rename it; an unchanged one is left alone. Raises OSError.

    family: the `point` of every artifact of this build, for the report.
    """
    stages = {entry.name: entry for entry in done}
    siblings = [artifact.read_manifest(sibling) for sibling in request.siblings]
    drawn = [list(family), [sibling["key"] for sibling in siblings]]
    parts = [entry.digest for entry in done] + [json.dumps(drawn, sort_keys=True)]
    key = hashlib.sha256("".join(parts).encode()).hexdigest()
    if (existing := _unchanged(folder, key, console)) is not None:
        return existing

    def waiting() -> None:
        console.say(f"another build writes '{folder}'; waiting for it")

    with cache.working(folder.parent / f".{folder.name}", waiting) as work:
        for stage, names in (("finetune", ("plan.json", "model.safetensors")), ("profile", ("profile.json",))):
            for name in names:
                shutil.copyfile(stages[stage].folder / name, work / name)
        if (learnt := stages["finetune"].folder / artifact.ADAPTERS).is_file():
            shutil.copyfile(learnt, work / learnt.name)
        if (reference := stages["validate"].folder / f"pruned-{neighbours.FILE}").is_file():
            shutil.copyfile(reference, work / neighbours.FILE)
        for path in stages["compile"].folder.iterdir():
            if path.name.startswith("model."):
                shutil.copyfile(path, work / path.name)
        write_anchor(stages["baseline"].folder / "dense.onnx", work / "anchor.onnx.gz")
        manifest = make_manifest(request, stages, work, key, environment)
        manifest["files"] = _files(work)
        (work / "report.md").write_text(report.markdown(manifest), encoding="utf-8")
        facts = {
            "schema": page.SCHEMA,
            **artifact.read_json(stages["inspect"].folder / "inspection.json"),
            "survey": artifact.read_json(stages["roofline"].folder / "survey.json") if "roofline" in stages else None,
            "family": list(family),
            "siblings": [page.dense_point(sibling) for sibling in siblings],
            "siblings_notes": changes.comparable([manifest, *siblings]),
        }
        (work / page.FACTS).write_text(json.dumps(facts), encoding="utf-8")
        (work / page.FILE).write_text(page.artifact_page(manifest, page.read(work)), encoding="utf-8")
        (work / provenance.SBOM).write_text(provenance.sbom(manifest), encoding="utf-8")
        manifest["files"] = _files(work)
        materials = {"dense.safetensors": artifact.sha256(stages["baseline"].folder / "dense.safetensors")}
        (work / provenance.STATEMENT).write_text(provenance.statement(manifest, materials), encoding="utf-8")
        manifest["files"] = _files(work)
        manifest = artifact.write_manifest(work, manifest)
        work.chmod(0o755)
        cache.put(work, folder)
    return Artifact(folder, manifest)


def _files(work: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"sha256": artifact.sha256(path), "bytes": path.stat().st_size} for path in sorted(work.iterdir())
    }


def _unchanged(folder: Path, key: str, console: Console) -> Artifact | None:
    """The artifact that is there, if it is this one and whole."""
    if not (folder / "manifest.json").exists():
        return None
    try:
        manifest = artifact.read_manifest(folder)
        artifact.check_files(folder, manifest)
    except (EdgepruneError, OSError) as error:
        console.warn(f"'{folder}' is replaced: {error}")
        return None
    return Artifact(folder, manifest) if manifest.get("key") == key else None


def make_manifest(
    request: Request, stages: dict[str, Done], work: Path, key: str, environment: dict[str, Any]
) -> dict[str, Any]:
    """The manifest without `files`; schema edgeprune.manifest/1."""
    facts = artifact.read_json(stages["validate"].folder / "validation.json")
    dense = artifact.read_json(stages["baseline"].folder / "baseline.json")
    compiled = artifact.read_json(stages["compile"].folder / "compile.json")
    simplified = artifact.read_json(stages["simplify"].folder / "simplify.json")
    profile = artifact.read_json(work / "profile.json")
    planned = artifact.read_plan(work / "plan.json")
    prices = table.table_from_json(profile["table"])
    dims = list(prices.priced(request.dims))
    latency = dict(facts["pruned"]["latency"])
    interval = latency.pop("ci")
    asked = request.card.deploy
    taken = intake.Intake(asked.batch, asked.dynamic_batch, intake.frame(asked.fold_preprocessing, dense["transforms"]))
    return {
        "schema": artifact.MANIFEST_SCHEMA,
        "key": key,
        "model": request.card.name,
        "architecture": request.card.architecture,
        "target": request.target.name,
        "request": {
            "latency": request.latency.text,
            "latency_ms": planned.limit_ms,
            "quantile": request.quantile,
            "max_drop": request.max_drop,
            "epochs": list(request.card.finetune.epochs),
            "search_seconds": request.search_seconds,
            "polish": request.polish,
            "gradual": request.gradual,
        },
        "runtime": compiled["runtime"],
        "entry": compiled["entry"],
        "precision": request.precision,
        "threads": profile["table"]["threads"],
        "method": request.method,
        "criterion": request.criterion,
        "allocator": request.allocator,
        "schedule": request.schedule,
        "recovery": request.recovery,
        "dims": dims,
        **({"int8": {kind: prices.form_share(kind, Form(int8=True)) for kind in INT8}} if "precision" in dims else {}),
        "reducer": request.reducer,
        "dense": facts["dense"],
        "pruned": {
            "accuracy": facts["pruned"]["accuracy"],
            "latency_ms": latency,
            "latency_ci_ms": interval,
            "predicted_ms": planned.predicted_ms,
            "ratio": facts["pruned"]["ratio"],
            "drift": facts["pruned"]["drift"],
            "params": facts["pruned"]["params"],
            "macs": facts["pruned"]["macs"],
        },
        "accuracy": facts["accuracy"],
        "checks": facts["checks"],
        "data": {**facts["data"], "unreadable": _unreadable(stages)},
        **({key: facts[key] for key in ("domains", "features") if key in facts}),
        **({"selection": {"name": request.selection, "tune_on": request.tune_on}} if request.selects else {}),
        "preprocessing": dense["transforms"],
        "input": taken.facts(dense["transforms"]),
        "weights": request.card.deploy.ir_precision if compiled["entry"].endswith(".xml") else "fp32",
        **({"image_size": request.image_size} if request.image_size else {}),
        **({"class_names": list(request.card.deploy.class_names)} if request.card.deploy.class_names else {}),
        "classes": dense["classes"],
        "shape": [list(row) for row in planned.plan.shape],
        "export": {k: v for k, v in simplified.items() if k not in ("before", "after")},
        "worker": facts["worker"],
        "device": profile["device"],
        "environment": environment,
        "provenance": {"statement": provenance.STATEMENT, "sbom": provenance.SBOM},
        "seed": request.seed,
        "stages": [{"name": e.name, "seconds": round(e.seconds, 3), "cached": e.cached} for e in stages.values()],
    }


def _unreadable(stages: dict[str, Done]) -> list[str]:
    """The images that any stage could not read."""
    files = [
        stages[name].folder / "unreadable.json"
        for name in ("baseline", "sparsify", "calibrate", "finetune", "validate", "inspect")
        if name in stages
    ]
    return sorted({name for path in files if path.is_file() for name in json.loads(path.read_text())})


def write_anchor(dense: Path, path: Path) -> None:
    """The dense model with meaningless weights, gzipped: what another machine times the artifact against.

    Latency depends on shapes, not on values; see `parcel.meaningless`.
    """
    path.write_bytes(gzip.compress(parcel.meaningless(dense), mtime=0))
