"""Random small models and rows for the property tests."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from lrt.config import ModelConfig, RecurrenceConfig
from lrt.model import build_model

VOCABULARY = 13
SEPARATOR = 0
# kv_projection and residual
PARTS = ((True, True), (True, False), (False, True), (True, "projected"), (False, "projected"))
WAYS = (("shared", "separate"), ("layerwise", "separate"), ("shared", "aligned"))  # sharing and projection


@st.composite
def model_configs(draw, layers=st.integers(1, 3), **fixed):
    n_layers = draw(layers)
    heads = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0]))
    settings = {
        "n_layers": n_layers,
        "width": 4 * heads,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": VOCABULARY,
        "vocab_multiple": draw(st.sampled_from([1, 8])),
        "sequence_length": draw(st.sampled_from([4, 8, 64])),
        "mlp_ratio": 2.0,
        "window_pattern": draw(st.sampled_from(["L", "S", "SSSL", "SL"])),
        "value_embeddings": draw(st.sampled_from(["all", "alternating", "none"])),
        "embedding_residual": draw(st.booleans()),
        "residual_scales": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "gate_channels": draw(st.sampled_from([None, 2])),
    }
    return ModelConfig(**{**settings, **fixed})


@st.composite
def recurrence_configs(draw, n_layers, **fixed):
    parts = draw(st.sampled_from(PARTS))
    ways = WAYS if parts[0] else WAYS[:2]
    blocks = draw(st.one_of(st.none(), st.lists(st.integers(1, n_layers), min_size=1, unique=True).map(tuple)))
    settings = {
        **dict(zip(("sharing", "projection"), draw(st.sampled_from(ways)))),
        "source_layer": draw(st.one_of(st.none(), st.integers(min(blocks or (1,)), n_layers))),
        "kv_projection": parts[0],
        "residual": parts[1],
        "gate_channels": draw(st.sampled_from([None, 2])),
        "blocks": blocks,
        "memory_norm": draw(st.sampled_from(["rms", "final"])),
        "separator": draw(st.sampled_from([None, SEPARATOR])),
    }
    return RecurrenceConfig(**{**settings, **fixed})


@st.composite
def models(draw, recurrence=None, **fixed):
    """A float64 model whose every parameter is random, so that nothing is zero or one by luck."""
    config = draw(model_configs(**fixed))
    options = draw(recurrence_configs(config.n_layers, **(recurrence or {})))
    return randomized(build_model(config, options, dtype=torch.float64), draw(st.integers(0, 2**31)))


def randomized(model, seed, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@st.composite
def rows(draw, batch=st.integers(1, 2), length=st.integers(1, 9)):
    """Token ids (B, T) and targets (B, T) with some positions ignored."""
    shape = (draw(batch), draw(length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
    targets = torch.randint(0, VOCABULARY, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.2] = -100
    return tokens, targets


def without_memory(config: ModelConfig):
    return build_model(config, None, dtype=torch.float64)


def replace(config, **changes):
    return dataclasses.replace(config, **changes)
