"""TOML -> model cards and targets. An unknown key is an error with "did you mean"; so is a missing one.

Cards live in `models/`, targets in `targets/`; both ship inside the wheel. A user's own card or
target is a path to a file.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types as pytypes
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgeprune import families
from edgeprune.errors import StorageError, UsageError, unknown
from edgeprune.extras import need_build_packages
from edgeprune.types import REDUCER, Latency, Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
WIDTHS = ("heads", "mlp", "depth")  # what every allocator chooses
IR_PRECISIONS = ("fp32", "fp16")
OPTIMIZERS = ("adamw", "muon")
MOST_BATCH = 1024  # images of one inference
CLASSIFY, FEATURES = TASKS = ("classify", "features")  # what a model is for: to name classes, or to embed
DIMS = (*WIDTHS, "tokens", "qk")  # what a plan has less of unless it is told otherwise
EVERY_DIM = (*DIMS, "precision")  # what it can have less of

#: What becomes a part of a folder's name, and is read on terminals.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@, -]{0,99}")


def check_name(name: str, where: str) -> None:
    """Raise UsageError for a name that could lead out of a folder or into a terminal."""
    if not NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"{where}: the name {name[:100]!r} cannot be a part of a folder's name; "
            "use up to 100 letters, digits and . _ + @ , -"
        )


#: 4GiB, 4G, 500MB, 1000
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Bytes of `4GiB`, `4G` (binary as well), `500MB` (decimal) or a plain number. Raises UsageError."""
    found = SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]) or len(text) > 20:
        raise UsageError(f"{option} must be a size such as 4GiB or 500MB, not '{text}'")
    binary = found[3] or not text.strip().lower().endswith("b")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if binary else 1000) ** power)


class BadValue(ValueError):
    """A value that its field cannot have; the message names the key."""


def within(table: Any, least: float, keys: str, most: float = math.inf) -> None:
    """Raise BadValue for a field of `table`, or an item of one, that is not from `least` to `most`."""
    for key in keys.split():
        value = getattr(table, key)
        for one in value if isinstance(value, tuple) else (value,):
            if not least <= one <= most:
                bounds = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
                raise BadValue(f"'{key}' must be {bounds}, not {one}")


@dataclass(frozen=True)
class DataSpec:
    """A data set: `digits`, or a name that timm.data knows (`folder`, `torch/cifar10`, `hfds/...`)."""

    name: str
    dir: str = ""
    train_split: str = "train"
    eval_split: str = "validation"
    held_out_domain: str = ""  # of DIR/<domain>/<class>/*: never trained on, judged apart; "" = no domains
    follow_links: bool = False  # also those that lead out of the folder

    def __post_init__(self) -> None:
        if self.held_out_domain and self.name != "folder":
            raise UsageError(
                f"the domain '{self.held_out_domain}' cannot be held out of the data set '{self.name}': domains are folders, "
                "DIR/<domain>/<class>/*; give --data folder --data-dir DIR"
            )


@dataclass(frozen=True)
class TransformSpec:
    """How an image becomes a tensor; what is left out is taken from timm's data config of the model."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = ""
    crop_pct: float = 0.0

    def __post_init__(self) -> None:
        within(self, 0, "crop_pct", 10)
        within(self, 1e-9, "std")


@dataclass(frozen=True)
class CalibrationSpec:
    """Images for statistics, set aside from the training images; their labels serve only methods that say so."""

    images: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        within(self, 1, "images batch_size")


@dataclass(frozen=True)
class DeploySpec:
    """What the artifact's files take and hold."""

    batch: int = 1  # images of one inference; the latency is that of all of them
    dynamic_batch: bool = False  # whether the files take any other number of images too
    fold_preprocessing: str = ""  # into the files, which then take raw uint8 images: auto, or HEIGHTxWIDTH; "" = no
    ir_precision: str = "fp32"  # of the weights in OpenVINO's files: fp32 or fp16
    class_names: tuple[str, ...] = ()  # for the files' metadata, in the order of the classes; () = the data set's

    def __post_init__(self) -> None:
        within(self, 1, "batch", MOST_BATCH)
        if self.ir_precision not in IR_PRECISIONS:
            raise BadValue(str(unknown("ir_precision", self.ir_precision, IR_PRECISIONS)))


@dataclass(frozen=True)
class FeaturesSpec:
    """How an embedding model is judged: by the classes of its nearest neighbours among labelled training images."""

    neighbours: int = 20
    reference: int = 5000  # training images that are embedded, at most

    def __post_init__(self) -> None:
        within(self, 1, "neighbours reference")


