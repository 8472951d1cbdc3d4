"""Criteria where the data shifts: a domain is left out of training, calibration and tuning, and judged apart.

    python benchmarks/domains.py                                    digits in four styles, made on the spot
    python benchmarks/domains.py --data-dir DIR --card my.toml      DIR/<domain>/<class>/*, your card
    python benchmarks/domains.py --quick                            all of it, small: it shows that it runs

For every domain in turn: a dense model is trained on the others by the card's [train] recipe, then for every criterion
so much of its prunable parameters (the rows and columns that belong to heads and neurons) is removed, and the rest is
tuned by the card's [finetune] recipe, taught by the dense model, for the same number of steps. Nothing is measured, and
no latency asked for: every block keeps the same number of heads and of neurons, the best by the criterion's own order,
so that only the order differs. Heads are kept by the share asked for, rounded, but at least one a block (or nothing
would reach the class token); neurons make up the rest, so the share that is really removed is in the table. Weights
that stay are not repaired before tuning (recovery `none`). Prints Markdown: accuracy on the fifth of the seen domains
that was kept back, accuracy on the whole held-out domain, each with Wilson's 95 % interval, and parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edgeprune import api, config, criteria, data, saliency, vit
from edgeprune.checks import wilson
from edgeprune.compat import VisionTransformer
from edgeprune.config import CalibrationSpec, DataSpec, ModelSpec, Recipe, TransformSpec
from edgeprune.console import SILENT
from edgeprune.criteria import Evidence
from edgeprune.images import Digits
from edgeprune.tuning.loop import fit
from edgeprune.types import BlockPlan, Plan

CRITERIA = "hessian,taylor,l1,l2,random"
STYLES = ("clean", "inverted", "noisy", "coloured")
SIZE = 32  # pixels of a made image
BATCH = 64

#: Trained on the spot: 4 blocks, 96 wide, 65 tokens; 12 narrow heads, so that a small share of them can be kept.
CARD = ModelSpec(
    "domains", "4 blocks, 96 wide, 32 pixels in patches of 4, on digits in four styles", "vit_tiny_patch16_224", 10,
    DataSpec("folder"),
    kwargs={"img_size": SIZE, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 12},
    transforms=TransformSpec(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0),
    calibration=CalibrationSpec(images=128, batch_size=32),
    finetune=Recipe(batch_size=32, learning_rate=5e-4, precision="float32"),
    train=Recipe((60.0,), batch_size=32, learning_rate=1e-3, label_weight=1.0, logit_weight=0.0, token_weight=0.0,
                 precision="float32", augment={"scale": [0.75, 1.0], "ratio": [0.85, 1.18], "hflip": 0.0, "color_jitter": 0.0}),
)  # fmt: skip
#: 2 blocks and 17 tokens.
QUICK = replace(
    CARD,
    kwargs={**CARD.kwargs, "patch_size": 8, "depth": 2},
    calibration=replace(CARD.calibration, images=64),
    train=replace(CARD.train, epochs=(10.0,), augment={}),
)


@dataclass(frozen=True)
class Row:
    """A model on the splits of one left-out domain. Accuracies in percent."""

    held_out: str
    criterion: str  # "dense" = nothing pruned
    asked: float  # share of the prunable parameters to remove
    removed: float
    seen: float
    seen_ci: tuple[float, float]
    unseen: float
    unseen_ci: tuple[float, float]
    parameters: int


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as made:
        folder = options.data_dir
        if folder is None:
            folder = make_domains(Path(made), seed=options.seed)
        card = config.load_card(options.card) if options.card else QUICK if options.quick else CARD
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        found = []
        for held_out in options.held_out or names[: 1 if options.quick else None]:
            for row in rows(api.with_data(card, "folder", folder, held_out), options):
                print(line(row) if found else f"{HEADING}\n{line(row)}", flush=True)
                found.append(row)
    print(f"\n{means(found)}")
    if options.results:
        options.results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in found))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="DIR/<domain>/<class>/* (default: digits in four styles)")
    parser.add_argument("--card", default="", help="card to train and to prune (default: a small one of its own)")
    parser.add_argument("--held-out", action="append", help="domain to leave out; may be repeated (default: each)")
    parser.add_argument("--criteria", default=CRITERIA, help="names, with commas between (default: %(default)s)")
    parser.add_argument(
        "--removed", default="50,75,95", help="per cents of the prunable parameters (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="of tuning, for every model (default: 200; quick: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="file for the rows, one JSON document a line")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps, one domain left out")
    options = parser.parse_args(argv)
    options.criteria = options.criteria.split(",")
    options.removed = [float(text) / 100 for text in options.removed.split(",")]
    options.steps = options.steps or (10 if options.quick else 200)
    for name in options.criteria:
        criteria.get(name)  # a wrong name is said before anything is trained
    return options


# Domains ------------------------------------------------------------------------------------


def make_domains(folder: Path, count: int | None = None, seed: int = 0) -> Path:
    """`folder/<style>/<digit>/*.png`: scikit-learn's digits, dealt out to the styles class by class; no digit is in two."""
    digits = Digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits))[:count]
    order = order[np.argsort(digits.labels[order], kind="stable")]
    for place, index in enumerate(order):
        style = STYLES[place % len(STYLES)]
        target = folder / style / str(digits.labels[index])
        target.mkdir(parents=True, exist_ok=True)
        draw(digits.pixels[index], style, rng).save(target / f"{index:04d}.png")
    return folder


