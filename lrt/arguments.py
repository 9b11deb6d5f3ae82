"""What a call of the model was given: checked, one row a sequence, and every row begun at column 0.

Legend: B batch, T columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.loss import IGNORE


class Rows(NamedTuple):
    """Rows of tokens (B, T) whose padding, if any, is on the right, and what was said of them."""

    input_ids: Tensor  # int64
    targets: Tensor | None  # already shifted; -100 is ignored, and so is padding
    document_ids: Tensor | None
    position_ids: Tensor | None
    real: Tensor | None  # bool, false where there is padding; None = none
    back: Tensor | None  # the column in which each given column now stands; None = its own

    def restore(self, values: Tensor) -> Tensor:
        """``values`` (B, T, ...) in the columns that were given; padding on the left repeats the first position."""
        return values if self.back is None else values.gather(1, self.back[..., None].expand_as(values))


class Borders(NamedTuple):
    """Where the documents of rows (B, T) begin, for the memory and for attention."""

    starts: Tensor | None  # bool: the memory received here is zero
    documents: Tensor | None  # number of the document to which attention is confined
    lengths: Tensor | None  # tokens of the row or document of each position, where they were asked for


def read_rows(
    input_ids: Tensor,
    *,
    targets: Tensor | None,
    labels: Tensor | None,
    document_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    vocab_size: int,
) -> Rows:
    """Check the arguments of ``LatentRecurrentModel.forward``, shift labels, and move padding to the right.

    Raises:
        ValueError: shapes, token ids or arguments that do not fit.
    """
    _check_tensors(input_ids=input_ids, targets=targets, labels=labels, attention_mask=attention_mask)
    input_ids = as_ids(input_ids)
    targets, labels = (None if given is None else as_ids(given) for given in (targets, labels))
    if attention_mask is not None:
        _check_mask(attention_mask, input_ids)
        labels = (
            None
            if labels is None or labels.shape != input_ids.shape
            else labels.masked_fill(~attention_mask.bool(), IGNORE)
        )
    targets = check_ids(input_ids, targets, labels, vocab_size=vocab_size)
    document_ids = _as_rows("document_ids", document_ids, input_ids)
    position_ids = _as_rows("position_ids", position_ids, input_ids)
    if attention_mask is None:
        return Rows(input_ids, targets, document_ids, position_ids, None, None)
    forth, real, back = alignment(attention_mask)
    return Rows(
        input_ids.gather(1, forth),
        None if targets is None else targets.gather(1, forth).masked_fill(~real, IGNORE),
        None if document_ids is None else document_ids.gather(1, forth),
        None if position_ids is None else position_ids.gather(1, forth),
        real,
        back,
    )


def check_ids(
    input_ids: Tensor, targets: Tensor | None, labels: Tensor | None = None, *, vocab_size: int
) -> Tensor | None:
    """The targets of tokens (B, T) in int64: those given, or the labels shifted.

    Raises:
        ValueError: shapes, dtypes or ids that do not fit.
    """
    _check_tensors(input_ids=input_ids, targets=targets, labels=labels)
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
        return None
    if targets.shape != input_ids.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, but input_ids {tuple(input_ids.shape)}: they must match"
        )
    if targets.dtype != torch.int64:
        raise ValueError(
            f"targets have dtype {targets.dtype}: expected token ids of an integer dtype, -100 where nothing is scored"
        )
    _check_range("target", targets.masked_fill(targets == IGNORE, 0), vocab_size)
    return targets


def find_borders(
    input_ids: Tensor,
    *,
    document_ids: Tensor | None,
    position_ids: Tensor | None,
    real: Tensor | None,
    separator: int | None,
    cut: int | None,
    longest: int | None,
) -> Borders:
    """Where documents begin in rows without padding on the left.

    Args:
        input_ids: (B, T).
        document_ids, position_ids: (B, T); a document begins where one changes, or does not follow on.
        real: bool (B, T), false where there is padding; None = none.
        separator, cut: tokens that begin one for the memory, or for attention; None = none.
        longest: positions up to which the tokens of a document are not asked for; None = they never are.
    """
    changed = _either(restarts(document_ids, step=0), restarts(position_ids, step=1))
    starts = _either(changed, None if separator is None else input_ids == separator)
    borders = _either(changed, None if cut is None else input_ids == cut)
    documents = None if borders is None else borders.cumsum(1)
    if longest is None or position_ids is None and input_ids.shape[1] <= longest:
        return Borders(starts, documents, None)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
    return Borders(starts, documents, final_lengths(positions.expand(input_ids.shape), documents, real))


# ------------------------------------------------------------------ single checks


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
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} {wrong}, but the vocabulary has {size} entries (0..{size - 1}): "
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
    """One number per token (B, T), from that or from one row for all."""
    if values is None:
        return None
    length = input_ids.shape[-1]
    if values.shape not in (input_ids.shape, (1, length), (length,)):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, but input_ids {tuple(input_ids.shape)}: they must match"
        )
    return values.expand(input_ids.shape)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a | b


# ------------------------------------------------------------------ padding and documents


def alignment(attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices that move every row's first real token to position 0, what is real there, and the way back.

    Padding on the right needs nothing in a causal decoder, so only the left is moved; no host sync.
    """
    real = attention_mask.bool()
    length = real.shape[1]
    places = torch.arange(length, device=real.device)[None]
    shift = (real.cumsum(1) == 0).sum(1, keepdim=True)
    forth = (places + shift).clamp_max(length - 1)
    inside = (places + shift < length) & real.gather(1, forth)
    return forth, inside, (places - shift).clamp_min(0)


def as_ids(ids: Tensor) -> Tensor:
    """Token ids of any signed integer dtype as int64, which embeddings and losses want;
    masks and numbers stay, to be refused."""
    return ids.long() if ids.dtype in (torch.int8, torch.int16, torch.int32) else ids


def restarts(numbers: Tensor | None, *, step: int) -> Tensor | None:
    """Where a document begins: bool (B, T), true where a number is not ``step`` more than the one before it.

    None without a border inside a row; on a GPU nobody looks, because that would wait for the device.
    """
    if numbers is None:
        return None
    border = numbers[:, 1:] != numbers[:, :-1] + step
    if border.device.type == "cpu" and not bool(border.any()):
        return None
    return F.pad(border, (1, 0), value=True)


def final_lengths(positions: Tensor, documents: Tensor | None, real: Tensor | None) -> Tensor:
    """Tokens of the row or document that each position belongs to: (B, 1), or (B, T) with documents.

    Args:
        positions: (B, T).
        documents: (B, T) their numbers, rising by one from 0 or 1; None = one per row.
        real: bool (B, T), false where there is padding; None = none.
    """
    ends = positions + 1 if real is None else torch.where(real, positions + 1, 0)
    if documents is None:
        return ends.amax(1, keepdim=True)
    longest = ends.new_zeros(ends.shape[0], ends.shape[1] + 1).scatter_reduce(1, documents, ends, "amax")
    return longest.gather(1, documents)
