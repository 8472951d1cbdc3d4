"""A card that builds in seconds, a target that fits any machine, and the command line run in this process."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from edgeprune.config import Request

CARD = """
description = "3 blocks, 48 wide, 32 pixels in patches of 8, on digits"
architecture = "vit_tiny_patch16_224"
num_classes = 10
weights = "small.safetensors"

[kwargs]
img_size = 32
patch_size = 8
embed_dim = 48
depth = 3
num_heads = 3

[data]
name = "digits"

[transforms]
crop_pct = 1.0

[calibration]
images = 64
batch_size = 32

[finetune]
epochs = [0.5]
batch_size = 32
learning_rate = 1e-3

[train]
epochs = [4.0]
batch_size = 32
learning_rate = 4e-3
label_weight = 1.0
logit_weight = 0.0
token_weight = 0.0
"""

#: The same with one block of one head: for tests that need a whole build and do not care of what.
ONE = CARD.replace("depth = 3\nnum_heads = 3", "depth = 1\nnum_heads = 1").replace("small.", "one.")

TARGET = f"""
description = "whatever this machine is: one thread of ONNX Runtime"
machine = ["{platform.machine()}"]
cpu_flags = []
max_isa = ""
runtimes = ["onnxruntime", "openvino"]
precisions = ["fp32"]
threads = 1
neuron_step = 32
quantile = "p50"
"""

#: Measuring stops when the intervals are tight; these bound it on a noisy machine, in seconds. Exports take most of the rest.
BUDGETS = {
    "edgeprune.stages.candidates.FITTING_PLANS": 4,
    "edgeprune.latency.choose.RACE_SECONDS": 1.0,
    "edgeprune.stages.profile.TABLE_SECONDS": 4.0,
    "edgeprune.latency.survey.MODEL_SECONDS": 2.0,
    "edgeprune.latency.survey.THREADS_SECONDS": 0.5,
    "edgeprune.latency.survey.PRECISIONS_SECONDS": 1.0,
    "edgeprune.stages.check.CHECK_SECONDS": 2.0,
    "edgeprune.stages.prune.MEASURE_SECONDS": 3.0,
    "edgeprune.stages.prune.SEARCH_SECONDS": 0.5,
    "edgeprune.checks.SECONDS": 3.0,
    "edgeprune.stages.inspect.ROBUSTNESS_SECONDS": 1.0,
    "edgeprune.latency.resources.ENERGY_SECONDS": 0.5,
}

#: The same in a process of its own: `python -c QUICK ARGUMENT...`.
QUICK = "\n".join(
    [f"import {name.rpartition('.')[0]}; {name} = {seconds}" for name, seconds in BUDGETS.items()]
    + ["from edgeprune.cli import main", "main()"]
)


@dataclass(frozen=True)
class Result:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Stdout as one JSON document, strictly: no NaN, nothing before or after it."""
        return strict_json(self.out)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def run(*arguments: object) -> Result:
    """`edgeprune ARGUMENT...` through the real entry point, in this process."""
    from edgeprune import cli

    out, err = io.StringIO(), io.StringIO()
    code: Any = None

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)):
            err.write(warnings.formatwarning(message, category, filename, lineno))

    with (
        mock.patch.object(sys, "argv", ["edgeprune", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.showwarning = show  # pytest would keep them to itself, and a user sees them
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int), f"the command ended with {code!r}, not with an exit code"
    return Result(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Short time budgets for everything that is measured."""
    with contextlib.ExitStack() as stack:
        for name, seconds in BUDGETS.items():
            stack.enter_context(mock.patch(name, seconds))
        # on a busy machine a verdict would be looked for again and again
        stack.enter_context(mock.patch("edgeprune.stages.validate.decided", lambda folder: True))
        yield


@dataclass(frozen=True)
class Workspace:
    """A folder with `small.toml`, its trained weights, `here.toml` and a cache."""

    root: Path
    trained: Result

    @property
    def card(self) -> Path:
        return self.root / "small.toml"

    @property
    def target(self) -> Path:
        return self.root / "here.toml"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def out(self) -> Path:
        return self.root / "artifacts"

    @property
    def one(self) -> Path:
        """A card of one block, with untrained weights."""
        return self.root / "one.toml"

    def build(
        self, *arguments: object, card: Path | None = None, cache: Path | None = None, out: Path | None = None
    ) -> Result:
        """`edgeprune build` of the small card for ONNX Runtime unless the arguments say otherwise."""
        own = [] if "--runtime" in arguments else ["--runtime", "onnxruntime"]
        with quick():
            return run("build", card or self.card, "--target", self.target, "--cache-dir", cache or self.cache,
                       "--out", out or self.out, *own, *arguments)  # fmt: skip


@functools.cache
def workspace(base: Path) -> Workspace:
    """The one workspace of a test session whose temporary folder is `base`; its card is trained by the command."""
    import torch

    root = base / "small"
    root.mkdir()
    (root / "small.toml").write_text(CARD)
    (root / "one.toml").write_text(ONE)
    random_weights(root / "one.safetensors", depth=1, num_heads=1)
    (root / "here.toml").write_text(TARGET)
    torch.set_num_threads(1)
    weights = root / "small.safetensors"
    trained = run("train", root / "small.toml", "--out", weights, "--format", "json")
    return Workspace(root, trained)


def random_weights(path: Path, classes: int = 10, **kwargs: int) -> Path:
    """Untrained weights of the small card, written to `path`."""
    import torch
    from safetensors.torch import save_file

    from edgeprune import vit

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, **kwargs}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = vit.create("vit_tiny_patch16_224", sizes, classes).state_dict()
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def finished(cache_dir: Path, request: Request, last: str) -> dict[str, Path]:
    """The folders of what a build of this request has finished in a cache, by stage, up to the stage `last`."""
    from edgeprune import cache, pipeline

    digests: dict[str, str] = {}
    found: dict[str, Path] = {}
    for stage in pipeline.stages_of(request):
        folder = pipeline._folder(cache_dir, stage, pipeline.stage_key(stage, request, digests))
        record, why = cache.look(folder)
        assert record is not None, f"{stage.name} is not there: {why}"
        found[stage.name], digests[stage.name] = folder, cache.digest(record)
        if stage.name == last:
            break
    return found
