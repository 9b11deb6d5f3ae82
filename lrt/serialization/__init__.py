"""A model as a folder: safetensors and config.json, readable by ``lrt.load`` alone."""

from lrt.serialization.description import config_of, model_from_config, native_config, read_config, schedule_to_table
from lrt.serialization.reading import filled, load
from lrt.serialization.tensors import in_memory
from lrt.serialization.writing import new_folder, save, write_model

__all__ = [
    "config_of", "filled", "in_memory", "load", "model_from_config", "native_config", "new_folder", "read_config",
    "save", "schedule_to_table", "write_model",
]  # fmt: skip
