"""An adapted model in half precision computes RoPE as the decoder does that transformers loads in half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_decoders import FAMILIES, make
from torch import Tensor

import lrt

ROTARY = [name for name in FAMILIES if name != "gpt2"]
CASTS: dict[str, Callable[[Path, Any], Any]] = {
    "to": lambda folder, base: lrt.adapt(base).to(torch.bfloat16),
    "to, by keyword and device": lambda folder, base: lrt.adapt(base).to(device="cpu", dtype=torch.bfloat16),
    "bfloat16": lambda folder, base: lrt.adapt(base).bfloat16(),
    "twice": lambda folder, base: lrt.adapt(base).half().float().bfloat16(),
    "lrt.load": lambda folder, base: lrt.load(lrt.save(lrt.adapt(base), folder / "s"), dtype=torch.bfloat16),
    "torch_dtype": lambda folder, base: transformers.AutoModelForCausalLM.from_pretrained(
        lrt.save(lrt.adapt(base), folder / "s"), torch_dtype=torch.bfloat16
    ),
    "base": lambda folder, base: lrt.load(
        lrt.save(lrt.adapt(single("llama")), folder / "s", adapter_only=True), base=base, dtype=torch.bfloat16
    ),
}


def single(name: str) -> Any:
    return make(name, dtype=torch.float32, max_position_embeddings=4096)


def loaded_by_transformers(name: str, folder: Path) -> Any:
    decoder = single(name)
    decoder.save_pretrained(folder)
    more = {"dtype": torch.bfloat16, "attn_implementation": decoder.config._attn_implementation}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **more)


def far(model: Any, **more: Any) -> Tensor:
    """Logits at positions where a rounded frequency is another angle."""
    with torch.no_grad():
        return model.eval()(torch.arange(9)[None], position_ids=torch.arange(3000, 3009)[None], **more).logits


@pytest.mark.parametrize("cast", CASTS)
def test_frequencies_stay_exact_however_it_is_cast(cast: str, tmp_path: Path) -> None:
    model = CASTS[cast](tmp_path, single("llama"))
    buffers = {name: b for name, b in model.named_buffers() if "inv_freq" in name}
    assert buffers and all(b.dtype == torch.float32 for b in buffers.values()) and model.dtype == torch.bfloat16
    exact = dict(single("llama").named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(buffers["backbone.rotary.inv_freq"], exact)
    theirs = loaded_by_transformers("llama", tmp_path / "plain")
    if cast != "twice":  # half precision has rounded the weights otherwise
        assert torch.equal(far(model, schedule=lrt.baseline()), far(theirs))
    assert not torch.equal(far(theirs), far(theirs.to(torch.bfloat16)))  # so that the comparison can fail


@pytest.mark.parametrize("name", ROTARY)
def test_every_family_keeps_them(name: str, tmp_path: Path) -> None:
    model = lrt.adapt(single(name)).to(torch.bfloat16)
    assert torch.equal(far(model, schedule=lrt.baseline()), far(loaded_by_transformers(name, tmp_path / "plain")))
    assert all(b.dtype == torch.float32 for n, b in lrt.release(model).named_buffers() if "inv_freq" in n)
