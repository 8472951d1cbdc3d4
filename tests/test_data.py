"""python -m pytest tests/test_data.py"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import data
from edgeprune.config import CalibrationSpec, DataSpec, ModelSpec, TransformSpec
from edgeprune.errors import UsageError

CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
}  # fmt: skip


def spec(name: str = "digits", where: Path | str = "", images: int = 4, **options: Any) -> ModelSpec:
    return ModelSpec(
        "test", "", "vit_tiny_patch16_224", 2, DataSpec(name, str(where), **options), calibration=CalibrationSpec(images)
    )  # fmt: skip


def folder(where: Path, seed: int = 0, **options: Any) -> data.Splits:
    return data.load_splits(spec("folder", where, **options), CONFIG, seed)


def files(images: data.Images) -> set[str]:
    """The files of one part."""
    return {images.source.reader.filename(int(i), absolute=True) for i in images.indices}


# Digits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_digits_are_divided_into_disjoint_parts(seed: int) -> None:
    splits = data.load_splits(spec(images=100), CONFIG, seed)
    parts = [set(map(int, p.indices)) for p in (splits.train, splits.calibration, splits.evaluation)]
    assert [len(p) for p in parts] == [1797 - 599 - 100, 100, 599]
    assert len(set.union(*parts)) == 1797
    assert splits.classes == tuple("0123456789")


def test_the_digits_test_part_does_not_depend_on_the_seed() -> None:
    first, second = (data.load_splits(spec(), CONFIG, seed) for seed in (0, 1))
    assert np.array_equal(first.evaluation.indices, second.evaluation.indices)
    assert not np.array_equal(first.train.indices, second.train.indices)
    assert set(first.calibration.indices) != set(second.calibration.indices)


def test_the_same_seed_gives_the_same_parts() -> None:
    first, second = (data.load_splits(spec(), CONFIG, 3) for _ in range(2))
    for part in ("train", "calibration", "evaluation"):
        assert np.array_equal(getattr(first, part).indices, getattr(second, part).indices)


def test_digits_are_grey_images_with_their_labels() -> None:
    from sklearn.datasets import load_digits

    digits, bunch = data.Digits(), load_digits()
    image, label = digits[5]
    assert image.mode == "RGB" and image.size == (8, 8) and label == bunch.target[5]
    pixels = np.asarray(image)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    np.testing.assert_allclose(pixels[..., 0] / 255 * 16, bunch.images[5], atol=0.05)


# Folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["validation", "val", "test"])
def test_a_folder_with_an_evaluation_part(image_folder: Callable[..., Path], part: str) -> None:
    splits = folder(image_folder(("train", part)))
    assert len(splits.train) == 12 and len(splits.calibration) == 4 and len(splits.evaluation) == 16
    assert not files(splits.train) & files(splits.calibration)
    assert all(Path(f).parts[-3] == "train" for f in files(splits.train) | files(splits.calibration))
    assert all(Path(f).parts[-3] == part for f in files(splits.evaluation))
    assert splits.classes == ("ant", "bee")


def test_validation_is_preferred_and_the_cards_split_before_all(image_folder: Callable[..., Path]) -> None:
    where = image_folder(("train", "validation", "val", "test"))
    assert {Path(f).parts[-3] for f in files(folder(where).evaluation)} == {"validation"}
    assert {Path(f).parts[-3] for f in files(folder(where, eval_split="test").evaluation)} == {"test"}


@pytest.mark.parametrize("parts", [("train",), ("",)])
def test_a_folder_without_an_evaluation_part_is_divided(image_folder: Callable[..., Path], parts: Any) -> None:
    where = image_folder(parts, per_class=25)
    first, again, other = folder(where, 0), folder(where, 0), folder(where, 1)
    assert len(first.evaluation) == 10 and len(first.train) == 36 and "80:20" in first.source
    assert len(files(first.train) | files(first.calibration) | files(first.evaluation)) == 50
    assert files(first.evaluation) == files(again.evaluation) != files(other.evaluation)


def test_evaluation_images_are_never_trained_on(image_folder: Callable[..., Path]) -> None:
    """A folder with validation/ but nothing named train/: refused, or kept apart; never one inside the other."""
    where = image_folder(("Training-images", "validation"))
    try:
        splits = folder(where)
    except UsageError as error:
        assert "train" in str(error)
    else:
        assert not (files(splits.train) | files(splits.calibration)) & files(splits.evaluation)


def test_labels_are_those_of_the_folders(image_folder: Callable[..., Path]) -> None:
    splits = folder(image_folder(per_class=3), images=1)
    for i in range(len(splits.evaluation)):
        index = int(splits.evaluation.indices[i])
        name = Path(splits.evaluation.source.reader.filename(index, absolute=True)).parent.name
        assert splits.classes[splits.evaluation[i][1]] == name


@pytest.mark.parametrize("parts", [(), ("train",)])
def test_an_empty_folder_is_refused(tmp_path: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        (tmp_path / part).mkdir()
    with pytest.raises(UsageError, match=str(tmp_path)):
        folder(tmp_path)


@pytest.mark.parametrize(("where", "says"), [("", "needs --data-dir"), ("/nowhere/at/all", "there is no folder")])
def test_a_folder_that_is_not_there(where: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        folder(Path(where) if where else "")  # type: ignore[arg-type]


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch/nonsense"):
        data.load_splits(spec("torch/nonsense", tmp_path), CONFIG, 0)


def test_different_class_folders_are_refused(image_folder: Callable[..., Path]) -> None:
    image_folder(("train",), ("ant", "bee"))
    with pytest.raises(UsageError, match="class folders of 'train' and 'validation' differ"):
        folder(image_folder(("validation",), ("ant", "cat")))


def test_classes_must_be_as_many_as_the_models(image_folder: Callable[..., Path]) -> None:
    splits = folder(image_folder())
    data.check_classes(splits, 2)
    with pytest.raises(UsageError, match="has 2 classes, the model 5"):
        data.check_classes(splits, 5)


@pytest.mark.parametrize("images", [16, 17])
def test_more_calibration_than_training_images(image_folder: Callable[..., Path], images: int) -> None:
    with pytest.raises(UsageError, match=f"16 training images, but the card sets {images} aside"):
        folder(image_folder(), images=images)


# Unreadable images --------------------------------------------------------------------------


def test_too_many_unreadable_images_are_named_and_refused(image_folder: Callable[..., Path]) -> None:
    where = image_folder()
    bad = sorted((where / "validation").rglob("*.png"))[:3]
    bad[0].write_bytes(b"no image")
    bad[1].write_bytes(bad[1].read_bytes()[:100])  # cut off
    bad[2].write_bytes(b"")
    with pytest.raises(UsageError, match="of the 16 evaluation images cannot be read, more than 1%") as error:
        list(folder(where).evaluation.batches(4))
    assert str(bad[0]) in str(error.value)


def test_one_unreadable_image_among_many_is_noted(image_folder: Callable[..., Path]) -> None:
    where = image_folder(("train", "validation"), per_class=101, size=8)
    bad = where / "validation" / "bee" / "validation-bee-7.png"
    bad.write_bytes(b"no image")
    splits = folder(where)
    batches = list(splits.evaluation.batches(50))
    assert sum(len(labels) for _, labels in batches) == 201
    assert sum(int((labels == 1).sum()) for _, labels in batches) == 100  # timm would show its neighbour instead
    assert list(splits.evaluation.corrupt) == [str(bad)]
    assert list(splits.evaluation.corrupt) == [str(bad)]
    list(splits.evaluation.batches(50))  # a second pass does not count it twice
    assert len(splits.evaluation.corrupt) == 1


def test_notes_are_shared_by_other_views_of_the_same_images(image_folder: Callable[..., Path]) -> None:
    where = image_folder()
    (where / "validation" / "ant" / "validation-ant-0.png").write_bytes(b"no image")
    splits = folder(where)
    view = splits.evaluation.with_transform(data.eval_transform(CONFIG, 16))
    assert {tuple(x.shape[1:]) for x, _ in view.batches(5)} == {(3, 16, 16)}
    assert len(splits.evaluation.corrupt) == 1


# Batches ------------------------------------------------------------------------------------


def test_batches_in_order_and_shuffled(image_folder: Callable[..., Path]) -> None:
    images = folder(image_folder()).evaluation

    def pixels(**options: Any) -> torch.Tensor:
        return torch.cat([x for x, _ in images.batches(5, **options)])

    plain, one, again, other = pixels(), pixels(shuffle_seed=1), pixels(shuffle_seed=1), pixels(shuffle_seed=2)
    assert plain.shape == (16, 3, 32, 32) and plain.dtype == torch.float32
    assert torch.equal(one, again) and not torch.equal(one, plain) and not torch.equal(one, other)
    key = [float(x.sum()) for x in plain]
    assert sorted(float(x.sum()) for x in one) == sorted(key)


def test_take(image_folder: Callable[..., Path]) -> None:
    images = folder(image_folder()).evaluation
    assert len(images.take(3)) == 3 and torch.equal(images.take(3)[2][0], images[2][0])


def test_grey_and_transparent_images_become_rgb(image_folder: Callable[..., Path]) -> None:
    from PIL import Image

    where = image_folder()
    names = sorted((where / "validation" / "ant").iterdir())
    for path, mode in zip(names, ("L", "RGBA", "P", "1", "LA"), strict=False):
        Image.open(path).convert(mode).save(path)
    assert sum(len(y) for _, y in folder(where).evaluation.batches(4)) == 16


def test_files_are_closed(image_folder: Callable[..., Path]) -> None:
    images = folder(image_folder()).evaluation
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        list(images.batches(4))
        gc.collect()
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]


# Transforms ---------------------------------------------------------------------------------


def test_the_transform_is_timms_for_the_model(tiny_vit: Any) -> None:
    config = data.transform_config(spec(), tiny_vit)
    assert config["input_size"] == (3, 32, 32)
    for key in ("mean", "std", "crop_pct", "interpolation"):
        assert config[key] == tiny_vit.pretrained_cfg[key]


def test_the_card_overrides_the_transform(tiny_vit: Any) -> None:
    overrides = TransformSpec(mean=(0.1, 0.2, 0.3), crop_pct=0.5)
    config = data.transform_config(replace(spec(), transforms=overrides), tiny_vit)
    assert config["mean"] == (0.1, 0.2, 0.3) and config["crop_pct"] == 0.5
    assert config["std"] == tiny_vit.pretrained_cfg["std"]


def test_pixels_are_normalised() -> None:
    from PIL import Image

    tensor = data.eval_transform({**CONFIG, "mean": (0.2,) * 3, "std": (0.4,) * 3})(
        Image.new("RGB", (40, 40), (255,) * 3)
    )
    torch.testing.assert_close(tensor, torch.full((3, 32, 32), 2.0))


def test_training_without_augmentation_sees_the_evaluation_transform() -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    assert torch.equal(data.train_transform(CONFIG, {})(image), data.eval_transform(CONFIG)(image))
    assert data.train_transform(CONFIG, {"hflip": 0.5}, 16)(image).shape == (3, 16, 16)


def test_an_augmentation_that_timm_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match=r"augment.*hflop"):
        data.train_transform(CONFIG, {"hflop": 0.5})


# Labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "images", "classes", "guesses"),
    [(0, 18, 10, True), (5, 18, 10, True), (6, 18, 10, False), (17, 18, 10, False), (0, 64, 1000, True), (1, 64, 1000, True),
     (2, 64, 1000, False), (46, 64, 1000, False), (20, 32, 2, True), (24, 32, 2, False), (6, 6, 2, False), (0, 6, 2, False), (4, 4, 3, False)],
)  # fmt: skip
def test_what_guessing_explains(right: int, images: int, classes: int, guesses: bool) -> None:
    from edgeprune.stages import baseline

    assert baseline.guesses(right, images, classes) == guesses