def draw(pixels: NDArray[np.uint8], style: str, rng: np.random.Generator) -> Image.Image:
    """Grey levels `[8, 8]` as an RGB image of `SIZE` pixels in one of the `STYLES`."""
    grey = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if style == "coloured":  # turned, in one colour on another
        grey = grey.rotate(float(rng.uniform(-35, 35)), Image.Resampling.BICUBIC)
        ink, paper = rng.uniform(140, 255, 3), rng.uniform(0, 110, 3)
    elif style == "inverted":
        ink, paper = np.zeros(3), np.full(3, 255.0)
    else:
        ink, paper = np.full(3, 255.0), np.zeros(3)
    share = np.asarray(grey, dtype=float)[..., None] / 255
    if style == "noisy":
        share = np.maximum(share, rng.uniform(0, 0.75, share.shape))
    return Image.fromarray(np.round(share * ink + (1 - share) * paper).astype(np.uint8))


# Rows ---------------------------------------------------------------------------------------


def rows(card: ModelSpec, options: argparse.Namespace) -> Iterator[Row]:
    """The dense model that never saw the card's held-out domain, and all that is pruned from it."""
    torch.manual_seed(options.seed)
    dense = vit.create(card.architecture, card.kwargs, card.num_classes)
    transforms = data.transform_config(card, dense)
    splits = data.load_splits(card, transforms, options.seed)
    data.check_classes(splits, card.num_classes)
    fit(dense, splits.train, card.train, transforms, seed=options.seed)
    yield judge(dense, splits, "dense", 0.0, 0.0)
    for name in options.criteria:
        levels = criteria.score(criteria.get(name), evidence(dense, name, splits, card, options.seed))
        for asked in options.removed:
            heads, neurons, removed = uniform(dense, asked)
            kept = [own.kept(heads if own.kind == "attn" else neurons) for own in levels]
            plan = Plan(tuple(BlockPlan(kept[i], kept[i + 1]) for i in range(0, len(kept), 2)))
            pruned = vit.slice_model(dense, plan)
            tune(pruned, dense, splits, card, transforms, options)
            yield judge(pruned, splits, name, asked, removed)


