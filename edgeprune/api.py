"""The Python API: what the commands do, without the terminal. Arguments have the names of the options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import config, methods, modules
from edgeprune.config import ModelSpec, Request
from edgeprune.console import SILENT, Console
from edgeprune.errors import StorageError, UsageError, unknown
from edgeprune.extras import need_build_packages
from edgeprune.latency.statistics import QUANTILES
from edgeprune.tuning import launch
from edgeprune.types import Latency

if TYPE_CHECKING:
    from edgeprune.publish import Artifact


def request(
    model: str = "digits",
    *,
    target: str,
    latency: Sequence[str] | str,
    weights: str | Path | None = None,
    data: str = "",
    data_dir: str | Path = "",
    held_out_domain: str = "",
    task: str = "",
    image_size: str = "",
    batch: int = 0,
    dynamic_batch: bool = False,
    fold_preprocessing: str = "",
    ir_precision: str = "",
    class_names: str | Path | None = None,
    follow_links: bool = False,
    dims: str = "",
    reducer: str = "",
    selection: str = "random",
    tune_on: float = 1.0,
    epochs: float | None = None,
    max_drop: float | None = None,
    quantile: str = "",
    method: str = methods.DEFAULT,
    criterion: str = "",
    allocator: str = "",
    schedule: str = "",
    recovery: str = "",
    search_seconds: float | None = None,
    polish: int = 0,
    gradual: bool = False,
    runtime: str = "",
    precision: str = "fp32",
    threads: int = 0,
    seed: int = 0,
    strict_clock: bool = False,
    profile: str | Path | None = None,
    processes: int = 0,
    accelerate_config: str | Path | None = None,
    device: str = "",
    accuracy_on: str = "build",
    sibling: Sequence[str | Path] | str | Path = (),
    max_memory: str = "",
) -> tuple[Request, list[Latency]]:
    """Names and texts checked and turned into what the pipeline takes. Raises UsageError.

    criterion, allocator, schedule, recovery: "" = the method's. held_out_domain: of the folder's domains, the one that
    is judged only. task: "classify" or "features", "" = the card's. image_size: 192 or
    192x256 (height x width), instead of the model's own. batch: images of one inference, 0 = the card's; dynamic_batch:
    the files take any number. fold_preprocessing: "auto" or HEIGHTxWIDTH of the raw images that the files then take.
    ir_precision: "fp16" or "fp32", of the weights in OpenVINO's files. class_names: a file of one name a line. selection: which training images calibrate. tune_on: the share of the others that is tuned on,
    chosen by the same selection. dims: what a plan may choose, "" = all that the allocator knows; reducer: which
    tokens stay where some go. device: that measures, a name or an ssh:// address; "" = this machine. accuracy_on:
    "build" or "device", where accuracy is judged then. sibling: artifacts whose dense models the report draws.
    max_memory: as "4GiB", "" = no limit; see `edgeprune.footprint`.
    """
    texts = [latency] if isinstance(latency, str) else list(latency)
    latencies = list(dict.fromkeys(config.parse_latency(text) for text in texts))
    if not latencies:
        raise UsageError("no latency is asked for; add --latency 10ms, 2x or 40%")
    spec = config.load_target(target)
    card = with_data(config.load_card(model), data, data_dir, held_out_domain, follow_links)
    if task:
        card = card.as_task(task)
    if image_size:
        card = config.sized(card, image_size)
    card = config.deployed(card, batch, dynamic_batch, fold_preprocessing, ir_precision, class_names)
    if epochs is not None:
        if not 0 <= epochs < float("inf"):
            raise UsageError(f"epochs must be 0 or more, not {epochs}")
        card = replace(card, finetune=replace(card.finetune, epochs=(float(epochs),), sizes=()))
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed must be from 0 to {(1 << 32) - 1}, not {seed}")
    if max_drop is not None and not 0 <= max_drop < float("inf"):
        raise UsageError(f"max-drop must be 0 or more accuracy points, not {max_drop}")
    if search_seconds is not None and not 0 <= search_seconds < float("inf"):
        raise UsageError(f"search-seconds must be 0 or more, not {search_seconds}")
    if not 0 < tune_on <= 1:
        raise UsageError(f"tune-on must be a share above 0 and up to 1, not {tune_on}")
    if polish < 0:
        raise UsageError(f"polish must be 0 or more passes, not {polish}")
    if threads < 0:
        raise UsageError(f"threads must be 0 (all) or more, not {threads}")
    known = methods.get(method)
    given = {"criterion": criterion, "allocator": allocator, "schedule": schedule, "recovery": recovery}
    parts: Any = {kind: name or getattr(known, kind) for kind, name in given.items()}
    dims = dims or (known.dims if parts["allocator"] == known.allocator else "")
    chosen = dims_of(dims, parts["allocator"])
    impossible = not_with(parts["recovery"], gradual=gradual, precision=precision)
    for dim in chosen:
        if dim in impossible and dims:
            raise UsageError(f"{impossible[dim]}; leave {dim} out of --dims")
    chosen = tuple(dim for dim in chosen if dim not in impossible)
    if quantile and quantile not in QUANTILES:
        raise unknown("quantile", quantile, QUANTILES)
    if accuracy_on not in ("build", "device"):
        raise unknown("accuracy-on", accuracy_on, ("build", "device"))
    modules.check("reducer", reducer := reducer or known.reducer)
    group = Path(accelerate_config) if accelerate_config else None
    launch.check_request(processes, group)
    made = Request(
        card=card, target=spec, latency=latencies[0], weights=Path(weights) if weights else None,
        quantile=quantile or spec.quantile, max_drop=max_drop, method=method, **parts,
        dims=chosen, reducer=reducer, search_seconds=search_seconds, polish=polish, selection=selection, tune_on=float(tune_on), gradual=gradual, runtime=runtime,
        precision=precision, threads=threads, seed=seed, strict_clock=strict_clock, profile=Path(profile) if profile else None,
        processes=processes, accelerate_config=group, device=device, accuracy_on=accuracy_on,
        image_size=image_size, siblings=tuple(map(Path, [sibling] if isinstance(sibling, (str, Path)) else sibling)),
        max_memory=config.parse_size(max_memory, "max-memory") if max_memory else None,
    )  # fmt: skip
    return made, latencies


def not_with(recovery: str, *, gradual: bool, precision: str) -> dict[str, str]:
    """What a plan cannot choose beside these, and why. Raises UsageError for an unknown recovery."""
    modules.check("recovery", recovery)
    found: dict[str, str] = {}
    if "".join(modules.constant("recovery", recovery, "TUNES")) == "adapters":
        reason = f"the recovery '{recovery}' tunes adapters of the dense weights"
        found |= {"qk": reason, "precision": reason}
    if (precision or "fp32") != "fp32":
        found["precision"] = f"int8 layers stand beside fp32 ones, not {precision}"
    if gradual:
        reason = "--gradual prunes a model on from where it is, with all its tokens, in dense shape and float"
        found |= {"tokens": reason, "qk": reason, "precision": reason}
    return found


def left_out(made: Request) -> dict[str, str]:
    """What the allocator would choose by default and cannot beside these options, and why."""
    impossible = not_with(made.recovery, gradual=made.gradual, precision=made.precision)
    return {dim: impossible[dim] for dim in dims_of("", made.allocator) if dim in impossible}


def dims_of(text: str, allocator: str) -> tuple[str, ...]:
    """What a plan may choose: `heads,mlp`; "" = all that the allocator knows. UsageError for what it does not."""
    modules.check("allocator", allocator)
    known = modules.constant("allocator", allocator, "DIMS")
    if not text:
        return config.DIMS if known else config.WIDTHS
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in chosen:
        if name not in config.EVERY_DIM:
            raise unknown("dimension", name, list(config.EVERY_DIM))
    if not known and chosen != config.WIDTHS:
        raise UsageError(
            f"the allocator '{allocator}' always chooses {', '.join(config.WIDTHS)}; leave out --dims, or add --allocator search"
        )
    return chosen


def with_data(
    card: ModelSpec, data: str, data_dir: str | Path, held_out_domain: str = "", follow_links: bool = False
) -> ModelSpec:
    """The card with another data set, another place for its own, a domain held out, or links followed out of its folder.

    Raises UsageError for data without domains.
    """
    if not data and not data_dir and not held_out_domain and not follow_links:
        return card
    own = card.data
    name = data or ("folder" if own.name == "digits" and data_dir else own.name)
    held_out = held_out_domain or own.held_out_domain
    return replace(
        card,
        data=replace(
            own,
            name=name,
            dir=str(data_dir) or own.dir,
            held_out_domain=held_out,
            follow_links=follow_links or own.follow_links,
        ),
    )


def build(
    model: str = "digits",
    *,
    out: str | Path = "artifacts",
    cache_dir: str | Path | None = None,
    rebuild: bool = False,
    console: Console = SILENT,
    **options: Any,
) -> list[Artifact]:
    """Build one artifact per latency; see `request` for the options. Returns the finished artifacts."""
    need_build_packages()
    made, latencies = request(model, **options)
    for reason in dict.fromkeys(left_out(made).values()):
        console.say(f"{reason}: a plan chooses {', '.join(made.dims)}")
    from edgeprune import pipeline

    cache = Path(cache_dir) if cache_dir else pipeline.default_cache_dir()
    return pipeline.build(made, latencies, out=Path(out), cache_dir=cache, rebuild=rebuild, console=console)


def join(
    accelerate_config: str | Path, *, cache_dir: str | Path | None = None, jobs: int = 0, console: Console = SILENT
) -> dict[str, int]:
    """Start this machine's processes of the tunings of a build that runs elsewhere and shares `cache_dir`.

    Until `jobs` are done, 0 = for ever. Returns how many `tunings` were joined and how many `failed`.
    """
    need_build_packages()
    from edgeprune import pipeline

    if jobs < 0:
        raise UsageError(f"jobs must be 0 (until interrupted) or more, not {jobs}")
    cache = Path(cache_dir) if cache_dir else pipeline.default_cache_dir()
    if not cache.is_dir():
        raise UsageError(f"there is no folder '{cache}'; give the --cache-dir of the build, which both machines see")
    return launch.join(Path(accelerate_config), cache, jobs, console)


def profile(
    model: str = "digits",
    *,
    target: str = "",
    check: int = 0,
    export: str | Path | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    rebuild: bool = False,
    console: Console = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Measure the device: the latency table of a model, and the profiling report. Needs no torch for an .onnx file.

    target: "" = the shipped one that fits this machine best. check: held-out random plans to compare the
    table's predictions with. export: a file for the profile, which `build(profile=...)` takes elsewhere.
    out: a folder for the profile, the report (profile.md) and the raw samples. See `request` for the options.
    Returns the profile document (schema edgeprune.profile/1) with `survey` and, if asked for, `check`; of an
    .onnx file the survey alone (schema edgeprune.survey/1), which is never cached.
    """
    if not target:
        from edgeprune.latency import devices

        name = str(options.get("device", ""))
        found, reason = devices.machine(name).detect(config.load_target(name) for name in config.names("targets"))
        target = found.name
        console.say(f"target: {target}, the one that fits {name or 'this machine'} best ({reason})")
    if model.endswith(".onnx"):
        others = {**options, "check": check, "export": export, "cache_dir": cache_dir, "rebuild": rebuild}
        return _profile_file(Path(model), target, out, console, **others)
    if options.get("profile"):
        raise UsageError("a recorded profile is for building; leave it out to profile this device")
    if check < 0:
        raise UsageError(f"check must be 0 or more plans, not {check}")
    need_build_packages("profiling a card")
    _must_be_writable(export, out)
    made, _ = request(model, target=target, latency="1x", **options)
    from edgeprune import artifact, pipeline

    made = replace(made, check=check)
    stages = [stage for stage in pipeline.PROFILING if stage.name != "check" or check]
    cache = Path(cache_dir) if cache_dir else pipeline.default_cache_dir()
    done = pipeline.run_stages(stages, made, cache, rebuild=rebuild, console=console)
    document = artifact.read_json(done["profile"].folder / "profile.json")
    for name in ("survey", "check"):
        if name in done:
            document[name] = artifact.read_json(done[name].folder / f"{name}.json")
    _write_profile(document, export, out, done["profile"].folder / "samples.npz", console)
    return document


