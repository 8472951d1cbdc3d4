"""The artifact on disk: plan and weights make the model again; no pickles, strict loading.

`plan.json` (schema edgeprune.plan/1) says which architecture was pruned and what of it is kept.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import StorageError, UsageError
from edgeprune.types import BlockPlan, Plan

if TYPE_CHECKING:
    from edgeprune.compat import VisionTransformer

PLAN_SCHEMA = "edgeprune.plan/1"
MANIFEST_SCHEMA = "edgeprune.manifest/1"
ADAPTERS = "adapters.safetensors"  # there if adapters were tuned, see edgeprune.adapters


@dataclass(frozen=True)
class PlannedModel:
    """A plan with the dense architecture it applies to."""

    architecture: str
    kwargs: dict[str, Any]
    num_classes: int
    plan: Plan
    predicted_ms: float
    limit_ms: float


def write_plan(planned: PlannedModel, path: Path) -> None:
    reduces = any(b.patches is not None for b in planned.plan.blocks)
    blocks = [
        {**({} if b.patches is None else {"patches": b.patches}), "heads": list(b.heads), "neurons": list(b.neurons)}
        for b in planned.plan.blocks
    ]
    document = {
        "schema": PLAN_SCHEMA,
        "architecture": planned.architecture,
        "kwargs": planned.kwargs,
        "num_classes": planned.num_classes,
        "limit_ms": planned.limit_ms,
        "predicted_ms": planned.predicted_ms,
        **({"reducer": planned.plan.reducer} if reduces else {}),
        "shape": [list(row) for row in planned.plan.shape],
        "blocks": blocks,
    }
    lines = json.dumps({k: v for k, v in document.items() if k != "blocks"}, indent=1)[:-2]
    rows = ",\n  ".join(json.dumps(b, separators=(",", ":")) for b in blocks)  # one block a line: plans are compared
    path.write_text(f'{lines},\n "blocks": [\n  {rows}\n ]\n}}\n')


def read_plan(path: Path) -> PlannedModel:
    """Raises UsageError naming the file and what is wrong with it."""
    document = read_json(path)
    if document.get("schema") != PLAN_SCHEMA:
        raise UsageError(f"{path} is not a plan of schema {PLAN_SCHEMA} (it says {document.get('schema')!r})")
    try:
        blocks = tuple(
            BlockPlan(_units(b["heads"]), _units(b["neurons"]), _count(b.get("patches"))) for b in document["blocks"]
        )
        return PlannedModel(
            str(document["architecture"]), dict(document["kwargs"]), int(document["num_classes"]),
            Plan(blocks, str(document.get("reducer", "cls"))),
            float(document["predicted_ms"]), float(document["limit_ms"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: the plan is damaged ({type(error).__name__}: {error})") from error


def _units(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise ValueError("heads and neurons must be lists of whole numbers")
    return tuple(values)


def _count(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise ValueError("patches must be a whole number")
    return value


def rebuild(planned: PlannedModel, weights: Path) -> VisionTransformer:
    """The pruned torch model in eval mode, its weights strictly loaded."""
    from edgeprune import vit

    model = vit.slice_model(vit.create(planned.architecture, planned.kwargs, planned.num_classes), planned.plan)
    vit.load_weights(model, vit.read_weights(weights), str(weights))
    return model.eval()


def load(folder: str | Path) -> VisionTransformer:
    """The pruned torch model of an artifact directory; its files must have the hashes of the manifest."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest, ("plan.json", "model.safetensors"))
    return rebuild(read_plan(folder / "plan.json"), folder / "model.safetensors")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact directory; UsageError when there is none."""
    if not (folder / "manifest.json").is_file():
        raise UsageError(
            f"'{folder}' is not an artifact: it has no manifest.json; give a directory that `edgeprune build` wrote"
        )
    manifest = read_json(folder / "manifest.json")
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise UsageError(f"{folder / 'manifest.json'} is not of schema {MANIFEST_SCHEMA}")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], names: tuple[str, ...] | None = None) -> None:
    """Raise UsageError naming every file that is missing or not what the manifest says."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UsageError(f"{folder / 'manifest.json'}: 'files' is missing")
    bad = []
    for name in names or tuple(files):
        if Path(name).name != name:
            raise UsageError(f"{folder / 'manifest.json'} names '{name}', which is outside the artifact")
        path = folder / name
        if name not in files:
            bad.append(f"{name} is not in the manifest")
        elif not path.is_file():
            bad.append(f"{name} is missing")
        elif not isinstance(files[name], dict) or sha256(path) != files[name].get("sha256"):
            bad.append(f"{name} has changed since it was built")
    if bad:
        raise UsageError(f"the artifact '{folder}' is damaged: {'; '.join(bad)}; build it again")


def must_be_writable(path: Path, option: str, *, folder: bool) -> None:
    """Make the folder, or the file's; StorageError naming the option, before any work, when that cannot be done."""
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        parent = path if folder else path.parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise StorageError(f"cannot write to '{path}': {error.strerror}; choose another {option}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} must hold a JSON object")
    return document


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
