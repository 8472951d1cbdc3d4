"""python -m pytest tests/test_benchmarks.py"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """The module of a script, which finds what is beside it."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def write_model(path: Path, width: int) -> str:
    """One linear layer, width -> width."""
    h = onnx.helper
    weight = onnx.numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")
    x, y = (h.make_tensor_value_info(name, 1, [1, width]) for name in "xy")
    graph = h.make_graph([h.make_node("MatMul", ["x", "w"], ["y"])], "tiny", [x], [y], [weight])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


def test_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    clock = script("clock")
    models = [write_model(tmp_path / "a.onnx", 256), write_model(tmp_path / "b.onnx", 128)]
    result = tmp_path / "result.json"
    options = ["--rounds", "10", "--repeats", "2", "--threads", "1", "--load", "0.2", "--json", str(result)]
    clock.main(["--models", *models, *options])
    out = capsys.readouterr().out
    assert all(f"\n{method} " in out for method in clock.METHODS) and len(clock.METHODS) == 4
    assert "A a.onnx, B b.onnx; 10 timed runs" in out and "1 threads" in out and "cpus_used" in out
    raw = json.loads(result.read_text())
    for method in clock.METHODS:
        estimates = raw["estimates"][method]
        assert len(estimates) == 2 and all(e["ratio"] > 0 and e["ms"] > 0 for e in estimates)
        # where only calm rounds count, one that something disturbed is timed again, however often that takes
        assert all(len(samples) >= 10 for e in estimates for samples in e["samples_ms"])


def test_clock_refuses_what_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("clock").main(["--repeats", "1"])
    assert "--repeats 2 or more" in capsys.readouterr().err


# Accuracy -----------------------------------------------------------------------------------


@pytest.fixture
def task(make_vit: Any, make_images: Any, tmp_path: Path) -> Any:
    """A tiny model, random images and an invented latency table."""
    torch = pytest.importorskip("torch")
    script("accuracy")
    import rivals

    from edgeprune import config, vit
    from edgeprune.types import Latency, LatencyTable, Prices

    model = make_vit(depth=2, mlp_ratio=2.0)
    sizes = vit.anatomy(model)
    widths = vit.neuron_grid(sizes.only.neurons, 16)
    prices = {"attn_ms": 0.1 * np.arange(sizes.only.heads + 1), "mlp_ms": 0.4 * np.array(widths) / sizes.only.neurons}
    stage = Prices(blocks=2, mlp_widths=widths, **prices)
    table = LatencyTable("openvino", "fp32", 1, 0.1, (stage,), dense_ms=1.5, empty_ms=0.1, samples=1)
    request = config.Request(config.load_card("digits"), config.load_target("cpu-avx512"), Latency("2x", fraction=0.5))
    made = rivals.Task(request, model, sizes, None, table, tmp_path)  # type: ignore[arg-type]
    made.batches = [(make_images(8, seed=i), torch.arange(8) % 5) for i in range(2)]
    return made


METHODS = ["ziplm", "nvit", "flap", "vbp", "random", "magnitude"]
TORCH_PRUNING = ["tp-l2-uniform-narrow", "tp-taylor-global-narrow", "tp-hessian-uniform-whole"]


@pytest.mark.parametrize("name", [*METHODS, *TORCH_PRUNING])
def test_a_rival_makes_the_model_that_was_asked_for(task: Any, name: str, make_images: Any, tmp_path: Path) -> None:
    """Within its budget, the same when asked again, and as ONNX what it is in torch."""
    if name.startswith("tp-"):
        pytest.importorskip("torch_pruning")
    import rivals

    from edgeprune.stages import export

    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    rival = rivals.make(name)
    rival.prepare(task)
    for speed_up in (1.0, 1.4):
        aim = task.table.dense_ms / speed_up
        model = rival.model(aim, aim)
        shape = rivals.shape_of(model)
        assert 0.7 * aim <= rivals.predict_ms(task, shape) <= aim * (1 + 1e-9)
        assert rivals.shape_of(rival.model(aim, aim)) == shape
    export.to_onnx(model, task.sizes.image, tmp_path / "model.onnx")
    assert export.compare(model, tmp_path / "model.onnx", make_images(4, seed=9))["agreement"] == 1
    after = task.model.state_dict()
    assert all(bool((after[k] == v).all()) for k, v in before.items()), "a rival must not change the dense model"


