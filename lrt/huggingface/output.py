"""What a call returns in the hands of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from lrt.huggingface.cache import RecurrentCache
from lrt.types import Output

# of the cache, before transformers 5.24 called it "cache"; both names work with every version
OLD_NAME = "past_key_values"
# the name that this version's generate uses
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else OLD_NAME


class _TwoNames(ModelOutput):
    """A ModelOutput whose field ``cache`` is also read as ``past_key_values``."""

    cache: RecurrentCache | None

    @property
    def past_key_values(self) -> RecurrentCache | None:
        return self.cache

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(_field(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_field(key))

    def get(self, key: str, default: object = None) -> object:
        return super().get(_field(key), default)


@dataclass
class LRTOutput(_TwoNames):
    """``lrt.Output`` as a ModelOutput.

    Attributes:
        loss: scalar, or None without targets.
        logits: (B, T, V); None unless asked for.
        memory: (B, T, D) m[t], or (B, 1, D) of the last token when a cache is used.
        groups: detached loss of each group, initialization first; None without targets.
        cache: the RecurrentCache, when one is used; ``past_key_values``, its name before transformers 5.24,
            reads it too.
        hidden_states: (B, T, D) input of the first block, output of every block, the last one normalized;
            None unless asked for.
        attentions: (B, H, T, S) weights of every block over the S tokens seen so far; None unless asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: Tensor | None = None
    groups: tuple[Tensor, ...] | None = None
    cache: RecurrentCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class LRTModelOutput(_TwoNames):
    """What the model without its head returns.

    Attributes:
        last_hidden_state: (B, T, D) output of the last block, normalized; the head makes logits of it.
        memory, cache, hidden_states, attentions: as in ``LRTOutput``.
    """

    last_hidden_state: Tensor | None = None
    memory: Tensor | None = None
    cache: RecurrentCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def _field(key: object) -> Any:
    return "cache" if key == OLD_NAME else key


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> RecurrentCache | None:
    """The cache that came under one of its two names.

    Raises:
        ValueError: two caches, or one that would drop the memory.
    """
    given = past_key_values if cache is None else cache
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(
            "cache and past_key_values are two caches: pass one of them, past_key_values is the old name of cache"
        )
    if given is not None and not isinstance(given, RecurrentCache):
        name = OLD_NAME if cache is None else "cache"
        what = f"{name} is a {type(given).__name__}, which would drop the recurrent memory"
        raise ValueError(f"{what}: leave it out, or pass lrt.huggingface.RecurrentCache()")
    return given


def face_of(out: Output) -> LRTOutput:
    return LRTOutput(
        loss=out.loss,
        logits=out.logits,
        memory=out.memory,
        groups=out.groups or None,
        hidden_states=out.hidden_states or None,
    )
