"""Data: tokenizers, sources of documents, packed rows, and the loader of each rank."""

from lrt.data.batch import Batch
from lrt.data.documents import CorruptShard
from lrt.data.held_out import ValidationLoader
from lrt.data.loader import TrainLoader, build_loader
from lrt.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "Batch",
    "CorruptShard",
    "Tokenizer",
    "TrainLoader",
    "ValidationLoader",
    "build_loader",
    "check_vocabulary",
    "load_tokenizer",
]