@dataclass(frozen=True)
class Recipe:
    """How a model is tuned. One entry of `epochs` and `sizes` per phase; `sizes` empty = the model's own.

    `augment` is passed to timm.data.create_transform; empty = none, and then the teacher's outputs
    are kept from the first epoch on.
    """

    epochs: tuple[float, ...] = (3.0,)
    sizes: tuple[int, ...] = ()
    batch_size: int = 32
    learning_rate: float = 2e-4
    optimizer: str = "adamw"  # or muon, for the matrices of the blocks
    weight_decay: float = 0.05
    warmup: float = 0.1  # fraction of the steps
    label_smoothing: float = 0.0
    label_weight: float = 0.0  # cross entropy with the labels
    logit_weight: float = 1.0  # KL to the teacher's logits
    token_weight: float = 1.0  # distance to the teacher's token features
    token_layers: int = 4  # after how many blocks, evenly spread, features are compared
    cls_share: float = 0.5  # least weight, in that distance, of the CLS token (of all tokens that the head reads)
    temperature: float = 1.0
    augment: dict[str, Any] = field(default_factory=dict)
    views: int = 0  # random views of each image, whose teacher outputs are kept; 0 = a new view in every epoch
    echo: int = 2  # how often a batch is used with one answer of the teacher, where views are not kept
    precision: str = "auto"  # float32, bfloat16 (autocast), or auto: the faster one of both
    learning_rate_search: bool = True  # try rates around `learning_rate` on a slice of the steps
    ema: float = 0.98  # greatest decay of a moving average of the weights; 0 = none
    checks: int = 5  # how often in a phase the model is judged on images kept out of tuning
    patience: int = 3  # checks without improvement that end a phase; 0 = never

    def __post_init__(self) -> None:
        within(self, 1, "sizes batch_size checks")
        within(
            self,
            0,
            "epochs learning_rate weight_decay label_weight logit_weight token_weight token_layers views echo patience",
        )
        within(self, 0, "warmup label_smoothing cls_share ema", 1)
        within(self, 1e-6, "temperature")
        if self.optimizer not in OPTIMIZERS:
            raise BadValue(str(unknown("optimizer", self.optimizer, OPTIMIZERS)))


@dataclass(frozen=True)
class ModelSpec:
    """A model card: everything that is needed to build, calibrate, tune and judge one model."""

    name: str
    description: str
    architecture: str
    num_classes: int  # 0 = timm's own number; of an embedding model the dimensions of a projection, 0 = it has none
    data: DataSpec
    task: str = CLASSIFY  # or "features": an embedding model, without a classifier
    weights: str = ""  # a file beside the card, "hub" = timm's pretrained weights, "" = give --weights
    kwargs: dict[str, Any] = field(default_factory=dict)
    anatomy: dict[str, str] = field(default_factory=dict)  # where units live in a model that edgeprune does not know
    transforms: TransformSpec = TransformSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    features: FeaturesSpec = FeaturesSpec()
    deploy: DeploySpec = DeploySpec()
    finetune: Recipe = Recipe()
    train: Recipe = Recipe(label_weight=1.0, logit_weight=0.0, token_weight=0.0)

    def __post_init__(self) -> None:
        within(self, 0, "num_classes", 1_000_000)
        if odd := families.odd_part(self.anatomy):
            raise BadValue(f"[anatomy]: {odd}")
        if self.task not in TASKS:
            raise BadValue(str(unknown("task", self.task, TASKS)))
        if self.task == FEATURES and self.finetune.label_weight:
            raise BadValue("an embedding model has no classes to learn: set [finetune] label_weight to 0")

    def as_task(self, task: str) -> ModelSpec:
        """The same model for a task: a classifier loses its last layer to embed. Raises UsageError."""
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        if task == self.task:
            return self
        if task == CLASSIFY:
            raise UsageError(f"the card '{self.name}' is of an embedding model; to name classes it needs task = \"classify\" "
                             "and num_classes in the card, and weights that have been trained for them")  # fmt: skip
        if self.finetune.label_weight:
            raise UsageError(f"the card '{self.name}' tunes with labels, and an embedding model has no classes to learn: "
                             "set [finetune] label_weight to 0")  # fmt: skip
        return dataclasses.replace(self, task=task, num_classes=0)

    @property
    def arguments(self) -> dict[str, Any]:
        """What timm makes the model with; without a classifier where it embeds and has no projection."""
        headless = self.task == FEATURES and not self.num_classes
        return {**self.kwargs, "num_classes": 0} if headless else self.kwargs