def table(
    model: str = "digits", *, cache_dir: str | Path | None = None, rebuild: bool = False, console: Console = SILENT,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The device profile alone, as a build makes it: the latency table without the survey. Options as for `request`."""
    need_build_packages("profiling a card")
    made, _ = request(model, latency="1x", **options)
    from edgeprune import artifact, pipeline

    cache = Path(cache_dir) if cache_dir else pipeline.default_cache_dir()
    done = pipeline.run_stages(pipeline.PIPELINE[:2], made, cache, rebuild=rebuild, console=console)
    return artifact.read_json(done["profile"].folder / "profile.json")


def _profile_file(
    path: Path,
    target: str,
    out: str | Path | None,
    console: Console,
    *,
    runtime: str = "",
    precision: str = "fp32",
    threads: int = 0,
    seed: int = 0,
    device: str = "",
    **others: Any,
) -> dict[str, Any]:
    """The survey of an ONNX file: no table, as nobody knows which of its parts can be removed."""
    if wrong := [name.replace("_", "-") for name, value in others.items() if value]:
        raise UsageError(
            f"--{wrong[0]} is for model cards; '{path}' is an ONNX file: it has no latency table and is not cached"
        )
    if not path.is_file():
        raise UsageError(f"there is no model file '{path}'")
    _must_be_writable(None, out)
    from edgeprune.latency import survey

    under = config.Conditions(config.load_target(target), runtime, precision, threads, seed, device)
    document = survey.survey_file(path, under, console)
    _write_profile(document, None, out, None, console)
    return document


def _must_be_writable(export: str | Path | None, out: str | Path | None) -> None:
    """Raise StorageError before minutes of measuring, not after."""
    from edgeprune import artifact

    if export:
        artifact.must_be_writable(Path(export), "--export", folder=False)
    if out:
        artifact.must_be_writable(Path(out), "--out", folder=True)


def _write_profile(
    document: dict[str, Any], export: str | Path | None, out: str | Path | None, samples: Path | None, console: Console
) -> None:
    """The profile as one file, and as a folder with its report."""
    from edgeprune.report import profiling

    text = json.dumps(document, indent=1)
    try:
        if export:
            Path(export).write_text(text, encoding="utf-8")
            console.say(f"profile: {export}")
        if out:
            folder = Path(out)
            (folder / "profile.json").write_text(text, encoding="utf-8")
            (folder / "profile.md").write_text(profiling.markdown(document), encoding="utf-8")
            if samples is not None:
                shutil.copyfile(samples, folder / "samples.npz")
            console.say(f"report: {folder / 'profile.md'}")
    except OSError as error:
        raise StorageError(f"cannot write the profile: {error.strerror or error} ({error.filename})") from error


def validate(
    artifact: str | Path,
    *,
    target: str = "",
    data: str = "",
    data_dir: str | Path = "",
    follow_links: bool = False,
    threads: int = 0,
    strict_clock: bool = False,
    device: str = "",
    accuracy_on: str = "build",
    out: str | Path | None = None,
    baseline: str | Path | None = None,
    max_regression: str = "",
    console: Console = SILENT,
) -> dict[str, Any]:
    """Check an artifact again, here or on a device, now; returns checks, latency and what was found. Needs no torch.

    With `data` or `data_dir` accuracy is checked too; see `recheck.validate_artifact`.
    """
    from edgeprune.recheck import validate_artifact

    return validate_artifact(
        Path(artifact), target=target, data=data, data_dir=str(data_dir), follow_links=follow_links, threads=threads, strict_clock=strict_clock,
        device=device, accuracy_on=accuracy_on, out=Path(out) if out else None,
        baseline=Path(baseline) if baseline else None, max_regression=max_regression, console=console,
    )  # fmt: skip


def report(artifacts: Sequence[str | Path], *, html: str | Path | None = None) -> list[dict[str, Any]]:
    """The manifests of artifact directories. html: where their page goes, of one artifact or a comparison of several.

    Raises UsageError for what is no artifact or is damaged, StorageError when the page cannot be written.
    """
    from edgeprune import artifact

    folders = [Path(folder) for folder in artifacts]
    manifests = [artifact.read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        artifact.check_manifest(folder, manifest)
    if html is not None:
        from edgeprune.report import page

        artifact.must_be_writable(Path(html), "--html", folder=False)
        if len(folders) == 1:
            text = page.artifact_page(manifests[0], page.read(folders[0], manifests[0]))
        else:
            text = page.comparison_page(list(zip(folders, manifests, strict=True)))
        try:
            Path(html).write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write '{html}': {error.strerror}; choose another --html") from error
    return manifests
