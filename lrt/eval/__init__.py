"""Evaluation: bits per byte in the three memory modes."""

from lrt.eval.bpb import MODES, BitsPerByte, evaluate_bpb

__all__ = ["MODES", "BitsPerByte", "evaluate_bpb"]
