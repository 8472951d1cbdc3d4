"""Token reduction. python -m pytest tests/test_reducers.py"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import artifact, reducers, vit
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.reducers import Seen, tome, zero_tprune
from edgeprune.stages import export, simplify
from edgeprune.types import BlockPlan, Plan

ALL = (0, 1, 2)
WIDE = tuple(range(24))
#: 16 patches come in; 10 are left after block 0, 5 after block 2.
REDUCED = Plan((BlockPlan(ALL, WIDE, 10), BlockPlan((0, 2), WIDE), BlockPlan(ALL, tuple(range(0, 24, 2)), 5)))


def seen_of(prefix: int = 1, tokens: int = 17, n: int = 3) -> Seen:
    draw = torch.Generator().manual_seed(0)
    stream, queries, keys = (torch.randn(*size, generator=draw) for size in ((n, tokens, 8), *((n, 2, tokens, 4),) * 2))
    return Seen(stream, queries, keys, prefix)


@pytest.mark.parametrize("name", reducers.names())
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("patches", [1, 7, 11, 15])
def test_prefix_tokens_stay_and_shapes_are_static(name: str, prefix: int, patches: int) -> None:
    seen = seen_of(prefix)
    apply = reducers.get(name).reduce(seen, patches)
    out = apply(seen.stream)
    assert out.shape == (3, prefix + patches, 8)
    assert torch.equal(out[:, :prefix], seen.stream[:, :prefix])
    ones = apply(torch.ones(3, 17, 1))
    torch.testing.assert_close(ones, torch.ones_like(ones), msg="every token that is left is a mean of tokens")


@pytest.mark.parametrize("name", reducers.names())
def test_keeping_all_patches_keeps_all_patches(name: str) -> None:
    seen = seen_of()
    out = reducers.get(name).reduce(seen, 16)(seen.stream)
    rows = {tuple(row) for row in seen.stream[0].tolist()}
    assert {tuple(row) for row in out[0].tolist()} == rows


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_cls_keeps_the_patches_that_receive_most_attention(prefix: int) -> None:
    seen = seen_of(prefix)
    out = reducers.get("cls").reduce(seen, 5)(seen.stream)
    for image in range(3):
        received = np.zeros(17)
        readers = range(prefix) if prefix else range(17)
        for head in range(2):
            for query in readers:
                row = np.exp((seen.keys[image, head] @ seen.queries[image, head, query]).numpy())
                received += row / row.sum()
        best = prefix + np.argsort(-received[prefix:])[:5]
        assert {tuple(r) for r in out[image, prefix:].tolist()} == {tuple(seen.stream[image, i].tolist()) for i in best}


def test_evit_fuses_what_it_drops_by_importance() -> None:
    seen = seen_of()
    out, kept = (reducers.get(name).reduce(seen, n)(seen.stream) for name, n in (("evit", 6), ("cls", 5)))
    torch.testing.assert_close(out[:, :6], kept)
    weights = reducers.importance(seen)
    for image in range(3):
        order = weights[image].argsort(descending=True)[5:]
        parts = [float(weights[image, i]) * seen.stream[image, 1 + i] for i in order]
        want = torch.stack(parts).sum(0) / sum(float(weights[image, i]) for i in order)
        torch.testing.assert_close(out[image, 6], want)


def test_page_rank_passes_importance_on_along_attention() -> None:
    attention = seen_of().attention()
    want = np.zeros((3, 17))
    for image in range(3):
        for head in range(2):
            rank = np.full(17, 1 / 17)
            for _ in range(zero_tprune.ITERATIONS):
                rank = np.array(
                    [sum(float(attention[image, head, j, i]) * rank[j] for j in range(17)) for i in range(17)]
                )
            want[image] += rank**2 / 2
    np.testing.assert_allclose(zero_tprune.page_rank(attention).numpy(), np.sqrt(want), rtol=1e-4)


def test_zero_tprune_drops_the_twin_of_an_important_patch() -> None:
    seen = seen_of(n=1)
    ranked = zero_tprune.page_rank(seen.attention())[0, 1:].argsort(descending=True)
    keys = torch.eye(17)[None, None].repeat(1, 2, 1, 1)
    keys[:, :, 1 + ranked[1]] = keys[:, :, 1 + ranked[0]]  # the two most important look alike
    queries = torch.zeros(1, 2, 17, 17)
    queries[:, :, :, 1 + ranked] = torch.linspace(2, 0, 16)
    seen = replace(seen, keys=keys, queries=queries)
    order = zero_tprune.page_rank(seen.attention())[0, 1:].argsort(descending=True, stable=True)
    out = reducers.get("zero-tprune").reduce(seen, 13)(seen.stream)
    left = {tuple(row) for row in out[0, 1:].tolist()}
    gone = {i for i in range(16) if tuple(seen.stream[0, 1 + i].tolist()) not in left}
    assert len(gone) == 3 and int(order[-1]) in gone
    assert len({int(ranked[0]), int(ranked[1])} & gone) == 1, "one of the twins"


def test_tome_merges_the_pair_most_alike_into_its_mean() -> None:
    keys = torch.nn.functional.normalize(torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    pairs = {(i, j): float(keys[0, i] @ keys[0, j]) for i in range(0, 8, 2) for j in range(1, 8, 2)}
    into, gone = max(pairs, key=pairs.__getitem__)
    matrix = tome.merging(keys, 7)[0]
    row = [float(x) for x in matrix[into // 2]]
    assert row[into] == row[gone] == 0.5 and matrix[:, gone].sum() == 0.5
    singles = matrix[[i for i in range(7) if i != into // 2]]
    assert torch.equal(singles.sum(1), torch.ones(6)) and singles.max() == 1


# In models ----------------------------------------------------------------------------------


def test_a_block_that_keeps_all_is_the_block(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    whole = Plan(tuple(replace(block, patches=16) for block in vit.dense_plan(vit.anatomy(tiny_vit)).blocks))
    with torch.no_grad():
        got, want = vit.slice_model(tiny_vit, whole)(make_images(4)), tiny_vit(make_images(4))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", reducers.names())
@pytest.mark.parametrize("kwargs", [{}, {"architecture": "deit_tiny_distilled_patch16_224"}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True, "init_values": 0.1}])  # fmt: skip
def test_a_reduced_model_equals_the_dense_one_whose_other_tokens_are_cut(
    make_vit: Callable[..., Any], make_images: Callable[..., Any], name: str, kwargs: dict[str, Any]
) -> None:
    model, images = make_vit(**kwargs), make_images(4)
    small = vit.slice_model(model, replace(REDUCED, reducer=name))
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        streams = list(vit.reduced_streams(small, images))
        x = vit.embed(model, images)
        for i, block in enumerate(
            vit.slice_model(model, Plan(tuple(replace(b, patches=None) for b in REDUCED.blocks))).blocks
        ):
            after = vit.step(block, "attn", x)
            patches = REDUCED.blocks[i].patches
            if patches is not None:
                cut = vit.reduction(block.attn, block.norm1(x), after, prefix, patches, name)
                after = cut(after)
            x = vit.step(block, "mlp", after)
            torch.testing.assert_close(streams[i][0], x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(streams[-1][0], vit.classify(model, x), rtol=1e-4, atol=1e-5)
        assert x.shape[1] == prefix + 5 and streams[2][1](torch.ones(4, prefix + 16, 2)).shape == (4, prefix + 5, 2)
        torch.testing.assert_close(small(images), streams[-1][0])


@pytest.mark.parametrize("name", reducers.names())
def test_a_reduced_model_exports_with_static_shapes(
    tiny_vit: Any, make_images: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    import onnx

    model = vit.slice_model(tiny_vit, replace(REDUCED, reducer=name))
    export.to_onnx(model, (3, 32, 32), tmp_path / "a.onnx")
    simplify.simplify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    for path in (tmp_path / "a.onnx", tmp_path / "b.onnx"):
        facts = export.compare(model, path, make_images(16))
        assert facts["agreement"] == 1.0
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "b.onnx")).graph
    for value in [*graph.input, *graph.output]:
        assert all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim)
    kinds = {node.op_type for node in graph.node}
    assert "Loop" not in kinds and "NonZero" not in kinds
    assert name not in ("cls", "evit") or "TopK" in kinds


def test_few_images_may_keep_other_tokens_that_matter_alike(
    tiny_vit: Any, make_images: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a reduced model one in 16, of another none; more are a difference."""
    images = make_images(32)
    plain = Plan(tuple(replace(block, patches=None) for block in REDUCED.blocks))
    for plan, broken, fits in ((REDUCED, 1, True), (REDUCED, 3, False), (plain, 1, False)):
        model = vit.slice_model(tiny_vit, plan)
        export.to_onnx(model, (3, 32, 32), tmp_path / "a.onnx")

        def other(x: torch.Tensor, model: Any = model, broken: int = broken) -> torch.Tensor:
            logits = type(model).forward(model, x)
            logits[:broken] += 0.1 * logits.abs().max()
            return logits

        model.forward = other
        if fits:
            assert export.compare(model, tmp_path / "a.onnx", images)["ties"] == 1
        else:
            with pytest.raises(EdgepruneError, match="differs from torch"):
                export.compare(model, tmp_path / "a.onnx", images)


