"""python -m pytest tests/test_deploy.py

What a deployer asks for: batches, another image size, preprocessing inside the files, fp16 weights, class names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import small
import torch
from onnx import helper
from PIL import Image
from safetensors.torch import load_file, save_file
from small import Workspace
from test_docs import manifest_errors

import edgeprune
from edgeprune import adapting, config, data, errors, folding, images, intake, resampling, runtimes, vit, weightfile
from edgeprune.errors import UsageError
from edgeprune.intake import Intake
from edgeprune.latency.clock import Clock
from edgeprune.report import page
from edgeprune.stages import baseline, export, shapes, simplify

CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 0.9,
}  # fmt: skip


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth and noisy parts, black and white ones."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(smooth).astype(int) + rng.integers(-60, 60, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


# Preprocessing in the graph -----------------------------------------------------------------


@pytest.mark.parametrize("interpolation", images.INTERPOLATIONS)
@pytest.mark.parametrize(("size", "to"), [((61, 83), (32, 20)), ((20, 31), (64, 57)), ((40, 40), (40, 25))])
def test_matrices_resize_as_pil_does(interpolation: str, size: tuple[int, int], to: tuple[int, int]) -> None:
    image = picture(*size)
    wanted = np.asarray(image.resize(to[::-1], Image.Resampling[interpolation.upper()])).astype(int)
    pixels = np.asarray(image).astype(np.float32)
    if size[1] != to[1]:
        across = np.einsum("hwc,vw->hvc", pixels, resampling.matrix(size[1], to[1], interpolation))
        pixels = np.clip(np.floor(across + 0.5), 0, 255)
    if size[0] != to[0]:
        down = np.einsum("hwc,uh->uwc", pixels, resampling.matrix(size[0], to[0], interpolation))
        pixels = np.clip(np.floor(down + 0.5), 0, 255)
    off = np.abs(pixels - wanted)
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01


def folded(frame: tuple[int, int], preprocessing: dict[str, Any], path: Path, batch: int | str = 1) -> Path:
    """A model that gives back what the preprocessing makes of its input."""
    model = folding.alone(frame, preprocessing, batch)
    helper.set_model_props(model, {runtimes.BATCH: "2"})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("frame", "changes"),
    [
        ((35, 35), {}),  # the size that is resized to
        ((60, 80), {}),
        ((80, 60), {"interpolation": "bilinear", "crop_pct": 0.8}),
        ((24, 20), {"interpolation": "lanczos", "crop_pct": 1.0}),
        ((32, 50), {"crop_pct": 1.0}),  # nothing to resize, only to crop
        ((90, 70), {"input_size": (3, 32, 24)}),
        ((60, 80), {"interpolation": "nearest"}),
        ((48, 40), {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,)}),
    ],
)
def test_the_graph_does_what_preprocessing_does(
    runtime: str, frame: tuple[int, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    """At most one level of 255 apart, in less than one value of a hundred: where PIL's fixed-point sums round otherwise."""
    preprocessing = {**CONFIG, **changes}
    path = folded(frame, preprocessing, tmp_path / "folded.onnx", "batch")
    pictures = [picture(*frame, seed=seed) for seed in (1, 2)]
    raw = np.stack([images.pixels_of(images.seen(one, preprocessing)) for one in pictures])
    wanted = np.stack([images.preprocess(one, preprocessing) for one in pictures])
    session = runtimes.get(runtime).open(str(path), 1, "fp32")
    assert session.input_shape == (2, *frame, preprocessing["input_size"][0])
    assert session.input_type == "uint8"
    level = 1 / (255 * np.array(preprocessing["std"]).reshape(1, -1, 1, 1))
    off = np.abs(np.array(session.run(raw)) - wanted) / level
    assert off.max() < 1.01
    assert (off > 0.01).mean() < 0.01


