"""lrt: Latent Recurrent Transformers (arXiv 2605.26797) in PyTorch."""

from lrt.config import RecipeError, RecurrenceConfig, load_recipe
from lrt.model import LatentRecurrentModel, build
from lrt.recurrence import Gate, KVProjection, RecurrentBlock, ResidualInjection
from lrt.schedules import baseline, chunked, interleaved, refine, sequential
from lrt.serialization import load, save
from lrt.types import Output

__version__ = "0.1.0"
__all__ = [
    "Gate", "KVProjection", "LatentRecurrentModel", "Output", "RecipeError", "RecurrenceConfig", "RecurrentBlock", "ResidualInjection",
    "baseline", "build", "chunked", "interleaved", "load", "load_recipe", "refine", "save", "sequential",
]  # fmt: skip
