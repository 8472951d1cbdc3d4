"""python -m pytest tests/test_selections.py

Which training images calibrate, and which are tuned on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import small
import torch

from edgeprune import api, config, data, modules, pipeline, selections, vit
from edgeprune.console import SILENT
from edgeprune.errors import UsageError
from edgeprune.selections import Pool, density
from edgeprune.stages import baseline
from edgeprune.tuning import launch


def pool(model: Any, images: data.Images | None = None, seed: int = 0) -> Pool:
    return Pool(images or parts.images(60), model, 16, seed, SILENT)


class Clusters:
    """A pool whose features are given; nothing is read."""

    def __init__(self, features: np.ndarray, labels: np.ndarray | None = None, seed: int = 0) -> None:
        self.features, self.labels, self.seed = features.astype(np.float32), labels, seed
        self.images = parts.images(len(features))


@pytest.fixture
def clusters() -> Clusters:
    """Three concepts: a tight one, a middling one, and a wide one far from both."""
    rng = np.random.default_rng(0)
    centres = np.array([[5.0, 0, 0, 0], [4.0, 3, 0, 0], [0, 0, 5, 0]])
    spread = np.repeat([0.1, 0.5, 1.5], 30)
    points = np.repeat(centres, 30, axis=0) + spread[:, None] * rng.normal(size=(90, 4))
    return Clusters(points[rng.permutation(90)])


# Every selection ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", selections.names())
class TestEverySelection:
    def test_it_says_what_it_is(self, name: str) -> None:
        assert len(modules.doc("selection", name).split("\n")) >= 3
        assert set(modules.needs("selection", name)) <= {"activations", "labels"}
        assert modules.needs("selection", name) == selections.get(name).NEEDS

    def test_so_many_different_ones_of_those_that_are_left(self, tiny_vit: Any, name: str) -> None:
        own = pool(tiny_vit)
        left = np.arange(5, 60)
        for count in (1, 4, 23, 55):
            first, again = (selections.get(name).choose(own, left, count) for _ in range(2))
            assert len(first) == count == len(set(first.tolist()))
            assert set(first.tolist()) <= set(left.tolist())
            assert np.array_equal(first, again)

    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_calibration_and_tuning_are_disjoint_and_in_the_drawn_order(
        self, tiny_vit: Any, name: str, share: float
    ) -> None:
        images = parts.images(60)
        images.indices = np.random.default_rng(3).permutation(60)
        chosen = selections.divide(selections.get(name), pool(tiny_vit, images), 20, share)
        assert len(chosen.calibration) == 20 and len(chosen.train) == round(share * 40)
        assert len({*chosen.calibration.tolist(), *chosen.train.tolist()}) == 20 + len(chosen.train)
        order = images.indices.tolist()
        for own in (chosen.calibration, chosen.train):
            places = [order.index(i) for i in own]
            assert places == sorted(places)

    def test_it_is_the_same_again_from_a_fresh_pool(self, tiny_vit: Any, name: str) -> None:
        before = parts.state(tiny_vit)
        first, again = (selections.divide(selections.get(name), pool(tiny_vit), 20, 0.3) for _ in range(2))
        assert np.array_equal(first.calibration, again.calibration) and np.array_equal(first.train, again.train)
        assert all(torch.equal(before[k], v) for k, v in parts.state(tiny_vit).items()) and not tiny_vit.training

    def test_labels_are_looked_at_only_where_it_says_so(self, tiny_vit: Any, name: str) -> None:
        plain, other = parts.images(60), parts.images(60)
        other.source.labels = np.sort(other.source.labels)
        both = [selections.divide(selections.get(name), pool(tiny_vit, own), 20, 0.5) for own in (plain, other)]
        same = all(np.array_equal(getattr(both[0], k), getattr(both[1], k)) for k in ("calibration", "train"))
        assert same == ("labels" not in selections.get(name).NEEDS)


def test_too_few_to_tune_on(tiny_vit: Any) -> None:
    with pytest.raises(UsageError, match=r"0\.03 of 40 training images are too few to tune on; raise --tune-on"):
        selections.divide(selections.get("random"), pool(tiny_vit), 20, 0.03)


def test_an_unknown_selection() -> None:
    with pytest.raises(UsageError, match="unknown selection 'densety'; did you mean 'density'"):
        selections.get("densety")


def test_a_selection_is_no_part_of_a_method() -> None:
    assert "selection" not in modules.KINDS and modules.PACKAGES["selection"] == "selections"


# Quotas -------------------------------------------------------------------------------------


def slow_quotas(wanted: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Every vector of whole numbers within the bounds: the one nearest to `wanted`."""
    low = 1 if count >= len(sizes) else 0
    ranges = [range(low, int(size) + 1) for size in sizes]
    found = [np.array(x) for x in itertools.product(*ranges) if sum(x) == count]
    return min(found, key=lambda x: float(np.square(x - wanted).sum()))


