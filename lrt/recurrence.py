"""The recurrence adapters: how memory enters a decoder block.

Each is usable on its own; ``RecurrentBlock`` puts them around any block that follows the ``Block``
protocol. Legend: B batch, P positions of the pass, D width, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt.types import (
    KV,
    AlignableBlock,
    Block,
    BlockContext,
    BlockOutput,
    Device,
    KVStore,
    MemoryInput,
    Mixed,
    Projection,
    at_least_float32,
)

HALVES = ("enter", "project", "attend")  # methods that every block needs; only kv_refresh asks for finish_kv too
ALIGNING = ("align", "project_aligned", "kv_bias")  # and those that aligned memory asks for beside them


class Gate(nn.Module):
    """One positive number per head: 2 sigmoid(W n[:c]), exactly 1 while W = 0.

    Args:
        channels: c, the leading channels of the attention's input that it reads.
        heads: gates to compute, a whole number of them a key/value head.
        device, dtype: of the weight.
    """

    def __init__(self, channels: int, heads: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.zeros(heads, channels, device=device, dtype=dtype))

    def forward(self, normed: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, heads, 1)."""
        heads = self.weight.shape[0]
        weight: Tensor = self.weight
        if normed.is_cuda and normed.shape[1] > 1:
            # rows of 16 bytes: otherwise cuBLAS falls back to kernels of another age
            weight = F.pad(weight, (0, 0, 0, -heads % 8))
        return (2 * torch.sigmoid(F.linear(normed[..., : self.channels], weight)[..., :heads]))[..., None]

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)


class KVProjection(nn.Module):
    """U_k and U_v: memory into the space of keys and values (paper section 3.2).

    Args:
        width: D of the memory.
        heads: G.
        head_dim: K.
        device, dtype: of the weights.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(width, heads * head_dim, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(width, heads * head_dim, bias=False, device=device, dtype=dtype)

    def forward(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, D) -> key, value, each (B, P, G, K)."""
        return self.key(memory).unflatten(-1, (self.heads, -1)), self.value(memory).unflatten(-1, (self.heads, -1))

    @torch.no_grad()
    def init_weights(self, *, init: Literal["paper", "identity"], generator: torch.Generator | None = None) -> None:
        """Uniform of standard deviation 1/sqrt(D) ("paper"), or zero ("identity")."""
        for linear in (self.key, self.value):
            if init == "identity":
                nn.init.zeros_(linear.weight)
            else:
                bound = (3 / linear.in_features) ** 0.5
                nn.init.uniform_(linear.weight, -bound, bound, generator=generator)


class AlignedProjection(nn.Module):
    """A: memory into the space of the blocks' normed inputs, which each block's own key and value matrices read.

    Args:
        width: D.
        device, dtype: of the weight.
    """

    def __init__(self, width: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False, device=device, dtype=dtype)

    def forward(self, memory: Tensor) -> Tensor:
        """(B, P, D) -> A m, (B, P, D)."""
        return self.map(memory)

    @torch.no_grad()
    def init_weights(self, *, init: Literal["paper", "identity"], generator: torch.Generator | None = None) -> None:
        """Uniform of standard deviation 1/sqrt(D), so that A m is as large as a normed input ("paper"),
        or zero ("identity")."""
        if init == "identity":
            nn.init.zeros_(self.map.weight)
        else:
            bound = (3 / self.map.in_features) ** 0.5
            nn.init.uniform_(self.map.weight, -bound, bound, generator=generator)


class ResidualInjection(nn.Module):
    """g: memory added to the input of every block, x <- x + g_l m[t-1].

    Args:
        blocks: number of blocks that receive memory.
        device, dtype: of the gains.
    """

    def __init__(self, blocks: int = 1, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(blocks, device=device, dtype=dtype))

    def forward(self, memory: Tensor | None = None) -> Any:
        """One gain (1, 1, 1) per block, to be handed to it as data; the memory (B, P, D) is added as it is."""
        return self.gains.view(-1, 1, 1, 1).unbind(0)

    @torch.no_grad()
    def init_weights(self, *, init: Literal["paper", "identity"]) -> None:
        """0.1 ("paper") or 0 ("identity")."""
        self.gains.fill_(0.1 if init == "paper" else 0.0)


class Injected(NamedTuple):
    """What a projected residual hands to the blocks."""

    gains: tuple[Tensor, ...]  # (1, 1, 1), one per block
    direction: Tensor  # (B, P, D) RMSNorm(P m), the same for all


