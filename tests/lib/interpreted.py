"""Triton's kernels on a CPU, one program after another: only with TRITON_INTERPRET=1 in the environment."""

from __future__ import annotations

import numpy as np
import triton.runtime.interpreter as interpreter


def allow_masks_of_scalars() -> None:
    """Some versions of the interpreter give a mask that a scalar takes part in another type than bool, "
    "and refuse it."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def whole(mask):
        return interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    builder.create_masked_load = lambda self, pointers, mask, *more: load(self, pointers, whole(mask), *more)
    builder.create_masked_store = lambda self, pointers, value, mask, *more: store(
        self, pointers, value, whole(mask), *more
    )
