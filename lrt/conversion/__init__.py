"""Checkpoints in, checkpoints out, checked before they are believed (docs/convert.md)."""

from lrt.conversion.checkpoints import Checkpoint
from lrt.conversion.inspection import inspect_checkpoint
from lrt.conversion.kinds import KINDS
from lrt.conversion.pipeline import Converted, convert
from lrt.conversion.verification import Verification, verify

__all__ = ["KINDS", "Checkpoint", "Converted", "Verification", "convert", "inspect_checkpoint", "verify"]