def test_slice_with_means_keeps_the_mean_output(task: Any) -> None:
    """With all neurons of a block gone, its MLP answers with what it answered on average."""
    torch = pytest.importorskip("torch")
    import rivals

    plan = rivals.plan_of(
        {at: [] if at == (0, "mlp") else range(task.sizes.units(at)) for at in rivals.sub_blocks(task.sizes)},
        task.sizes,
    )
    seen: list[Any] = []
    hook = task.model.blocks[0].mlp.register_forward_hook(lambda _, x, y: seen.append(y.flatten(0, 1)))
    with torch.no_grad():
        for pixels, _ in task.batches:
            task.model(pixels)
    hook.remove()
    bias = rivals.slice_with_means(task, plan).blocks[0].mlp.bias
    assert torch.allclose(bias, torch.cat(seen).mean(0), atol=1e-5)


def test_hit_asks_again_until_the_measurement_agrees() -> None:
    """A method whose table is 30 % wrong, and one whose shapes are coarse."""
    accuracy = script("accuracy")

    class Stand:
        """Measures `wrong` times what was asked for, in steps of `step`."""

        def __init__(self, wrong: float, step: float) -> None:
            self.wrong, self.step, self.timings = wrong, step, {}
            self.options = type("Options", (), {"measurements": 6})

        def model(self, aim_ms: float, target_ms: float) -> float:
            return max(aim_ms * self.wrong // self.step, 1) * self.step

        def time(self, model: float) -> Any:
            return self.timings.setdefault(model, accuracy.Timing(model, (model, model), 60, True))

    for wrong in (0.7, 1.0, 1.3):
        stand = Stand(wrong, 1e-6)
        found = accuracy.hit(stand, stand, 1.0)
        assert abs(found.timing.ms - 1) <= 0.02 and found.measurements <= 3
    stand = Stand(1.3, 0.3)
    found = accuracy.hit(stand, stand, 1.0)
    assert found.timing.ms == pytest.approx(0.9) and accuracy.verdict(found.timing.ms, 1.0)[0] == "coarse"
    stand = Stand(1.0, 2.0)
    found = accuracy.hit(stand, stand, 1.0)
    assert found.timing.ms == 2 and accuracy.verdict(found.timing.ms, 1.0)[0] == "unreachable"


def test_a_sibling_trained_by_itself_is_judged_with_its_weights(task: Any, tmp_path: Path) -> None:
    """Its minutes are in the row; weights of another size are refused."""
    torch, accuracy, training = pytest.importorskip("torch"), script("accuracy"), script("training")
    import rivals

    from edgeprune.errors import UsageError

    rival = rivals.make("sibling")
    rival.prepare(task)
    target_ms = task.table.dense_ms / 2
    trained = rival.model(target_ms, target_ms)
    for p in trained.parameters():
        p.data.add_(1.0)
    training.save_half(trained, tmp_path / "sibling.safetensors")
    judged: list[Any] = []

    def judge(model: Any) -> Any:
        judged.append(model)
        return np.ones(8, dtype=bool)

    file = tmp_path / "sibling.safetensors"
    options = SimpleNamespace(sibling_minutes=90.0, sibling_teacher=None, sibling_weights=file, measurements=1)
    time = lambda model: accuracy.Timing(target_ms, (target_ms, target_ms), 60, True)  # noqa: E731
    bench = SimpleNamespace(
        table=task.table, request=task.request, options=options, right=np.ones(8, dtype=bool), timings={}, time=time, judge=judge
    )  # fmt: skip
    keys = [("w", "sibling", 2.0, 0, steps, "now") for steps in (0, 100)]
    book = accuracy.Book(tmp_path / "rows.jsonl")
    before, after = accuracy.rows(bench, task, rival, 2.0, keys, book)
    assert before["status"] == "no one-shot" and after["status"] == "ok" and after["seconds"]["tune"] == 5400
    for own, wanted in zip(judged[0].parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(own, wanted.half().float())
    training.save_half(rival.make(1, 1), tmp_path / "sibling.safetensors")
    with pytest.raises(UsageError, match=r"sibling\.safetensors"):
        list(accuracy.rows(bench, task, rival, 2.0, keys, book))
    with pytest.raises(SystemExit):  # or one model would count as two seeds
        accuracy.parse(["--sibling-weights", str(file), "--speed-ups", "5"])


def test_rows_are_kept_and_compared_on_the_same_images(tmp_path: Path) -> None:
    accuracy = script("accuracy")
    tables = script("tables")
    rng = np.random.default_rng(0)
    dense = rng.random(1000) < 0.7
    pruned = np.where(rng.random(1000) < 0.1, ~dense, dense)
    assert (accuracy.unpacked(accuracy.packed(pruned), 1000) == pruned).all()
    drop, (low, high) = accuracy.paired(dense, pruned)
    assert drop == pytest.approx(100 * (dense.mean() - pruned.mean())) and low < drop < high
    own, half = tables.mean_and_half(np.stack([dense, dense]).astype(float))
    assert own == pytest.approx(100 * dense.mean()) and half == pytest.approx(196 * dense.std() / 1000**0.5)
    key = ("weights", "flap", 2.0, 0, 0, "label")
    row = accuracy.described(key, {}, "unreachable", "why", {})
    accuracy.Book(tmp_path / "rows.jsonl").add(row)
    assert accuracy.Book(tmp_path / "rows.jsonl").rows == {key: row}


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole benchmark on a tiny model; where the machine is too busy to measure, a row may have no model."""
    for package in ("torch", "openvino", "onnxsim"):
        pytest.importorskip(package)
    accuracy = script("accuracy")
    rows, options = tmp_path / "quick.jsonl", ["--quick", "--tune-steps", "2", "--measurements", "1", "--label", "test"]
    accuracy.main([*options, "--methods", "edgeprune,flap", "--results", str(rows)])
    made = accuracy.read(rows)
    assert [(row["method"], row["tune_steps"]) for row in made] == [
        ("edgeprune", 0), ("edgeprune", 2), ("flap", 0), ("flap", 2)
    ]  # fmt: skip
    for row in made:
        assert row["status"] in ("ok", "coarse", "unreachable")
        if row["plan"] is None:
            assert row["status"] == "unreachable" and row["reason"]
            continue
        assert len(row["plan"]) == 4
        assert row["latency_ci_ms"][0] <= row["latency_ms"] <= row["latency_ci_ms"][1]
        assert row["drop"] == pytest.approx(row["dense_accuracy"] - row["accuracy"])
    pytest.importorskip("matplotlib")
    script("tables").main(["--results", str(rows), "--out", str(tmp_path)])
    assert "| edgeprune |" in (tmp_path / "quick.md").read_text() and (tmp_path / "quick-quick-0.png").is_file()


def committed(name: str, label: str) -> dict[int, Any]:
    """The cells of committed rows, by tuned steps."""
    accuracy, tables = script("accuracy"), script("tables")
    groups = tables.grouped(accuracy.read(FOLDER / "results" / f"{name}.jsonl"), [label])
    return {steps: tables.with_best(cells) for (*_, steps), cells in groups.items()}


def first_tables() -> tuple[str, dict[int, Any]]:
    """The benchmark's README, and the cells of the rows that its first tables are of."""
    readme = (FOLDER / "README.md").read_text()
    found = re.search(r"code (\w+), mean of two seeds", readme)
    assert found
    return readme, committed("accuracy", found[1])


def points_lost(cells: Any) -> dict[tuple[str, float], float]:
    """Below dense, mean of the seeds."""
    tables = script("tables")
    judged = {at: rows for at, rows in cells.items() if tables.judged(rows)}
    return {at: rows[0]["dense_accuracy"] - tables.accuracy(rows)[0] for at, rows in judged.items()}


def test_the_readme_has_the_tables_of_the_committed_rows() -> None:
    pytest.importorskip("torch")
    readme, shown = first_tables()
    tables = script("tables")
    for steps in (0, 100):
        table = tables.table(shown[steps], lambda rows: tables.cell(rows, 2))
        assert table in readme, f"after {steps} steps: copy the table of results/accuracy.md"


def test_the_committed_rows_hold_what_edgeprune_promises() -> None:
    """First at every speed-up, and by how much; among ways of pruning, and longer tuned before a sibling of the same total time."""
    pytest.importorskip("torch")
    tables, longer = script("tables"), committed("longer", "6f6cb7c")
    for steps, cells in [*first_tables()[1].items(), *longer.items()]:
        lost = points_lost(cells)
        for (method, speed_up), own in lost.items():
            if method != "edgeprune":
                assert lost["edgeprune", speed_up] < own, f"{method} is ahead at {speed_up}x after {steps} steps"
    lost = points_lost(first_tables()[1][0])
    assert all(lost["edgeprune", at] <= lost[tables.BEST, at] / 4 for at in (2.0, 3.0))
    assert all(lost["edgeprune", at] <= lost["ziplm", at] / 2 for at in (3.0, 4.0))
    assert points_lost(longer[600])["edgeprune", 2.0] <= 1.0


def test_every_method_can_be_asked_for() -> None:
    pytest.importorskip("torch")
    bench = script("methods")
    from edgeprune import methods
    from edgeprune.errors import UsageError

    assert bench.chosen("*") == list(methods.METHODS)
    assert [method.name for method in bench.chosen("flap,knap*")] == ["knapsack", "flap"]
    both = bench.variants(bench.chosen("edgeprune,flap"))
    assert list(both) == ["edgeprune", "flap", "edgeprune-widths"]
    assert set(both["edgeprune-widths"]["dims"]) < set(both["edgeprune"]["dims"])
    with pytest.raises(UsageError, match="there is no method 'flop'"):
        bench.chosen("flop")


@pytest.mark.slow
def test_methods_quick(tmp_path: Path) -> None:
    """Two methods, one of which trains before the cut, at one speed-up; a second run finds nothing to do."""
    for package in ("torch", "openvino", "onnxsim", "matplotlib"):
        pytest.importorskip(package)
    accuracy, bench = script("accuracy"), script("methods")
    rows = tmp_path / "rows.jsonl"
    options = [
        "--quick",
        "--methods",
        "knapsack,gradual",
        "--tune-steps",
        "8",
        "--label",
        "test",
        "--results",
        str(rows),
    ]
    bench.main(options)
    made = accuracy.read(rows)
    assert [(row["method"], row["tune_steps"]) for row in made] == [
        ("knapsack", 0), ("knapsack", 8), ("gradual", 0), ("gradual", 8)
    ]  # fmt: skip
    for row in made:
        if row["plan"] is None:  # no one-shot, or a machine too busy to measure
            assert row["status"] in ("no one-shot", "unreachable") and row["reason"]
            continue
        assert row["latency_ms"] <= row["target_ms"] and row["latency_ci_ms"][1] <= row["target_ms"]
        assert row["drop"] == pytest.approx(row["dense_accuracy"] - row["accuracy"])
    assert "| knapsack |" in (tmp_path / "rows.md").read_text()


@pytest.mark.slow
def test_published_quick(tmp_path: Path) -> None:
    for package in ("torch", "openvino", "onnxsim", "sklearn"):
        pytest.importorskip(package)
    published = script("published")
    published.main(["--quick", "--epochs", "0.2", "--out", str(tmp_path)])
    [text] = [path.read_text() for path in tmp_path.glob("published-*.md")]
    assert [text.count(f"## {paper}") for paper in published.PAPERS] == [1, 1, 1]
    assert text.count(" at 1.") >= 6, "three models of ZipLM's, one of NViT's, two of SLS's"
    assert "keeps on average: heads " in text and "`adapters.safetensors`" in text
    with pytest.raises(SystemExit):
        published.main(["ziplm", "sdlm"])


# The compiler -------------------------------------------------------------------------------


def test_a_phase_within_another_is_taken_off_it() -> None:
    torch = pytest.importorskip("torch")
    phases = script("compiler").Phases()
    product = phases.wrapped("product", lambda: torch.ones(8, 4) @ torch.ones(4, 2))

    def all_of_it() -> None:
        time.sleep(0.2)
        product()
        product()

    phases.wrapped("the rest", all_of_it, counted=False)()
    assert phases.flops == {"product": 2 * (2 * 8 * 4 * 2), "the rest": 0}
    assert phases.seconds["the rest"] >= 0.2 and phases.seconds["product"] > 0 and not phases.inner


def test_attention_on_a_cpu_is_counted() -> None:
    torch = pytest.importorskip("torch")
    phases = script("compiler").Phases()
    q = torch.ones(1, 2, 5, 8)
    phases.wrapped("attention", torch.nn.functional.scaled_dot_product_attention)(q, q, q)
    assert phases.flops["attention"] == 2 * (2 * 2 * 5 * 5 * 8)  # queries by keys, and what they say of values


def test_what_the_compiler_is_timed_by_is_there() -> None:
    """Phases are found by name: one that was renamed would be missed only after minutes of measuring."""
    for module, name, _ in script("compiler").PHASES:
        assert callable(getattr(importlib.import_module(module), name))
