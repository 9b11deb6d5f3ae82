"""Prompts that begin at column 0, and documents in packed rows.

Legend: B batch, T columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.arguments import alignment, as_ids
from lrt.types import RecurrentDecoder


def packed_documents(
    input_ids: Tensor,
    *,
    document_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Tensor | None:
    """Number of the document of each token (B, T), from what transformers' collators say of packed rows;
    None = nothing is said.

    Args:
        input_ids: (B, T).
        document_ids, seq_idx: (B, T); a document begins where one of them changes.
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) where documents begin and end in the flattened rows;
            both the same.

    Raises:
        ValueError: shapes or lengths that do not fit the rows.
    """
    lengths = cu_seq_lens_q if cu_seq_lens_q is not None else cu_seq_lens_k
    numbers = [
        x.expand(input_ids.shape)
        for x in (document_ids, seq_idx)
        if x is not None and x.shape[-1] == input_ids.shape[-1]
    ]
    if len(numbers) < sum(x is not None for x in (document_ids, seq_idx)):
        raise ValueError(
            f"document_ids or seq_idx do not fit input_ids of shape {tuple(input_ids.shape)}: give one number a token"
        )
    if lengths is not None:
        other = lengths if cu_seq_lens_k is None else cu_seq_lens_k
        tokens, on_cpu = input_ids.numel(), lengths.device.type == "cpu"
        if lengths.shape != other.shape or on_cpu and not torch.equal(lengths, other.to(lengths)):
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k differ, but queries and keys of a row are the same tokens: "
                "give the same for both"
            )
        if lengths.ndim != 1 or on_cpu and (int(lengths[0]) != 0 or int(lengths[-1]) != tokens):
            raise ValueError(
                f"cu_seq_lens_q is {lengths.tolist()}, but the rows hold {tokens} tokens: "
                f"it begins with 0 and ends with {tokens}"
            )
        places = torch.arange(tokens, device=input_ids.device)
        numbers.append(torch.searchsorted(lengths[1:].to(places), places, right=True).view(input_ids.shape))
    borders = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
    for each in numbers:
        borders = borders | F.pad(each[:, 1:] != each[:, :-1], (1, 0))
    return borders.cumsum(1) if numbers else None


def check_prompt(model: RecurrentDecoder, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """The real tokens (B,) of each row.

    Raises:
        ValueError: a row without a token, or a token that the model does not know.
    """
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the prompt has shape {tuple(tokens.shape)} and dtype {tokens.dtype}: "
            "expected token ids (batch, tokens) in torch.int64"
        )
    counts = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int64, device=tokens.device)
    if lengths is not None:
        counts = lengths.to(device=tokens.device, dtype=torch.int64)
    if counts.numel() == 0 or int(counts.min()) < 1:
        raise ValueError(
            "the prompt is empty: begin it with the tokenizer's separator (BOS), or give at least one token in "
            "every row"
        )
    real = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
    known = torch.where(real, tokens, tokens[:, :1])
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= model.backbone.vocab_size:
        raise ValueError(
            f"the prompt has token id {low if low < 0 else high}, but the vocabulary has {model.backbone.vocab_size} "
            f"entries (0..{model.backbone.vocab_size - 1}): use the tokenizer that the model was trained with"
        )
    return counts


def on_device(tokens: Tensor, attention_mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompt and mask on a device.

    Raises:
        ValueError: one is no tensor.
    """
    for name, given in (("the prompt", tokens), ("attention_mask", attention_mask)):
        if not isinstance(given, (Tensor, type(None))) or tokens is None:
            raise ValueError(
                f"{name} is a {type(given).__name__}: expected a tensor (batch, tokens), such as torch.tensor([[1, 2]])"
            )
    return as_ids(tokens.to(device)), None if attention_mask is None else attention_mask.to(device)


def align(tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows (B, T) that begin at column 0, and their lengths (B,).

    Raises:
        ValueError: the mask does not fit, or has holes.
    """
    if attention_mask is None:
        return tokens, None
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the prompt {tuple(tokens.shape)}: "
            "they must match"
        )
    forth, inside, _ = alignment(attention_mask)
    if bool((inside[:, 1:] & ~inside[:, :-1]).any()):
        raise ValueError(
            "attention_mask has zeros between ones: padding may stand on the left or on the right of a row only"
        )
    return tokens.gather(1, forth), inside.sum(1)
