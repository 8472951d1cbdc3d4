"""python -m pytest tests/test_config.py"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune import config
from edgeprune.config import ModelSpec, Recipe
from edgeprune.errors import UsageError
from edgeprune.types import Target

CARD = """
description = "a card"
architecture = "vit_tiny_patch16_224"
num_classes = 3
[data]
name = "folder"
dir = "somewhere"
"""

TARGET = (config.shipped("targets") / "cpu-avx2.toml").read_text(encoding="utf-8")


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(CARD)
    return path


def write(path: Path, *, add: str = "", old: str = "", new: str = "") -> str:
    """The file with a piece exchanged and lines put before its first table; returns its path as text."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(add + "\n" + text.replace(old, new))
    return str(path)


@pytest.mark.parametrize("name", config.names("models"))
def test_shipped_cards_load(name: str) -> None:
    card = config.load_card(name)
    assert card.name == name and card.description and card.architecture and card.num_classes > 0
    assert len(card.finetune.sizes) in (0, len(card.finetune.epochs))
    assert len(card.train.sizes) in (0, len(card.train.epochs))
    assert card.weights in ("", "hub") or Path(card.weights).is_file()


@pytest.mark.parametrize("name", config.names("targets"))
def test_shipped_targets_load(name: str) -> None:
    from edgeprune import runtimes
    from edgeprune.latency import device

    target = config.load_target(name)
    assert target.name == name and target.description and target.machine and target.precisions
    assert target.runtimes and set(target.runtimes) <= set(runtimes.names())
    assert not target.max_isa or target.max_isa in device.ISAS


def test_there_are_shipped_cards_and_targets() -> None:
    assert "digits" in config.names("models") and "cpu-avx2" in config.names("targets")


def test_a_card_of_ones_own(card: Path) -> None:
    spec = config.load_card(str(card))
    assert (spec.name, spec.num_classes, spec.data.dir, spec.data.train_split) == ("mine", 3, "somewhere", "train")
    assert spec.finetune == Recipe() and spec.train.label_weight == 1.0 and spec.train.logit_weight == 0.0


def test_weights_lie_beside_the_card(card: Path) -> None:
    assert config.load_card(write(card, add='weights = "w.pth"')).weights == str(card.parent / "w.pth")
    card.write_text(CARD)
    assert config.load_card(write(card, add='weights = "hub"')).weights == "hub"


def test_whole_numbers_do_for_floats_and_lists_become_tuples(card: Path) -> None:
    card.write_text(CARD + "[finetune]\nepochs = [3, 1.5]\nlearning_rate = 1\n")
    recipe = config.load_card(str(card)).finetune
    assert recipe.epochs == (3.0, 1.5) and isinstance(recipe.epochs[0], float) and recipe.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (CARD.replace("architecture", "architectur"), "unknown key 'architectur'; did you mean 'architecture'"),
        (CARD + "split = 1", r"\[data\]: unknown key 'split'; did you mean 'eval_split|train_split'"),
        (CARD + "[finetune]\nepoch = [1.0]", r"\[finetune\]: unknown key 'epoch'; did you mean 'epochs'"),
        (CARD.replace("num_classes = 3", ""), "the key 'num_classes' is missing"),
        (CARD.replace('name = "folder"', ""), r"\[data\]: the key 'name' is missing"),
        (CARD.replace("= 3", "= '3'"), "'num_classes' must be a whole number, not '3'"),
        (CARD.replace("= 3", "= 3.0"), "'num_classes' must be a whole number, not 3.0"),
        (CARD.replace("= 3", "= true"), "'num_classes' must be a whole number, not True"),
        (CARD + "[finetune]\nepochs = 3.0", "'epochs' must be a list"),
        (CARD + "[finetune]\nepochs = ['3']", "'epochs' must be a number, not '3'"),
        (CARD + "[finetune]\nlearning_rate = true", "'learning_rate' must be a number, not True"),
        (CARD + "[finetune]\naugment = 1", "'augment' must be a table"),
        ("weights = 3\n" + CARD, "'weights' must be a text, not 3"),
        ("calibration = 3\n" + CARD, "'calibration' must be a table"),
        (CARD + "[data]", "not valid TOML"),
        ("= 1", "not valid TOML: .*line 1"),
    ],
)
def test_a_wrong_card_names_file_and_key(card: Path, text: str, says: str) -> None:
    card.write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        config.load_card(str(card))
    assert str(card) in str(error.value)


