"""RoPE whose factors depend on how long a row is (longrope, dynamic), as a pure function of that length.

transformers picks the factors of a whole call by its largest position and keeps them in the module. A row here is
rotated by the factors of its own final length, whatever runs beside it and however it is cut into calls.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lrt.families.description import Foreign


class LengthRotary:
    """Cosines and sines of a rotation that changes where rows get longer than ``border`` tokens.

    Attributes:
        border: longest row that the first factors are for.
        beyond: whether there are factors for longer rows; "dynamic" has others for every length,
            so no cache can hold its keys.
    """

    def __init__(self, border: int, *, beyond: bool) -> None:
        self.border, self.beyond = border, beyond

    def __call__(
        self, rotary: nn.Module, hidden: Tensor, positions: Tensor, reach: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (1 or B, P, R).

        Args:
            rotary: the decoder's module.
            hidden: for device and dtype.
            positions: (1 or B, P).
            reach: (B, 1 or P) tokens of the row or document in the end; None = none is longer than ``border``.
        """
        module: Foreign = rotary
        short = self._tables(rotary, hidden, positions, module.original_inv_freq)
        if not self.beyond:
            last = positions[:, -1:] if positions.device.type == "cpu" else positions[:, :0]
            self.check(max(positions.shape[1], int(last.max()) + 1 if last.numel() else 0))
        if reach is None or not self.beyond:
            return short
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        factors = ROPE_INIT_FUNCTIONS[module.rope_type](module.config, hidden.device, seq_len=self.border + 1)[0]
        long = self._tables(rotary, hidden, positions, factors)
        chosen = (reach.to(hidden.device) > self.border)[..., None]
        return torch.where(chosen, long[0], short[0]), torch.where(chosen, long[1], short[1])

    def check(self, length: int) -> None:
        """Raises ValueError when rows of ``length`` tokens are longer than the rotation can be exact for."""
        if length > self.border and not self.beyond:
            raise ValueError(
                f"rows of {length} tokens, but past {self.border} this decoder's RoPE (rope_type 'dynamic') rotates "
                "every earlier key anew with every token: use shorter rows, "
                "or a decoder whose config has rope_type 'yarn', 'linear' or 'llama3'"
            )

    def crosses(self, before: Tensor, after: Tensor) -> bool:
        """Whether a row of ``before`` (B,) tokens gets longer than ``border`` with ``after`` (B,);
        waits for the device."""
        self.check(int(after.max()))
        return bool(((before > 0) & (before <= self.border) & (after > self.border)).any())

    @staticmethod
    def _tables(rotary: nn.Module, hidden: Tensor, positions: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The module's own arithmetic, without the code around it that picks factors."""
        module: Foreign = rotary
        plain = inspect.unwrap(type(rotary).forward)
        stand_in = SimpleNamespace(
            inv_freq=factors.to(hidden.device), attention_scaling=module.attention_scaling, config=module.config
        )
        with torch.no_grad():
            return plain(stand_in, hidden, positions)


def length_rotary(rotary: Foreign) -> LengthRotary | None:
    """What depends on the length in a rotary module of transformers; None where nothing does."""
    kind = getattr(rotary, "rope_type", None)
    kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
    if not kinds & {"longrope", "dynamic"}:
        return None
    if isinstance(kind, dict):
        raise ValueError(
            f"this decoder's RoPE depends on the length in some kinds of blocks only ({kind}): "
            "lrt.adapt does not know how it is cached"
        )
    config = rotary.config
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    border = settings.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    beyond = kind == "longrope"
    return LengthRotary(int(border) if beyond and border else int(rotary.original_max_seq_len), beyond=beyond)
