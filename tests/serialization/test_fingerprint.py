"""A memory is loaded on the weights that it was trained on, or not at all;
a decoder of one's own keeps what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_decoders import make, stir
from hypothesis import given
from hypothesis import strategies as st
from own_decoders import PLAIN, Plain, plain
from torch import Tensor

import lrt
from lrt.config import parse_recipe
from lrt.conversion import convert
from lrt.serialization.fingerprint import fingerprint, same_weights

TOKENS = torch.arange(9)[None]
NATIVE = (
    "recurrence = false\n[schedule]\nkind = 'baseline'\n[model]\nn_layers = 2\nwidth = 32\nn_heads = 2\nvocab_size = 64"
)
OTHER = "with other weights than this one: pass the decoder that it was trained on"


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return make("llama", dtype=dtype)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, schedule=lrt.refine(1)).logits


def train(model: Any, steps: int = 3) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
    return float(model(TOKENS, labels=TOKENS, schedule=lrt.refine(1)).loss.detach())


# ------------------------------------------------------------------ decoders of one's own


def test_a_decoder_of_ones_own_keeps_what_was_trained(tmp_path: Path) -> None:
    model = lrt.adapt(plain(), family=PLAIN)
    train(model)
    whole = lrt.load(lrt.save(model, tmp_path / "whole", shard_size=4000), base=plain(), family=PLAIN)
    assert torch.equal(logits(whole), logits(model))
    memory = lrt.save(model, tmp_path / "memory", adapter_only=True)
    original = plain()
    with pytest.raises(
        ValueError, match=f"trained on a Plain {OTHER}.*its weights are not in this folder .*lrt.save the whole model"
    ):
        lrt.load(memory, base=original, family=PLAIN)
    trained = plain()
    trained.load_state_dict(lrt.release(model).state_dict())
    assert torch.equal(logits(lrt.load(memory, base=trained, family=PLAIN)), logits(model))
    lrt.adapt(original, family=PLAIN)  # the failed load released it


def test_the_cards_show_the_calls_that_work(tmp_path: Path) -> None:
    """The lines of a card run as they stand, once its placeholders are filled in."""
    models: dict[str, Any] = {
        "own": lrt.adapt(plain(), family=PLAIN),
        "hf": lrt.adapt(llama()),
        "native": lrt.adapt(lrt.build(parse_recipe(NATIVE))),
    }
    llama().save_pretrained(tmp_path / "decoder_hf")
    lrt.save(lrt.release(models["native"]), tmp_path / "decoder_native")
    for name, model in models.items():
        stir(model)
        for alone in (True, False):
            folder = lrt.save(model, tmp_path / f"{name}_{alone}", adapter_only=alone)
            code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
            filled = code.replace("FOLDER", str(folder)).replace('"DECODER"', repr(str(tmp_path / f"decoder_{name}")))
            filled = filled.replace("Plain(...)", "plain()").replace("lrt.Family(...)", "PLAIN")
            scope: dict[str, Any] = {"plain": plain, "PLAIN": PLAIN}
            exec(filled, scope)  # noqa: S102
            assert torch.equal(logits(scope["model"]), logits(model)), code


def test_a_decoder_of_ones_own_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = lrt.save(lrt.adapt(plain(), family=PLAIN), tmp_path / "whole")
    other = Plain().double()
    del other.stack[-1]
    with pytest.raises(ValueError, match="another decoder than this Plain: .*is unexpected"):
        lrt.load(folder, base=other, family=PLAIN)


# ------------------------------------------------------------------ every decoder


@pytest.mark.parametrize("name", ["q_proj", "embed_tokens", "norm", "lm_head", "bias"])
def test_training_of_any_part_is_noticed(name: str, tmp_path: Path) -> None:
    model = stir(lrt.adapt(llama()))
    folder = lrt.save(model, tmp_path / "memory", adapter_only=True)
    assert torch.equal(logits(lrt.load(folder, base=llama())), logits(model))
    other = llama()
    chosen = next(p for n, p in other.named_parameters() if name in n)
    chosen.grad = torch.randn_like(chosen)
    torch.optim.AdamW([chosen], lr=1e-6).step()
    with pytest.raises(ValueError, match=OTHER):
        lrt.load(folder, base=other)


def test_a_base_in_another_precision_is_the_same_base(tmp_path: Path) -> None:
    folder = lrt.save(lrt.adapt(llama()), tmp_path / "single", adapter_only=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        lrt.load(folder, base=llama().to(dtype))
    lrt.load(folder, base=llama(), dtype=torch.bfloat16)
    half = lrt.save(lrt.adapt(llama().to(torch.bfloat16)), tmp_path / "half", adapter_only=True)
    lrt.load(half, base=llama())
    with pytest.raises(ValueError, match=OTHER):
        lrt.load(half, base=make("llama", dtype=torch.float32, seed=5))
    with pytest.raises(ValueError, match=OTHER):
        lrt.load(folder, base=make("llama", dtype=torch.float32, seed=5).to(torch.bfloat16))


def test_conversion_notices_too(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("other", 5)):
        make("llama", dtype=torch.float32, seed=seed).save_pretrained(tmp_path / name)
    model = stir(lrt.adapt(llama()))
    lrt.save(model, tmp_path / "whole")
    lrt.save(model, tmp_path / "memory", adapter_only=True)
    convert(tmp_path / "whole", tmp_path / "converted", source="lrt", target="adapter", report=lambda _: None)
    for memory in ("memory", "converted"):
        done = convert(
            tmp_path / memory,
            tmp_path / f"{memory}_on",
            source="adapter",
            target="lrt",
            base=tmp_path / "base",
            report=lambda _: None,
        )
        assert torch.equal(logits(lrt.load(done.output)), logits(model))
        assert torch.equal(logits(lrt.load(tmp_path / memory, base=llama())), logits(model))
        with pytest.raises(ValueError, match="was trained on other weights than those of .*other: name the decoder"):
            convert(
                tmp_path / memory,
                tmp_path / "no",
                source="adapter",
                target="lrt",
                base=tmp_path / "other",
                report=lambda _: None,
            )


@given(rows=st.integers(1, 40), columns=st.integers(1, 900), seed=st.integers(0, 9), size=st.sampled_from([1e-3, 1.0]))
def test_few_numbers_are_read_and_all_columns_met(rows: int, columns: int, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    before = fingerprint([("a", weight)])
    assert same_weights(before, fingerprint([("a", weight.clone())])) and same_weights(
        before, fingerprint([("a", weight.T.contiguous().T)])
    )
    assert same_weights(before, fingerprint([("a", weight.to(torch.bfloat16))])) and same_weights(
        before, fingerprint([("a", weight.half())])
    )
    assert not same_weights(before, fingerprint([("a", weight + size)])) and not same_weights(
        before, fingerprint([("b", weight)])
    )
    assert same_weights(before, fingerprint([("a", weight.to("meta"))])) and same_weights(None, before)
    if rows * columns > 1:
        assert not same_weights(before, fingerprint([("a", weight.flip(0, 1))]))
