"""Evaluation: bits per byte in the three memory modes, and what the memory does inside the model."""

from lrt.eval.activations import activation_statistics
from lrt.eval.bpb import MODES, BitsPerByte, evaluate_bpb

__all__ = ["MODES", "BitsPerByte", "activation_statistics", "evaluate_bpb"]
