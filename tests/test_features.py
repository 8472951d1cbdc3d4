"""python -m pytest tests/test_features.py

Embedding models: what divergence means, nearest neighbours, and a whole build of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import parts
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import Workspace
from test_docs import manifest_errors

import edgeprune
from edgeprune import artifact, config, criteria, data, errors, images, neighbours, tasks, vit
from edgeprune.errors import UsageError
from edgeprune.tuning.loop import fit
from edgeprune.tuning.loss import read_tokens


@pytest.fixture
def embedder(make_vit: Callable[..., Any]) -> Any:
    """A tiny ViT without a classifier."""
    model = make_vit()
    model.reset_classifier(0)
    return tasks.mark(model, config.FEATURES)


# Divergence ---------------------------------------------------------------------------------


def test_divergence_of_embeddings_is_half_the_squared_distance_of_unit_vectors() -> None:
    a, b = (torch.randn(7, 5, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    unit_a, unit_b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    found = float(tasks.divergence(a, b, config.FEATURES))
    assert found == pytest.approx(float((unit_a - unit_b).square().sum() / 2))
    assert found == pytest.approx(float(tasks.divergence(3 * a, 0.1 * b, config.FEATURES)))
    assert float(tasks.divergence(a, a, config.FEATURES)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("task", config.TASKS)
def test_the_surprise_has_the_fisher_information_for_its_covariance(task: str) -> None:
    """The mean of (gradient . change)^2 is twice the divergence that a small change makes."""
    outputs = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    change = 1e-3 * torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(2)
    seen = []
    for _ in range(4000):
        [gradient] = torch.autograd.grad(tasks.surprise(outputs, task, generator), outputs)
        seen.append(float((gradient * change).sum() ** 2))
    wanted = 2 * float(tasks.divergence(outputs + change, outputs, task).detach())
    assert np.mean(seen) == pytest.approx(wanted, rel=0.12)


def test_scale_is_how_far_apart_embeddings_are() -> None:
    apart = torch.eye(4)
    near = torch.ones(4, 4) + 0.01 * apart
    assert tasks.scale(apart, config.FEATURES) == pytest.approx(0.75)  # images themselves included
    assert 0 < tasks.scale(near, config.FEATURES) < 1e-4
    assert tasks.scale(near, config.CLASSIFY) == 1


def test_top1_of_embeddings_is_the_nearest_other_image() -> None:
    near = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 2.0]])
    assert tasks.top1(near, config.FEATURES).tolist() == [2, 3, 0, 1]
    assert tasks.top1(near, config.CLASSIFY).tolist() == [0, 1, 0, 1]


def test_fisher_foretells_what_embeddings_lose(embedder: Any) -> None:
    """One backward pass against the measured divergence, over levels of all sub-blocks."""
    levels = [criteria.score(criteria.get(name), parts.evidence(embedder, name)[0]) for name in ("fisher", "kl")]
    foretold = np.concatenate([level.errors[1:] for level in levels[0]])
    measured = 2 * np.concatenate([level.errors[1:] for level in levels[1]])
    assert np.corrcoef(np.log(foretold), np.log(measured))[0, 1] > 0.8
    small_ones = measured < np.quantile(measured, 0.5)
    assert 0.3 < np.median(foretold[small_ones] / measured[small_ones]) < 3


def test_the_tokens_that_an_embedding_is_made_of_are_found(embedder: Any) -> None:
    """Its length is fixed by the last norm, and says nothing."""
    assert read_tokens(embedder).tolist() == [True] + [False] * 16


def test_tuning_brings_embeddings_closer(embedder: Any) -> None:
    pruned = tasks.mark(vit.slice_model(embedder, vit.plan_of_shape(((2, 16), (3, 8), (1, 24)))), config.FEATURES)
    train, check = parts.images(60), parts.images(20, seed=9)
    before = parts.divergence(pruned, embedder, check, 10)
    fit(pruned, train, parts.RECIPE, parts.CONFIG, teacher=embedder, check=check, seed=0)
    assert parts.divergence(pruned, embedder, check, 10) < 0.7 * before


# Nearest neighbours -------------------------------------------------------------------------


@pytest.fixture
def reference() -> neighbours.Reference:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    centres = rng.standard_normal((3, 8))
    unit = neighbours.normalised(centres[labels] + 1.5 * rng.standard_normal((90, 8)))
    return neighbours.Reference(labels, neighbours.centred(unit), 7, 3)


def test_votes_are_those_of_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: Any) -> Any:
        return np.exp((1 - distances) / neighbours.TEMPERATURE)

    unit = neighbours.normalised(np.random.default_rng(1).standard_normal((50, 8)))
    rng = np.random.default_rng(2)
    labels, others = rng.integers(0, 3, 90), neighbours.normalised(3 + rng.standard_normal((90, 8)))
    known = KNeighborsClassifier(7, weights=weights, metric="cosine").fit(others, labels)
    votes = np.exp(neighbours.Reference(labels, neighbours.centred(others), 7, 3).logits(unit).astype(float))
    np.testing.assert_allclose(votes / votes.sum(-1, keepdims=True), known.predict_proba(unit), atol=5e-3)  # float16


def test_more_neighbours_than_references_are_all_of_them(reference: neighbours.Reference) -> None:
    few = neighbours.Reference(np.array([0, 1, 1]), np.eye(3, dtype=np.float32), 20, 3)
    assert few.logits(np.eye(3, dtype=np.float32)).argmax(-1).tolist() == [0, 1, 1]


def test_a_reference_is_read_as_it_was_written(reference: neighbours.Reference, tmp_path: Path) -> None:
    neighbours.save(reference, tmp_path / "r.npy")
    again = neighbours.load(tmp_path / "r.npy", 7, 3)
    np.testing.assert_array_equal(again.labels, reference.labels)
    np.testing.assert_array_equal(again.embeddings, reference.embeddings)


@pytest.mark.parametrize("what", ["text", "pickle", "plain", "cut", "labels", "infinite"])
def test_what_is_no_reference_is_refused(reference: neighbours.Reference, tmp_path: Path, what: str) -> None:
    path = tmp_path / "r.npy"
    neighbours.save(reference, path)
    if what == "text":
        path.write_text("nothing of the kind")
    elif what == "pickle":
        np.save(path, np.array([{"label": 1}], dtype=object), allow_pickle=True)
    elif what == "plain":
        np.save(path, np.zeros((3, 4)))
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif what == "infinite":
        broken = reference.embeddings.copy()
        broken[3, 2] = np.inf
        neighbours.save(neighbours.Reference(reference.labels, broken, 7, 3), path)
    with pytest.raises(UsageError, match=r"r\.npy holds no reference embeddings"):
        neighbours.load(path, 7, 2 if what == "labels" else 3)


# Cards and options --------------------------------------------------------------------------


def test_a_classifier_embeds_without_its_last_layer() -> None:
    card = config.load_card("digits").as_task("features")
    assert (card.num_classes, card.arguments["num_classes"]) == (0, 0)
    assert config.load_card("digits").arguments == {}


def test_a_projection_stays_where_the_card_has_one(space: Workspace) -> None:
    path = space.root / "projected.toml"
    path.write_text('task = "features"\n' + small.ONE)
    card = config.load_card(str(path))
    assert (card.task, card.num_classes, "num_classes" in card.arguments) == ("features", 10, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "feature"], "did you mean 'features'?"),
        (["--task", "features", "--criterion", "taylor"], "the criterion 'taylor' looks at classes"),
        (["--task", "features", "--criterion", "lrp"], "the criterion 'lrp' looks at classes"),
        (["--task", "features", "--allocator", "sls"], "the allocator 'sls' looks at classes"),
        (["--task", "features", "--schedule", "p3b", "--epochs", "1"], "the schedule 'p3b' looks at classes"),
    ],
)
def test_what_embedding_models_cannot_be_asked_for(space: Workspace, arguments: list[str], said: str) -> None:
    result = space.build("--latency", "60%", *arguments, card=space.one)
    assert result.code == errors.UsageError.exit_code
    assert said in result.err


def test_a_model_without_a_classifier_is_told_of_the_task(space: Workspace) -> None:
    path = space.root / "headless.toml"
    path.write_text(small.ONE.replace("num_classes = 10", "num_classes = 0"))
    path.write_text(path.read_text().replace("[kwargs]", "[kwargs]\nnum_classes = 0"))
    weights = small.random_weights(space.root / "headless.safetensors", depth=1, num_heads=1)
    save_file({k: v for k, v in load_file(weights).items() if not k.startswith("head.")}, weights)
    result = space.build("--latency", "60%", "--weights", weights, card=path)
    assert result.code == errors.UsageError.exit_code
    assert "the model has no classifier: add --task features" in result.err


def test_cards_of_embedding_models_that_contradict_themselves(space: Workspace) -> None:
    path = space.root / "odd.toml"
    path.write_text('task = "features"\n' + small.ONE.replace("[finetune]", "[finetune]\nlabel_weight = 0.5"))
    result = space.build("--latency", "60%", card=path)
    assert result.code == errors.UsageError.exit_code
    assert "odd.toml: an embedding model has no classes to learn: set [finetune] label_weight to 0" in result.err
    path.write_text('task = "features"\n' + small.ONE)
    result = space.build("--latency", "60%", "--task", "classify", card=path)
    assert result.code == errors.UsageError.exit_code
    assert "the card 'odd' is of an embedding model" in result.err
    result = small.run("train", path, "--out", space.root / "odd.safetensors")
    assert result.code == errors.UsageError.exit_code
    assert "which labels cannot train" in result.err


# A whole build ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(space: Workspace) -> Path:
    out = space.root / "features"
    weights = small.random_weights(space.root / "spread.safetensors", depth=1, num_heads=1)
    state = {name: 8 * value for name, value in load_file(weights).items()}  # or all images would look alike
    save_file(state, weights)
    result = space.build(
        "--task", "features", "--weights", weights, "--latency", "80%", "--max-drop", "100", "--format", "json", "--dims", "heads,mlp,depth",
        card=space.one, out=out,
    )  # fmt: skip
    assert result.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), result.err
    return Path(result.document["artifacts"][0]["path"])


def test_the_manifest_says_how_near_the_embeddings_are(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest_errors(manifest) == []
    found = manifest["features"]
    assert (found["dimensions"], found["classes"], found["neighbours"]) == (48, 10, 20)
    assert found["reference"] == manifest["data"]["train"]
    assert -1 <= found["cosine"]["least"] <= found["cosine"]["p1"] <= found["cosine"]["mean"] <= 1.001
    assert [check["name"] for check in manifest["checks"]] == ["latency p50", "accuracy drop"]
    assert manifest["dense"]["accuracy"] > 40  # ten classes; random weights keep digits apart


def test_the_embeddings_are_those_of_the_artifact(built: Path) -> None:
    """Cosine and k-NN accuracy once more, by hand: torch for the dense model, ONNX Runtime for the artifact's file."""
    manifest = json.loads((built / "manifest.json").read_text())
    session = onnxruntime.InferenceSession(str(built / "model.onnx"))
    [output] = session.get_outputs()
    assert (output.name, output.shape) == ("embedding", [1, 48])
    reference = neighbours.load(built / neighbours.FILE, 20, 10)
    digits = images.Digits()
    _, chosen = digits.split()
    rows = []
    for i in chosen[:100]:
        pixels = images.preprocess(digits[int(i)][0], manifest["preprocessing"])
        rows.append(session.run(None, {"pixels": pixels[None]})[0][0])
    model = edgeprune.load(built)
    assert tasks.of(model) == config.FEATURES
    pixels_t = torch.stack(
        [torch.from_numpy(images.preprocess(digits[int(i)][0], manifest["preprocessing"])) for i in chosen[:100]]
    )
    with torch.no_grad():
        np.testing.assert_allclose(model(pixels_t).numpy(), np.stack(rows), atol=5e-3)  # of up to 17
    found = reference.logits(neighbours.normalised(np.stack(rows))).argmax(-1)
    share = 100 * float((found == digits.labels[chosen[:100]]).mean())
    assert abs(share - manifest["pruned"]["accuracy"]) < 20  # of a sixth of the images


