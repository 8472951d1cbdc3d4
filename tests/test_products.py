"""Products of rounded operands, and attention written out for training in bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch.nn import functional as F

from edgeprune import criteria, products, vit
from edgeprune.attention import WrittenOut, attention
from edgeprune.obs import Moments


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are rounded, as on a CPU with bfloat16 outside of tests; any other multiplies such matrices, too, if slowly."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)


@pytest.mark.usefixtures("rounding")
def test_only_layers_are_rounded_and_only_inside() -> None:
    layer, x = torch.nn.Linear(64, 32).requires_grad_(False), torch.randn(128, 64)
    exact = layer(x)
    with products.rounded():
        torch.testing.assert_close(layer(x), exact, rtol=0, atol=0)
        with products.layers():
            near = layer(x).float()
        with pytest.raises(ZeroDivisionError), products.rounded():
            raise ZeroDivisionError
        with products.layers():
            assert layer(x).dtype == torch.bfloat16
    with products.layers():
        torch.testing.assert_close(layer(x), exact, rtol=0, atol=0)
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.01


def test_nothing_is_rounded_where_the_cpu_has_no_bfloat16() -> None:
    with products.rounded(), products.layers():
        assert torch.nn.Linear(4, 4)(torch.randn(2, 4)).dtype == torch.float32


@pytest.mark.usefixtures("rounding")
def test_a_sub_block_is_rounded_its_residual_stream_is_not(make_vit: Any) -> None:
    model = make_vit()
    stream = torch.randn(2, 5, model.embed_dim)
    exact = vit.step(model.blocks[0], "mlp", stream)
    with torch.no_grad(), products.rounded():
        near = vit.step(model.blocks[0], "mlp", stream)
        assert near.dtype == torch.float32 and not torch.equal(near, exact)
        torch.testing.assert_close(near, exact, rtol=0.02, atol=0.02)
        still = vit.step(model.blocks[0], "mlp", stream, torch.nn.Identity())
        assert torch.equal(still, stream + model.blocks[0].norm2(stream))


@pytest.mark.usefixtures("rounding")
def test_covariances_are_exact_also_within_layers() -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    alone, within = Moments(), Moments()
    alone.add(x)
    with products.rounded(), products.layers():
        within.add(x)
    assert torch.equal(alone.covariance, within.covariance)


@pytest.mark.usefixtures("rounding")
def test_a_criterion_scores_alike_with_rounded_products(make_vit: Any) -> None:
    """Removing all of a sub-block costs what it costs, within a tenth."""
    criterion = criteria.get("fisher")
    rounded = criteria.score(criterion, parts.evidence(make_vit(), "fisher")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "has_bfloat16", lambda: False)
        exact = criteria.score(criterion, parts.evidence(make_vit(), "fisher")[0])
    assert any(not np.array_equal(a.errors, b.errors) for a, b in zip(rounded, exact, strict=True))
    for near, want in zip(rounded, exact, strict=True):
        np.testing.assert_allclose(near.errors[-1], want.errors[-1], rtol=0.1)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_written_out_is_the_fused_one(mask: bool, scale: float | None) -> None:
    q, k, v = (torch.randn(2, 3, 17, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 3, 17, 17, dtype=torch.float64) if mask else None
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    with WrittenOut():
        written = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    assert type(written.grad_fn) is not type(fused.grad_fn)  # not the same kernel twice
    torch.testing.assert_close(written, fused)
    for one, other in zip(torch.autograd.grad(written.square().sum(), (q, k, v)),
                          torch.autograd.grad(fused.square().sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_what_is_not_written_out_is_left_to_torch() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    masked = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, masked), F.scaled_dot_product_attention(q, k, v, masked))
    torch.testing.assert_close(
        attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_dropout_drops() -> None:
    q, k, v = (torch.randn(1, 2, 64, 4) for _ in range(3))
    assert not torch.allclose(attention(q, k, v, dropout_p=0.5), attention(q, k, v))