def test_a_graph_that_preprocesses_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.stack([np.asarray(picture(60, 80))])
    assert folding.check(raw, CONFIG).shape == (1, 3, 32, 32)
    monkeypatch.setitem(resampling.FILTERS, "bicubic", resampling.FILTERS["bilinear"])
    with pytest.raises(errors.EdgepruneError, match=r"the folded preprocessing is [0-9.]+ levels of 255 from PIL's"):
        folding.check(raw, CONFIG)


def test_a_frame_of_its_own_size_is_left_alone_and_another_is_covered() -> None:
    image = picture(40, 50)
    np.testing.assert_array_equal(intake.framed(image, (40, 50), CONFIG), np.asarray(image))
    square = np.asarray(image.resize((25, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(intake.framed(image, (20, 20), CONFIG), square[:, 2:22])


@pytest.mark.parametrize(
    ("text", "changes", "found"),
    [("", {}, None), ("auto", {}, (35, 35)), ("auto", {"crop_pct": 1.0}, (32, 32)), ("480x640", {}, (480, 640))],
)
def test_frames_that_can_be_asked_for(text: str, changes: dict[str, Any], found: tuple[int, int] | None) -> None:
    assert intake.frame(text, {**CONFIG, **changes}) == found


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("480", {}, "is a size in pixels, as in 480x640"),
        ("0x640", {}, "is a size in pixels"),
        ("99999x10", {}, "is a size in pixels"),
        ("640x480\n", {}, "is a size in pixels"),
        ("auto", {"crop_pct": 1.2}, "a crop_pct of 1.2 pads images"),
        ("auto", {"interpolation": "random"}, "unknown interpolation 'random'"),
    ],
)
def test_frames_that_cannot(text: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        intake.frame(text, {**CONFIG, **changes})


# Batches ------------------------------------------------------------------------------------


def exported(model: Any, how: Intake, path: Path) -> Path:
    """The model as `to_onnx` and `simplify` write it."""
    metadata = {runtimes.BATCH: str(how.batch)}
    export.deploy(model, export.Deployed(how, {**CONFIG, "crop_pct": 1.0}, metadata))
    export.to_onnx(model, (3, 32, 32), path.with_suffix(".exported"))
    simplify.simplify(path.with_suffix(".exported"), path)
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_batches_say_what_single_images_say(
    tiny_vit: Any, make_images: Callable[..., Any], tmp_path: Path, runtime: str, dynamic: bool
) -> None:
    """Of a batch of 4, 6 images are one and a half."""
    pixels = make_images(6)
    path = exported(tiny_vit, Intake(4, dynamic), tmp_path / "batch.onnx")
    with torch.no_grad():
        wanted = tiny_vit(pixels).numpy()
    with Clock(runtime, threads=1) as clock:
        clock.load("model", path)
        np.testing.assert_allclose(clock.predict("model", pixels.numpy()), wanted, atol=1e-4)
        with pytest.raises(UsageError, match=r"model takes float32 \(4, 3, 32, 32\), not uint8 \(4, 3, 32, 32\)"):
            clock.predict("model", np.zeros((6, 3, 32, 32), np.uint8))
    assert export.compare(tiny_vit, path, pixels)["max_error"] < 1e-4
    if dynamic:
        session = onnxruntime.InferenceSession(str(path))
        for count in (1, 3):
            np.testing.assert_allclose(
                session.run(None, {"pixels": pixels[:count].numpy()})[0], wanted[:count], atol=1e-4
            )


def test_plans_that_drop_tokens_take_any_batch(tiny_vit: Any, make_images: Callable[..., Any], tmp_path: Path) -> None:
    pruned = vit.slice_model(tiny_vit, vit.plan_of_shape(((2, 8), (3, 16, 9), (1, 8))))
    path = exported(pruned, Intake(2, True), tmp_path / "tokens.onnx")
    session, pixels = onnxruntime.InferenceSession(str(path)), make_images(5)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"pixels": pixels.numpy()})[0], pruned(pixels), atol=1e-4)


