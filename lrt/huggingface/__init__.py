"""The Hugging Face face, imported only where transformers is."""

from __future__ import annotations

from typing import Any

__all__ = ["LRTConfig", "LRTForCausalLM", "LRTModel", "RecurrentCache"]


def __getattr__(name: str) -> Any:
    """The classes of this package, which need transformers, at the moment they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lrt.huggingface import cache, causal_lm

    return getattr(cache if name == "RecurrentCache" else causal_lm, name)