def test_the_plan_remembers_the_task(built: Path) -> None:
    planned = artifact.read_plan(built / "plan.json")
    assert (planned.task, planned.num_classes, planned.kwargs["num_classes"]) == ("features", 0, 0)


def test_reports_call_it_k_nn_accuracy(built: Path) -> None:
    assert "| k-NN accuracy |" in (built / "report.md").read_text()
    page = (built / "report.html").read_text()
    assert "k-NN accuracy" in page
    assert "cosine to the dense embeddings" in page
    assert "--task features" in page
    assert "cosine to dense, mean" in small.run("report", built).out


def test_validate_finds_the_same_accuracy_without_torch_or_training_images(built: Path) -> None:
    with small.quick():
        result = small.run("validate", built, "--data", "digits", "--format", "json")
    manifest = json.loads((built / "manifest.json").read_text())
    assert result.document["accuracy"]["accuracy"] == pytest.approx(manifest["pruned"]["accuracy"], abs=0.4)
    assert {check["name"] for check in result.document["checks"]} == {"latency p50", "accuracy", "accuracy drop"}


def test_validate_misses_the_reference(built: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    (copy / neighbours.FILE).unlink()
    result = small.run("validate", copy, "--data", "digits")
    assert result.code == errors.UsageError.exit_code
    assert "reference.npy is missing" in result.err


def test_classifier_weights_are_left_out_of_an_embedding_model(space: Workspace) -> None:
    from edgeprune.stages import baseline

    card = config.load_card(str(space.one)).as_task("features")
    model = baseline.load_source(card, None)
    assert isinstance(model.head, torch.nn.Identity)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 48)
    assert data.transform_config(card, model)["input_size"] == (3, 32, 32)
