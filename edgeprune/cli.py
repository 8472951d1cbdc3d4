"""The command line: parse, call the library, print. Decides nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edgeprune import __version__, errors
from edgeprune.errors import EdgepruneError, UsageError

ISSUES = "the edgeprune issue tracker"
CRASH_HELP = "this is a defect in edgeprune"


def main() -> None:
    """Run the command line and exit with the code of the contract."""
    with _interruptible():
        _run()


def _run() -> None:
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ and _in_a_group():
            sys.exit(errors.PASSED)
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        _fail_json(error.format_message(), errors.UsageError.exit_code)
        sys.exit(errors.UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _end("interrupted; finished stages are kept: run the same command again to resume", errors.INTERRUPTED)
    except EdgepruneError as error:
        if type(error) is EdgepruneError and _verbose():
            traceback.print_exc()
        _end(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(errors.StorageError.exit_code)
    except Exception as error:
        if _verbose():
            traceback.print_exc()
        _end(
            f"{CRASH_HELP}: {type(error).__name__}: {error}; run again with -v and report the output to {ISSUES}",
            EdgepruneError.exit_code,
        )


def _verbose() -> bool:
    return "-v" in sys.argv or "--verbose" in sys.argv


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is Ctrl-C: workers end, and work folders go. Neither gets lost where Python swallows exceptions.

    An interrupt that comes while an object is being deleted is only reported, and the work would go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    report = sys.unraisablehook

    def terminate(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what cleans up is not interrupted
        raise KeyboardInterrupt

    def swallowed(found: Any) -> None:
        if found.exc_type is KeyboardInterrupt:
            signal.signal(signal.SIGTERM, terminate)
            # Later: one that came at once would be raised in here, and swallowed as well.
            threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()
        else:
            report(found)

    before = signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGTERM, before)


def _in_a_group() -> bool:
    """Whether `accelerate launch` started this process and leaves it nothing to do."""
    from edgeprune.tuning import launch

    return launch.lead_or_leave(sys.argv[1:])


def _end(message: str, code: int) -> None:
    click.echo(f"edgeprune: {message}", err=True)
    _fail_json(message, code)
    sys.exit(code)


def _fail_json(message: str, code: int) -> None:
    """With --format json, stdout is one JSON document also when the command fails."""
    if ("json" in sys.argv and "--format" in sys.argv) or "--format=json" in sys.argv:
        click.echo(json.dumps({"exit_code": code, "error": message}))


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _read_config(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """Values of the file become defaults, so that the command line wins."""
    if value is None:
        return
    from edgeprune.config import read_toml

    table = read_toml(Path(value))
    known = {p.name: p for p in ctx.command.params if p.name not in ("config", "output_format")}
    for key, setting in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"{value}: {errors.unknown('key', key, [str(k).replace('_', '-') for k in known])}")
        if known[name].multiple and not isinstance(setting, list):
            setting = [setting]
        ctx.default_map = {**(ctx.default_map or {}), name: setting}


MODEL = click.argument("model", default="digits")
CONFIG = click.option("--config", type=click.Path(), is_eager=True, expose_value=False, callback=_read_config,
                      help="TOML file with the names of these options; the command line wins.")  # fmt: skip
TARGET = click.option(
    "--target", required=True, metavar="NAME", help="Device class: a name from `edgeprune targets`, or a .toml file."
)
FOLLOW = click.option(
    "--follow-links", is_flag=True, help="Read images over links that lead out of DIR; without it they are refused."
)
DATA = _options(
    click.option("--weights", type=click.Path(), metavar="FILE", help="Weights of the dense model, .safetensors or .pth, instead of the card's."),
    click.option("--data", default="", metavar="NAME", help="Data set in timm.data's names (folder, torch/cifar10, hfds/...), or digits."),
    click.option("--data-dir", default="", type=click.Path(), metavar="DIR", help="Where the data set is: a folder with train/ and validation/ (or val/, test/), or a .zip or .tar of one."),
    click.option("--held-out-domain", default="", metavar="NAME", help="DIR/<domain>/<class>/*: train and calibrate on the other domains only, and judge this one apart."),
    FOLLOW,
)  # fmt: skip
TASK = click.option("--task", default="", metavar="NAME",
                    help="classify, or features: an embedding model without its classifier, judged by cosine similarity and nearest neighbours (default: the card's).")  # fmt: skip
SERVED = _options(
    click.option("--image-size", default="", metavar="SIZE", help="Image size instead of the model's own, as in 192 or 192x256 (height x width); position embeddings are interpolated."),
    click.option("--batch", default=0, metavar="N", help="Images of one inference, which --latency is then of (default: the card's, 1)."),
    click.option("--dynamic-batch", is_flag=True, help="Files that take any number of images; the latency is of --batch."),
    click.option("--fold-preprocessing", default="", is_flag=False, flag_value="auto", metavar="[SIZE]",
                 help="Files that take raw uint8 images [batch, height, width, channels] of one size, as in 480x640, and resize, crop and normalise them; without SIZE it is the one they are resized to."),
)  # fmt: skip
FILES = _options(
    click.option("--ir-precision", type=click.Choice(["fp32", "fp16"]), default=None, help="Of the weights in OpenVINO's files (default: the card's, fp32)."),
    click.option("--class-names", type=click.Path(), metavar="FILE", help="Class names for the files' metadata, one a line, instead of the card's or the data set's."),
)  # fmt: skip
STRICT = click.option("--strict-clock", is_flag=True,
                      help="Take the machine as slow or fast as it is now, instead of correcting for drift since it was profiled.")  # fmt: skip
MACHINE = _options(
    click.option("--runtime", default="", metavar="NAME", help="onnxruntime or openvino; by default the faster one on this machine."),
    click.option("--precision", default="fp32", show_default=True, help="Numeric precision of the artifact."),
    click.option("--threads", default=0, help="Threads at inference; 0 = all that this process may use."),
    click.option("--seed", default=0, show_default=True, help="Seed of data splits, sampling and tuning."),
    click.option("--cache-dir", type=click.Path(), metavar="DIR", help="Where finished stages are kept (default: $EDGEPRUNE_CACHE_DIR or ~/.cache/edgeprune)."),
    click.option("--rebuild", is_flag=True, help="Do every stage again, even where nothing has changed."),
    click.option("--max-memory", default="", metavar="SIZE", help="What this may take at most, as 4GiB: more than that waits on disk, and what cannot is refused before any work."),
)  # fmt: skip
CI = _options(
    click.option("--junit", type=click.Path(), metavar="FILE", help="Write the gates to FILE as JUnit XML; an undecided one is an error."),
    click.option("--github", is_flag=True, help="In GitHub Actions: annotate gates that did not pass, and write the step summary."),
)  # fmt: skip
DIMS = click.option("--dims", default="", metavar="NAMES",
                    help="What a plan may choose, and a profile has prices of: heads, mlp (neurons), depth (whole sub-blocks), tokens, qk (ranks of heads), precision (int8); comma-separated (default: all that the allocator knows but precision).")  # fmt: skip
DEVICE = click.option("--device", default="", metavar="DEVICE",
                      help="Measure there instead of here: a name from `edgeprune device list`, or ssh://[user@]host[:port].")  # fmt: skip
ACCURACY_ON = click.option("--accuracy-on", type=click.Choice(["build", "device"]), default="build", show_default=True,
                           help="Where accuracy is judged with --device: on this machine, or there.")  # fmt: skip
OUTPUT = _options(
    click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
                 help="json: one JSON document on stdout, everything else on stderr."),
    click.option("-q", "--quiet", is_flag=True, help="Print only warnings and the result."),
    click.option("-v", "--verbose", is_flag=True, help="Print every detail, and tracebacks of internal errors."),
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgeprune")
def cli() -> None:
    """Give edgeprune a Vision Transformer, a data set and a device: it returns the most accurate
    artifact that measurably meets the latency on that device.

    Exit codes: 0 passed; 1 a gate failed; 2 bad input; 3 the target is not here; 4 the latency cannot be
    reached; 5 a file cannot be read or written; 6 too noisy to decide; 70 internal error; 130 interrupted
    (Ctrl-C or SIGTERM).
    """


@cli.command()
@MODEL
@CONFIG
@TARGET
@click.option("--latency", "latency", required=True, multiple=True, metavar="LIMIT",
              help="10ms, 2.5x (speed-up over dense) or 40% (of dense). Repeat it to build a family in one run.")  # fmt: skip
@DATA
@TASK
@SERVED
@FILES
@click.option("--max-drop", type=float, metavar="POINTS", help="Second gate: accuracy points the artifact may lose.")
@click.option(
    "--quantile",
    type=click.Choice(["p50", "p90", "p99"]),
    default=None,
    help="Latency quantile that is gated (default: the target's).",
)
@click.option("--epochs", type=float, help="Epochs of fine-tuning instead of the card's; 0 = none.")
@click.option("--method", default="edgeprune", show_default=True, metavar="NAME",
              help="A named combination of the four parts below: a name from `edgeprune methods`.")  # fmt: skip
@click.option("--criterion", default="", metavar="NAME", help="How units are scored, instead of the method's.")
@click.option(
    "--allocator", default="", metavar="NAME", help="How much is kept of which sub-block, instead of the method's."
)
@click.option(
    "--schedule", default="", metavar="NAME", help="When units go, before or during training, instead of the method's."
)
@click.option(
    "--recovery", default="", metavar="NAME", help="What is done to the weights that stay, instead of the method's."
)
@click.option(
    "--search-seconds",
    type=float,
    help="How long to search for a better plan than the least sum of scores; 0 = not at all (default: 60).",
)
@click.option(
    "--polish",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="After the refit, train each block for N passes over the calibration images to meet the dense one; no labels.",
)
@DIMS
@click.option("--reducer", default="", metavar="NAME",
              help="Which tokens stay where a plan drops some: cls, evit, zero-tprune or tome (default: the method's, cls).")  # fmt: skip
@click.option("--selection", default="random", show_default=True, metavar="NAME",
              help="Which training images calibrate: random, balanced (as many of each class) or density (hard ones of complex concepts).")  # fmt: skip
@click.option("--tune-on", type=float, default=1.0, show_default=True, metavar="SHARE",
              help="Share of the other training images to fine-tune on, chosen by the same selection.")  # fmt: skip
@click.option(
    "--gradual",
    is_flag=True,
    help="With several latencies: prune each model from the tuned one of the milder latency before.",
)
@MACHINE
@click.option(
    "--out",
    type=click.Path(),
    default="artifacts",
    show_default=True,
    metavar="DIR",
    help="Where the artifact directory appears.",
)
@STRICT
@click.option("--profile", type=click.Path(), metavar="FILE",
              help="Use a profile that `edgeprune profile --export` recorded; on another device the latency is then predicted, not validated.")  # fmt: skip
@click.option("--processes", default=0, metavar="N",
              help="Processes that tune together, under Hugging Face Accelerate; 0 = one.")  # fmt: skip
@click.option("--accelerate-config", type=click.Path(), metavar="FILE",
              help="Tune in the processes that a file of `accelerate config` describes.")  # fmt: skip
@DEVICE
@ACCURACY_ON
@click.option("--sibling", type=click.Path(), multiple=True, metavar="ARTIFACT",
              help="An artifact of a smaller or larger model on the same data; the report draws its dense model as a baseline. Repeatable.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show which stages would run and which are done; run nothing.")
@CI
@OUTPUT
def build(
    model: str,
    out: str,
    cache_dir: str | None,
    rebuild: bool,
    dry_run: bool,
    junit: str | None,
    github: bool,
    output_format: str,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """Prune, fine-tune, export, simplify, compile and validate MODEL (a card, a .toml file or a timm name).

    Example: edgeprune build digits --target cpu-avx2 --latency 10ms
    """
    from edgeprune import api, checks, ci, report
    from edgeprune.console import Console

    options["quantile"], options["ir_precision"] = options["quantile"] or "", options["ir_precision"] or ""
    console = Console(quiet=quiet or dry_run, verbose=verbose)
    if dry_run:
        from edgeprune.extras import need_build_packages

        need_build_packages()
        from edgeprune import pipeline

        request, latencies = api.request(model, **options)
        pipeline.check_request(request)
        rows = pipeline.preview(request, latencies, Path(cache_dir) if cache_dir else pipeline.default_cache_dir())
        if output_format == "json":
            click.echo(
                json.dumps([{"stage": s, "latency": latency, "done": done} for s, latency, done in rows], indent=1)
            )
        else:
            for stage, latency, done in rows:
                click.echo(f"{stage:10} {latency:14} {'done before' if done else 'would run'}")
        return errors.PASSED
    with ci.told("build", junit, github) as outcome:
        artifacts = api.build(model, out=out, cache_dir=cache_dir, rebuild=rebuild, console=console, **options)
        outcome.suites = [
            ci.Suite(a.folder.name, a.manifest["checks"], sum(s["seconds"] for s in a.manifest["stages"]))
            for a in artifacts
        ]
        outcome.summary = report.summary([a.manifest for a in artifacts])
    code = checks.worst(built.exit_code for built in artifacts)
    if output_format == "json":
        click.echo(
            json.dumps(
                {"exit_code": code, "artifacts": [{"path": str(a.folder), "manifest": a.manifest} for a in artifacts]},
                indent=1,
            )
        )
    else:
        for built in artifacts:
            report.show(built.manifest, str(built.folder))
    return code


@cli.command()
@MODEL
@CONFIG
@DATA
@click.option("--epochs", type=float, multiple=True, help="Epochs instead of the card's, one per phase.")
@click.option("--seed", default=0, show_default=True, help="Seed of initial weights, data order and augmentation.")
@click.option(
    "--out", type=click.Path(), metavar="FILE", help="Where the fp16 .safetensors go (default: MODEL.safetensors here)."
)
@OUTPUT
def train(model: str, out: str | None, output_format: str, quiet: bool, verbose: bool, **options: Any) -> int:
    """Train MODEL by its card's [train] recipe: the fine-tuning stage with nothing pruned.

    Starts from random weights, or from --weights. Example: edgeprune train digits
    """
    from edgeprune.console import Console
    from edgeprune.extras import need_build_packages

    need_build_packages("training")
    from edgeprune.train import train as run

    facts = run(model, out=out, console=Console(quiet=quiet, verbose=verbose), **options)
    if output_format == "json":
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(
            f"{facts['weights']}: {facts['accuracy']:.2f} % on {facts['images']} evaluation images, {facts['seconds']:.0f} s"
        )
    return errors.PASSED


@cli.command()
@click.option("--accelerate-config", type=click.Path(), required=True, metavar="FILE",
              help="This machine's file of `accelerate config`: as the build's, but with a machine_rank of its own.")  # fmt: skip
@click.option("--cache-dir", type=click.Path(), metavar="DIR",
              help="The build's cache, in a folder that all machines share (default: $EDGEPRUNE_CACHE_DIR or ~/.cache/edgeprune).")  # fmt: skip
@click.option("--jobs", default=0, metavar="N", help="Leave after so many tunings; 0 = stay until interrupted.")
@OUTPUT
def join(output_format: str, quiet: bool, verbose: bool, **options: Any) -> int:
    """Tune with a build that runs on another machine, under `edgeprune build --accelerate-config FILE`.

    Example: edgeprune join --accelerate-config second.yaml --cache-dir /shared/edgeprune
    """
    from edgeprune import api
    from edgeprune.console import Console

    joined = api.join(console=Console(quiet=quiet, verbose=verbose), **options)
    if output_format == "json":
        click.echo(json.dumps(joined, indent=1))
    else:
        click.echo(f"{joined['tunings']} tunings joined, {joined['failed']} of them failed")
    return errors.EdgepruneError.exit_code if joined["failed"] else errors.PASSED


@cli.command()
@MODEL
@CONFIG
@click.option("--target", default="", metavar="NAME",
              help="Device class: a name from `edgeprune targets`, or a .toml file (default: what `targets detect` names).")  # fmt: skip
@click.option("--check", default=0, metavar="N",
              help="Compare the table's predictions with N held-out random plans, assembled and measured.")  # fmt: skip
@click.option("--export", type=click.Path(), metavar="FILE",
              help="Write the profile to FILE, for `edgeprune build --profile FILE` on another machine.")  # fmt: skip
@click.option(
    "--out", type=click.Path(), metavar="DIR", help="Write profile.json, profile.md and the raw samples to DIR."
)
@DIMS
@DEVICE
@DATA
@TASK
@SERVED
@MACHINE
@OUTPUT
def profile(model: str, output_format: str, quiet: bool, verbose: bool, **options: Any) -> int:
    """Measure this device: what every head and every group of neurons of MODEL costs, and where the time goes.

    MODEL may also be an .onnx file: then there is no latency table, and no torch is needed.

    Example: edgeprune profile digits --target cpu-avx2 --check 20
    """
    from edgeprune import api
    from edgeprune.console import Console
    from edgeprune.report import profiling

    document = api.profile(model, console=Console(quiet=quiet, verbose=verbose), **options)
    if output_format == "json":
        click.echo(json.dumps(document, indent=1))
    else:
        profiling.show(document)
    return errors.PASSED


@cli.command()
@click.argument("matrix", type=click.Path())
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="local: processes on this machine; ray: the nodes of a Ray cluster ($RAY_ADDRESS, or the one on this machine).")  # fmt: skip
@click.option("--jobs", default=1, show_default=True, metavar="N",
              help="Processes at a time with --engine local; one that measures here runs alone.")  # fmt: skip
@click.option("--out", type=click.Path(), default="artifacts", show_default=True, metavar="DIR",
              help="Where the artifacts, their logs and the comparison appear.")  # fmt: skip
@click.option("--cache-dir", type=click.Path(), metavar="DIR", help="Where finished stages are kept; shared by all.")
@click.option("--rebuild", is_flag=True, help="Do every stage again, even where nothing has changed.")
@OUTPUT
def sweep(matrix: str, output_format: str, quiet: bool, verbose: bool, **options: Any) -> int:
    """Build every combination of the models, targets and latencies in MATRIX, a TOML file, and compare them.

    What cannot be built does not stop the rest. The exit code is 1 if a gate failed anywhere, else the highest of all.

    Example: edgeprune sweep matrix.toml --out artifacts
    """
    from edgeprune.console import Console
    from edgeprune.fleet.sweep import markdown
    from edgeprune.fleet.sweep import sweep as run

    found = run(matrix, console=Console(quiet=quiet, verbose=verbose), **options)
    click.echo(json.dumps(found, indent=1) if output_format == "json" else markdown(found, Path(options["out"])))
    return int(found["exit_code"])


@cli.command()
@click.argument("artifact", type=click.Path())
@click.option(
    "--target", default="", metavar="NAME", help="Hold it to another device class than the one it was built for."
)
@click.option(
    "--data", default="", metavar="NAME", help="Check accuracy too: folder, or digits where it was built on them."
)
@click.option("--data-dir", default="", type=click.Path(), metavar="DIR",
              help="Labelled images: DIR/validation/<class>/* (or val, test), or DIR/<class>/*.")  # fmt: skip
@FOLLOW
@click.option("--threads", default=0, help="Threads; 0 = as many as it was built for.")
@STRICT
@click.option("--baseline", type=click.Path(), metavar="FILE",
              help="manifest.json of an earlier artifact; where its model lies beside it, both are timed turn by turn.")  # fmt: skip
@click.option("--max-regression", default="", metavar="PERCENT",
              help="Third gate: how much slower than the baseline it may be, as in 3%.")  # fmt: skip
@DEVICE
@ACCURACY_ON
@click.option(
    "--out", type=click.Path(), metavar="FILE", help="Where the result goes as JSON, with all raw samples in ms."
)
@CI
@OUTPUT
def validate(
    artifact: str,
    junit: str | None,
    github: bool,
    output_format: str,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """Check ARTIFACT again on this machine: every file's hash, the latency contract and, given data, the accuracy.
    Needs no torch.

    Example: edgeprune validate artifacts/digits-cpu-avx2-10ms --data digits
    """
    from edgeprune import api, checks, ci, recheck
    from edgeprune.console import Console
    from edgeprune.types import Check

    with ci.told("validate", junit, github) as outcome:
        found = api.validate(artifact, console=Console(quiet=quiet, verbose=verbose), **options)
        outcome.suites = [ci.Suite(Path(artifact).name, found["checks"])]
        outcome.summary = recheck.summary(found)
    code = checks.exit_code(Check(**check) for check in found["checks"])
    if output_format == "json":
        click.echo(json.dumps({"exit_code": code, **found}, indent=1))
    else:
        recheck.show(found)
    return code


@cli.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(), metavar="ARTIFACT...")
@click.option("--html", type=click.Path(), metavar="FILE",
              help="Write the page of the artifact, or of several on one front, to FILE instead.")  # fmt: skip
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="json: the manifests, and of two artifacts what changed.")  # fmt: skip
def report(artifacts: tuple[str, ...], html: str | None, output_format: str) -> int:
    """Print the report of an ARTIFACT; several are compared, and of two the change from the first to the second.

    Example: edgeprune report artifacts/* --html family.html
    """
    from edgeprune import api
    from edgeprune import report as reports

    manifests = api.report(artifacts, html=html)
    if output_format == "json":
        click.echo(json.dumps(reports.document(artifacts, manifests), indent=1))
    elif html:
        click.echo(html)
    else:
        click.echo(reports.markdown(manifests[0]) if len(manifests) == 1 else reports.comparison(manifests))
    return errors.PASSED


def _listing(kind: str, load: Callable[[str], Any], describe: Callable[[Any], str]) -> click.Group:
    """`edgeprune targets` and `edgeprune models`: list, and `show NAME`."""

    @click.group(kind, invoke_without_command=True, help=f"List the shipped {kind}; `show NAME` prints one.")
    @click.pass_context
    def group(ctx: click.Context) -> None:
        from edgeprune import config

        if ctx.invoked_subcommand is None:
            for name in config.names(kind):
                click.echo(f"{name:16} {describe(load(name))}")

    @group.command(help="Print the file of one.")
    @click.argument("name")
    def show(name: str) -> None:
        from edgeprune import config

        load(name)
        path = config.shipped(kind) / f"{name}.toml"
        path = path if path.is_file() else Path(name)
        if not path.is_file():
            raise errors.UsageError(
                f"'{name}' needs no card: it is a name of timm's, and `edgeprune build {name}` takes it"
            )
        click.echo(path.read_text(encoding="utf-8").rstrip())

    return group


def _load_target(name: str) -> Any:
    from edgeprune import config

    return config.load_target(name)


def _load_card(name: str) -> Any:
    from edgeprune import config

    return config.load_card(name)


def _fits(target: Any) -> str:
    from edgeprune.latency import device

    reason = device.unfit(target)
    return f"{target.description}{f'  (not here: {reason})' if reason else ''}"


targets = _listing("targets", _load_target, _fits)


@targets.command()
def detect() -> None:
    """Name the shipped target that fits this machine best, and why."""
    from edgeprune import config
    from edgeprune.latency import device

    best, reason = device.detect(config.load_target(name) for name in config.names("targets"))
    click.echo(f"{best.name}: {reason}")


cli.add_command(targets)


def _print_supported(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    from edgeprune import families

    if wanted:
        click.echo(families.listing())
        ctx.exit()


models = _listing("models", _load_card, lambda card: card.description)
models.params.append(
    click.Option(["--supported"], is_flag=True, is_eager=True, expose_value=False, callback=_print_supported,
                 help="List instead the timm names that are tested, by family.")
)  # fmt: skip
cli.add_command(models)


@cli.group()
def device() -> None:
    """Devices that are reached over SSH: prepare one, list them, look at one, remove one.

    Example: edgeprune device add pi ssh://pi@raspberrypi.local
    """


@device.command()
@click.argument("name")
@click.argument("address", metavar="ssh://[USER@]HOST[:PORT]")
@click.option("--python", default="", metavar="PATH",
              help="Run the worker with this Python there, with the packages that it has (default: the first from 3.9 on).")  # fmt: skip
@click.option("--runtime", multiple=True, metavar="NAME",
              help="Send this runtime; may be repeated (default: onnxruntime, where that Python has none).")  # fmt: skip
@click.option("--wheels", type=click.Path(), metavar="DIR",
              help="Take numpy and the runtimes from this folder of wheels instead of the package index.")  # fmt: skip
@click.option("--ssh-config", default="", type=click.Path(), metavar="FILE",
              help="A configuration file for ssh instead of your own (ssh -F).")  # fmt: skip
@OUTPUT
def add(name: str, address: str, output_format: str, quiet: bool, verbose: bool, **options: Any) -> int:
    """Prepare the device at this address and remember it as NAME.

    Sends the measuring worker, and numpy and a runtime where they are missing: the device needs a Python from 3.9 on,
    and no network. Example: edgeprune device add pi ssh://pi@raspberrypi.local
    """
    from edgeprune.console import Console
    from edgeprune.latency import devices

    found = devices.add(name, address, console=Console(quiet=quiet, verbose=verbose), **options)
    if output_format == "json":
        click.echo(json.dumps({"name": found.name, "url": found.address.url, "python": found.python,
                               "fingerprint": dict(found.fingerprint)}, indent=1))  # fmt: skip
    else:
        click.echo(
            f"{found.name}: {found.fingerprint['cpu']} at {found.address.url}; now: edgeprune build --device {found.name} ..."
        )
    return errors.PASSED


@device.command("list")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="json: one JSON document on stdout.")  # fmt: skip
def list_devices(output_format: str) -> int:
    """List the devices that were added; connects to none of them."""
    from edgeprune.latency import devices

    rows = [{"name": d.name, "url": d.address.url, "cpu": d.fingerprint.get("cpu", ""), "added": d.added}
            for d in devices.known().values()]  # fmt: skip
    if output_format == "json":
        click.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            click.echo(f"{row['name']:16} {row['url']:32} {row['cpu']} (added {row['added']})")
    return errors.PASSED


@device.command()
@click.argument("name")
@OUTPUT
def check(name: str, output_format: str, quiet: bool, verbose: bool) -> int:
    """Look at the device NAME: what it is, whether something else keeps it busy, whether it is hot or throttled.

    Ends with 6 when something would disturb a measurement now. Example: edgeprune device check pi
    """
    from edgeprune.latency import devices

    found = devices.check(name)
    if output_format == "json":
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(devices.told(found))
    return errors.INCONCLUSIVE if found["problems"] else errors.PASSED


@device.command()
@click.argument("name")
@click.option("--forget", is_flag=True, help="Do not connect: for a device that is gone.")
def remove(name: str, forget: bool) -> int:
    """Delete what was sent to the device NAME, and forget it."""
    from edgeprune.latency import devices

    devices.remove(name, forget=forget)
    click.echo(f"{name} is removed")
    return errors.PASSED


@cli.command()
@click.argument("name", default="")
def methods(name: str) -> None:
    """List the methods (for --method) and the parts they are made of; with NAME, say all about one.

    Example: edgeprune methods ziplm
    """
    from edgeprune import methods

    click.echo(methods.describe(name) if name else methods.listing())


if __name__ == "__main__":
    main()
