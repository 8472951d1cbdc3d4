"""The rows of `benchmarks/accuracy.py` as markdown tables and a plot.

    python benchmarks/tables.py [--results FILE] [--out DIR] [--label COMMIT]

Writes DIR/NAME.md, NAME being that of the results, and for every model and number of tuned steps a plot,
DIR/NAME-MODEL-STEPS.png. A value is the mean over seeds; its 95 % interval holds the test images (paired, where two methods are compared) and the spread of the seeds.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import HERE, read, unpacked
from numpy.typing import NDArray

OURS = ("edgeprune", "edgeprune-widths")  # the first of these that has rows is compared with the others
BEST = "torch-pruning, best"  # of all its variants, chosen after the fact at every speed-up: a favour
COLOURS = 10  # of matplotlib, before they come again
MARKERS = "osDv^P"  # of a plot, one for each round of the colours

Row = dict[str, Any]
#: The rows of all seeds, by method and speed-up.
Cells = dict[tuple[str, float], list[Row]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "accuracy.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument(
        "--label", default="", help="only rows of these labels, comma-separated (default: that of the last row)"
    )
    options = parser.parse_args(argv)
    rows = read(options.results)
    if not rows:
        parser.error(f"there are no rows in {options.results}; run benchmarks/accuracy.py first")
    labels = options.label.split(",") if options.label else [rows[-1]["label"]]
    options.out.mkdir(parents=True, exist_ok=True)
    parts = []
    for (model, _, _, steps), cells in sorted(grouped(rows, labels).items(), key=lambda item: item[0][3]):
        plot = options.out / f"{options.results.stem}-{model}-{steps}.png"
        parts.append(section(cells, steps, plot.name))
        draw(with_best(cells), f"{model}, {'one-shot' if not steps else f'{steps} steps of fine-tuning'}", plot)
    (options.out / f"{options.results.stem}.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


def grouped(rows: list[Row], labels: Sequence[str]) -> dict[tuple[str, str, str, int], Cells]:
    """Cells of these labels' rows by model, weights, runtime and tuned steps; of two rows alike the latest."""
    latest = {
        (r["weights"], r["method"], r["speed_up"], r["seed"], r["tune_steps"]): r for r in rows if r["label"] in labels
    }
    groups: dict[tuple[str, str, str, int], Cells] = defaultdict(lambda: defaultdict(list))
    for row in latest.values():
        if row["status"] != "no one-shot":
            group = row["model"], row["weights"], row["runtime"], row["tune_steps"]
            groups[group][row["method"], row["speed_up"]].append(row)
    return groups


# Numbers ------------------------------------------------------------------------------------


def right(row: Row, name: str = "right") -> NDArray[np.float64]:
    """1 for every test image that was named rightly `[images]`."""
    return unpacked(row[name], row["images"]).astype(float)


def mean_and_half(per_seed: NDArray[np.float64]) -> tuple[float, float]:
    """Mean in percent and half its 95 % interval, of `[seeds, images]`: images and seeds both are samples."""
    seeds, images = per_seed.shape
    variance = per_seed.mean(0).var() / images
    if seeds > 1:
        variance += per_seed.mean(1).var(ddof=1) / seeds
    return 100 * float(per_seed.mean()), 196 * math.sqrt(variance)


def accuracy(rows: list[Row]) -> tuple[float, float]:
    return mean_and_half(np.stack([right(row) for row in rows]))


def against(rows: list[Row], ours: list[Row]) -> tuple[float, float] | None:
    """Points that edgeprune is ahead, on the same images and seeds."""
    by_seed = {row["seed"]: row for row in ours}
    pairs = [right(by_seed[row["seed"]]) - right(row) for row in rows if row["seed"] in by_seed]
    return mean_and_half(np.stack(pairs)) if pairs else None


def judged(rows: list[Row]) -> bool:
    return all(row["accuracy"] is not None for row in rows)


def with_best(cells: Cells) -> Cells:
    """The variants of Torch-Pruning replaced by the best of them at every speed-up, if there are any."""
    kept: Cells = {at: rows for at, rows in cells.items() if not at[0].startswith("tp-")}
    for speed_up in sorted({at[1] for at in cells}):
        variants = [
            rows for at, rows in cells.items() if at[0].startswith("tp-") and at[1] == speed_up and judged(rows)
        ]
        reached = [rows for rows in variants if all(row["status"] != "unreachable" for row in rows)]
        if variants:
            kept[BEST, speed_up] = max(reached or variants, key=lambda rows: accuracy(rows)[0])
    return kept


def ours(cells: Cells) -> str:
    """Which of the methods is ours; "" where none is."""
    return next((name for name in OURS if any(at[0] == name for at in cells)), "")


# Tables -------------------------------------------------------------------------------------


