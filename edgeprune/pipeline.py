"""The pipeline: what a build does, in order; caching, resuming, and the finished artifact.

Read `PIPELINE` first. A stage is a function that reads the folders of earlier stages and writes a new
folder. Its cache key is made of what it asks of the request, the files of the stages it reads, its own
code and the versions of the libraries; a finished folder is never touched again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache as memo
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from edgeprune import artifact, cache, footprint, images, modules, publish, recoveries, runtimes, schedules
from edgeprune.config import FEATURES, DataSpec, Request
from edgeprune.console import SILENT, Console
from edgeprune.errors import StorageError, TargetUnavailable, UsageError, unknown
from edgeprune.latency import device, devices
from edgeprune.stages import (
    baseline,
    calibrate,
    check,
    compile,
    export,
    finetune,
    inspect,
    profile,
    prune,
    roofline,
    simplify,
    sparsify,
    survey,
    validate,
)
from edgeprune.tuning import launch
from edgeprune.types import Latency, to_json

T = TypeVar("T")

#: run(request, read, out, console): `read` maps the stages it reads to their folders.
Run = Callable[[Request, Mapping[str, Path], Path, Console], None]


@dataclass(frozen=True)
class Stage:
    """One step: its function, the stages whose files it reads, and what of the request it depends on."""

    name: str
    run: Run
    reads: tuple[str, ...]
    asks: tuple[str, ...]
    per_latency: bool = False
    when: Callable[[Request], bool] = lambda request: True
    #: Whether what it left in a folder needs no second try.
    decided: Callable[[Path], bool] = lambda folder: True


#: With `--gradual`, the tuned model of the milder latency before, which is pruned further.
PARENT = "parent"
#: What is pruned instead of the dense model, where there is one: read by stages that can do without.
INSTEAD = (PARENT, "sparsify")

PIPELINE = (
    # the dense model as it came: weights, ONNX, sizes
    Stage(
        "baseline",
        baseline.run,
        (),
        ("model", "weights", "data", "calibration", "selection", "tune_on", "deploy", "seed"),
    ),
    # what every sub-block shape costs on this device, in the runtime that will run
    Stage(
        "profile",
        profile.run,
        ("baseline",),
        ("target", "runtime", "precision", "threads", "device", "recorded", "tokens", "forms", "reducer", "seed"),
    ),
    # train under gates that a schedule shuts; cut what is shut
    Stage(
        "sparsify",
        sparsify.run,
        ("baseline", "profile"),
        (
            "schedule",
            "criterion",
            "allocator",
            "dims",
            "latency",
            "quantile",
            "recipe",
            "calibration",
            "target",
            "seed",
        ),
        per_latency=True,
        when=lambda r: r.schedule != schedules.DEFAULT,
    ),
    # what every head and neuron is worth: input statistics, OBS order, error of every level
    Stage("calibrate", calibrate.run, ("baseline", *INSTEAD), ("calibration", "criterion", "target", "seed")),
    # the plan of least error that is measured within the limit; survivors re-fitted
    Stage(
        "prune",
        prune.run,
        ("baseline", "profile", "calibrate", *INSTEAD),
        (
            "latency",
            "quantile",
            "calibration",
            "allocator",
            "dims",
            "reducer",
            "search_seconds",
            "recovery",
            "polish",
            "seed",
        ),
        per_latency=True,
    ),
    # distillation from the dense model
    Stage(
        "finetune",
        finetune.run,
        ("baseline", "prune"),
        ("recipe", "schedule", "recovery", "reducer", "seed"),
        per_latency=True,
    ),
    # torch -> ONNX, checked
    Stage("export", export.run, ("baseline", "finetune"), ("reducer",), per_latency=True),
    # onnxsim, checked
    Stage("simplify", simplify.run, ("baseline", "finetune", "export"), ("reducer",), per_latency=True),
    # for every runtime the target can use; the faster one is kept
    Stage("compile", compile.run, ("profile", "simplify"), ("target", "runtime", "ir_precision"), per_latency=True),
    # accuracy and latency of what was compiled, beside the dense model
    Stage(
        "validate",
        validate.run,
        ("baseline", "profile", "finetune", "compile"),
        ("quantile", "max_drop", "strict_clock", "accuracy_on", "judging"),
        per_latency=True,
        decided=lambda folder: validate.decided(folder),
    ),
    # for the report: what this device can do, and its noise; not where the profile is of another device
    Stage(
        "roofline",
        roofline.run,
        ("baseline", "profile"),
        ("target", "precision", "device", "seed"),
        when=lambda r: r.profile is None,
    ),
    # for the report: classes, images, confidence, corruptions, features, memory
    Stage(
        "inspect", inspect.run, ("baseline", "profile", "finetune", "compile", "validate"), ("seed",), per_latency=True
    ),
)

#: What `edgeprune profile` does: the stages that it shares with a build, and two of its own.
PROFILING = (
    *PIPELINE[:2],
    # where the time goes, what the device can do, what threads, runtimes and int8 would change
    Stage("survey", survey.run, ("baseline", "profile"), ("target", "precision", "device", "seed")),
    # how far the table is off on held-out random plans
    Stage("check", check.run, ("baseline", "profile"), ("target", "precision", "device", "reducer", "seed", "check")),
)

ASKS: dict[str, Callable[[Request], Any]] = {
    "model": lambda r: (
        r.card.architecture,
        r.card.arguments,
        r.card.num_classes,
        r.card.transforms,
        r.card.task,
        *filter(None, [r.card.anatomy]),
    ),
    "deploy": lambda r: replace(r.card.deploy, ir_precision="fp32"),
    "ir_precision": lambda r: r.card.deploy.ir_precision,
    "judging": lambda r: r.card.task == FEATURES and r.card.features,
    "weights": lambda r: _weights_key(r),
    "data": lambda r: (r.card.data, data_key(r.card.data)),
    "calibration": lambda r: r.card.calibration,
    "recipe": lambda r: (r.card.finetune, r.lesson_bytes),  # how many lessons are kept decides when they come again
    "target": lambda r: r.target,
    "runtime": lambda r: r.runtime,
    "precision": lambda r: r.precision,
    "threads": lambda r: r.threads,
    "device": lambda r: _device_key(r),
    "recorded": lambda r: artifact.sha256(r.profile) if r.profile is not None else "",
    "check": lambda r: r.check,
    "criterion": lambda r: r.criterion,
    "allocator": lambda r: r.allocator,
    "schedule": lambda r: r.schedule,
    "recovery": lambda r: r.recovery,
    "dims": lambda r: r.dims,
    "tokens": lambda r: "tokens" in r.dims,
    "forms": lambda r: ("qk" in r.dims, "precision" in r.dims),
    "reducer": lambda r: r.reducer if "tokens" in r.dims else "",
    "search_seconds": lambda r: r.search_seconds,
    "polish": lambda r: r.polish,
    "selection": lambda r: r.selection,
    "tune_on": lambda r: r.tune_on,
    "latency": lambda r: (r.latency.ms, r.latency.fraction),
    "quantile": lambda r: r.quantile,
    "max_drop": lambda r: r.max_drop,
    "strict_clock": lambda r: r.strict_clock,
    "accuracy_on": lambda r: r.accuracy_on if r.device else "",
    "seed": lambda r: r.seed,
}

LIBRARIES = ("torch", "timm", "onnx", "onnxruntime", "onnxsim", "onnxscript", "openvino", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Done:
    """A stage that has run, now or earlier."""

    name: str
    key: str
    folder: Path
    seconds: float
    cached: bool
    digest: str  # of the key and the files: a stage that reads this one is stale when it was made anew


class Moved(Exception):
    """Another process has replaced or deleted finished stages that this build reads; the message says which."""


#: How often a build starts over because another process has changed what it had finished.
STARTS = 4


def build(
    request: Request,
    latencies: Sequence[Latency],
    *,
    out: Path,
    cache_dir: Path,
    rebuild: bool = False,
    console: Console = SILENT,
) -> list[publish.Artifact]:
    """Build one artifact per latency; what does not depend on the latency is done once.

    Raises the errors of edgeprune.errors; whatever was finished before stays in the cache. A gate
    that fails does not raise: the artifact says so.
    """
    preflight(request, out, cache_dir)
    request = footprint.within(request, [stage.name for stage in stages_of(request)], console)
    cache.sweep(cache_dir, frozenset(stage.name for stage in PIPELINE))
    redone: set[str] | None = set() if rebuild else None
    return _until_undisturbed(lambda: _build(request, latencies, out, cache_dir, redone, console), console)


def _until_undisturbed(work: Callable[[], T], console: Console) -> T:
    """`work()`, started over while others change the cache under it. Raises StorageError when that does not end."""
    reason = ""
    for _ in range(STARTS):
        try:
            return work()
        except Moved as moved:
            reason = str(moved)
            console.warn(f"{reason}; going on with what is there now")
    raise StorageError(f"{reason}, {STARTS} times in this build; give each build its own --cache-dir")


def _build(
    request: Request,
    latencies: Sequence[Latency],
    out: Path,
    cache_dir: Path,
    redone: set[str] | None,
    console: Console,
) -> list[publish.Artifact]:
    members = [replace(request, latency=latency) for latency in latencies]
    done: list[dict[str, Done]] = [{} for _ in members]
    made: dict[str, Done] = {}  # by key: what several latencies share is done once

    def advance(stage: Stage, one: Request, finished: dict[str, Done]) -> None:
        key = stage_key(stage, one, {name: entry.digest for name, entry in finished.items()})
        if key in made:
            finished[stage.name] = replace(made[key], cached=True)
            return
        several = len(members) > 1 and _per_latency(stage, finished)
        where = f" for {one.latency.text}" if several else ""
        made[key] = finished[stage.name] = run_stage(stage, one, key, finished, cache_dir, redone, where, console)

    stages = stages_of(request)
    if request.gradual:
        for stage in PIPELINE[:2]:
            advance(stage, members[0], done[0])
        before: dict[str, Done] = {}
        with undisturbed([done[0]["profile"]], "the order of the latencies", cache_dir):
            order = mildest_first(members, done[0]["profile"].folder)
        for i in order:
            done[i].update({PARENT: before["finetune"]} if before else {})
            for stage in stages:
                advance(stage, members[i], done[i])
            before = done[i]
    else:
        for stage in stages:
            for one, finished in zip(members, done, strict=True):
                advance(stage, one, finished)
    artifacts, family = [], []
    for one, finished in zip(members, done, strict=True):
        with undisturbed([finished["validate"], finished["finetune"]], "the report", cache_dir):
            family.append(publish.point(one, finished))
    for one, finished in zip(members, done, strict=True):
        folder = out / publish.artifact_name(one)
        own = [entry for name, entry in finished.items() if name != PARENT]
        with undisturbed(own, "the artifact", cache_dir):
            artifacts.append(publish.publish(one, own, folder, environment(), family, console))
        console.say(f"artifact: {folder}")
    return artifacts


def stages_of(request: Request) -> list[Stage]:
    """What a build of this request does, in order."""
    return [stage for stage in PIPELINE if stage.when(request)]


def _per_latency(stage: Stage, finished: Mapping[str, Any]) -> bool:
    """Whether what it does depends on the latency, by itself or by what it reads."""
    return stage.per_latency or any(name in finished and name in stage.reads for name in INSTEAD)


def mildest_first(members: Sequence[Request], profile_folder: Path) -> list[int]:
    """The order of a gradual build: indices of the members, the highest latency first."""
    dense_ms = profile.read_profile(profile_folder)[1].dense_ms
    return sorted(range(len(members)), key=lambda i: -members[i].latency.limit_ms(dense_ms))


def run_stages(
    stages: Sequence[Stage], request: Request, cache_dir: Path, *, rebuild: bool = False, console: Console = SILENT
) -> dict[str, Done]:
    """Run those of the stages that the request needs, in order, for one latency; returns their results by name."""
    preflight(request, cache_dir, cache_dir)
    request = footprint.within(request, [stage.name for stage in stages if stage.when(request)], console)
    cache.sweep(cache_dir, frozenset(stage.name for stage in PROFILING))

    redone: set[str] | None = set() if rebuild else None

    def work() -> dict[str, Done]:
        finished: dict[str, Done] = {}
        for stage in (stage for stage in stages if stage.when(request)):
            key = stage_key(stage, request, {name: entry.digest for name, entry in finished.items()})
            finished[stage.name] = run_stage(stage, request, key, finished, cache_dir, redone, "", console)
        return finished

    return _until_undisturbed(work, console)


def preview(request: Request, latencies: Sequence[Latency], cache_dir: Path) -> list[tuple[str, str, bool]]:
    """What `build` would do: (stage, latency, whether it is cached), in order. Nothing is run."""
    if request.max_memory is not None:
        request = footprint.within(request, [stage.name for stage in stages_of(request)], SILENT)
    rows: list[tuple[str, str, bool]] = []
    members = [replace(request, latency=latency) for latency in latencies]
    keys: list[dict[str, str]] = [{} for _ in members]

    def look(stage: Stage, i: int) -> Done | None:
        key = stage_key(stage, members[i], keys[i])
        folder = _folder(cache_dir, stage, key)
        record, _ = cache.look(folder)
        keys[i][stage.name] = cache.digest(record) if record else key  # unknown yet: what reads it would run too
        own, there = _per_latency(stage, keys[i]), record is not None and stage.decided(folder)
        row = (stage.name, members[i].latency.text if own else "every latency", there)
        if row not in rows:
            rows.append(row)
        return Done(stage.name, key, folder, 0.0, True, "") if there else None

    if request.gradual:
        profiled = [look(stage, 0) for stage in PIPELINE[:2]][1]
        before = ""
        # Without a profile nobody knows yet which of 10ms and 2x is milder: in the order they were given.
        for i in mildest_first(members, profiled.folder) if profiled else range(len(members)):
            keys[i].update({PARENT: before} if before else {})
            for stage in stages_of(request):
                look(stage, i)
            before = keys[i]["finetune"]
    else:
        for stage in stages_of(request):
            for i in range(len(members)):
                look(stage, i)
    return rows


def run_stage(
    stage: Stage,
    request: Request,
    key: str,
    finished: Mapping[str, Done],
    cache_dir: Path,
    redone: set[str] | None,
    where: str,
    console: Console,
) -> Done:
    """The stage's finished folder: from the cache, or run now and renamed into place when whole.

    redone: keys of stages that were done once more, to which this one is added; None = what is done stays.
    Raises Moved when another process has changed what the stage reads.
    """
    folder = _folder(cache_dir, stage, key)
    force = redone is not None and key not in redone

    def found() -> tuple[Done | None, str]:
        record, damage = (None, "") if force else cache.look(folder)
        if record is None:
            return None, damage and f"in the cache, {damage} ('{folder}')"
        if not stage.decided(folder):
            return None, "it came to no verdict, as the machine was too busy or the latency too near the limit"
        console.stage(f"{stage.name}{where}: done before ({record['seconds']:.1f} s), nothing has changed")
        return Done(stage.name, key, folder, record["seconds"], cached=True, digest=cache.digest(record)), ""

    known, why = found()
    if known is not None:
        return known
    if why:
        console.warn(f"{stage.name}{where} is done again: {why}")
    read = {name: finished[name].folder for name in stage.reads if name in finished}
    inputs = [finished[name] for name in read]

    def waiting() -> None:
        console.say(f"{stage.name}{where}: another build is at it; waiting for its result")

    with (
        undisturbed(inputs, f"stage '{stage.name}'", cache_dir),
        cache.working(cache_dir / f".{folder.name}", waiting) as work,
    ):
        known, _ = found()
        if known is not None:
            return known  # from the build that this one waited for
        console.stage(f"{stage.name}{where}")
        if force:
            shutil.rmtree(work / cache.CHECKPOINT, ignore_errors=True)
        start = time.monotonic()
        stage.run(request, read, work, console)
        seconds = time.monotonic() - start
        moved(inputs)
        record = cache.finish(work, folder, stage.name, key, seconds)
    footprint.give_back()
    if redone is not None:
        redone.add(key)
    console.say(f"{stage.name}: {seconds:.1f} s")
    return Done(stage.name, key, folder, seconds, cached=False, digest=cache.digest(record))


@contextmanager
def undisturbed(inputs: Sequence[Done], what: str, cache_dir: Path) -> Iterator[None]:
    """Around what reads finished stages: Moved if they changed meanwhile, else StorageError for a failing disk."""
    try:
        yield
    except Exception as error:
        moved(inputs)
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        elif "(os error " in str(error):  # how libraries in Rust put it, safetensors among them
            reason = str(error)
        else:
            raise
        raise StorageError(f"{what} stopped: {reason}; finished stages are kept in '{cache_dir}'") from error
    moved(inputs)


def moved(inputs: Sequence[Done]) -> None:
    """Raise Moved unless all of these finished stages are as they were found."""
    for entry in inputs:
        if not cache.unchanged(entry.folder, entry.digest):
            raise Moved(f"another process has changed or deleted '{entry.folder}'")


def check_request(request: Request) -> None:
    """Refuse what can be refused before any work: names, target, precision, weights."""
    for kind in modules.PACKAGES:
        modules.check(kind, getattr(request, kind))
    if request.schedule != schedules.DEFAULT and sum(request.card.finetune.epochs) <= 0:
        raise UsageError(
            f"the schedule '{request.schedule}' trains, but 0 epochs were asked for; give --epochs, or --schedule one-shot"
        )
    if request.card.task == FEATURES:
        for kind in ("criterion", "allocator", "schedule", "recovery"):
            name = getattr(request, kind)
            if {"labels", "classes"} & set(modules.needs(kind, name)):
                raise UsageError(f"the {kind} '{name}' looks at classes, and an embedding model names none; "
                                 f"choose another --{kind} (`edgeprune methods` says what each looks at)")  # fmt: skip
    if request.gradual and request.schedule != schedules.DEFAULT:
        raise UsageError(
            f"--gradual prunes from tuned models, the schedule '{request.schedule}' from the dense one; give one of the two"
        )
    if launch.wanted(request) and recoveries.get(request.recovery).TUNES == "adapters":
        raise UsageError(
            f"the recovery '{request.recovery}' tunes adapters, and those in one process alone; "
            "leave --processes and --accelerate-config out, or choose another --recovery"
        )
    data = request.card.data
    if data.follow_links and os.path.isdir(data.dir):
        images.check_links(Path(data.dir), follow=True)  # before anyone walks the folder, which might have no end
    if request.runtime and request.runtime not in runtimes.names():
        raise unknown("runtime", request.runtime, runtimes.names())
    if request.precision not in request.target.precisions:
        raise UsageError(
            f"precision '{request.precision}' is not one of target '{request.target.name}': {', '.join(request.target.precisions)}"
        )
    if request.profile is not None:
        if not request.profile.is_file():
            raise UsageError(
                f"there is no profile '{request.profile}'; write one with `edgeprune profile --export FILE`"
            )
        artifact.read_json(request.profile)  # unreadable or no JSON: said before any work
    for sibling in request.siblings:
        artifact.check_manifest(sibling, artifact.read_manifest(sibling))
    if request.profile is None and (reason := devices.machine(request.device).unfit(request.target)):
        where = f"on {request.device}" if request.device else "here"
        raise TargetUnavailable(
            f"target '{request.target.name}' is not {where}: {reason}; `edgeprune targets detect` names one that fits"
        )
    if request.weights is not None and not request.weights.is_file():
        raise UsageError(f"weights file '{request.weights}' does not exist; give a .safetensors or .pth file")


def preflight(request: Request, out: Path, cache_dir: Path) -> None:
    """`check_request`, and folders that cannot be written."""
    check_request(request)
    for folder, option in ((out, "--out"), (cache_dir, "--cache-dir")):
        artifact.must_be_writable(folder, option, folder=True)


def default_cache_dir() -> Path:
    """$EDGEPRUNE_CACHE_DIR, else the user's cache folder."""
    if chosen := os.environ.get("EDGEPRUNE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune"


# Keys ---------------------------------------------------------------------------------------


def stage_key(stage: Stage, request: Request, keys: Mapping[str, str]) -> str:
    """sha256 over all that the stage's result depends on."""
    asked = {name: to_json(ASKS[name](request)) for name in stage.asks}
    code = code_key(stage.run.__module__)
    for kind in modules.PACKAGES:
        if kind in stage.asks and asked[kind]:
            code += code_key(modules.path(kind, asked[kind]))
    parts = {
        "stage": stage.name,
        "asks": asked,
        "reads": [keys[name] for name in stage.reads if name not in INSTEAD or name in keys],
        "code": code,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


#: Modules that no import statement names: the worker is a process, runtimes are found by name.
BY_NAME = {
    "edgeprune.latency.clock": ["edgeprune.latency.worker"],
    "edgeprune.latency.remote": ["edgeprune.latency.agent"],
    "edgeprune.tuning.launch": ["edgeprune.tuning.worker"],
    "edgeprune.runtimes": [f"edgeprune.runtimes.{name}" for name in runtimes.names()],
    "edgeprune.anatomies": [
        f"edgeprune.anatomies.{path.stem}" for path in Path(__file__).parent.glob("anatomies/*.py")
    ],
}


@memo
def code_key(module: str) -> str:
    """sha256 of the source of a module of edgeprune and of all that it imports from edgeprune."""
    seen: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name)
        if name in seen or spec is None or spec.origin is None:
            continue
        seen[name] = Path(spec.origin).read_bytes()
        waiting += BY_NAME.get(name, [])
        waiting += [found for found in _imports(ast.parse(seen[name])) if found.startswith("edgeprune.")]
    return hashlib.sha256(b"".join(name.encode() + seen[name] for name in sorted(seen))).hexdigest()


def _imports(tree: ast.AST) -> set[str]:
    """Modules that the source may import: `from a import b` may mean module a or module a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module.startswith("edgeprune"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names if _is_module(node.module, alias.name)}
    return found


def _is_module(package: str, name: str) -> bool:
    folder = Path(__file__).parent.joinpath(*package.split(".")[1:])
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


@memo
def versions() -> dict[str, str]:
    """Versions of the libraries that decide the result; "" for one that is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def environment() -> dict[str, Any]:
    """Machine, Python and library versions, for the manifest."""
    import platform

    from edgeprune import __version__

    return {
        "edgeprune": __version__, "code": code_key(__name__)[:16], "python": platform.python_version(), "system": platform.platform(),
        "device": device.fingerprint(), "versions": versions(),
    }  # fmt: skip


def _weights_key(request: Request) -> str:
    if request.weights is None and request.card.architecture.startswith("local-dir:"):
        return files_key(request.card.architecture.removeprefix("local-dir:"))
    path = request.weights or (Path(request.card.weights) if request.card.weights not in ("", "hub") else None)
    if path is None:
        return request.card.weights
    return artifact.sha256(path) if path.is_file() else "missing"


def _device_key(request: Request) -> Any:
    """What identifies the device that measures, set as it is now; two of one kind at two addresses are two."""
    machine = devices.machine(request.device)
    facts = (
        machine.fingerprint,
        machine.conditions["governor"],
        machine.conditions["quota"],
        machine.usable_threads(request.threads or request.target.threads)[0],
    )
    return (*facts, machine.url) if machine.url else facts


def data_key(data: DataSpec) -> str:
    """Names, sizes and times of all files of the data set, or of the archive that it is."""
    return files_key(data.dir, data.follow_links)


def files_key(folder: str, follow_links: bool = False) -> str:
    """The same of any folder or file; "" is empty."""
    digest = hashlib.sha256()
    if folder and os.path.isfile(folder):
        stat = os.stat(folder)
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    for root, folders, files in os.walk(folder, followlinks=follow_links) if folder else ():
        folders.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            stat = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a link to nothing; who reads it says so
            digest.update(f"{os.path.relpath(root, folder)}/{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _folder(cache_dir: Path, stage: Stage, key: str) -> Path:
    return cache_dir / f"{stage.name}-{key[:20]}"
