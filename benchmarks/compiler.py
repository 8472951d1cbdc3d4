"""Where the compiler's own time goes, beside what its matrix products alone would take: calibrate, search, prune.

    python benchmarks/compiler.py                                     DeiT-S at 224 pixels, 512 calibration images
    python benchmarks/compiler.py --architecture deit_tiny_patch16_224 --images 256

The weights are random, four times as large as timm makes them, so that plans differ in what comes out; the images are
digits. Seconds of every phase, the floating-point operations of its products as torch counts them (not those of OBS: counting
its many small steps would take longer than they do), and the share of this machine's rate of float32 products, measured before.
The latency table is made first and not counted; what is timed in the runtime meanwhile has a row of its own. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import accuracy
import torch
from safetensors.torch import save_file
from torch.utils import flop_counter

from edgeprune import api, pipeline, vit
from edgeprune.console import Console
from edgeprune.latency import device
from edgeprune.stages import calibrate, prune

#: (module, function, what it is): time spent in one belongs to the innermost.
PHASES = (
    ("edgeprune.criteria", "collect", "calibrate: layer statistics"),
    ("edgeprune.criteria.fisher", "obs_orders", "calibrate: OBS orders"),
    ("edgeprune.criteria.fisher", "_changes", "calibrate: weights of every level"),
    ("edgeprune.criteria.fisher", "_fisher", "calibrate: Fisher errors"),
    ("edgeprune.allocators._forms", "weighed", "prune: lower ranks, one by one"),
    ("edgeprune.allocators._tokens", "drop_errors", "prune: dropped tokens, one by one"),
    ("edgeprune.allocators.search", "improve", "prune: search"),
    ("edgeprune.stages.prune", "recovered", "prune: refit"),
    ("edgeprune.stages.prune", "measure", "prune: plans timed in the runtime"),
)
TIMED = PHASES[-1][2]  # latency, not the compiler's own work
UNCOUNTED = {TIMED, "calibrate: OBS orders"}
PRODUCT = (3152, 1536, 384)  # tokens of 16 images, by DeiT-S's second MLP layer
GAIN = 4.0

CARD = """
description = "{architecture}, random weights, on digits"
architecture = "{architecture}"
num_classes = 10
weights = "random.safetensors"
data = {{ name = "digits" }}
calibration = {{ images = {images}, batch_size = 16 }}
finetune = {{ epochs = [0.0], batch_size = 32, learning_rate = 1e-4 }}
"""


@dataclass
class Phases:
    """Seconds and operations, by phase; the seconds of a phase within another are taken off it."""

    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    inner: list[float] = field(default_factory=list)  # seconds of the phases within each open one

    def wrapped(self, name: str, function: Callable[..., Any], *, counted: bool = True) -> Callable[..., Any]:
        """The same function, its time and, where `counted`, its operations kept; what is counted holds no other phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            began = time.monotonic()
            # torch.export, which `measure` and thus what holds it calls, cannot be counted
            counter = flop_counter.FlopCounterMode(display=False, custom_mapping=attention()) if counted else None
            with counter or nullcontext():
                made = function(*args, **kwargs)
            spent = time.monotonic() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self.inner.pop()
            self.flops[name] = self.flops.get(name, 0.0) + (counter.get_total_flops() if counter else 0)
            if self.inner:
                self.inner[-1] += spent
            return made

        return run


def attention() -> dict[Any, Any]:
    """Torch counts the attention of GPUs only; that of CPUs is the same work."""
    ops = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_flop_count(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_backward_flop_count(grad, q, k, v))

    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def rate() -> float:
    """Float32 operations per second of a large product here and now: the best of many."""
    m, k, n = PRODUCT
    a, b = torch.randn(m, k), torch.randn(k, n)
    taken = []
    for _ in range(50):
        began = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - began)
    return 2 * m * k * n / min(taken)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="deit_small_patch16_224", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=512, help="of calibration (default: %(default)s)")
    parser.add_argument("--latency", default="2x", help="(default: %(default)s)")
    parser.add_argument("--target", default=accuracy.fitting().name, help="(default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=pipeline.default_cache_dir())
    parser.add_argument("--out", type=Path, default=accuracy.HERE / "results")
    options = parser.parse_args(argv)
    lines = judged(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"compiler-{options.architecture}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def judged(options: argparse.Namespace) -> list[str]:
    """The table, a row per phase."""
    console, phases = Console(), Phases()
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        card = make_card(Path(folder), options.architecture, options.images)
        request, _ = api.request(str(card), target=options.target, latency=options.latency)
        done = pipeline.run_stages(pipeline.PIPELINE[:2], request, options.cache_dir, console=console)
        best = rate()
        read = {name: stage.folder for name, stage in done.items()}
        with ExitStack() as patches:
            for module, name, what in PHASES:
                found = importlib.import_module(module)
                wrapped = phases.wrapped(what, getattr(found, name), counted=what not in UNCOUNTED)
                patches.enter_context(mock.patch.object(found, name, wrapped))
            for name, run in (("calibrate", calibrate.run), ("prune", prune.run)):
                read[name] = Path(folder) / name
                read[name].mkdir()
                step = partial(run, request, read, read[name], console)
                phases.wrapped(f"{name}: the rest", step, counted=False)()
    own = {name: seconds for name, seconds in phases.seconds.items() if name != TIMED}
    flops = sum(phases.flops[name] for name in own)
    lines = [
        f"{options.architecture}, random weights, {options.images} calibration images, {options.latency}; {device.cpu_model()}, "
        f"{torch.get_num_threads()} threads; {accuracy.commit()}. A float32 product of {' x '.join(map(str, PRODUCT))} runs at {best / 1e9:.0f} GFLOP/s.",
        "", "| phase | seconds | TFLOP in products | of that rate |", "|---|---|---|---|",
    ]  # fmt: skip
    order = [what for _, _, what in PHASES] + ["calibrate: the rest", "prune: the rest"]
    rows = [(name, phases.seconds[name], phases.flops[name]) for name in order if name in own]
    for name, seconds, counted in [*rows, ("together", sum(own.values()), flops)]:
        lines.append(f"| {name} | {seconds:.1f} | {counted / 1e12:.2f} | {counted / seconds / best:.0%} |")
    lines.append(f"| {TIMED} | {phases.seconds.get(TIMED, 0.0):.1f} | | |")
    lines += ["", f"The products alone would take {flops / best:.0f} s at that rate."]
    return lines


def make_card(folder: Path, architecture: str, images: int) -> Path:
    """A card of the architecture with random weights."""
    torch.manual_seed(0)
    model = vit.create(architecture, {}, 10)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= GAIN
    save_file(model.state_dict(), folder / "random.safetensors")
    card = folder / f"{architecture}.toml"
    card.write_text(CARD.format(architecture=architecture, images=images))
    return card


if __name__ == "__main__":
    main()