def evidence(dense: VisionTransformer, name: str, splits: data.Splits, card: ModelSpec, seed: int) -> Evidence:
    """What the criterion may look at: calibration images of the seen domains."""
    size = card.calibration.batch_size
    uses_loss = criteria.uses_loss(criteria.get(name))
    found = criteria.collect(dense, splits.calibration.batches(size), seed, lambda *_: None, uses_loss=uses_loss)
    sizes = vit.anatomy(dense)
    return Evidence(
        model=dense, sizes=sizes, moments=found.moments, gradients=found.gradients,
        batches=lambda: splits.calibration.batches(size), images=len(splits.calibration),
        neuron_grids=(vit.neuron_grid(sizes.only.neurons, 1),), seed=seed, console=SILENT,
    )  # fmt: skip


def uniform(model: VisionTransformer, removed: float) -> tuple[int, int, float]:
    """Heads and neurons that every block keeps so that this share of the prunable parameters goes; and what really goes."""
    sizes = vit.anatomy(model)
    head, neuron = (
        sum(tensor.numel() for tensor in saliency.group(model, (0, kind))) / sizes.units((0, kind))
        for kind in vit.KINDS
    )
    total = head * sizes.only.heads + neuron * sizes.only.neurons
    heads = max(1, math.floor((1 - removed) * sizes.only.heads + 0.5))
    neurons = min(sizes.only.neurons, max(0, round(((1 - removed) * total - heads * head) / neuron)))
    return heads, neurons, 1 - (heads * head + neurons * neuron) / total


def tune(
    pruned: VisionTransformer, dense: VisionTransformer, splits: data.Splits, card: ModelSpec,
    transforms: dict[str, object], options: argparse.Namespace,
) -> None:  # fmt: skip
    """The card's recipe for `options.steps` steps in one phase, at its own learning rate, taught by the dense model."""
    recipe = card.finetune
    epochs = options.steps / math.ceil(len(splits.train) / recipe.batch_size)
    recipe = replace(recipe, epochs=(epochs,), sizes=())
    fit(pruned, splits.train, recipe, transforms, teacher=dense, seed=options.seed)


@torch.inference_mode()
def right(model: VisionTransformer, images: data.Images) -> tuple[int, int]:
    """How many images the model names rightly, and how many there are."""
    found = total = 0
    for pixels, labels in images.batches(BATCH):
        found += int((model(pixels).argmax(-1) == labels).sum())
        total += len(labels)
    return found, total


def judge(model: VisionTransformer, splits: data.Splits, criterion: str, asked: float, removed: float) -> Row:
    held_out = list(splits.domains)[-1]
    seen, unseen = right(model, splits.evaluation), right(model, splits.domains[held_out])
    return Row(
        held_out, criterion, asked, removed, 100 * seen[0] / seen[1], wilson(*seen), 100 * unseen[0] / unseen[1],
        wilson(*unseen), vit.parameters(model),
    )  # fmt: skip


# Tables -------------------------------------------------------------------------------------

HEADING = (
    "| left out | criterion | removed | seen domains, % | held-out domain, % | parameters |\n|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    seen = f"{row.seen:.1f} [{row.seen_ci[0]:.1f}, {row.seen_ci[1]:.1f}]"
    unseen = f"{row.unseen:.1f} [{row.unseen_ci[0]:.1f}, {row.unseen_ci[1]:.1f}]"
    return f"| {row.held_out} | {row.criterion} | {100 * row.removed:.1f} % | {seen} | {unseen} | {row.parameters} |"


def means(found: Sequence[Row]) -> str:
    """Every criterion at every share, averaged over the domains that were left out."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in found:
        groups.setdefault((row.criterion, row.asked), []).append(row)
    lines = [
        "| criterion | removed (asked) | seen domains, mean % | held-out domain, mean % | left-out domains |",
        "|---|---|---|---|---|",
    ]
    for (criterion, asked), own in groups.items():
        seen, unseen = (float(np.mean([getattr(row, which) for row in own])) for which in ("seen", "unseen"))
        lines.append(f"| {criterion} | {100 * asked:g} % | {seen:.1f} | {unseen:.1f} | {len(own)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
