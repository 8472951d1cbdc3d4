"""The artifact on disk: plan and weights make the model again; no pickles, strict loading.

`plan.json` (schema edgeprune.plan/1) says which architecture was pruned and what of it is kept.
"""

from __future__ import annotations

import hashlib
import json
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import families, runtimes, schema, sealed
from edgeprune.config import CLASSIFY, ModelSpec
from edgeprune.errors import StorageError, TargetUnavailable, UsageError
from edgeprune.types import INT8, BlockPlan, Plan, SubBlockKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeprune.compat import VisionTransformer

PLAN_SCHEMA = "edgeprune.plan/1"
MANIFEST_SCHEMA = "edgeprune.manifest/1"
MAX_JSON = 64 << 20  # bytes of a document that is read; a manifest has some kilobytes
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
    task: str = CLASSIFY
    anatomy: dict[str, str] = field(default_factory=dict)  # see `config.ModelSpec`

    @classmethod
    def of(cls, card: ModelSpec, num_classes: int, plan: Plan, predicted_ms: float, limit_ms: float) -> PlannedModel:
        """A plan for the card's model."""
        return cls(
            card.architecture, card.arguments, num_classes, plan, predicted_ms, limit_ms, card.task, card.anatomy
        )


def write_plan(planned: PlannedModel, path: Path) -> None:
    reduces = any(b.patches is not None for b in planned.plan.blocks)
    blocks = [
        {
            **({} if b.patches is None else {"patches": b.patches}),
            **({"int8": list(b.int8)} if b.int8 else {}),
            **({} if b.rank is None else {"rank": b.rank}),
            "heads": list(b.heads),
            "neurons": list(b.neurons),
        }
        for b in planned.plan.blocks
    ]
    document = {
        "schema": PLAN_SCHEMA,
        "architecture": planned.architecture,
        "kwargs": planned.kwargs,
        **({"anatomy": planned.anatomy} if planned.anatomy else {}),
        "num_classes": planned.num_classes,
        "limit_ms": planned.limit_ms,
        "predicted_ms": planned.predicted_ms,
        **({"task": planned.task} if planned.task != CLASSIFY else {}),
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
            BlockPlan(
                _units(b["heads"]),
                _units(b["neurons"]),
                _count(b.get("patches")),
                _kinds(b.get("int8", [])),
                _count(b.get("rank")),
            )
            for b in document["blocks"]
        )
        return PlannedModel(
            str(document["architecture"]), dict(document["kwargs"]), int(document["num_classes"]),
            Plan(blocks, str(document.get("reducer", "cls"))),
            float(document["predicted_ms"]), float(document["limit_ms"]),
            str(document.get("task", CLASSIFY)),
            _anatomy(document.get("anatomy", {})),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UsageError(f"{path}: the plan is damaged ({type(error).__name__}: {error})") from error


def _units(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise ValueError("heads and neurons must be lists of whole numbers")
    return tuple(values)


def _count(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise ValueError("patches and rank must be whole numbers")
    return value


def _kinds(values: Any) -> tuple[SubBlockKind, ...]:
    if not isinstance(values, list) or values not in ([], *([kind] for kind in INT8), list(INT8)):
        raise ValueError(f"int8 must be a list of {' and '.join(INT8)}")
    return tuple(values)


def _anatomy(value: Any) -> dict[str, str]:
    if odd := families.odd_part(dict(value)):
        raise ValueError(odd)
    return dict(value)


def rebuild(planned: PlannedModel, weights: Path) -> VisionTransformer:
    """The pruned torch model in eval mode, its weights strictly loaded."""
    from edgeprune import structure, tasks, vit, weightfile

    dense = vit.create(planned.architecture, planned.kwargs, planned.num_classes, planned.anatomy)
    model = structure.of(dense, planned.plan)
    weightfile.load(model, weightfile.read(weights), str(weights))
    return tasks.mark(model.eval(), planned.task)


def load(folder: str | Path) -> VisionTransformer:
    """The pruned torch model of an artifact directory; its files must have the hashes of the manifest."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest, ("plan.json", "model.safetensors"))
    return rebuild(read_plan(folder / "plan.json"), folder / "model.safetensors")


class Opened:
    """A session of a runtime whose results stay: no later run overwrites them."""

    def __init__(self, session: runtimes.Session) -> None:
        self._session = session
        self.input_shape, self.input_type, self.facts = session.input_shape, session.input_type, session.facts

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """The outputs `[batch, outputs]` for `x` of `input_shape` and `input_type`."""
        return self._session.run(x).copy()


def open_entry(folder: str | Path) -> Opened:
    """The artifact's model as it was measured: its runtime, threads and session options. Needs no torch.

    Its files must have the hashes of the manifest. Raises UsageError, TargetUnavailable where the runtime is not installed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest, needed=(manifest["entry"],))
    runtime = runtimes.get(manifest["runtime"])
    if reason := runtime.available():
        raise TargetUnavailable(reason)
    return Opened(runtime.open(str(folder / manifest["entry"]), manifest["threads"], manifest["precision"]))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Seal the manifest and write it; returns it with its own sha256. Raises OSError."""
    return sealed.write(folder / "manifest.json", manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact directory.

    Raises UsageError when there is none, or when it is not as `write_manifest` wrote it.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UsageError(
            f"'{folder}' is not an artifact: it has no manifest.json; give a directory that `edgeprune build` wrote"
        )
    manifest = read_json(path)
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise UsageError(f"{path} is not of schema {MANIFEST_SCHEMA}")
    try:
        sealed.read(path)
    except sealed.Damaged as error:
        raise UsageError(f"{path} is damaged: {error}; build it again") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    return manifest


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise UsageError, naming the key, unless the manifest is of its schema: what reports and `validate` rely on."""
    rules = json.loads((Path(__file__).parent / "report" / "manifest.schema.json").read_text(encoding="utf-8"))
    if found := schema.problem(manifest, rules):
        raise UsageError(f"{folder / 'manifest.json'} is no sound manifest: {found}; build the artifact again")


def model_files(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the files that the runtime opens: the entry, and the weights of an OpenVINO IR."""
    entry = str(manifest["entry"])
    return (entry, f"{Path(entry).stem}.bin") if entry.endswith(".xml") else (entry,)


def check_files(
    folder: Path, manifest: dict[str, Any], names: tuple[str, ...] | None = None, needed: Sequence[str] = ()
) -> None:
    """Raise UsageError naming every file that is missing or not what the manifest says.

    names: which files; None = all that the manifest has, and those `needed`. Links are refused: they may lead anywhere.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UsageError(f"{folder / 'manifest.json'}: 'files' is missing")
    bad = []
    for name in dict.fromkeys([*(names or files), *needed]):
        if (
            not isinstance(name, str)
            or name in ("", ".", "..")
            or Path(name).name != name
            or "\\" in name
            or "\0" in name
        ):
            raise UsageError(f"{folder / 'manifest.json'} names {name!r}, which is outside the artifact")
        path = folder / name
        kind = path.lstat().st_mode if path.is_symlink() or path.exists() else 0
        if name not in files:
            bad.append(f"{name} is not in the manifest")
        elif not kind:
            bad.append(f"{name} is missing")
        elif not stat.S_ISREG(kind):
            bad.append(f"{name} is a {'link' if stat.S_ISLNK(kind) else 'special file or a folder'}, not a file")
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
    """The JSON object in a file; UsageError for anything else, numbers that are none (NaN) included."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise UsageError(f"{path} is larger than {MAX_JSON >> 20} MiB, and no document of edgeprune's")
        document = json.loads(content.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} must hold a JSON object")
    return document


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
