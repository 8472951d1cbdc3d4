"""Export: the tuned model as ONNX, with the batch and the input that are asked for, checked against torch on calibration images.

Writes `exported.onnx`. What the manifest says of the comparison is of the simplified graph, in the stage after.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune import artifact, folding, intake, numerics, quantisation, tasks, vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import CLASSIFY, FEATURES, Request
from edgeprune.console import Console
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.intake import Intake
from edgeprune.runtimes import BATCH
from edgeprune.stages import baseline

M = TypeVar("M", bound=nn.Module)

OPSET = 20  # the first with Gelu as one node
INPUT, OUTPUT, EMBEDDING = "pixels", "logits", "embedding"
CHECK_IMAGES = 32
MAX_TIES = 1 / 16  # share of the images whose dropped tokens may differ
MAX_ERROR = 1e-3  # of the logits' greatest magnitude; fp32 kernels differ in summation order
MAX_INT8_ERROR = 5e-2  # where that decides how an input is rounded, which changes it by a 255th of its range


@dataclass(frozen=True)
class Deployed:
    """What files of a model are like: how images enter them, and what they say of themselves."""

    intake: Intake = field(default_factory=Intake)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)  # as in the manifest
    metadata: Mapping[str, str] = field(default_factory=dict)


def deployed(request: Request, preprocessing: Mapping[str, Any], classes: Sequence[str]) -> Deployed:
    """What the request asks for; classes: as the data set names them. Raises UsageError for what cannot be had."""
    asked = request.card.deploy
    size = intake.frame(asked.fold_preprocessing, preprocessing)
    made = Intake(asked.batch, asked.dynamic_batch, size)
    names = asked.class_names or classes
    if request.card.task == CLASSIFY and asked.class_names and len(classes) not in (0, len(names)):
        raise UsageError(f"the card names {len(names)} classes ('class_names'), the data set has {len(classes)}")
    metadata = {BATCH: str(asked.batch), "task": request.card.task}
    if request.card.task == CLASSIFY and names:
        metadata["classes"] = json.dumps(list(names), ensure_ascii=False)
    if not made.folded:
        metadata["preprocessing"] = json.dumps(preprocessing)
    return Deployed(made, preprocessing, metadata)


def deploy(model: M, how: Deployed) -> M:
    """The same model, which from now on is exported so; copies of it are too."""
    cast: Any = model
    cast.deployed = how
    return model


def how(model: nn.Module) -> Deployed:
    """How the model is exported: one image of normalised pixels, unless it was told otherwise."""
    found: Deployed = getattr(model, "deployed", Deployed())
    return found


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense, model = deployable(request, read)
    path = out / "exported.onnx"
    with console.busy("torch to ONNX"):
        to_onnx(model, dense.sizes.image, path)
    with quantisation.exactly(model):  # int8 comes after onnxsim, which would fold it away
        facts = compare(model, path, *check_images(dense, CHECK_IMAGES))
    console.say(f"ONNX opset {OPSET}; {words(facts)}")


def deployable(request: Request, read: Mapping[str, Path]) -> tuple[baseline.Dense, VisionTransformer]:
    """The dense model with the data, and the tuned one, exported as the request asks."""
    dense = baseline.load(request, read["baseline"])
    model = artifact.rebuild(artifact.read_plan(read["finetune"] / "plan.json"), read["finetune"] / "model.safetensors")
    return dense, deploy(model, how(dense.model))


def words(facts: Mapping[str, Any]) -> str:
    """What `compare` found."""
    return (
        f"against torch on {facts['images']} images: greatest relative difference {facts['max_error']:.1e}, "
        f"top-1 agreement {facts['agreement']:.1%}"
    )


def output(model: nn.Module) -> str:
    """What the files call what they say."""
    return EMBEDDING if tasks.of(model) == FEATURES else OUTPUT


def check_images(dense: baseline.Dense, count: int) -> tuple[Tensor, NDArray[Any]]:
    """The first calibration images as the torch model takes them, `[n, channels, height, width]`, and as the files do.

    Where the preprocessing is folded, the former are what the graph makes of the latter; see `folding.check`.
    """
    taken, some = how(dense.model), dense.splits.calibration.take(count)
    served, _ = next(dense.served(some).batches(count))
    raw = served.numpy()
    if not taken.intake.folded:
        return served, raw
    return torch.from_numpy(folding.check(raw, taken.preprocessing)), raw


def to_onnx(model: VisionTransformer, image: tuple[int, int, int], path: Path) -> None:
    """Write the model as ONNX with one input `pixels` `[1, *image]` and one output `logits` `[1, classes]`, or `embedding`.

    Or with another batch, any batch, or the preprocessing folded in, as `deploy` said.
    """
    asked = how(model)
    dynamic = asked.intake.dynamic
    batch = max(2, asked.intake.batch) if dynamic else asked.intake.batch  # a dynamic one of 1 would be taken for fixed
    with _quiet(), _translations(), quantisation.exactly(model):
        program = torch.onnx.export(
            model.eval(), (torch.zeros(batch, *image),), dynamo=True, opset_version=OPSET,
            input_names=[INPUT], output_names=[output(model)], verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)
    if asked == Deployed():
        return
    proto = onnx.load(path)
    if asked.intake.frame is not None:
        folding.fold(proto, asked.intake.frame, asked.preprocessing)
    onnx.helper.set_model_props(proto, dict(asked.metadata))
    onnx.save(proto, path)


@torch.no_grad()
def compare(model: VisionTransformer, path: Path, images: Tensor, served: NDArray[Any] | None = None) -> dict[str, Any]:
    """Greatest difference, relative to the greatest output, and top-1 agreement (`tasks.top1`) of the ONNX with torch.

    served: the images as the file takes them, if that is not as the model does.

    Where tokens are dropped, two that matter nearly alike may change places between runtimes, and the logits of that
    image with them: such images may be a few, and are counted apart. Raises EdgepruneError above `MAX_ERROR`, or
    `MAX_INT8_ERROR` where layers are int8.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs, batch = images.numpy() if served is None else served, how(model).intake.batch
    parts = [inputs[i : i + batch] for i in range(0, len(inputs), batch)]
    short = batch - len(parts[-1])
    parts[-1] = np.concatenate([parts[-1], np.repeat(parts[-1][-1:], short, axis=0)])
    got = np.concatenate([session.run(None, {INPUT: part})[0] for part in parts])[: len(inputs)]
    wanted = model(images)
    numerics.refuse_not_finite(
        model, images, wanted, "export", "lower [finetune] learning_rate, or ask for a milder latency"
    )
    want = wanted.numpy()
    errors = np.abs(got - want).max(-1) / max(float(np.abs(want).max()), 1e-9)
    most = MAX_INT8_ERROR if any(not layer.exact for layer in quantisation.layers(model).values()) else MAX_ERROR
    ties = errors > most
    if not any(isinstance(block, vit.ReducingBlock) for block in model.blocks) or ties.mean() > MAX_TIES:
        ties[:] = False
    error = float(errors[~ties].max())
    task = tasks.of(model)
    agreement = float((tasks.top1(torch.from_numpy(got), task) == tasks.top1(wanted, task)).float().mean())
    if not error <= most:
        raise EdgepruneError(f"the ONNX differs from torch by {error:.1e} of the greatest logit (at most {most:.0e})")
    return {"max_error": error, "agreement": agreement, "images": len(images), "opset": OPSET, "ties": int(ties.sum())}


@contextlib.contextmanager
def _translations() -> Iterator[None]:
    """torch reads the source of all its 500 translations at every export, a third of the time of one: here once per process.

    With a torch that keeps them elsewhere, exports only take longer.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        own = vars(ONNXRegistry)["from_torchlib"]
    except (ImportError, KeyError):
        yield
        return
    read = own.__get__(None, ONNXRegistry)

    def known(*args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in _READ:
            _READ[key] = read(*args, **kwargs)
        return _READ[key]

    ONNXRegistry.from_torchlib = staticmethod(known)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own  # type: ignore[method-assign]


#: Translations of an opset, by what they were asked for with.
_READ: dict[Any, Any] = {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout, which belongs to `--format json`."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
