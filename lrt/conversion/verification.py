"""A conversion proves itself: every tensor is read back, and both sides answer the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.conversion.checkpoints import Checkpoint
from lrt.conversion.official_reference import Mode, Precision
from lrt.serialization.tensors import check_shapes

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest logit, or of 1
KEEP_BYTES = 2 << 30  # float32 bytes up to which a model is held while it is run
WORK = 20e9  # parameters x tokens of the zero-memory comparison


class Comparison(NamedTuple):
    """Largest difference of logits in one memory mode."""

    mode: Mode
    compute: torch.dtype
    tokens: int
    difference: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.bound  # not so for NaN

    def __str__(self) -> str:
        dtype = str(self.compute).removeprefix("torch.")
        sign = "<=" if self.agrees else ">"
        return (
            f"{self.mode}, {dtype}: largest logit difference {self.difference:.2e} {sign} {self.bound:.2e} over "
            f"{self.tokens} tokens"
        )


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
        ValueError: a tensor is missing, unexpected, misshapen, not finite or not equal, or the logits differ by more
            than the bound: 1e-5 of the largest logit in float32, and 1e-9 in float64, which is asked only where float32
            fails.
    """
    compare_tensors(source, target)
    report(f"tensors: {len(source.tensors)} read back, all equal")
    dtype = next(iter(target.tensors.values())).dtype
    rounded = dtype if any(torch.promote_types(t.dtype, dtype) != dtype for t in source.tensors.values()) else None
    count = sum(torch.Size(t.shape).numel() for t in source.tensors.values())
    keep = 4 * count <= KEEP_BYTES
    lengths: dict[Mode, int] = {
        "zero": int(min(source.context, max(32, WORK / count))),
        "decode": min(source.context, 24 if keep else 12),
    }
    tokens = torch.randint(
        0, source.config["vocab_size"], (1, lengths["zero"]), generator=torch.Generator().manual_seed(0)
    )
    comparisons, rounding = [], []
    for mode, length in lengths.items():
        row = tokens[:, :length]
        for compute, tolerance in TOLERANCE.items():
            wanted, found = (
                _answer(side, row, mode, Precision(compute, r, keep)) for side, r in ((source, rounded), (target, None))
            )
            if not bool(torch.isfinite(wanted).all()):
                raise ValueError(
                    f"{source.where}: its own {mode} logits are not finite, so this checkpoint cannot be used"
                )
            found_difference = (wanted - found).abs().max().item()
            comparison = Comparison(
                mode, compute, length, found_difference, tolerance * max(1.0, wanted.abs().max().item())
            )
            report(str(comparison))
            comparisons.append(comparison)
            if comparison.agrees:
                break  # float64 only decides whether a difference in float32 is more than amplified rounding
        else:
            raise ValueError(f"the converted model answers differently ({comparison}): nothing was written")
        if rounded is not None:
            exact = _answer(source, row, mode, Precision(compute, None, keep))
            rounding.append(Comparison(mode, compute, length, (exact - found).abs().max().item(), float("inf")))
            report(
                f"{mode}: rounding to {str(dtype).removeprefix('torch.')} moves logits by up to "
                f"{rounding[-1].difference:.2e}"
            )
    return Verification(len(source.tensors), tuple(comparisons), tuple(rounding))


@torch.no_grad()
def _answer(side: Checkpoint, tokens: Tensor, mode: Mode, precision: Precision) -> Tensor:
    return side.reading(precision)(tokens, mode)


def compare_tensors(source: Checkpoint, target: Checkpoint) -> None:
    """Every tensor of the target equals the source's, rounded to the target's dtype.

    Raises:
        ValueError: one is missing, unexpected, misshapen, not finite, or differs.
    """
    check_shapes("the converted checkpoint", target.tensors, {name: t.shape for name, t in source.tensors.items()})
    for name, tensor in target.tensors.items():
        written, wanted = tensor.read(), source.tensors[name].read()
        if not bool(torch.isfinite(written).all()):
            where = (
                "has values that are NaN or infinite"
                if not bool(torch.isfinite(wanted).all())
                else f"does not fit into {tensor.dtype}"
            )
            raise ValueError(f"{name} {where}: nothing was written")
        if not torch.equal(written, wanted.to(written.dtype)):
            raise ValueError(
                f"{name} differs from its source after writing: the disk or the converter is at fault; "
                "nothing was written"
            )