@dataclass(frozen=True)
class Conditions:
    """Under which conditions something is measured."""

    target: Target
    runtime: str = ""  # "" = the fastest that the target allows
    precision: str = "fp32"
    threads: int = 0  # 0 = all that this process may use
    seed: int = 0
    device: str = ""  # that measures: a name or an ssh:// address; "" = this machine


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked: everything a stage needs to know besides the files it reads."""

    card: ModelSpec
    target: Target
    latency: Latency
    weights: Path | None = None  # overrides the card's
    quantile: str = "p50"
    max_drop: float | None = None  # accuracy points; None = no accuracy gate
    method: str = "edgeprune"  # a named combination of the four parts below
    criterion: str = "fisher"
    allocator: str = "search"
    schedule: str = "one-shot"
    recovery: str = "refit"
    polish: int = 0  # passes over the calibration images in which each block is trained to meet the dense one
    search_seconds: float | None = None  # how long stitched models are searched; 0 = not at all
    dims: tuple[str, ...] = DIMS  # what a plan may choose
    reducer: str = REDUCER  # which tokens stay where some go
    selection: str = "random"  # which training images calibrate, and are tuned on where that is not all
    tune_on: float = 1.0  # share of the other training images that are tuned on
    gradual: bool = False  # prune each model from the tuned one of the milder latency before, not from the dense one
    runtime: str = ""  # "" = the fastest that the target allows
    precision: str = "fp32"
    threads: int = 0  # 0 = all that this process may use
    seed: int = 0
    strict_clock: bool = False  # take the machine as slow or fast as it now is: no correction for drift
    profile: Path | None = None  # a recorded profile instead of measuring one here
    check: int = 0  # held-out random plans to compare the latency table with
    processes: int = 0  # that tune together on this machine; 0 = this one alone
    device: str = ""  # that the artifact is for and that measures: a name or an ssh:// address; "" = this machine
    accuracy_on: str = "build"  # where accuracy is judged: on the machine that builds, or on the device
    accelerate_config: Path | None = None  # or those that a file of `accelerate config` describes
    image_size: str = ""  # as it was asked for, "" = the card's; the card has it
    siblings: tuple[Path, ...] = ()  # artifacts whose dense models the report draws beside this one
    max_memory: int | None = None  # bytes that the build may take; None = no limit
    #: What follows from it, see `edgeprune.footprint`: bytes of activations that wait in memory, of images and
    #: answers that tuning keeps, and of models that the table is measured on at once; None = as many as there are.
    shelf_bytes: int | None = None
    lesson_bytes: int | None = None
    table_bytes: int | None = None

    @property
    def selects(self) -> bool:
        """Whether the images to calibrate or to tune on are chosen, not all of them as they were drawn."""
        return self.selection != "random" or self.tune_on < 1

    @property
    def conditions(self) -> Conditions:
        return Conditions(self.target, self.runtime, self.precision, self.threads, self.seed, self.device)


def shipped(kind: str) -> Path:
    """The folder of shipped `models` or `targets`: inside the wheel, or at the top of a checkout."""
    inside = Path(__file__).parent / kind
    return inside if inside.is_dir() else Path(__file__).parent.parent / kind


def names(kind: str) -> list[str]:
    """Names of the shipped `models` or `targets`."""
    return sorted(path.stem for path in shipped(kind).glob("*.toml"))


def load_card(name: str) -> ModelSpec:
    """The card `name`: shipped, a path to a .toml file, or a card made on the spot for a timm model name."""
    path = _path("models", name)
    if path is not None:
        table = read_toml(path)
        weights = table.get("weights", "")
        if isinstance(weights, str) and weights not in ("", "hub"):
            table["weights"] = str(path.parent / weights)
        card = parse(ModelSpec, {"name": path.stem, **table}, str(path))
        check_name(card.name, str(path))
        return card
    if name.startswith(("hf-hub:", "local-dir:")) or _timm_knows(name):
        return ModelSpec(
            name=re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100].replace("..", "-"),
            description="a timm model without a card",
            architecture=name,
            num_classes=0,  # timm's own
            data=DataSpec(name="folder"),
            weights="hub",
        )
    known = unknown("model", name, names("models"))
    if not re.search(r"[_\d]", name):
        raise known
    raise UsageError(
        f"{known}; of timm's models, the nearest that is tested is '{families.nearest(name)}' (`edgeprune models --supported` lists them)"
    )


def load_target(name: str) -> Target:
    """The target `name`: shipped, or a path to a .toml file."""
    path = _path("targets", name)
    if path is None:
        raise unknown("target", name, names("targets"))
    target = parse(Target, {"name": path.stem, **read_toml(path)}, str(path))
    check_name(target.name, str(path))
    if target.neuron_step < 1:
        raise UsageError(f"{path}: neuron_step must be at least 1")
    if target.quantile not in ("p50", "p90", "p99"):
        raise UsageError(f"{path}: quantile must be p50, p90 or p99, not '{target.quantile}'")
    return target


def sized(card: ModelSpec, text: str) -> ModelSpec:
    """The card with another image size: `192`, or `192x256` (height x width). Raises UsageError."""
    sides = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if not sides or not all(1 <= int(side) <= 1 << 14 for side in sides.groups() if side):
        raise UsageError(
            f"an image size is a number of pixels, as in 192, or height x width, as in 192x256; not '{text}'"
        )
    height, width = int(sides[1]), int(sides[2] or sides[1])
    return dataclasses.replace(card, kwargs={**card.kwargs, "img_size": [height, width] if height != width else height})


def deployed(
    card: ModelSpec,
    batch: int = 0,
    dynamic_batch: bool = False,
    fold_preprocessing: str = "",
    ir_precision: str = "",
    class_names: str | Path | None = None,
) -> ModelSpec:
    """The card with what is given of how the artifact is deployed. Raises UsageError, StorageError."""
    own = card.deploy
    if batch < 0:
        raise UsageError(f"batch must be 1 or more images, not {batch}")
    try:
        made = DeploySpec(
            batch or own.batch, dynamic_batch or own.dynamic_batch, fold_preprocessing or own.fold_preprocessing,
            ir_precision or own.ir_precision, read_names(Path(class_names)) if class_names else own.class_names,
        )  # fmt: skip
    except BadValue as error:
        raise UsageError(str(error)) from error
    if card.task == CLASSIFY and card.num_classes and made.class_names and len(made.class_names) != card.num_classes:
        raise UsageError(f"{len(made.class_names)} class names are given, and the model has {card.num_classes} classes")
    return dataclasses.replace(card, deploy=made)


def read_names(path: Path) -> tuple[str, ...]:
    """The lines of a file. Raises UsageError for no text, StorageError for a file that cannot be read."""
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except FileNotFoundError:
        raise UsageError(f"there is no file '{path}'; --class-names takes a file of one name a line") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text in UTF-8: {error}") from error
    if not names or not all(name.isprintable() for name in names):
        raise UsageError(f"{path} must hold one class name a line")
    return names


def _path(kind: str, name: str) -> Path | None:
    if name in names(kind):
        return shipped(kind) / f"{name}.toml"
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(
                f"there is no file '{name}'; give a path to a .toml file, or one of: {', '.join(names(kind))}"
            )
        return path
    return None


def _timm_knows(name: str) -> bool:
    if not any(part in name for part in families.PARTS):  # spares a mistyped card name the import of timm
        return False
    need_build_packages("looking up a timm name")
    from edgeprune.compat import timm

    return bool(timm.is_model(name.split(".")[0]))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; UsageError with the line for bad syntax, StorageError if unreadable."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error


def parse(cls: type[T], table: dict[str, Any], where: str) -> T:
    """A frozen dataclass from a table; UsageError names the file and the key that is wrong."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise UsageError(f"{where}: {unknown('key', key, fields)}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], where, name)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: the key '{name}' is missing")
    try:
        return cls(**values)
    except BadValue as error:
        raise UsageError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UsageError(f"{where}: '{key}' must be a table")
        return parse(hint, value, f"{where} [{key}]")
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}: '{key}' must be a list")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, v, where, key) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: '{key}' must be a table")
        return value
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{where}: '{key}' is too large a number") from None
    if hint is float and type(value) is float and not math.isfinite(value):
        raise UsageError(f"{where}: '{key}' must be a finite number, not {value}")
    if isinstance(hint, type) and not isinstance(hint, pytypes.GenericAlias) and type(value) is not hint:
        kinds = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise UsageError(f"{where}: '{key}' must be {kinds.get(hint, hint.__name__)}, not {value!r}")
    return value


def parse_latency(text: str) -> Latency:
    """`10ms` -> milliseconds; `2.5x` -> a speed-up over dense; `40%` -> a share of the dense latency."""
    text = text.strip()
    units = {"ms": 1.0, "x": 1.0, "%": 0.01, "us": 1e-3, "s": 1e3}
    for unit in ("ms", "us", "x", "%", "s"):
        if text.endswith(unit):
            break
    else:
        raise UsageError(f"latency '{text}' has no unit; write 10ms, 2.5x (speed-up over dense) or 40% (of dense)")
    try:
        number = float(text[: -len(unit)]) * units[unit]
    except ValueError:
        raise UsageError(
            f"latency '{text}' is not a number; write 10ms, 2.5x (speed-up over dense) or 40% (of dense)"
        ) from None
    if not 0 < number < float("inf"):
        raise UsageError(f"latency '{text}' must be above zero and finite")
    if unit == "x":
        return Latency(text, fraction=1 / number)
    if unit == "%":
        return Latency(text, fraction=number)
    return Latency(text, ms=number)
