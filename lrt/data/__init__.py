"""Data: tokenizers, sources of documents, packed rows, and the loader of each rank."""

from .batch import Batch
from .loader import TrainLoader, ValidationLoader, build_loader
from .sources import CorruptShard
from .tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = ["Batch", "CorruptShard", "Tokenizer", "TrainLoader", "ValidationLoader", "build_loader", "check_vocabulary", "load_tokenizer"]