def test_bytes_that_are_no_text_are_refused(card: Path) -> None:
    card.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        config.load_card(str(card))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("neuron_step = 8", "neuron_step = 0", "neuron_step must be at least 1"),
        ('quantile = "p50"', 'quantile = "p95"', "quantile must be p50, p90 or p99, not 'p95'"),
        ("neuron_step", "neuron_steps", "did you mean 'neuron_step'"),
        ("threads = 0", "", "'threads' is missing"),
        ('runtimes = ["openvino", "onnxruntime"]', "runtimes = [1]", "'runtimes' must be a text, not 1"),
    ],
)
def test_a_wrong_target_names_file_and_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "box.toml"
    path.write_text(TARGET)
    with pytest.raises(UsageError, match=says) as error:
        config.load_target(write(path, old=old, new=new))
    assert str(path) in str(error.value)


def test_a_target_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text(TARGET)
    target = config.load_target(str(tmp_path / "box.toml"))
    assert isinstance(target, Target) and target.name == "box" and target.neuron_step == 8


@pytest.mark.parametrize(
    ("load", "name", "says"),
    [
        (config.load_card, "digit", "unknown model 'digit'; did you mean 'digits'"),
        (config.load_target, "cpu-avx3", "unknown target 'cpu-avx3'; did you mean 'cpu-avx"),
        (config.load_card, "nowhere.toml", r"there is no file 'nowhere\.toml'"),
        (config.load_target, "nowhere.toml", r"there is no file 'nowhere\.toml'"),
    ],
)
def test_unknown_names(load: object, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(name)  # type: ignore[operator]


def test_a_timm_name_needs_no_card() -> None:
    spec = config.load_card("deit_small_patch16_224.fb_in1k")
    assert (spec.architecture, spec.weights, spec.num_classes) == ("deit_small_patch16_224.fb_in1k", "hub", 0)
    assert "/" not in config.load_card("hf-hub:timm/some_model").name


def test_a_mistyped_card_does_not_load_torch() -> None:
    code = (
        "import sys; from edgeprune import config, errors\n"
        "try: config.load_card('digts')\n"
        "except errors.UsageError: sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cards_are_frozen() -> None:
    with pytest.raises(AttributeError):
        config.load_card("digits").name = "other"  # type: ignore[misc]


def test_parse_says_where() -> None:
    with pytest.raises(UsageError, match="here: unknown key 'nam'"):
        config.parse(ModelSpec, {"nam": "x"}, "here")


# Latency ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dense_ms", "limit_ms"),
    [
        ("10ms", 40, 10), ("10 ms", 40, 10), ("0.5ms", 40, 0.5), ("1e1ms", 40, 10), ("1s", 40, 1000), ("500us", 40, 0.5),
        ("2.5x", 40, 16), ("1x", 40, 40), ("40%", 40, 16), ("150%", 40, 60),
    ],
)  # fmt: skip
def test_a_latency_is_understood(text: str, dense_ms: float, limit_ms: float) -> None:
    latency = config.parse_latency(text)
    assert latency.text == text and latency.limit_ms(dense_ms) == pytest.approx(limit_ms)
    assert (latency.ms is None) != (latency.fraction is None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10", "has no unit; write 10ms"), ("", "has no unit"), ("10MS", "has no unit"), ("ten", "has no unit"),
        ("-1ms", "must be above zero"), ("0x", "must be above zero"), ("0ms", "must be above zero"), ("-2x", "must be above zero"),
        ("nan ms", "must be above zero and finite"), ("infms", "must be above zero and finite"), ("1e999s", "finite"),
        ("abcms", "is not a number"), ("ms", "is not a number"), ("%", "is not a number"), ("10mss", "is not a number"), ("1,5ms", "is not a number"),
    ],
)  # fmt: skip
def test_a_bad_latency_is_refused_with_an_example(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        config.parse_latency(text)
    assert f"latency '{text}'" in str(error.value)
