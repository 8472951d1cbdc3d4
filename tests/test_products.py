"""Products of rounded operands, and attention written out for training in bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch.nn import functional as F

from edgeprune import criteria, products
from edgeprune.latency import device
from edgeprune.obs import Moments
from edgeprune.tuning.attention import WrittenOut, attention


def precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)


def test_products_are_rounded_only_inside_and_only_where_the_cpu_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    before = precision()
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    monkeypatch.setattr(products, "by_hand", lambda: False)
    with products.rounded():
        assert precision() == "bf16"
        with products.exact():
            assert precision() == "ieee"
        assert precision() == "bf16"
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    with products.rounded():
        assert precision() == "ieee"
    with pytest.raises(ZeroDivisionError), products.rounded():
        raise ZeroDivisionError
    assert precision() == before


def test_by_hand_only_linear_layers_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    monkeypatch.setattr(products, "by_hand", lambda: True)
    layer, x = torch.nn.Linear(64, 32).requires_grad_(False), torch.randn(128, 64)
    exact = layer(x)
    with products.rounded():
        torch.testing.assert_close(x @ layer.weight.T + layer.bias, exact)
        near = layer(x)
        wide = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(wide.float(), exact)
    assert near.dtype == torch.float32 and 0 < float((near - exact).norm() / exact.norm()) < 0.01
    assert torch.equal(layer(x), exact)


@pytest.mark.parametrize("by_hand", [False, True])
def test_covariances_are_exact_also_where_products_are_rounded(monkeypatch: pytest.MonkeyPatch, by_hand: bool) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    monkeypatch.setattr(products, "by_hand", lambda: by_hand)
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    alone, within = Moments(), Moments()
    alone.add(x)
    with products.rounded():
        within.add(x)
    assert torch.equal(alone.covariance, within.covariance)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are rounded, as on this CPU outside of tests."""
    if not device.cpu_flags() & products.FLAGS:
        pytest.skip("this CPU has no products of bfloat16")
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)


@pytest.mark.usefixtures("rounding")
def test_rounded_products_are_near_exact_ones() -> None:
    x, w = torch.randn(512, 384), torch.randn(512, 384)
    with products.rounded():
        near = F.linear(x, w)
    exact = F.linear(x, w)
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.01


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
