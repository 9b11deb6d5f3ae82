"""lrt: Latent Recurrent Transformers (arXiv 2605.26797) in PyTorch."""

from lrt.installed import check_installed

check_installed()

from lrt.adaptation import adapt, release  # noqa: E402
from lrt.config import RecipeError, RecurrenceConfig, load_recipe  # noqa: E402
from lrt.decoding import prefill  # noqa: E402
from lrt.decoding.generation import generate  # noqa: E402
from lrt.decoding.state import DecodeState  # noqa: E402
from lrt.families import Family  # noqa: E402
from lrt.huggingface.registration import register_lazily  # noqa: E402
from lrt.model import LatentRecurrentModel, build  # noqa: E402
from lrt.recurrence import Gate, KVProjection, RecurrentBlock, ResidualInjection  # noqa: E402
from lrt.schedules import baseline, chunked, interleaved, mixture, refine, sequential  # noqa: E402
from lrt.serialization import load, save  # noqa: E402
from lrt.types import MemoryInput, Output, Pass, Projection, Schedule  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "DecodeState", "Family", "Gate", "KVProjection", "LatentRecurrentModel", "MemoryInput", "Output", "Pass",
    "Projection", "RecipeError", "RecurrenceConfig", "RecurrentBlock", "ResidualInjection", "Schedule",
    "adapt", "baseline", "build", "chunked", "generate", "interleaved", "load", "load_recipe", "mixture", "prefill",
    "refine", "release", "save", "sequential",
]  # fmt: skip

register_lazily()
