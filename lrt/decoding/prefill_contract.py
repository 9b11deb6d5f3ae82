"""What a way to run prompts must do, and what it says about the result.

Legend: B batch, T prompt tokens, P positions of a chunk, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from lrt.accounting import Work
from lrt.decoding.state import DecodeState
from lrt.decoding.step import Runner
from lrt.decoding.which_model import Decodes


@dataclass(frozen=True)
class Report:
    """What a prefill did; one number per row.

    Attributes:
        method: "exact", "refine(1)", ...
        sweeps: passes over the positions not yet exact, after the first forward (the most in any chunk).
        residual: largest ||m_new - m_old|| / ||m_new|| of the last sweep; 0 where exact. It does not bound the error.
        exact_positions: leading positions of the row that are exact for certain.
        converged: every position exact, or residual within tol (refine: exact only).
        flops: matrix products of all rows together, padding included; None when the decoder is not a native one.
        seconds: wall clock.
    """

    method: str
    sweeps: tuple[int, ...]
    residual: tuple[float, ...]
    exact_positions: tuple[int, ...]
    converged: tuple[bool, ...]
    flops: float | None
    seconds: float

    def __str__(self) -> str:
        missed = self.converged.count(False)
        cost = "" if self.flops is None else f", {self.flops / 1e9:.3g} GFLOP"
        return (
            f"{self.method}: {max(self.sweeps)} sweeps, largest residual {max(self.residual):.2g}, "
            f"exact for certain up to {min(self.exact_positions)} tokens"
            f"{f', {missed} of {len(self.converged)} rows not converged' if missed else ''}{cost}, {self.seconds:.3f} s"
        )


class Prefilled(NamedTuple):
    """A state that has consumed the prompt, and what came with it."""

    state: DecodeState
    hidden: Tensor  # (B, D) last block's output at each row's last token; (B, T, D) where all were asked for
    report: Report


class Settled(NamedTuple):
    """What settling a stretch gave, one entry per row."""

    hidden: Tensor  # (B, D) at the last token, or (B, P, D)
    sweeps: list[int]
    residual: list[float]
    exact: list[int]  # leading positions of the stretch that are exact, given an exact state
    converged: list[bool]
    work: list[Work]  # what ran, in positions of all rows together


class Prefill(Protocol):
    """A way to run prompts: plain data that ``run`` applies chunk by chunk."""

    @property
    def chunk(self) -> int | None:
        """Tokens in flight at once; None = the whole prompt."""
        ...

    def settle(
        self, model: Decodes, state: DecodeState, tokens: Tensor, counts: Tensor, *, everywhere: bool, runner: Runner
    ) -> Settled:
        """Let the rows of ``state`` consume ``counts`` (B,) tokens each of ``tokens`` (B, P), in place."""
        ...
