"""What both fixture scripts share: importing the official code, and giving an official model random parameters."""

import importlib
import subprocess
import sys
import types

import torch

CENTRE = {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "interleaved_lambdas": 0.1}  # the official init; 0 for all others


def import_official(path):
    """Import the official modules from a checkout, without rustbpe (only needed to train tokenizers)."""
    sys.path.insert(0, str(path))
    sys.modules["rustbpe"] = types.ModuleType("rustbpe")
    names = ("checkpoint_manager", "engine", "gpt", "loss_eval", "tokenizer")
    commit = subprocess.check_output(["git", "-C", path, "rev-parse", "HEAD"], text=True).strip()
    return types.SimpleNamespace(commit=commit, **{n: importlib.import_module(f"nanochat.{n}") for n in names})


def random_parameters(model, *, seed):
    """Give every parameter a value that matters: nothing stays zero or one, gates and output projections included."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        std = 1.0 if "wte" in name else 0.5 if "lm_head" in name else 0.2  # 0.5: logits large enough for the softcap
        p.data = CENTRE.get(name, 0.0) + std * torch.randn(p.shape, generator=generator)
