"""The values and Protocols that cross the borders between modules.

Shape letters: B batch, T positions of a row, P positions of a pass, L blocks, D model width,
H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

T = TypeVar("T")
BlockContext = Any  # what a backbone prepares for one of its blocks, a named tuple; only that block looks inside
Device = torch.device | str | int | None  # as torch takes it; None: the default one


class Projection(NamedTuple):
    """What a decoder block computes before its keys and values are mixed with memory.

    Attributes:
        normed: (B, P, D) input of the attention.
        query: (B, P, H, K) before RoPE and QK-norm.
        key: (B, P, G, K) before RoPE and QK-norm.
        value: (B, P, G, K).
    """

    normed: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class Mixed(NamedTuple):
    """Queries, keys and values as attention reads them: gated, mixed with memory, rotated and normalized."""

    query: Tensor  # (B, P, H, K)
    key: Tensor  # (B, P, G, K)
    value: Tensor  # (B, P, G, K)
    key_path: Tensor | None = None  # where the gradients of later passes go; see ``Handed``
    value_path: Tensor | None = None


class MemoryInput(NamedTuple):
    """The recurrent memory as one block receives it.

    Attributes:
        state: (B, P, D) m[t-1].
        key, value: (B, P, G, K) U_k m and U_v m of a shared projection; None = the block projects, or has none.
        gain: (1, 1, 1) g of this block; None = nothing is added to the residual stream.
        direction: (B, P, D) of size 1, which a projected residual adds in the place of the state.
        aligned: (B, P, D) A m, which keys and values read through the block's own matrices.
    """

    state: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    gain: Tensor | None = None
    direction: Tensor | None = None
    aligned: Tensor | None = None


class KV(NamedTuple):
    """Keys (after RoPE and norm) and values of some positions, each (B, P, G, K)."""

    key: Tensor
    value: Tensor


class Handed(NamedTuple):
    """A tensor that a block hands on without gradient, and where its gradient is to go.

    A key has readers inside its block and in later passes. With a path of their own, the later ones' gradient reaches
    the block's own kernel, which adds it; otherwise a kernel of its own would.
    """

    value: Tensor
    path: Tensor  # of the same shape, never read


class Later(Generic[T]):
    """A tensor of a context that is made when a block first asks for it, and then kept.

    What is made in the order of the blocks is also differentiated in their order: a sharded table is gathered while
    the block before computes, and its gradient is reduced while that block is differentiated. A pass without gradient
    may be the first to ask: what is made has a gradient if it would have had one when it was promised.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] | None = make
        self._made: T | None = None
        self._graded = torch.is_grad_enabled()

    def __call__(self) -> T:
        if self._make is not None:
            with torch.set_grad_enabled(self._graded):
                self._made, self._make = self._make(), None
        return cast(T, self._made)


class Saved(Protocol):
    """What the backward of a ``torch.autograd.Function`` gets: the tensors that its forward kept."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


class PassOutput(NamedTuple):
    """What one forward over some positions returns."""

    hidden: Tensor  # (B, P, D) output of the last block that ran
    memory: Tensor | None  # (B, P, D) m[t]; None when the model has no recurrence
    kv: tuple[KV, ...]  # one per block
    inputs: tuple[Tensor, ...] = ()  # (B, P, D) input of each block, when asked for


class KVStore(Protocol):
    """Keys and values known so far, as seen by one block during one pass.

    A store is a tuple of tensors; None stands for plain causal attention over the pass's own positions.
    """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of fresh queries (B, P, H, K) over stored keys with the fresh ones in place; sinks are scores (H,)
        without a value."""
        ...


@runtime_checkable
class Block(Protocol):
    """A decoder block in two halves, between which the memory enters.

    ``window`` is the number of tokens seen before the current one (None: all).
    """

    window: int | None

    def enter(self, hidden: Tensor, context: BlockContext) -> Tensor:
        """The block's input (B, P, D) before any memory is added."""
        ...

    def project(self, hidden: Tensor, context: BlockContext) -> Projection: ...

    def attend(
        self, hidden: Tensor, projection: Projection, context: BlockContext, kv: KVStore | None
    ) -> tuple[Tensor, Tensor | Handed, Tensor | Handed]:
        """Returns (hidden, key, value): the block's output and what the buffer or cache keeps."""
        ...

    def finish_kv(self, projection: Projection, context: BlockContext) -> KV:
        """Keys and values as the store keeps them: after RoPE, norm and value embedding."""
        ...


class AlignableBlock(Block, Protocol):
    """A decoder block whose own key and value matrices can read memory beside its normed input."""

    def project_aligned(self, hidden: Tensor, context: BlockContext, aligned: Tensor) -> Projection:
        """``project``, where keys and values read the normed input plus w times ``aligned`` (B, P, D),
        w the norm's own weight."""
        ...

    def align(self) -> None:
        """Make ready for ``project_aligned``, once; raises ValueError where it would be wrong for this block."""
        ...

    def kv_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """The biases of keys and values, each (G, K), which no gate multiplies; None where there is none."""
        ...


