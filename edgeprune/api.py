"""The Python API: what the commands do, without the terminal. Arguments have the names of the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import config
from edgeprune.config import ModelSpec, Request
from edgeprune.console import SILENT, Console
from edgeprune.errors import UsageError
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
    epochs: float | None = None,
    max_drop: float | None = None,
    quantile: str = "",
    criterion: str = "fisher",
    runtime: str = "",
    precision: str = "fp32",
    threads: int = 0,
    seed: int = 0,
    strict_clock: bool = False,
) -> tuple[Request, list[Latency]]:
    """Names and texts checked and turned into what the pipeline takes. Raises UsageError."""
    texts = [latency] if isinstance(latency, str) else list(latency)
    latencies = list(dict.fromkeys(config.parse_latency(text) for text in texts))
    if not latencies:
        raise UsageError("no latency is asked for; add --latency 10ms, 2x or 40%")
    spec = config.load_target(target)
    card = with_data(config.load_card(model), data, data_dir)
    if epochs is not None:
        if not 0 <= epochs < float("inf"):
            raise UsageError(f"epochs must be 0 or more, not {epochs}")
        card = replace(card, finetune=replace(card.finetune, epochs=(float(epochs),), sizes=()))
    if max_drop is not None and not max_drop >= 0:
        raise UsageError(f"max-drop must be 0 or more accuracy points, not {max_drop}")
    if threads < 0:
        raise UsageError(f"threads must be 0 (all) or more, not {threads}")
    made = Request(
        card=card, target=spec, latency=latencies[0], weights=Path(weights) if weights else None,
        quantile=quantile or spec.quantile, max_drop=max_drop, criterion=criterion, runtime=runtime,
        precision=precision, threads=threads, seed=seed, strict_clock=strict_clock,
    )  # fmt: skip
    return made, latencies


def with_data(card: ModelSpec, data: str, data_dir: str | Path) -> ModelSpec:
    """The card with another data set, or another place for its own."""
    if not data and not data_dir:
        return card
    name = data or ("folder" if card.data.name == "digits" else card.data.name)
    return replace(card, data=replace(card.data, name=name, dir=str(data_dir) or card.data.dir))


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
    made, latencies = request(model, **options)
    from edgeprune import pipeline

    cache = Path(cache_dir) if cache_dir else pipeline.default_cache_dir()
    return pipeline.build(made, latencies, out=Path(out), cache_dir=cache, rebuild=rebuild, console=console)


def profile(
    model: str = "digits",
    *,
    cache_dir: str | Path | None = None,
    rebuild: bool = False,
    console: Console = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Measure the device; returns the profile document (schema edgeprune.profile/1)."""
    made, _ = request(model, latency="1x", **options)
    from edgeprune import artifact, pipeline

    cache = Path(cache_dir) if cache_dir else pipeline.default_cache_dir()
    done = pipeline.run_until("profile", made, cache, rebuild=rebuild, console=console)
    return artifact.read_json(done.folder / "profile.json")


def validate(
    artifact: str | Path, *, threads: int = 0, strict_clock: bool = False, console: Console = SILENT
) -> dict[str, Any]:
    """Check an artifact again, here and now; returns checks, latency and what was found. Needs no torch."""
    from edgeprune.checks import validate_artifact

    return validate_artifact(Path(artifact), threads=threads, strict_clock=strict_clock, console=console)