@pytest.mark.parametrize("said", ["", "0", "many", "99999", "-1"])
def test_a_dynamic_file_must_say_at_which_batch_it_is_timed(said: str) -> None:
    with pytest.raises(UsageError, match=r"m\.onnx has a dynamic input \[None, 3\]; export it with batch 1"):
        runtimes.fixed("m.onnx", [None, 3], said)
    assert runtimes.fixed("m.onnx", [None, 3], "8") == (8, 3)
    assert runtimes.fixed("m.onnx", [2, 3], said) == (2, 3)
    with pytest.raises(UsageError, match="dynamic"):
        runtimes.fixed("m.onnx", [1, None], "8")


def test_widths_are_cut_beside_folded_preprocessing(tiny_vit: Any, tmp_path: Path) -> None:
    """The marker width that is cut out of the weights is no size of an image."""
    sizes = vit.anatomy(tiny_vit)
    assert shapes.marker_width(sizes, 0) == 23
    how = export.Deployed(Intake(frame=(23, 46)), {**CONFIG, "crop_pct": 1.0}, {})
    models = shapes.width_models(export.deploy(tiny_vit, how), 0, (8, 16), tmp_path)
    for path in models.values():
        session = runtimes.get("onnxruntime").open(str(path), 1, "fp32")
        assert session.run(np.zeros((1, 23, 46, 3), np.uint8)).shape == (1, 5)


# Weights of another size --------------------------------------------------------------------


def test_position_embeddings_are_interpolated_as_timm_does(make_vit: Callable[..., Any]) -> None:
    from timm.layers import resample_abs_pos_embed

    state = make_vit().state_dict()
    larger = make_vit(seed=1, img_size=[48, 40])
    found, done = adapting.adapt(larger, state)
    weightfile.load(larger, found, "elsewhere")
    wanted = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 5], num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed.data, wanted)
    assert done == ["pos_embed resampled from (1, 17, 48) to (1, 31, 48)"]
    same, done = adapting.adapt(make_vit(seed=1), state)
    assert (same, done) == (state, [])


def test_rgb_weights_serve_grey_images(make_vit: Callable[..., Any]) -> None:
    """An RGB image that is grey says the same to both."""
    model = make_vit()
    grey = make_vit(seed=1, in_chans=1)
    found, done = adapting.adapt(grey, model.state_dict())
    weightfile.load(grey, found, "elsewhere")
    pixels = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(grey(pixels), model(pixels.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    assert done == ["weights for RGB images made ones for 1 channel"]


@pytest.mark.parametrize("changes", [{"patch_size": 4}, {"embed_dim": 24}, {"num_classes": 7}])
def test_weights_of_another_model_are_refused_by_their_own_names(
    make_vit: Callable[..., Any], changes: dict[str, Any]
) -> None:
    state = make_vit(**changes).state_dict()
    model = make_vit()
    found, done = adapting.adapt(model, state)
    assert done == []
    with pytest.raises(UsageError, match="do not fit the architecture"):
        weightfile.load(model, found, "elsewhere")


def test_the_image_size_of_a_card_can_be_asked_for(space: Workspace) -> None:
    card = config.sized(config.load_card(str(space.one)), "48x40")
    model = baseline.load_source(card, None)
    assert model.patch_embed.img_size == (48, 40)
    assert data.transform_config(card, model)["input_size"] == (3, 48, 40)
    assert config.sized(card, "64").kwargs["img_size"] == 64


def test_models_of_one_channel_see_grey_images(make_vit: Callable[..., Any]) -> None:
    card = config.load_card("digits")
    found = data.transform_config(replace(card, transforms=config.TransformSpec()), make_vit(in_chans=1))
    assert (found["input_size"], found["mean"]) == ((1, 32, 32), (0.5,))
    image = picture(50, 40)
    np.testing.assert_array_equal(data.eval_transform(found)(image).numpy(), images.preprocess(image, found))
    with pytest.raises(UsageError, match="takes 4 channels, and edgeprune reads images in RGB or grey"):
        data.transform_config(card, make_vit(in_chans=4))


# Options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "-1"], "batch must be 1 or more images, not -1"),
        (["--batch", "5000"], "'batch' must be from 1 to 1024, not 5000"),
        (["--image-size", "big"], "an image size is a number of pixels, as in 192"),
        (["--fold-preprocessing", "640"], "--fold-preprocessing is a size in pixels, as in 480x640"),
        (["--class-names", "nowhere.txt"], "there is no file 'nowhere.txt'"),
    ],
)
def test_what_cannot_be_deployed_is_refused(space: Workspace, arguments: list[str], said: str) -> None:
    result = space.build("--latency", "80%", *arguments, card=space.one)
    assert result.code == errors.UsageError.exit_code
    assert said in result.err


