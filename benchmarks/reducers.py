"""Which tokens stay: the dense model with fewer tokens, by reducer and schedule: accuracy and measured latency.

    python benchmarks/reducers.py --model digits
    python benchmarks/reducers.py --model cifar10 --data-dir DIR --images 2000

Nothing but tokens goes, and nothing is tuned. Tokens are dropped after the attention of the blocks a third and two thirds of the
way, to the same share each time, rounded to what plans may leave. All are timed turn by turn with the dense model, in the product's
clock. -> results/reducers-MODEL.md
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import accuracy
import numpy as np
import torch

from edgeprune import checks, pipeline, reducers, structure, vit
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import choose, device
from edgeprune.latency.clock import COPIES
from edgeprune.stages import baseline, export, shapes, simplify
from edgeprune.types import Plan

SHARES = (0.7, 0.5, 0.3)  # of the patches that come in, at each of the two drops
SECONDS = 90.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accuracy.shared(parser, model="digits", target=accuracy.fitting().name, threads=1)
    parser.add_argument("--out", type=Path, default=accuracy.HERE / "results")
    options = parser.parse_args(argv)
    with accuracy.full(options) as request, tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        done = pipeline.run_stages(pipeline.PIPELINE[:1], request, options.cache_dir, console=Console())
        dense, anchor = baseline.load(request, done["baseline"].folder), done["baseline"].folder / "dense.onnx"
        paths = {
            (left, name): exported(dense, plan_of(dense.sizes, left, name), Path(folder) / f"{name}-{left[0]}.onnx")
            for left in schedules(dense.sizes)
            for name in reducers.names()
        }
        lines = judged(request, dense, anchor, paths, options.images)
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"reducers-{request.card.name}.md").write_text(text)
    print(text)


def schedules(sizes: vit.Anatomy) -> list[tuple[int, int]]:
    """How many patches the first and the second drop leave."""
    counts = np.array(shapes.patch_counts(sizes))

    def nearest(wanted: float) -> int:
        return int(counts[np.abs(counts - wanted).argmin()])

    return [(nearest(share * sizes.patches), nearest(share * share * sizes.patches)) for share in SHARES]


def plan_of(sizes: vit.Anatomy, left: tuple[int, int], reducer: str) -> Plan:
    """All heads and neurons, and so many patches after the attention of two blocks."""
    blocks = list(vit.dense_plan(sizes).blocks)
    for at, patches in zip((len(blocks) // 3, 2 * len(blocks) // 3), left, strict=True):
        blocks[at] = replace(blocks[at], patches=patches)
    return Plan(tuple(blocks), reducer=reducer)


def exported(dense: baseline.Dense, plan: Plan, out: Path) -> Path:
    model = structure.of(dense.model, plan)
    raw = out.with_suffix(".exported")
    export.to_onnx(model, dense.sizes.image, raw)
    simplify.simplify(raw, out, model)
    return out


def judged(
    request: Request, dense: baseline.Dense, anchor: Path, paths: dict[tuple[tuple[int, int], str], Path], count: int
) -> list[str]:
    """The table, a row per schedule and reducer."""
    runtime, (threads, _) = choose.eligible(request.conditions, Console())[0], device.usable_threads(request.threads)
    images = accuracy.spaced(dense.splits.evaluation, count)
    pixels, labels = (torch.cat(part).numpy() for part in zip(*images.batches(accuracy.BATCH), strict=True))
    with choose.clock(request.conditions, runtime, threads) as clock:
        names = {at: f"{at[1]} {at[0][0]} {at[0][1]}" for at in paths}
        clock.load("dense", anchor, COPIES)
        for at, path in paths.items():
            clock.load(names[at], path, COPIES)
        measured = clock.measure(list(names.values()), "dense", ci=0.005, min_rounds=60, budget_s=SECONDS)
        right = clock.predict("dense", pixels).argmax(-1) == labels
        dense_ms = float(np.median(next(iter(measured.values())).anchor_ms))
        lines = [
            f"{request.card.name}, {runtime}, {device.cpu_model()}, {threads} thread{'s' if threads > 1 else ''}; dense {100 * right.mean():.2f} % of "
            f"{len(labels)} images, {dense_ms:.2f} ms here and then. Points lost to dense on the same images and latency relative to it, "
            "turn by turn, each with its 95 % interval.", "",
            "| patches left | reducer | points lost | latency | rounds |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for (left, name), known in names.items():
            hits = clock.predict(known, pixels).argmax(-1) == labels
            drops = right.astype(float) - hits
            low, high = checks.drop_interval(drops)
            own = measured[known]
            lines.append(
                f"| {left[0]}, then {left[1]} of {dense.sizes.patches} | {name} | {100 * drops.mean():.2f} [{100 * low:.2f}, {100 * high:.2f}] | "
                f"{own.ratio:.3f} [{own.ratio_ci[0]:.3f}, {own.ratio_ci[1]:.3f}] | {len(own.samples_ms)}{'' if own.calm else ', busy machine'} |"
            )
            print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