class ProjectedInjection(ResidualInjection):
    """g and P: x <- x + g_l rms(x) RMSNorm(P m[t-1]), as large as g_l says whatever the size of the stream; rms(x)
    is detached.

    Args:
        blocks: number of blocks that receive memory.
        width: D.
        device, dtype: of the weights.
    """

    def __init__(self, blocks: int = 1, *, width: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(blocks, device=device, dtype=dtype)
        self.map = nn.Linear(width, width, bias=False, device=device, dtype=dtype)

    def forward(self, memory: Tensor | None = None) -> Injected:
        """Gains, and the direction of the memory (B, P, D)."""
        assert memory is not None
        return Injected(super().forward(), rms_memory(self.map(memory)))

    @torch.no_grad()
    def init_weights(self, *, init: Literal["paper", "identity"]) -> None:
        """P is the identity; g is 0.1 ("paper") or 0 ("identity"). With both at zero neither would get a gradient."""
        super().init_weights(init=init)
        nn.init.eye_(self.map.weight)


class Mixer(Protocol):
    """How memory enters a block's keys and values, between ``enter`` and ``attend``."""

    def __call__(
        self, block: Block, hidden: Tensor, memory: MemoryInput | None, context: BlockContext, *, gate: Gate | None,
        kv: KVStore | None, read_later: bool,
    ) -> Projection | Mixed:  # fmt: skip
        """What the block's ``attend`` and ``finish_kv`` take.

        Args:
            block: the decoder block.
            hidden: (B, P, D) its input, with the memory that the residual receives.
            memory: m[t-1] with keys and values of its own, where it has any; None = zero.
            context: of these positions.
            gate: of this block; None: memory enters no keys and values.
            kv: the store that attention will read.
            read_later: later passes read the keys and values, and their gradient comes back.
        """
        ...


def plain_mix(
    block: Block, hidden: Tensor, memory: MemoryInput | None, context: BlockContext, *, gate: Gate | None,
    kv: KVStore | None, read_later: bool,
) -> Projection:  # fmt: skip
    """k = local W_k n + remote U_k m, and v alike: the ``Mixer`` of any block."""
    projection = block.project(hidden, context)
    if gate is None:
        return projection
    local, remote = gate(projection.normed).chunk(2, dim=2)
    key, value = local * projection.key, local * projection.value
    if memory is not None:
        key, value = key + remote * memory.key, value + remote * memory.value
    return Projection(projection.normed, projection.query, key, value)


def aligned_mix(
    block: Block, hidden: Tensor, memory: MemoryInput | None, context: BlockContext, *, gate: Gate | None,
    kv: KVStore | None, read_later: bool,
) -> Projection:  # fmt: skip
    """k = gate W_k (n + w A m) + bias, and v alike: the ``Mixer`` of an ``AlignedBlock``."""
    alignable = cast(AlignableBlock, block)
    assert gate is not None
    if memory is None:
        projection = block.project(hidden, context)
    else:
        assert memory.aligned is not None
        projection = alignable.project_aligned(hidden, context, memory.aligned)
    local = gate(projection.normed)
    key_bias, value_bias = alignable.kv_bias()
    return projection._replace(
        key=gated(projection.key, local, key_bias), value=gated(projection.value, local, value_bias)
    )


class RecurrentBlock(nn.Module):
    """A decoder block that can receive memory: hidden, memory -> hidden, key, value.

    Memory, positions and stored keys are arguments and results, never attributes, so activation
    checkpointing, compilation and sharding need to know nothing about them.

    Args:
        block: the decoder block.
        gate: gates of the local and of the memory part, 2 G heads; None: memory enters no keys and values.
        projection: this block's own memory projection; None: a shared one arrives with the memory.
        mixer: how memory enters keys and values; the native decoder's blocks have one kernel for it.

    Raises:
        ValueError: the block lacks a method of ``lrt.types.Block``; a call gets a tensor as its memory.
    """

    def __init__(
        self, block: Block, *, gate: Gate | None = None, projection: KVProjection | None = None,
        mixer: Mixer = plain_mix,
    ) -> None:  # fmt: skip
        super().__init__()
        missing = _missing(block, HALVES)
        if missing:
            raise ValueError(
                f"{type(block).__name__} has no {', '.join(missing)}: "
                f"a block that receives memory needs {', '.join(HALVES)}, "
                "as lrt.types.Block says (docs/extend.md shows one); of a whole decoder lrt.adapt makes them"
            )
        self.block: Any = block
        self.gate = gate
        self.projection = projection
        self.mixer = mixer

    @property
    def window(self) -> int | None:
        return self.block.window

    def forward(
        self,
        hidden: Tensor,
        memory: MemoryInput | None,
        context: BlockContext,
        kv: KVStore | None,
        keep_kv: bool = True,
    ) -> BlockOutput:
        """Run the block.

        Args:
            hidden: (B, P, D).
            memory: m[t-1] for these positions; None = zero everywhere, and nothing is computed on it.
            context: what the backbone's ``embed`` prepared for this block.
            kv: the store to attend to; None = plain causal attention over these positions.
            keep_kv: return keys and values; otherwise no gradient of zeros comes back through what nobody reads.

        Returns:
            hidden (B, P, D), key and value (B, P, G, K) as the store keeps them, maybe ``Handed``, or None.
        """
        if isinstance(memory, Tensor):
            given = tuple(memory.shape)
            raise ValueError(f"memory is a tensor {given}: give lrt.MemoryInput(state) of every m[t-1], or None")
        read_later = keep_kv and torch.is_grad_enabled()
        hidden, projection = self._project(hidden, memory, context, kv=kv, read_later=read_later)
        hidden, key, value = self.block.attend(hidden, projection, context, kv)
        return (hidden, key, value) if keep_kv else (hidden, None, None)

    def refresh(self, hidden: Tensor, memory: MemoryInput, context: BlockContext) -> KV:
        """Keys and values with a newer memory, but with gates and local parts of the block input ``hidden``.

        Args:
            hidden: (B, P, D) input that the block had in the initialization forward.
            memory: newest m[t-1]; it is not injected into the residual here (spec: kv_refresh).
            context: as in ``forward``.
        """
        _, projection = self._project(hidden, memory._replace(gain=None), context, kv=None, read_later=False)
        return self.block.finish_kv(projection, context)

    def _project(
        self, hidden: Tensor, memory: MemoryInput | None, context: BlockContext, *, kv: KVStore | None, read_later: bool
    ) -> tuple[Tensor, Projection | Mixed]:
        hidden = _injected(self.block.enter(hidden, context), memory)
        if memory is not None and self.projection is not None:
            key, value = self.projection(memory.state)
            memory = memory._replace(key=key, value=value)
        return hidden, self.mixer(self.block, hidden, memory, context, gate=self.gate, kv=kv, read_later=read_later)


class AlignedBlock(RecurrentBlock):
    """A RecurrentBlock whose own matrices read the memory: k = gate W_k (n + w A m) + bias, and v alike.

    One gate, of the block's normed input, multiplies both parts: two gates would need two products.

    Args:
        block: an ``AlignableBlock``.
        gate: the gate of keys and values, G heads.

    Raises:
        ValueError: the block cannot say what its keys and values would be of another input.
    """

    def __init__(self, block: Block, *, gate: Gate) -> None:
        if _missing(block, ALIGNING):
            raise ValueError(
                'recurrence.projection = "aligned" does not fit this block: '
                f'{type(block).__name__} is no lrt.types.AlignableBlock; use projection = "separate"'
            )
        super().__init__(block, gate=gate, mixer=aligned_mix)
        self.block.align()


def _missing(block: object, methods: Sequence[str]) -> list[str]:
    """Which methods a block of any class lacks."""
    return [name for name in methods if not callable(getattr(block, name, None))]


def gated(x: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` times ``gate``, but for the bias that is part of it; exactly ``x`` where the gate is 1."""
    return gate * x if bias is None else x + (gate - 1) * (x - bias)


def _injected(hidden: Tensor, memory: MemoryInput | None) -> Tensor:
    """The block's input with the memory that its gain lets in."""
    return hidden if memory is None or memory.gain is None else hidden + into_residual(hidden, memory)


def into_residual(hidden: Tensor, memory: MemoryInput) -> Tensor:
    """What a memory with a gain adds to the block's input ``hidden`` (B, P, D)."""
    assert memory.gain is not None
    return memory.gain.to(hidden.dtype) * (
        memory.state if memory.direction is None else matched(memory.direction, hidden)
    )


def matched(direction: Tensor, stream: Tensor) -> Tensor:
    """A direction of size 1 (B, P, D), as large at every position as the stream there, of whose size no gradient comes
    back."""
    size = at_least_float32(stream.detach()).square().mean(-1, keepdim=True).sqrt()
    return size.to(stream.dtype) * direction


# ------------------------------------------------------------------ memory as a sequence


def rms_memory(hidden: Tensor) -> Tensor:
    """m[t] = RMSNorm(h[t]) without parameters, computed in float32 at least, in the dtype of ``hidden``."""
    # rms_norm computes in float32 inside; only its eps would follow the dtype.
    return F.rms_norm(
        hidden, (hidden.shape[-1],), eps=torch.finfo(torch.promote_types(hidden.dtype, torch.float32)).eps
    )


def shift_right(memory: Tensor) -> Tensor:
    """m[t-1] for every t: (B, T, D) -> (B, T, D), zero at position 0."""
    return F.pad(memory[:, :-1], (0, 0, 1, 0))


def reset_memory(received: Tensor, starts: Tensor | None) -> Tensor:
    """Zero the received memory (B, P, D) where ``starts`` (B, P) says that a document begins."""
    return received if starts is None else received.masked_fill(starts[..., None], 0.0)
