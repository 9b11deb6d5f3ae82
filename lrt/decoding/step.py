"""How a model decodes: one token for every row of a state, its logits, and stretches of prompt.

A ``Stepper`` is what decoding asks. It takes the model's place: whatever it does not say itself is the model's.

Legend: B batch, P positions of a stretch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrt.decoding.one_position import consume
from lrt.decoding.prefill_passes import Span
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes, StandIn
from lrt.forward import Row

Action = Callable[[], None]  # a step on static tensors
Runner = Callable[[Action, "Tensor"], Action]  # how steps run: (step, static ``active`` (B,)) -> step


class Stepper(StandIn):
    """A model that decodes by its own blocks, in plain PyTorch."""

    @torch.no_grad()
    def step(
        self, state: DecodeState, tokens: Tensor, active: Tensor, *, row: Row | None = None, stop: int | None = None
    ) -> Tensor:
        """Let every active row of ``state`` consume one token, in place.

        Args:
            state: its rows; must have room for one token.
            tokens: (B,) token ids.
            active: (B,) bool; other rows stay as they are.
            row: what block ``row.start`` receives at these tokens, with contexts;
                None = the tokens embedded, for the first block.
            stop: the first block that does not run, above the source; None = all run.

        Returns:
            (B, D) output of the last block that ran.
        """
        return consume(self.plain, state, tokens, active, row=row, stop=stop).hidden[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) of the last block's output (B, D)."""
        return self.plain.backbone.logits(hidden[:, None])[:, 0]

    def stretch(self, state: DecodeState, tokens: Tensor, counts: Tensor, *, kind: Any) -> Span:
        """A stretch of prompt in parallel passes.

        Args:
            state: where it begins.
            tokens: (B, P).
            counts: (B,) real tokens of each row.
            kind: which passes: groups of a sweep, "refine" or "plain".
        """
        return Span(self, state, tokens, counts)

    def quick(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of tensors, as fast as this stepper can make it."""
        return function


def stepper_of(model: Decodes) -> Stepper:
    """How a model decodes: what stands in its place, or its own blocks."""
    return model if isinstance(model, Stepper) else Stepper(model)


@torch.no_grad()
def decode_one_token(model: Decodes, state: DecodeState, tokens: Tensor, active: Tensor) -> Tensor:
    """Logits (B, V) of the token after ``tokens`` (B,), which active rows consume; see ``Stepper.step``."""
    stepper = stepper_of(model)
    return stepper.logits(stepper.step(state, tokens, active))


class WithoutMemory(StandIn):
    """A model whose memory is never received: memory mode ``zero``, to see what the memory changes.

    Args:
        model: a LatentRecurrentModel.
    """

    def __init__(self, model: Decodes) -> None:
        super().__init__(model)
        self.recurrence, self.source, self.receivers, self.memory_projection, self.injection = None, 0, (), None, None

    @property
    def itself(self) -> Any:
        return self


# ------------------------------------------------------------------ how a step runs


def eager(step: Action, active: Tensor) -> Action:
    """Run the step as it is."""
    return step


def graphed(step: Action, active: Tensor) -> Action:
    """Capture the step as a CUDA graph and replay it; elsewhere than on CUDA, run it as it is.

    While the step warms up no row is active, so nothing but a spare slot of the caches changes.
    """
    if active.device.type != "cuda":
        return step
    before = active.clone()
    active.fill_(False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may pin memory meanwhile
        step()
    active.copy_(before)

    def replay(inputs: Action = step) -> None:  # which must live as long: the graph knows only where its tensors were
        graph.replay()

    return replay
