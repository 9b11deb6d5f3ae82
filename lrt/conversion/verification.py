"""A conversion proves itself: every tensor is read back, and both sides answer the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lrt.conversion.checkpoints import Checkpoint
from lrt.conversion.reading import Mode
from lrt.shards import check_shapes

TOLERANCE = 1e-5  # of the largest logit, or of 1: float32 rounding of two ways to compute the same
KEEP_BYTES = 2 << 30  # float32 bytes up to which a model is held while it is run
WORK = 20e9  # parameters x tokens of the zero-memory comparison


class Comparison(NamedTuple):
    """Largest difference of logits in one memory mode."""

    mode: str
    tokens: int
    difference: float
    bound: float

    def __str__(self) -> str:
        sign = "<=" if self.difference <= self.bound else ">"
        return f"{self.mode}: largest logit difference {self.difference:.2e} {sign} {self.bound:.2e} over {self.tokens} tokens"


class Verification(NamedTuple):
    """What was compared."""

    tensors: int
    comparisons: tuple[Comparison, ...]
    rounding: tuple[Comparison, ...]  # what rounding to the target's dtype changes; bound is infinite


def verify(source: Checkpoint, target: Checkpoint, *, report: Callable[[str], None] = print) -> Verification:
    """Compare a written checkpoint with its source.

    Args:
        source: as it was read.
        target: as it was written, read again. Its dtype may be narrower: then the source is rounded alike.
        report: receives one line a comparison.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen, not finite or not equal, or the logits differ by more than
            the bound (1e-5 of the largest logit).
    """
    compare_tensors(source, target)
    report(f"tensors: {len(source.tensors)} read back, all equal")
    dtype = next(iter(target.tensors.values())).dtype
    rounded = any(torch.promote_types(t.dtype, dtype) != dtype for t in source.tensors.values())
    count = sum(torch.Size(t.shape).numel() for t in source.tensors.values())
    keep = 4 * count <= KEEP_BYTES
    context = source.config["model"]["sequence_length"]
    lengths = {"zero": int(min(context, max(32, WORK / count))), "decode": min(context, 24 if keep else 12)}
    tokens = _prompt(source.config["vocab_size"], lengths["zero"])
    wanted = _answers(source, dtype, keep, tokens, lengths)
    exact = _answers(source, None, keep, tokens, lengths) if rounded else wanted
    found = _answers(target, None, keep, tokens, lengths)
    comparisons, rounding = [], []
    for mode, length in lengths.items():
        if not bool(torch.isfinite(wanted[mode]).all()):
            raise ValueError(f"{source.where}: its own {mode} logits are not finite, so this checkpoint cannot be used")
        bound = TOLERANCE * max(1.0, wanted[mode].abs().max().item())
        comparison = Comparison(mode, length, _largest(wanted[mode], found[mode]), bound)
        report(str(comparison))
        if not comparison.difference <= bound:  # NaN too
            raise ValueError(f"the converted model answers differently ({comparison}): nothing was written")
        comparisons.append(comparison)
        if rounded:
            rounding.append(Comparison(mode, length, _largest(exact[mode], found[mode]), float("inf")))
            report(f"{mode}: rounding to {str(dtype).removeprefix('torch.')} moves logits by up to {rounding[-1].difference:.2e}")
    return Verification(len(source.tensors), tuple(comparisons), tuple(rounding))


def compare_tensors(source: Checkpoint, target: Checkpoint) -> None:
    """Every tensor of the target equals the source's, rounded to the target's dtype.

    Raises:
        ValueError: one is missing, unexpected, misshapen, not finite, or differs.
    """
    check_shapes("the converted checkpoint", target.tensors, {name: t.shape for name, t in source.tensors.items()})
    for name, tensor in target.tensors.items():
        written, wanted = tensor.read(), source.tensors[name].read()
        if not bool(torch.isfinite(written).all()):
            where = "has values that are NaN or infinite" if not bool(torch.isfinite(wanted).all()) else f"does not fit into {tensor.dtype}"
            raise ValueError(f"{name} {where}: nothing was written")
        if not torch.equal(written, wanted.to(written.dtype)):
            raise ValueError(f"{name} differs from its source after writing: the disk or the converter is at fault; nothing was written")


def _prompt(vocab_size: int, length: int) -> Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(20260526))


@torch.no_grad()
def _answers(side: Checkpoint, dtype: torch.dtype | None, keep: bool, tokens: Tensor, lengths: dict[str, int]) -> dict[str, Tensor]:
    logits = side.reading(dtype, keep)
    modes: tuple[Mode, ...] = get_args(Mode)
    return {mode: logits(tokens[:, : lengths[mode]], mode) for mode in modes}


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