def section(cells: Cells, steps: int, plot: str) -> str:
    some = next(iter(cells.values()))[0]
    seeds = len({row["seed"] for rows in cells.values() for row in rows})
    labels = ", ".join(sorted({row["label"] for rows in cells.values() for row in rows}))
    title = "one-shot, no fine-tuning" if not steps else f"after {steps} steps of fine-tuning"
    shown = with_best(cells)
    dense_ms = sorted({f"{row['dense_ms']:.3f}" for rows in cells.values() for row in rows})
    parts = [
        f"## {some['model']}: {title}",
        f"Top-1 in percent on {some['images']} test images, mean of {seeds} seed{'s' * (seeds > 1)} ± half the 95 % interval, and points "
        f"lost; dense {some['dense_accuracy']:.2f} % at {', '.join(dense_ms)} ms ({some['runtime']}, {some['machine']}); "
        f"code {labels}, weights {some['weights'][:8]}.",
        table(shown, lambda rows: cell(rows, seeds)),
    ]
    own = ours(shown)
    if others := {at: rows for at, rows in shown.items() if own and at[0] != own}:
        parts += [
            "Points that edgeprune is ahead, on the same images and seeds:",
            table(others, lambda rows: lead(rows, cells)),
        ]
    if any(at[0] == BEST for at in shown):
        parts += [
            "All variants of Torch-Pruning:",
            table(
                {a: r for a, r in cells.items() if a[0].startswith("tp-")}, lambda rows: cell(rows, seeds, named=False)
            ),
        ]
    parts += ["Seconds per row (preparing a seed once, then: finding the latency, tuning, judging):", table(shown, spent),
              f"![accuracy over measured speed-up]({plot})"]  # fmt: skip
    return "\n\n".join(parts)


def table(cells: Cells, write: Any) -> str:
    speed_ups = sorted({at[1] for at in cells})
    lines = ["| method | " + " | ".join(f"{s:g}x" for s in speed_ups) + " |", "|---" * (len(speed_ups) + 1) + "|"]
    for method in dict.fromkeys(at[0] for at in cells):
        row = [write(cells[method, s]) if (method, s) in cells else "" for s in speed_ups]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def cell(rows: list[Row], seeds: int, *, named: bool = True) -> str:
    """Accuracy and points lost; where the target was missed, the speed-ups that were measured; how many seeds it has, if fewer.

    `named`: with the variant of Torch-Pruning.
    """
    if not judged(rows):
        return "not reachable"
    value, half = accuracy(rows)
    missed = {row["status"] for row in rows} - {"ok"}
    lost = max(rows[0]["dense_accuracy"] - value, 0.0)
    measured = dict.fromkeys(f"{row['measured_speed_up']:.2f}" for row in sorted(rows, key=lambda row: row["seed"]))
    variant = f" ({rows[0]['method'].removeprefix('tp-')})" if named and rows[0]["method"].startswith("tp-") else ""
    busy = "" if all(row["calm"] for row in rows) else ", busy machine"
    fewer = f", {len(rows)} seed{'s' * (len(rows) > 1)}" if len(rows) < seeds else ""
    at = f" at {', '.join(measured)}x" if missed else ""
    return f"{value:.2f} ± {half:.2f} ({lost:.1f}){at}{fewer}{busy}{variant}"


def lead(rows: list[Row], cells: Cells) -> str:
    own = cells.get((ours(cells), rows[0]["speed_up"]), [])
    if not own or not judged(rows) or not judged(own):
        return ""
    found = against(rows, own)
    missed = " (slower)" if any(row["status"] == "unreachable" for row in rows) else ""
    return f"{found[0]:+.2f} ± {found[1]:.2f}{missed}" if found else ""


def spent(rows: list[Row]) -> str:
    def mean(*names: str) -> float:
        return float(np.mean([sum(row["seconds"].get(name, 0.0) for name in names) for row in rows]))

    return f"{mean('prepare'):.0f}, then {mean('search'):.0f} + {mean('tune'):.0f} + {mean('judge'):.0f}"


# Plot ---------------------------------------------------------------------------------------


def draw(cells: Cells, title: str, path: Path) -> None:
    """Accuracy over the speed-up that was measured."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib; pip install 'edgeprune[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    methods = list(dict.fromkeys(at[0] for at in cells))
    for place, method in enumerate(methods):
        points = []
        for (name, _), rows in sorted(cells.items(), key=lambda item: item[0][1]):
            if name == method and judged(rows):
                points.append((float(np.mean([row["measured_speed_up"] for row in rows])), *accuracy(rows)))
        if points:
            x, y, half = zip(*sorted(points), strict=True)
            width = 2.5 if method == ours(cells) else 1.2
            marker = MARKERS[place // COLOURS % len(MARKERS)]
            axes.errorbar(x, y, half, label=method, marker=marker, markersize=4, capsize=2, linewidth=width)
    axes.axhline(next(iter(cells.values()))[0]["dense_accuracy"], color="grey", linestyle=":", label="dense")
    axes.set(xlabel="measured speed-up over dense", ylabel="top-1 (%)", title=title)
    axes.grid(alpha=0.3)
    if len(methods) > COLOURS:
        figure.legend(fontsize=8, loc="outside right upper")
    else:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
