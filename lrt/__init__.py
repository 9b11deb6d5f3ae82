"""lrt: Latent Recurrent Transformers (arXiv 2605.26797) in PyTorch."""

from lrt.installed import check_installed, uninterrupted

check_installed()

with uninterrupted():
    from lrt.adaptation import adapt, release
    from lrt.config import RecipeError, RecurrenceConfig, load_recipe
    from lrt.decoding import prefill
    from lrt.decoding.generation import generate
    from lrt.decoding.state import DecodeState
    from lrt.families import Family
    from lrt.huggingface.registration import register_lazily
    from lrt.model import LatentRecurrentModel, build
    from lrt.recurrence import Gate, KVProjection, RecurrentBlock, ResidualInjection
    from lrt.schedules import baseline, chunked, interleaved, mixture, refine, sequential
    from lrt.serialization import load, save
    from lrt.types import MemoryInput, Output, Pass, Projection, Schedule

__version__ = "0.1.0"
__all__ = [
    "DecodeState", "Family", "Gate", "KVProjection", "LatentRecurrentModel", "MemoryInput", "Output", "Pass",
    "Projection", "RecipeError", "RecurrenceConfig", "RecurrentBlock", "ResidualInjection", "Schedule",
    "adapt", "baseline", "build", "chunked", "generate", "interleaved", "load", "load_recipe", "mixture", "prefill",
    "refine", "release", "save", "sequential",
]  # fmt: skip

register_lazily()
