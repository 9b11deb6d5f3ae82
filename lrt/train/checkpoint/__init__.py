"""Checkpoints of a run, weights that it starts from, and what it exports."""
