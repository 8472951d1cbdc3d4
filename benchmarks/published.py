"""What the papers of ZipLM, NViT and SLS report of their methods, looked for in what `edgeprune build` makes of them.

    python benchmarks/published.py --model cifar10 --data-dir DIR --epochs 0.5
    python benchmarks/published.py --model cifar10 --data-dir DIR ziplm sls

ziplm   one run prunes a whole family, each model from the tuned one before it, and each meets its own latency; the last
        one is no worse than one pruned in one step and tuned as long as all of the family together.
nvit    units are redistributed: the blocks in the middle keep more heads and neurons than the first and last ones.
sls     classes are as separate some blocks before the end as at the end; cut there, adapters and the classifier win
        back most of what is lost, and a task stores no more than the plan and them.

P3B's, late blocks that regain width after a transfer, is in tests/test_schedules.py; grouped pruning for other domains
is domains.py. -> results/published-MODEL.md
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy
import methods as bench

from edgeprune import artifact, config, methods, pipeline
from edgeprune.allocators import sls
from edgeprune.config import Request
from edgeprune.console import SILENT, Console
from edgeprune.publish import Artifact
from edgeprune.stages import baseline

FAMILY, QUICK_FAMILY = ("2x", "3x", "4x"), ("1.3x", "1.5x")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("papers", nargs="*", help=f"of {', '.join(PAPERS)} (default: all)")
    accuracy.shared(parser, model="digits", target=accuracy.fitting().name, threads=1)
    parser.add_argument("--epochs", type=float, default=0.5, help="of tuning, per model of the family (default: 0.5)")
    parser.add_argument("--out", type=Path, default=accuracy.HERE / "results")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, short measurements: it shows that all of it runs"
    )
    options = parser.parse_args(argv)
    options.measurements = 2  # what accuracy.quick limits
    if unknown := set(options.papers) - set(PAPERS):
        parser.error(f"there is no paper '{min(unknown)}'; known: {', '.join(PAPERS)}")
    with accuracy.quick(options) if options.quick else accuracy.full(options) as request:
        build = Builder(request, options.cache_dir, options.epochs, QUICK_FAMILY if options.quick else FAMILY)
        lines = [f"{request.card.name}, {accuracy.commit()}, `--epochs {options.epochs:g}`"]
        for paper in options.papers or PAPERS:
            found = ["", f"## {paper}", "", *PAPERS[paper](build)]
            print("\n".join(found), flush=True)
            lines += found
    path = options.out / f"published-{request.card.name}.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"written to {path}")


class Builder:
    """Builds of one model, of one latency table. family: latencies; epochs: of tuning, per model of it."""

    def __init__(self, request: Request, cache_dir: Path, epochs: float, family: Sequence[str]) -> None:
        self.request, self.cache_dir, self.epochs, self.family = request, cache_dir, epochs, family

    def __call__(self, method: str, *latencies: str, epochs: float, **changes: Any) -> list[Artifact]:
        """One artifact per latency, kept beside the cache."""
        recipe = replace(self.request.card.finetune, epochs=(epochs,), sizes=())
        own = {**bench.changes_of(methods.get(method)), **changes}
        asked = [config.parse_latency(text) for text in latencies]
        request = replace(self.request, card=replace(self.request.card, finetune=recipe), latency=asked[0], **own)
        out = self.cache_dir / "published" / f"{method}-{epochs:g}{''.join(sorted(changes))}"
        return pipeline.build(request, asked, out=out, cache_dir=self.cache_dir, console=Console())

    def dense(self) -> baseline.Dense:
        done = pipeline.run_stages(pipeline.PIPELINE[:1], self.request, self.cache_dir)
        return baseline.load(self.request, done["baseline"].folder)


def judged(made: Artifact) -> str:
    """Accuracy, points lost with their 95 % interval, and the measured speed-up."""
    found = made.manifest["accuracy"]
    low, high = found["drop_ci"]
    lost = f"{found['dense'] - found['pruned']:.2f} [{low:.2f}, {high:.2f}]"
    return f"{found['pruned']:.2f} %, lost {lost}, at {1 / made.manifest['pruned']['ratio']:.2f}x"


def row(name: str, values: Sequence[object]) -> str:
    return f"| {name} | " + " | ".join(map(str, values)) + " |"


def heading(blocks: int) -> str:
    return row("block", range(1, blocks + 1)) + "\n" + "|---" * (blocks + 1) + "|"


# The papers -----------------------------------------------------------------------------------


def ziplm(build: Builder) -> Iterator[str]:
    """A family in one run, and each of its models pruned from the dense one and tuned as long as the family so far."""
    family = build("ziplm", *build.family, epochs=build.epochs, gradual=True)
    yield row("asked", ["latency", "one run, each from the one before", "from the dense model, tuned as long in all"])
    yield "|---" * 4 + "|"
    for place, (latency, member) in enumerate(zip(build.family, family, strict=True), 1):
        [alone] = [member] if place == 1 else build("ziplm", latency, epochs=place * build.epochs)
        yield row(latency, [member.checks[0].verdict, judged(member), judged(alone)])


def nvit(build: Builder) -> Iterator[str]:
    """What is left of every block."""
    [made] = build("nvit", build.family[0], epochs=build.epochs)
    blocks = artifact.read_plan(made.folder / "plan.json").plan.blocks
    yield f"{build.family[0]}: {judged(made)}\n"
    yield heading(len(blocks))
    quarter = len(blocks) // 4
    means = []
    for kind in ("heads", "neurons"):
        counts = [len(getattr(block, kind)) for block in blocks]
        yield row(kind, counts)
        middle, ends = counts[quarter : len(counts) - quarter], counts[:quarter] + counts[len(counts) - quarter :]
        means.append(f"{kind} {sum(middle) / len(middle):.1f} and {sum(ends) / len(ends):.1f}")
    yield f"\nA block of the middle half, and of the quarters at both ends, keeps on average: {'; '.join(means)}."


def truncated(build: Builder) -> Iterator[str]:
    """How separate classes are after every block, and what truncation with adapters makes of it."""
    dense = build.dense()
    task: Any = types.SimpleNamespace(
        model=dense.model,
        found=types.SimpleNamespace(labelled=lambda: dense.splits.calibration.batches(accuracy.BATCH)),
        console=SILENT,
    )  # what sls.class_features looks at
    features, labels = sls.class_features(task)
    apart = [sls.separation(own, labels, build.request.seed) for own in features]
    left = sls.truncation(apart.__getitem__, len(apart))
    yield f"Silhouette coefficient of {len(labels)} calibration images after every block; by the rule {left} blocks are left:\n"
    yield heading(len(apart))
    yield row("SC", [f"{own:.2f}" for own in apart])
    for epochs in (0.0, build.epochs):
        [made] = build("sls", "80%", epochs=epochs, recovery="lora")
        kept = sum(bool(block.heads) for block in artifact.read_plan(made.folder / "plan.json").plan.blocks)
        tuned = f"adapters and classifier tuned for {epochs:g} epochs" if epochs else "untuned"
        yield f"\nThe first {kept} of {len(apart)} blocks, {tuned}: {judged(made)}."
    files = ("plan.json", artifact.ADAPTERS, "model.safetensors")
    yield "\n" + ", ".join(f"`{file}` {(made.folder / file).stat().st_size / 1024:.0f} KiB" for file in files) + "."


PAPERS: dict[str, Callable[[Builder], Iterator[str]]] = {"ziplm": ziplm, "nvit": nvit, "sls": truncated}


if __name__ == "__main__":
    main()
