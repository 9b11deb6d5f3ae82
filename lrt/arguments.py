"""What a model call is given: checked, and brought to rows that begin at column 0.

Legend: B batch, T columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrt.loss import IGNORE
from lrt.padding import alignment, as_ids


class Rows(NamedTuple):
    """Rows without padding on the left, and the way back to the columns of the caller."""

    input_ids: Tensor  # (B, T)
    targets: Tensor | None  # (B, T), shifted; -100 where nothing is scored
    document_ids: Tensor | None  # (B, T)
    position_ids: Tensor | None  # (B, T)
    real: Tensor | None  # bool (B, T), false where there is padding; None: there is none
    back: Tensor | None  # (B, T) the column here of each of the caller's; None: the same

    def restore(self, values: Tensor) -> Tensor:
        """(B, T, ...) in the caller's columns; padding on the left repeats the first position."""
        return values if self.back is None else values.gather(1, self.back[..., None].expand_as(values))


def begin_at_zero(
    input_ids: Tensor,
    *,
    targets: Tensor | None,
    labels: Tensor | None,
    document_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    vocab_size: int,
) -> Rows:
    """The arguments of a call as rows that begin at column 0; what each is, ``LatentRecurrentModel.forward`` says.

    Raises:
        ValueError: shapes, dtypes, token ids or arguments that do not fit.
    """
    _check_tensors(input_ids=input_ids, targets=targets, labels=labels, attention_mask=attention_mask)
    if attention_mask is not None:
        _check_mask(attention_mask, input_ids)
        if labels is not None and labels.shape == input_ids.shape:
            labels = labels.masked_fill(~attention_mask.bool(), IGNORE)
    ids, targets = checked_rows(input_ids, targets, labels, vocab_size=vocab_size)
    documents = _as_rows("document_ids", document_ids, ids)
    positions = _as_rows("position_ids", position_ids, ids)
    if attention_mask is None:
        return Rows(ids, targets, documents, positions, None, None)
    forth, real, back = alignment(attention_mask)
    documents, positions = (None if x is None else x.gather(1, forth) for x in (documents, positions))
    targets = None if targets is None else targets.gather(1, forth).masked_fill(~real, IGNORE)
    return Rows(ids.gather(1, forth), targets, documents, positions, real, back)


def checked_rows(
    input_ids: Tensor, targets: Tensor | None, labels: Tensor | None, *, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Token ids and shifted targets (B, T) in int64, of which every id is in the vocabulary.

    Raises:
        ValueError: shapes, dtypes or token ids that do not fit, or both targets and labels.
    """
    _check_tensors(input_ids=input_ids, targets=targets, labels=labels)
    input_ids = as_ids(input_ids)
    targets, labels = (None if given is None else as_ids(given) for given in (targets, labels))
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: expected (batch, tokens) with at least one token"
        )
    if input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids has dtype {input_ids.dtype}: expected token ids, int64 or int32")
    _check_range("token id", input_ids, vocab_size)
    if targets is not None and labels is not None:
        raise ValueError(
            "both targets and labels were given: pass targets (already shifted) or labels (shifted inside), not both"
        )
    if labels is not None:
        targets = torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE)], dim=1)
    if targets is None:
        return input_ids, None
    if targets.shape != input_ids.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, but input_ids {tuple(input_ids.shape)}: they must match"
        )
    if targets.dtype != torch.int64:
        raise ValueError(
            f"targets have dtype {targets.dtype}: expected token ids of an integer dtype, -100 where nothing is scored"
        )
    _check_range("target", targets.masked_fill(targets == IGNORE, 0), vocab_size)
    return input_ids, targets


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}: expected a tensor (batch, tokens), such as torch.tensor([[1, 2]])"
            )


def _check_range(name: str, ids: Tensor, size: int) -> None:
    """On the CPU only: elsewhere the answer would be a host sync in every step."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name} {low if low < 0 else high}, but the vocabulary has {size} entries (0..{size - 1}): "
                "check the tokenizer, or set model.vocab_size"
            )


def _check_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    if attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask has shape {shapes}: give (batch, tokens), 0 where a token is padding")
    real = attention_mask.bool()
    if real.device.type == "cpu" and bool(((real[:, 1:] != real[:, :-1]).sum(1) > 1 + ~real[:, 0]).any()):
        raise ValueError(
            "attention_mask has zeros between ones: padding may stand on the left or on the right of a row only"
        )


def _as_rows(name: str, values: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """One number a token (B, T), from that or from one row for all."""
    if values is None:
        return None
    length = input_ids.shape[-1]
    if values.shape not in (input_ids.shape, (1, length), (length,)):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, but input_ids {tuple(input_ids.shape)}: they must match"
        )
    return values.expand(input_ids.shape)
