"""Checkpoints of a run, weights that it starts from, and what it exports."""

from lrt.train.checkpoint.checkpoint import CheckpointManager, read_tensors
from lrt.train.checkpoint.same_run import check_same_model, check_same_run, stored_recipe, write_history
from lrt.train.checkpoint.verifying import Loaded, damage, find_checkpoint, latest, newest, read_rest, step_of, whole

__all__ = [
    "CheckpointManager", "Loaded", "check_same_model", "check_same_run", "damage", "find_checkpoint", "latest",
    "newest", "read_rest", "read_tensors", "step_of", "stored_recipe", "whole", "write_history",
]  # fmt: skip