def test_a_reduced_plan_survives_the_disk(tiny_vit: Any, tiny_kwargs: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plan = replace(REDUCED, reducer="evit")
    planned = artifact.PlannedModel("vit_tiny_patch16_224", tiny_kwargs, 5, plan, 1.0, 2.0)
    artifact.write_plan(planned, tmp_path / "plan.json")
    assert artifact.read_plan(tmp_path / "plan.json") == planned
    small = vit.slice_model(tiny_vit, plan)
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    again = artifact.rebuild(planned, tmp_path / "w.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(torch.ones(1, 3, 32, 32)), small(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize(
    "plan, said",
    [
        (Plan((BlockPlan(ALL, WIDE, 0), *REDUCED.blocks[1:])), "block 0 of the plan: patches must be a number from 1 to 16"),
        (Plan((*REDUCED.blocks[:2], BlockPlan(ALL, WIDE, 11))), "block 2 of the plan: patches must be a number from 1 to 10"),
        (Plan((BlockPlan((), WIDE, 10), *REDUCED.blocks[1:])), "block 0 of the plan drops tokens, but has no attention"),
        (replace(REDUCED, reducer="evitt"), "evitt"),
    ],
)  # fmt: skip
def test_impossible_reductions_are_refused(tiny_vit: Any, plan: Plan, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        vit.slice_model(tiny_vit, plan)


def test_multiply_adds_count_the_tokens_that_are_there(tiny_vit: Any) -> None:
    sizes = vit.anatomy(tiny_vit)
    one = ((3, 24, 8),) + ((3, 24),) * 2
    saved = vit.macs(sizes, sizes.shape) - vit.macs(sizes, one)
    n, m, c, d = 17, 9, 48, 16
    attention = c * 3 * d * 4 * (n - m) + 2 * 3 * d * (n * n - m * m)
    assert saved == 3 * (n - m) * 2 * c * 24 + 2 * attention
