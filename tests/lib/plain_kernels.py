"""Attention kernels in plain torch, in the place of those of a GPU."""

from __future__ import annotations

import torch


class Plain:
    """A kernel in plain torch with the face of ``kernels.Flash``."""

    @staticmethod
    def weights(query, key, seen, scale, lse=None):
        key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
        back = torch.arange(query.shape[1])[:, None] - torch.arange(key.shape[1])[None] - seen.shift
        mask = (back >= 0) if seen.left is None else (back >= 0) & (back <= seen.left)
        scores = scores.masked_fill(~mask, float("-inf"))
        lse = torch.logsumexp(scores, -1) if lse is None else lse
        return torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None]), lse

    @staticmethod
    def forward(query, key, value, seen, scale):
        weights, lse = Plain.weights(query, key, seen, scale)
        return torch.einsum(
            "bhij,bjhd->bihd", weights, value.repeat_interleave(query.shape[2] // value.shape[2], 2)
        ), lse

    @staticmethod
    def backward(grad, query, key, value, out, lse, seen, scale):
        share = query.shape[2] // key.shape[2]
        weights, _ = Plain.weights(query, key, seen, scale, lse)
        d_weights = torch.einsum("bihd,bjhd->bhij", grad, value.repeat_interleave(share, 2))
        d_scores = weights * (d_weights - (grad * out).sum(-1).transpose(1, 2)[..., None]) * scale

        def fold(x):
            return x.unflatten(2, (x.shape[2] // share, share)).sum(3)

        d_query = torch.einsum("bhij,bjhd->bihd", d_scores, key.repeat_interleave(share, 2))
        return (
            d_query,
            fold(torch.einsum("bhij,bihd->bjhd", d_scores, query)),
            fold(torch.einsum("bhij,bihd->bjhd", weights, grad)),
        )
