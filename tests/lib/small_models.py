"""A small native model."""

from __future__ import annotations

import torch
from strategies import SEPARATOR, VOCABULARY, randomized

from lrt.model import build_model


def small(seed=3, dtype=torch.float64, recurrence=None, **settings):
    from lrt.config import ModelConfig, RecurrenceConfig

    config = ModelConfig(
        **{
            "n_layers": 3,
            "width": 16,
            "n_heads": 2,
            "vocab_size": VOCABULARY,
            "sequence_length": 8,
            "window_pattern": "SL",
            **settings,
        }
    )
    return randomized(
        build_model(config, recurrence or RecurrenceConfig(separator=SEPARATOR), dtype=dtype), seed, 0.3
    ).eval()