def test_class_names_must_be_as_many_as_classes(space: Workspace, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    result = space.build("--latency", "80%", "--class-names", names, card=space.one)
    assert result.code == errors.UsageError.exit_code
    assert "2 class names are given, and the model has 10 classes" in result.err
    names.write_bytes(b"\xff\xfe\x00")
    result = space.build("--latency", "80%", "--class-names", names, card=space.one)
    assert result.code == errors.UsageError.exit_code
    assert "is not a text in UTF-8" in result.err


def test_a_card_says_how_it_is_deployed(space: Workspace) -> None:
    path = space.root / "deployed.toml"
    path.write_text(small.ONE + '\n[deploy]\nbatch = 8\nfold_preprocessing = "auto"\nir_precision = "fp16"\n')
    card = config.load_card(str(path))
    assert config.deployed(card).deploy == card.deploy
    assert config.deployed(card, batch=2, ir_precision="fp32").deploy == replace(
        card.deploy, batch=2, ir_precision="fp32"
    )
    path.write_text(small.ONE + '\n[deploy]\nir_precision = "fp17"\n')
    with pytest.raises(UsageError, match=r"deployed\.toml \[deploy\]: unknown ir_precision 'fp17'"):
        config.load_card(str(path))


# A whole build ------------------------------------------------------------------------------

NAMES = [f"the {name}" for name in ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]]


@pytest.fixture(scope="module")
def built(space: Workspace) -> Path:
    """Any batch, timed at 2; raw images of 48x40; fp16 weights."""
    names, weights = space.root / "names.txt", space.root / "apart.safetensors"
    names.write_text("\n".join(NAMES))
    small.random_weights(weights, depth=1, num_heads=1)
    save_file({name: 8 * value for name, value in load_file(weights).items()}, weights)  # so that images differ
    result = space.build(
        "--weights", weights, "--latency", "90%", "--runtime", "openvino", "--dims", "heads,mlp,depth", "--batch", "2",
        "--dynamic-batch", "--fold-preprocessing", "48x40", "--ir-precision", "fp16", "--class-names", names, "--format",
        "json", card=space.one, out=space.root / "deployed",
    )  # fmt: skip
    assert result.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), result.err
    return Path(result.document["artifacts"][0]["path"])


@pytest.fixture
def manifest(built: Path) -> Any:
    return json.loads((built / "manifest.json").read_text())


def test_the_manifest_says_what_the_files_take(built: Path, manifest: Any) -> None:
    assert manifest_errors(manifest) == []
    assert manifest["input"] == {
        "batch": 2, "dynamic_batch": True, "dtype": "uint8", "layout": "NHWC", "shape": [None, 48, 40, 3],
        "preprocessing": "folded",
    }  # fmt: skip
    assert (manifest["entry"], manifest["weights"], manifest["class_names"]) == ("model.xml", "fp16", NAMES)
    assert manifest["classes"] == [str(i) for i in range(10)]


