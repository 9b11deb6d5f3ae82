"""The model without its head, and what docs/adapt.md says of other libraries' trainers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_decoders import FAMILIES, make, stir
from pages import blocks
from strategies import randomized
from torch import Tensor

import lrt
from lrt.config import parse_recipe
from lrt.huggingface import LRTForCausalLM

NATIVE = "[model]\nn_layers = 2\nwidth = 32\nn_heads = 2\nsequence_length = 16\nvocab_size = "


def scores_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits as a tool computes them that applies the head itself: the config says how they are scaled and capped."""
    config = model.config.get_text_config()
    logits = (
        model.get_output_embeddings()(hidden) if model.original else hidden @ model.get_output_embeddings().weight.T
    )
    divisor, cap = getattr(config, "logits_scaling", None) or 1, getattr(config, "final_logit_softcapping", None)
    logits = logits * (getattr(config, "logit_scale", None) or 1) / divisor
    return logits if not cap else torch.tanh(logits / cap) * cap


def native(vocab_size: int) -> Any:
    return LRTForCausalLM.of(randomized(lrt.build(parse_recipe(NATIVE + str(vocab_size))), 0).double())


@pytest.mark.parametrize("name", [*FAMILIES, "native", "softcap"])
def test_the_head_on_the_trunk_is_the_model(name: str) -> None:
    more = {"final_logit_softcapping": 0.5} if name == "softcap" else {}
    model = native(64) if name == "native" else stir(lrt.adapt(make("gemma2" if name == "softcap" else name, **more)))
    tokens = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for kept in (
        {},
        {"attention_mask": mask},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)},
    ):
        for schedule in (lrt.refine(1), lrt.interleaved(2), None):
            expected = model(tokens, **kept, schedule=schedule or model.train_schedule, use_cache=False).logits
            hidden = model.base_model(tokens, **kept, schedule=schedule, use_cache=False).last_hidden_state
            torch.testing.assert_close(scores_of(model, hidden), expected, rtol=1e-6, atol=1e-6)
    assert model.get_decoder()(tokens).last_hidden_state.shape == (2, 9, hidden.shape[-1])
    assert model(tokens, return_logits=False).logits is None


def test_gradients_reach_the_memory_through_the_trunk() -> None:
    model = stir(lrt.adapt(make("llama"))).train()
    tokens = torch.arange(9)[None]
    grads = []
    for out in (
        lambda: model(tokens, schedule=lrt.refine(1)).logits,
        lambda: scores_of(model, model.base_model(tokens, schedule=lrt.refine(1))[0]),
    ):
        model.zero_grad()
        out().log_softmax(-1)[..., 0].sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(g.any() for name, g in grads[0].items() if name in model.memory_parameters())
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)


def test_what_a_trunk_cannot_do_is_refused() -> None:
    tokens = torch.arange(9)[None]
    with pytest.raises(ValueError, match="the head has 320 rows for a vocabulary of 300.*multiple of 64"):
        native(300).base_model(tokens)
    for wrong in ({"use_cache": True}, {"return_dict": False}):
        with pytest.raises(ValueError, match="pass use_cache=False and leave return_dict out"):
            native(64).base_model(tokens, **wrong)


# ------------------------------------------------------------------ docs/adapt.md


@pytest.mark.parametrize("holding", ["import Trainer", "import Accelerator", "get_peft_model"])
def test_the_page_says_what_works(holding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = torch.arange(9)
    for block in blocks("adapt.md", holding=holding):
        scope = {
            "lrt": lrt,
            "torch": torch,
            "decoder": make("llama", dtype=torch.float32),
            "batches": [tokens[None]] * 3,
        }
        scope["rows"] = [{"input_ids": tokens, "labels": tokens}] * 8
        exec(re.sub("max_steps=1000", "max_steps=5, use_cpu=True, report_to=[]", block), scope)  # noqa: S102
        model = scope["model"]
        if holding != "get_peft_model":
            trained = lrt.load(tmp_path / "accelerated") if "accelerated" in block else model
            assert all(p.any() for p in trained.memory_parameters().values())
        assert torch.isfinite(model.eval()(tokens[None]).logits).all()
