"""Sinks: one more score in the softmax, in every kernel that knows them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from lrt.attention import causal_attention, causal_mask, grouped_attention, masked_attention
from lrt.kernels.attention import flex_groups


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_sinks_are_a_score_without_a_value() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, sinks = (
        torch.randn(shape, generator=generator) for shape in ((2, 8, 4, 16), (2, 8, 2, 16), (2, 8, 2, 16), (4,))
    )
    places, expected = torch.arange(8), torch.zeros(2, 8, 4, 16)
    for row in range(2):
        for head in range(4):
            for t in range(8):
                scores = torch.stack(
                    [query[row, t, head] @ key[row, s, head // 2] * 0.25 for s in range(t + 1)] + [sinks[head]]
                )
                expected[row, t, head] = torch.softmax(scores, 0)[:-1] @ value[row, : t + 1, head // 2]
    close = {"rtol": 1e-5, "atol": 1e-6}
    found = masked_attention(query, key, value, causal_mask(places, places), scale=0.25, sinks=sinks)
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(
        causal_attention(query, key, value, window=None, scale=0.25, sinks=sinks), expected, **close
    )
    groups = [tuple(x[:, g::2] for g in range(2)) for x in (key, value)]
    more = {"residue": 1, "window": None, "scale": 0.25, "softcap": None, "sinks": sinks}
    torch.testing.assert_close(grouped_attention(query[:, 1::2], *groups, **more), expected[:, 1::2], **close)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            flex_groups(query, (key,), (value,), mask, scale=0.25, softcap=None, sinks=sinks), expected, **close
        )