@pytest.mark.parametrize("seed", range(40))
def test_quotas_are_the_nearest_that_there_are(seed: int) -> None:
    """Rounding can cost a little beside the best whole numbers, but never a whole image twice."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 8, 4)
    count = int(rng.integers(2, sizes.sum() + 1))
    wanted = rng.dirichlet(np.ones(4)) * count
    taken = selections.quotas(wanted, sizes, count)
    assert taken.sum() == count and (taken >= (1 if count >= 4 else 0)).all() and (taken <= sizes).all()
    best = slow_quotas(wanted, sizes, count)
    assert np.square(taken - wanted).sum() == pytest.approx(np.square(best - wanted).sum(), abs=1e-6)


def test_quotas_of_equal_wishes() -> None:
    assert selections.quotas(np.full(3, 10 / 3), np.array([9, 9, 9]), 10).tolist() == [4, 3, 3]
    assert selections.quotas(np.full(3, 4.0), np.array([2, 9, 9]), 12).tolist() == [2, 5, 5]
    assert selections.quotas(np.full(4, 0.5), np.array([3, 3, 3, 3]), 2).tolist() == [1, 1, 0, 0]
    assert selections.quotas(np.full(2, 50.0), np.array([3, 4]), 100).tolist() == [3, 4], "all there are"
    many = selections.quotas(np.full(1000, 0.256), np.full(1000, 500), 256)
    assert many.sum() == 256 and set(many.tolist()) == {0, 1}


# Balanced -----------------------------------------------------------------------------------


def test_balanced_takes_as_many_of_each_class(tiny_vit: Any) -> None:
    images = parts.images(60)
    images.source.labels = np.array([0] * 40 + [1] * 15 + [2] * 5)
    images.indices = np.random.default_rng(0).permutation(60)
    taken = selections.get("balanced").choose(pool(tiny_vit, images), np.arange(60), 25)
    labels = images.source.labels[images.indices[taken]]
    assert np.bincount(labels).tolist() == [10, 10, 5]
    drawn = [i for i in range(60) if images.source.labels[images.indices[i]] == 0][:10]
    assert sorted(taken[labels == 0].tolist()) == drawn, "within a class, the first that were drawn"


def test_balanced_reads_no_image_where_labels_are_listed(tiny_vit: Any, image_folder: Callable[..., Path]) -> None:
    where = image_folder(("train", "validation"), per_class=10)
    spec = config.ModelSpec("x", "", "vit", 2, config.DataSpec("folder", str(where)))
    spec = replace(spec, calibration=config.CalibrationSpec(4))
    images = data.load_splits(spec, parts.CONFIG, 0).train
    images._read = None  # type: ignore[method-assign, assignment]
    labels = pool(tiny_vit, images).labels
    assert [images.source.reader.samples[i][1] for i in images.indices] == labels.tolist()


def test_labels_are_read_where_they_are_not_listed(tiny_vit: Any) -> None:
    images = parts.images(12)
    want = images.source.labels.tolist()
    hidden = Hidden(images.source)
    images = data.Images(hidden, np.arange(12), images.transform, "training")
    hidden.broken = {7}
    found = pool(tiny_vit, images).labels
    assert found.tolist() == [*want[:7], -1, *want[8:]]
    taken = selections.get("balanced").choose(pool(tiny_vit, images), np.arange(12), 12)
    assert 7 not in taken and len(taken) == 11


class Hidden:
    """Images whose labels are known only by reading them; some cannot be read. Remembers what was read."""

    def __init__(self, source: Any) -> None:
        self.inner, self.broken, self.seen = source, set[int](), set[int]()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.seen.add(index)
        if index in self.broken:
            raise OSError("no image")
        return self.inner[index]


# Density ------------------------------------------------------------------------------------


def slow_shares(features: np.ndarray, members: np.ndarray) -> np.ndarray:
    """P(j) of the docstring, one term after another."""
    labels = sorted(set(members.tolist()))
    centroids = {}
    for j in labels:
        mean = np.mean([features[i] for i in range(len(features)) if members[i] == j], axis=0)
        centroids[j] = mean / np.linalg.norm(mean)
    powers = []
    for j in labels:
        intra = np.mean([1 - features[i] @ centroids[j] for i in range(len(features)) if members[i] == j])
        others = sorted(1 - centroids[j] @ centroids[k] for k in labels if k != j)[:20]
        powers.append(float(intra) * float(np.mean(others)) / 0.1)
    return np.exp(powers) / np.sum(np.exp(powers))


def test_density_is_its_formula(clusters: Clusters) -> None:
    features = density.unit(clusters.features.astype(float))
    members = density.clusters(features, 0)
    groups = [np.flatnonzero(members == j) for j in np.unique(members)]
    centroids = density.unit(np.stack([features[own].mean(0) for own in groups]))
    want = slow_shares(features, members)
    found = density.shares(features, groups, centroids)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert found.sum() == pytest.approx(1) and found.max() > 1.1 * found.min()

    count = 30
    taken = set(density.choose(clusters, np.arange(90), count).tolist())  # type: ignore[arg-type]
    sizes = np.array([len(own) for own in groups])
    for own, centroid, quota in zip(groups, centroids, selections.quotas(want * count, sizes, count), strict=True):
        kept, left = [i for i in own if i in taken], [i for i in own if i not in taken]
        assert len(kept) == quota
        if kept and left:
            hardest = max(float(features[i] @ centroid) for i in kept)
            assert hardest <= min(float(features[i] @ centroid) for i in left) + 1e-6


def test_density_takes_more_of_the_wide_concept(clusters: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "CLUSTERS", 3)
    features = density.unit(clusters.features)
    members = density.clusters(features, 0)
    spread = {j: float(features[members == j].std()) for j in np.unique(members)}
    taken = density.choose(clusters, np.arange(90), 20)  # type: ignore[arg-type]
    counts = {j: int((members[taken] == j).sum()) for j in spread}
    assert max(counts, key=lambda j: counts[j]) == max(spread, key=lambda j: spread[j])


def test_density_of_images_that_are_all_alike() -> None:
    with pytest.warns(match="distinct clusters"):  # scikit-learn's
        taken = density.choose(Clusters(np.ones((30, 4))), np.arange(30), 7)  # type: ignore[arg-type]
    assert len(set(taken.tolist())) == 7
    assert density.choose(Clusters(np.ones((1, 4))), np.arange(1), 1).tolist() == [0]  # type: ignore[arg-type]


def test_features_are_what_the_classifier_reads_and_unreadable_images_are_left_out(tiny_vit: Any) -> None:
    source = Hidden(parts.images(40).source)
    source.broken = {11}
    images = data.Images(source, np.arange(40)[::-1], parts.images(1).transform, "training")
    own = pool(tiny_vit, images)
    with torch.no_grad():
        for place, index in ((0, 39), (17, 22), (39, 0)):
            want = tiny_vit.forward_head(tiny_vit.forward_features(images[place][0][None]), pre_logits=True)[0]
            np.testing.assert_allclose(own.features[place], want.numpy(), rtol=1e-4, atol=1e-5, err_msg=str(index))
    assert np.isnan(own.features[40 - 1 - 11]).all() and np.isfinite(np.delete(own.features, 28, axis=0)).all()
    chosen = selections.divide(selections.get("density"), own, 20, 0.9)
    assert 11 not in {*chosen.calibration.tolist(), *chosen.train.tolist()} and len(chosen.train) == 18
    assert list(images.corrupt) == ["image 11"]


# In a build ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> config.Request:
    root = tmp_path_factory.mktemp("selections")
    (root / "one.toml").write_text(small.ONE)
    (root / "here.toml").write_text(small.TARGET)
    small.random_weights(root / "one.safetensors", depth=1, num_heads=1)
    made, _ = api.request(str(root / "one.toml"), target=str(root / "here.toml"), latency="2x")
    return made


@pytest.fixture(scope="module")
def dense(request_: config.Request) -> baseline.Dense:
    return baseline.with_data(baseline.load_source(request_.card, None), request_)


@pytest.mark.parametrize("name", selections.names())
def test_evaluation_images_are_never_looked_at(
    request_: config.Request, dense: baseline.Dense, tmp_path: Path, name: str
) -> None:
    drawn = dense.splits
    source = Hidden(drawn.train.source)
    parts_ = {k: replace(getattr(drawn, k), source=source) for k in ("train", "calibration", "evaluation")}
    watched = replace(dense, splits=replace(drawn, **parts_))
    asked = replace(request_, selection=name, tune_on=0.25)
    chosen = baseline.select(watched, asked, tmp_path, SILENT)
    mine = {*drawn.train.indices.tolist(), *drawn.calibration.indices.tolist()}
    assert source.seen <= mine and not mine & set(drawn.evaluation.indices.tolist())
    assert {*chosen.calibration.tolist(), *chosen.train.tolist()} <= mine
    assert len(chosen.calibration) == len(drawn.calibration)
    assert len(chosen.train) == round(0.25 * len(drawn.train))
    assert json.loads((tmp_path / "unreadable.json").read_text()) == []

    chosen.save(tmp_path)
    again = baseline.with_data(dense.model, asked, data.Chosen.find(tmp_path)).splits
    assert np.array_equal(again.calibration.indices, chosen.calibration)
    assert np.array_equal(again.train.indices, chosen.train)
    assert np.array_equal(again.evaluation.indices, drawn.evaluation.indices)


def test_random_is_what_is_drawn_without_a_selection(
    request_: config.Request, dense: baseline.Dense, tmp_path: Path
) -> None:
    assert not request_.selects and replace(request_, tune_on=0.5).selects
    assert replace(request_, selection="density").selects
    assert data.Chosen.find(tmp_path) is None
    chosen = baseline.select(dense, replace(request_, tune_on=1.0), tmp_path, SILENT)
    assert np.array_equal(chosen.calibration, dense.splits.calibration.indices)
    assert np.array_equal(chosen.train, dense.splits.train.indices)
    half = baseline.select(dense, replace(request_, tune_on=0.5), tmp_path, SILENT)
    assert np.array_equal(half.train, dense.splits.train.indices[: len(half.train)])


def test_stages_are_done_again_for_another_selection(request_: config.Request) -> None:
    stage = next(stage for stage in pipeline.PIPELINE if stage.name == "baseline")
    requests = [
        request_, replace(request_, selection="density"), replace(request_, selection="balanced"),
        replace(request_, tune_on=0.5),
    ]  # fmt: skip
    assert len({pipeline.stage_key(stage, one, {}) for one in requests}) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"selection": "balancd"}, "unknown selection 'balancd'; did you mean 'balanced'"),
        ({"tune_on": 0.0}, "tune-on must be a share above 0 and up to 1, not 0.0"),
        ({"tune_on": 1.5}, "tune-on must be a share above 0 and up to 1, not 1.5"),
        ({"tune_on": float("nan")}, "tune-on must be a share above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pipeline.check_request(api.request("digits", target="cpu-avx2", latency="2x", **options)[0])


def test_processes_that_tune_together_see_what_was_chosen(
    request_: config.Request, dense: baseline.Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = data.Chosen(np.arange(64), np.arange(64, 100))
    seen: list[data.Chosen | None] = []

    def run(folder: Path, *_: Any) -> None:
        seen.append(data.Chosen.find(folder))
        (folder / "student.safetensors").rename(folder / "tuned.safetensors")
        (folder / "history.json").write_text(json.dumps({"checks": []}))

    monkeypatch.setattr(launch, "_run", run)
    plan = vit.dense_plan(dense.sizes)
    from edgeprune.artifact import PlannedModel

    planned = PlannedModel(request_.card.architecture, request_.card.kwargs, 10, plan, 1.0, 1.0)
    student = vit.slice_model(dense.model, plan)
    for own in (chosen, None):
        launch.fit(student, dense.model, planned, request_.card.finetune, request_, {}, tmp_path, SILENT, own)
    assert seen[0] is not None and np.array_equal(seen[0].train, chosen.train) and seen[1] is None
