"""Decoding with true recurrence: states, steps, prefill, sessions, scores."""

from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.generation import generate, start
from lrt.decoding.prefix_cache import PrefixCache
from lrt.decoding.sampling import Sampling
from lrt.decoding.scoring import score, score_continuations
from lrt.decoding.session import Session
from lrt.decoding.state import DecodeState

__all__ = [
    "DecodeState",
    "PrefixCache",
    "Sampling",
    "Session",
    "accelerate",
    "generate",
    "score",
    "score_continuations",
    "start",
]