class Backbone(Protocol):
    """A decoder without its blocks: embeddings in, logits and losses out."""

    width: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[BlockContext, ...]]:
        """(hidden (B, P, D), one context per block).

        A context is a tuple of tensors whose dimension 1 is positions, or 1 to broadcast; one may come ``Later``.
        """
        ...

    def final_norm(self, hidden: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, P, V) of the last block's output (B, P, D)."""
        ...

    def loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of nats, differentiable; nats of every position (B, P), detached); -100 is ignored."""
        ...


# hidden (B, P, D), key and value (B, P, G, K), which are None where nobody keeps them
BlockOutput = tuple[Tensor, Tensor | Handed | None, Tensor | Handed | None]


class PassBlock(Protocol):
    """A ``RecurrentBlock`` as passes call it."""

    @property
    def window(self) -> int | None: ...

    def __call__(
        self,
        hidden: Tensor,
        memory: MemoryInput | None,
        context: BlockContext,
        kv: KVStore | None,
        keep_kv: bool = True,
        /,
    ) -> BlockOutput: ...

    def refresh(self, hidden: Tensor, memory: MemoryInput, context: BlockContext, /) -> KV: ...


class RecurrentDecoder(Protocol):
    """What a pass needs of a model: the decoder's parts and the recurrence around them."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def blocks(self) -> Sequence[PassBlock]: ...

    @property
    def memory_projection(self) -> Callable[[Tensor], tuple[Tensor, Tensor] | Tensor] | None:
        """KVProjection when shared, or AlignedProjection."""
        ...

    @property
    def injection(self) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        """ResidualInjection or ProjectedInjection."""
        ...

    source: int  # block (1..L) whose output is the memory; 0 without recurrence
    receivers: tuple[int, ...]  # zero-based indices of the blocks that receive memory
    twins: Twins | None  # None: the model itself

    def memory_of(self, hidden: Tensor) -> Tensor:
        """m (B, P, D) of the source block's output."""
        ...


# (model, index of a pass) -> the decoder with the same weights that runs it
Twins = Callable[[RecurrentDecoder, int], RecurrentDecoder]


class Pass(NamedTuple):
    """One forward of a schedule, as data.

    Attributes:
        start, stop, step: the positions that it computes, as of a slice.
        group: loss group of the pass; -1 = none, because the pass only feeds the next one.
        memory: positions that receive m[t-1]: none ("zero"), "all", or the "first" one only.
        graded: gradients flow back through the pass.
    """

    start: int
    stop: int
    step: int
    group: int
    memory: Literal["zero", "all", "first"]
    graded: bool = True

    @property
    def positions(self) -> slice:
        return slice(self.start, self.stop, self.step)

    def covers(self, length: int) -> bool:
        """Whether it computes every position of a row, so that it needs no buffer."""
        return self.start == 0 and self.step == 1 and self.stop >= length


class Schedule(Protocol):
    """Which positions are computed, in which order, and how their losses are weighted.

    ``lrt.baseline()`` and its neighbours return one; a schedule of one's own needs these five members.
    """

    @property
    def cut_gradient(self) -> bool | Literal["initialization"]:
        """No gradient flows from a pass into the passes before it, or only into the initialization."""
        ...

    @property
    def kv_refresh(self) -> bool:
        """Whether the newest memory is projected again for positions not yet visited."""
        ...

    @property
    def token_compute(self) -> int:
        """Token compute: forward tokens per token of data."""
        ...

    def group_weights(self, length: int) -> tuple[float, ...]:
        """Loss weight of each group, initialization first."""
        ...

    def plan(self, length: int, *, generator: torch.Generator | None = None) -> tuple[Pass, ...]:
        """The passes over a row of ``length`` positions, in order; a schedule that draws takes ``generator``."""
        ...


@dataclass(frozen=True)
class Output:
    """What a model call returns.

    Attributes:
        loss: scalar, or None without targets.
        logits: (B, T, V), each position from the last pass that computed it; None unless asked for.
        memory: (B, T, D) m[t]; None for a model without recurrence.
        groups: detached loss of each group, initialization first; empty without targets.
        last_hidden_state: (B, T, D) normalized output of the last block, from the same passes as logits,
            for a head outside the model. Present where neither loss nor logits are asked for, or hidden states are.
        hidden_states: (B, T, D) input of every block, then the output of the last one after the final norm;
            empty unless asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: Tensor | None = None
    groups: tuple[Tensor, ...] = ()
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()

    def __getitem__(self, index: int | slice | str) -> Tensor | tuple[Tensor, ...] | None:
        """The loss and the logits as ``transformers.Trainer`` reads them, by name or by place;
        what is None has no place."""
        named = {"loss": self.loss, "logits": self.logits}
        return named[index] if isinstance(index, str) else tuple(x for x in named.values() if x is not None)[index]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
