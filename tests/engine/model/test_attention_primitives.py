"""`partial_attention` and `merge`: attention in parts equals attention at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.model.attention import merge, partial_attention, visible_keys


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_all_keys_at_once_is_ordinary_attention(kv_heads: int) -> None:
    q, k, v = random(5, 6, 16), random(9, kv_heads, 16, seed=1), random(9, kv_heads, 16, seed=2)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(partial_attention(q, k, v)[0], expected)


@pytest.mark.parametrize("window", [None, 4])
def test_parts_merge_to_the_whole_in_any_order(window: int | None) -> None:
    q, k, v = random(7, 4, 8), random(40, 2, 8, seed=1), random(40, 2, 8, seed=2)
    visible = visible_keys(torch.arange(33, 40), torch.arange(40), window)
    whole = partial_attention(q, k, v, visible)
    cuts = [(0, 1), (1, 17), (17, 36), (36, 40)]
    parts = [partial_attention(q, k[a:b], v[a:b], visible[:, a:b]) for a, b in cuts]
    for order in (parts, parts[::-1], [merge(parts[:2]), merge(parts[2:])]):
        merged = merge(order)
        torch.testing.assert_close(merged[0], whole[0])
        torch.testing.assert_close(merged[1], whole[1])


def test_a_row_that_sees_nothing_adds_nothing() -> None:
    q, k, v = random(2, 2, 8), random(3, 1, 8, seed=1), random(3, 1, 8, seed=2)
    nothing = partial_attention(q, k, v, torch.tensor([[False] * 3, [True] * 3]))
    assert nothing[0][0].eq(0).all()
    assert nothing[1][0].eq(-torch.inf).all()
    whole = partial_attention(q, k, v)
    merged = merge([nothing, whole])
    torch.testing.assert_close(merged[0][0], whole[0][0])
    assert merge([nothing, nothing])[0].isfinite().all()


def test_the_window_counts_the_query_itself() -> None:
    visible = visible_keys(torch.tensor([5]), torch.arange(8), 3)
    assert visible.tolist() == [[False, False, False, True, True, True, False, False]]
