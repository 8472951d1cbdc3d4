"""python -m pytest tests/test_images.py

What a device without torch sees is what the build saw: the same images, the same labels, the same pixels.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune import data, extras, images
from edgeprune.config import CalibrationSpec, DataSpec, ModelSpec
from edgeprune.errors import UsageError

CONFIG: dict[str, Any] = {
    "input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    "crop_pct": 0.9,
}  # fmt: skip
#: Height and width; odd, flat, thin, smaller and larger than the model's.
SIZES = [(8, 8), (31, 77), (500, 333), (224, 224), (37, 36), (257, 301), (45, 1), (3, 200)]


def manifest(
    classes: tuple[str, ...] = ("ant", "bee"), source: str = "folder data set", **facts: Any
) -> dict[str, Any]:
    return {"classes": list(classes), "data": {"source": source, "evaluation": 16, "seed": 0, **facts}}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", images.INTERPOLATIONS)
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.9, 0.875, 0.5, 1.2])
def test_pixels_are_timms(interpolation: str, crop_pct: float) -> None:
    """Every size, square and other inputs; above 1 the image is padded. Equal to the bit."""
    for size in ((32, 32), (64, 64), (33, 47), (48, 32)):
        config = {**CONFIG, "input_size": [3, *size], "interpolation": interpolation, "crop_pct": crop_pct}
        transform = data.eval_transform(config)
        for height, width in SIZES:
            image = noise(height, width)
            found = images.preprocess(image, config)
            assert found.dtype == np.float32
            assert found.shape == (3, *size)
            np.testing.assert_array_equal(found, transform(image).numpy(), err_msg=f"{size} of {height} x {width}")


def test_a_missing_crop_is_timms_default() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "crop_pct"}
    image = noise(90, 70)
    np.testing.assert_array_equal(images.preprocess(image, config), data.eval_transform(config)(image).numpy())


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_files_of_every_mode_are_read_as_at_build(tmp_path: Path, image_folder: Callable[..., Path], mode: str) -> None:
    where = image_folder(size=41)
    for path in images.image_files(where):
        Image.open(path).convert(mode).save(path)
    built = data.load_splits(spec(where), {**CONFIG, "input_size": (3, 32, 32)}, 0).evaluation
    found = images.for_artifact(manifest(), "", str(where))
    assert found is not None
    [(pixels, labels)] = found.batches(CONFIG, 64)
    [(want, want_labels)] = built.batches(64)
    np.testing.assert_array_equal(pixels, want.numpy())
    np.testing.assert_array_equal(labels, want_labels.numpy())


def test_an_interpolation_that_pil_does_not_know() -> None:
    with pytest.raises(UsageError, match="unknown interpolation 'bicubik'; did you mean 'bicubic'"):
        images.preprocess(noise(8, 8), {**CONFIG, "interpolation": "bicubik"})


# The same images as at build ----------------------------------------------------------------


def spec(where: Path | str, name: str = "folder") -> ModelSpec:
    return ModelSpec("test", "", "vit", 2, DataSpec(name, str(where)), calibration=CalibrationSpec(4))


def test_digits_are_those_of_the_build() -> None:
    built = data.load_splits(spec("", "digits"), CONFIG, seed=3)
    found = images.for_artifact(manifest(source=built.source), "digits", "")
    assert found is not None
    assert len(found) == images.DIGITS_TEST == len(built.evaluation)
    batches = list(found.batches(CONFIG, 100))
    assert [len(labels) for _, labels in batches] == [100] * 5 + [99]
    want = list(built.evaluation.batches(100))
    for (pixels, labels), (want_pixels, want_labels) in zip(batches, want, strict=True):
        np.testing.assert_array_equal(pixels, want_pixels.numpy())
        np.testing.assert_array_equal(labels, want_labels.numpy())


@pytest.mark.parametrize("part", ["validation", "val", "test", ""])
def test_a_folder_with_or_without_a_part(image_folder: Callable[..., Path], part: str) -> None:
    where = image_folder((part,), classes=("bee", "ant"))
    found = images.for_artifact(manifest(("bee", "ant")), "folder", str(where))
    assert found is not None
    assert found.corrupt == {}
    assert len(found) == 16
    assert {Path(name).parent.name: label for name, label in zip(found.names, found.labels)} == {"bee": 0, "ant": 1}


def test_images_of_some_classes_are_enough(image_folder: Callable[..., Path]) -> None:
    found = images.for_artifact(manifest(("ant", "bee", "cat")), "", str(image_folder(("",), classes=("cat",))))
    assert found is not None
    assert set(found.labels) == {2}


@pytest.mark.parametrize("seed", [0, 5])
def test_a_folder_that_was_divided_is_divided_alike(image_folder: Callable[..., Path], seed: int) -> None:
    where = image_folder(("train",), per_class=30)
    built = data.load_splits(spec(where), CONFIG, seed)
    recorded = manifest(source=built.source, evaluation=len(built.evaluation), seed=seed)
    found = images.for_artifact(recorded, "", str(where))
    assert found is not None
    reader = built.evaluation.source.reader
    assert found.names == [reader.filename(int(i), absolute=True) for i in built.evaluation.indices]
    assert len(found) == 12 and found.source.endswith("(divided 80:20)")
    other = images.for_artifact({**recorded, "data": {**recorded["data"], "evaluation": 99}}, "", str(where))
    assert other is not None
    assert len(other) == 60, "another folder is judged whole"


def test_files_come_in_timms_order(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    where = image_folder(("validation",), per_class=12)
    (where / "validation" / "ant" / "notes.txt").write_text("no image")
    reader = data.create_dataset("", root=str(where), split="validation").reader
    found = images.image_files(where / "validation")
    assert list(map(str, found)) == [reader.filename(i, absolute=True) for i in range(24)]


# Refusals -----------------------------------------------------------------------------------


def test_no_data_is_asked_for() -> None:
    assert images.for_artifact(manifest(), "", "") is None


@pytest.mark.parametrize(
    ("name", "where", "recorded", "says"),
    [
        ("torch/cifar10", "", {}, "validate reads 'digits' or 'folder', not 'torch/cifar10'; write the images to DIR/<class>"),
        ("folder", "", {}, "needs --data-dir DIR"),
        ("folder", "/nowhere/at/all", {}, "there is no folder '/nowhere/at/all'; give --data-dir"),
        ("digits", "", {}, "the artifact was built on folder data set, not on digits; give --data-dir DIR"),
        ("digits", "/tmp", {"source": images.DIGITS_SOURCE}, "'digits' is embedded and reads no '/tmp'; leave --data-dir out"),
    ],
)  # fmt: skip
def test_data_that_means_nothing(name: str, where: str, recorded: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as error:
        images.for_artifact(manifest(**recorded), name, where)
    assert says in str(error.value)


def test_folders_that_are_no_classes(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    where = image_folder(("val",), classes=("ant", "wasp"))
    with pytest.raises(UsageError, match=r"/val/wasp' is named after no class of the artifact \(ant, bee\); name each"):
        images.for_artifact(manifest(), "", str(where))
    with pytest.raises(UsageError, match="the artifact names no classes"):
        images.for_artifact(manifest(()), "", str(where))
    many = manifest(tuple(f"c{i}" for i in range(9)))
    with pytest.raises(UsageError, match=r"\(c0, c1, c2, c3, c4 and 4 more\)"):
        images.for_artifact(many, "", str(where))


def test_images_outside_any_class_folder(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    noise(8, 8).save(tmp_path / "ant" / "one.png")
    with pytest.raises(UsageError, match="is named after no class"):
        images.for_artifact(manifest(), "", str(tmp_path / "ant"))


def test_a_folder_without_images_or_with_training_images_alone(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"'.*' holds no images \(\.png, \.jpg, \.jpeg in one folder per class\)"):
        images.for_artifact(manifest(), "", str(tmp_path))
    with pytest.raises(UsageError, match="has training images only; add a folder validation, val or test"):
        images.for_artifact(manifest(), "", str(image_folder(("train",))))


def test_one_unreadable_image_is_noted_and_more_are_refused_as_at_build(image_folder: Callable[..., Path]) -> None:
    where = image_folder(("train", "validation"), per_class=101, size=8)
    bad = images.image_files(where / "validation")[:3]
    bad[1].write_bytes(bad[1].read_bytes()[:60])
    found = images.for_artifact(manifest(), "", str(where))
    assert found is not None
    assert sum(len(labels) for _, labels in found.batches(CONFIG, 50)) == 201
    assert list(found.corrupt) == [str(bad[1])]
    bad[0].write_bytes(b"no image")
    bad[2].write_bytes(b"")
    again = images.for_artifact(manifest(), "", str(where))
    assert again is not None
    with pytest.raises(UsageError) as error:
        list(again.batches(CONFIG, 50))
    with pytest.raises(UsageError) as at_build:
        list(data.load_splits(spec(where), CONFIG, 0).evaluation.batches(50))
    said = "3 of the 202 evaluation images cannot be read, more than 1%: "
    for text in (str(error.value), str(at_build.value)):
        assert text.startswith(said) and text.endswith("; repair or remove them")
        assert all(str(path) in text for path in bad)


# Packages -----------------------------------------------------------------------------------


def test_missing_packages_are_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "BUILD", {"numpy": "numpy", "no_such_1": "pkg-one", "no_such_2": "pkg-two"})
    with pytest.raises(UsageError) as error:
        extras.need_build_packages()
    assert str(error.value) == (
        "building needs pkg-one, pkg-two (not installed); install them with: pip install 'edgeprune[build]'"
    )
    monkeypatch.setattr(extras, "BUILD", {"no_such_1": "pkg-one"})
    with pytest.raises(UsageError, match=r"training needs pkg-one .* install it with: "):
        extras.need_build_packages("training")
    monkeypatch.setattr(extras, "BUILD", {"numpy": "numpy"})
    extras.need_build_packages()


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "missing", lambda packages: list(packages.values()))
    with pytest.raises(
        UsageError, match=r"the digits data set needs scikit-learn \(not installed\); install it with: pip"
    ):
        images.Digits()


def test_neither_torch_nor_pil_is_imported_to_list_a_folder() -> None:
    code = "import sys, edgeprune.images; assert not {'torch', 'timm', 'PIL', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