def test_both_files_take_any_number_of_raw_images(built: Path, manifest: Any) -> None:
    """And say what the torch model says of them, rounded to fp16 in one."""
    raw = np.stack([intake.framed(picture(60, 60, seed), (48, 40), manifest["preprocessing"]) for seed in range(3)])
    pixels = np.stack([images.preprocess(Image.fromarray(one), manifest["preprocessing"]) for one in raw])
    with torch.no_grad():
        wanted = edgeprune.load(built)(torch.from_numpy(pixels)).numpy()
    scale = np.abs(wanted).max()
    session = onnxruntime.InferenceSession(str(built / "model.onnx"))
    got = session.run(None, {"pixels": raw})[0]
    assert np.abs(got - wanted).max() < 0.02 * scale  # a level of 255, here and there
    library = runtimes.openvino._library()  # type: ignore[attr-defined]
    core = library.Core()
    compiled = core.compile_model(core.read_model(built / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.abs(compiled([raw])[0] - got).max() < 0.02 * scale
    np.testing.assert_allclose(compiled([raw[:1]])[0], compiled([raw])[0][:1], atol=1e-3 * scale)


def test_the_weights_are_fp16_and_the_names_are_in_both_files(built: Path) -> None:
    library = runtimes.openvino._library()  # type: ignore[attr-defined]
    model = library.Core().read_model(built / "model.xml")
    large = [op for op in model.get_ops() if op.get_type_name() == "Constant" and op.get_output_shape(0) == [10, 48]]
    assert [op.get_output_element_type(0).get_type_name() for op in large] == ["f16"]
    assert model.get_rt_info(["model_info", "labels"]).astype(str).split() == [name.replace(" ", "_") for name in NAMES]
    props = {one.key: one.value for one in onnx.load(built / "model.onnx").metadata_props}
    assert json.loads(props["classes"]) == NAMES
    assert (props["task"], props["edgeprune.batch"]) == ("classify", "2")
    assert (built / "model.bin").stat().st_size < 0.6 * (built / "model.onnx").stat().st_size


def test_accuracy_is_that_of_the_files(built: Path, manifest: Any) -> None:
    """Once more on all images, by hand and one by one."""
    digits, right = images.Digits(), 0
    _, chosen = digits.split()
    session = runtimes.get("openvino").open(str(built / "model.xml"), 1, "fp32")
    assert session.input_shape == (2, 48, 40, 3)
    for i in chosen:
        raw = intake.framed(digits[int(i)][0], (48, 40), manifest["preprocessing"])
        right += int(session.run(raw[None])[0].argmax()) == digits.labels[int(i)]
    assert 100 * right / len(chosen) == pytest.approx(manifest["pruned"]["accuracy"], abs=0.2)


def test_validate_feeds_raw_images(built: Path, manifest: Any) -> None:
    with small.quick():
        result = small.run("validate", built, "--data", "digits", "--format", "json")
    assert result.document["accuracy"]["accuracy"] == pytest.approx(manifest["pruned"]["accuracy"], abs=0.2)


def test_reports_say_what_one_inference_is(built: Path, manifest: Any) -> None:
    said = "batch 2 (others work too), preprocessing of raw 48x40 images included, fp16 weights"
    assert said in (built / "report.md").read_text()
    assert said in (built / "report.html").read_text()
    command = page.command(manifest)
    assert "--batch 2 --dynamic-batch --fold-preprocessing 48x40 --ir-precision fp16" in command
    assert "--image-size" not in command
    assert " --image-size 48x40 " in page.command({**manifest, "image_size": "48x40"})


def test_a_baseline_of_another_batch_cannot_be_compared(built: Path, tmp_path: Path) -> None:
    import shutil

    from edgeprune import artifact

    other = tmp_path / "other"
    shutil.copytree(built, other)
    before = json.loads((other / "manifest.json").read_text())
    before["input"]["batch"] = 1
    artifact.write_manifest(other, before)
    result = small.run("validate", built, "--baseline", other, "--max-regression", "5%")
    assert result.code == errors.UsageError.exit_code
    assert "the baseline's latency is of 1 image, the artifact's of 2" in result.err
