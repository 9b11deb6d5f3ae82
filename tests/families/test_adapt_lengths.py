"""RoPE that depends on the length of a row: forward, decoding and ``generate`` of both libraries are one function of
the row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_decoders import make, rotation, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lrt

BORDER = 10
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.5, 3.0, 5.0, 9.0]}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, **FACTORS, "original_max_position_embeddings": BORDER}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
_made: dict[str, Any] = {}


def decoder(kind: str = "phi3") -> Any:
    more = (
        {"hidden_size": 32, "sliding_window": None, "original_max_position_embeddings": BORDER}
        if kind == "phi3"
        else {"head_dim": 8}
    )
    return make(kind, max_position_embeddings=4 * BORDER, **rotation(**LONG) | more)


def stirred(kind: str) -> Any:
    if kind not in _made:
        _made[kind] = stir(lrt.adapt(decoder(kind)))
    return _made[kind]


def greedy(model: Any, prompt: Tensor, new: int) -> Tensor:
    """The loop that defines decoding: the whole row anew for every token."""
    with torch.no_grad():
        for _ in range(new):
            prompt = torch.cat([prompt, model(prompt, schedule=lrt.sequential()).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


def tokens(length: int, seed: int, rows: int = 2) -> Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["phi3", "llama"])
@settings(max_examples=8)
@given(
    length=st.integers(BORDER - 6, BORDER + 5),
    new=st.integers(1, 8),
    seed=st.integers(0, 99),
    method=st.sampled_from(["exact", "refine"]),
)
def test_generate_of_both_libraries_is_the_argmax_loop(
    kind: str, length: int, new: int, seed: int, method: str
) -> None:
    model, prompt = stirred(kind), tokens(length, seed)
    expected = greedy(model, prompt, new)
    prefill = lrt.prefill.exact() if method == "exact" else lrt.prefill.refine(length)
    assert torch.equal(lrt.generate(model, prompt, max_new_tokens=new, temperature=0.0, prefill=prefill), expected)
    assert torch.equal(
        model.generate(prompt, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None), expected
    )


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(BORDER - 5, BORDER + 4), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_rows_of_a_batch_do_not_lengthen_each_other(lengths: list[int], seed: int) -> None:
    model, width = stirred("llama"), max(lengths)
    rows = tokens(width, seed)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = lrt.generate(model, rows * mask, mask, max_new_tokens=6, temperature=0.0)
    theirs = model.generate(
        rows * mask, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with torch.no_grad():
        together = model(rows * mask, attention_mask=mask, schedule=lrt.refine(2)).logits
    for row, n in enumerate(lengths):
        alone = rows[row : row + 1, width - n :]
        expected = greedy(model, alone, 6)[:, n:]
        assert torch.equal(ids[row : row + 1, width:], expected)
        assert torch.equal(theirs[row : row + 1, width:], expected)
        with torch.no_grad():
            torch.testing.assert_close(
                together[row : row + 1, width - n :], model(alone, schedule=lrt.refine(2)).logits, **CLOSE
            )


@given(length=st.integers(1, 3 * BORDER), seed=st.integers(0, 99))
def test_baseline_is_the_original_on_either_side(length: int, seed: int) -> None:
    if "plain" not in _made:
        original = decoder()
        _made["plain"] = (original, lrt.adapt(original))
    original, model = _made["plain"]
    ids = tokens(length, seed)
    with torch.no_grad():
        theirs = original(ids, use_cache=False).logits
        assert torch.equal(model(ids, schedule=lrt.baseline()).logits, theirs)
        torch.testing.assert_close(model(ids, schedule=lrt.sequential()).logits, theirs, **CLOSE)


def test_generate_of_the_original_is_kept() -> None:
    original, prompt = decoder(), tokens(BORDER - 2, 1)
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = original.generate(prompt, **more)
    assert torch.equal(lrt.adapt(original).generate(prompt, **more), expected)


@given(lengths=st.lists(st.integers(1, BORDER + 5), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_packed_documents_are_rotated_by_their_own_lengths(lengths: list[int], seed: int) -> None:
    model, ids = stirred("llama"), tokens(sum(lengths), seed, rows=1)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=places, schedule=lrt.refine(1)).logits
        apart = torch.cat([model(part, schedule=lrt.refine(1)).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, **CLOSE)


def test_a_state_and_a_cache_keep_one_set_of_factors(tmp_path: Any) -> None:
    from lrt.huggingface import causal_lm

    model, prompt = stirred("llama"), tokens(BORDER + 3, 2)
    done = lrt.prefill.run(model, prompt, capacity=BORDER + 3)
    with torch.no_grad():
        expected = model(prompt, schedule=lrt.sequential()).memory[:, -1]
    torch.testing.assert_close(done.state.memory, expected, **CLOSE)
    done.state.save(tmp_path / "state")
    assert torch.equal(lrt.DecodeState.load(tmp_path / "state", model=model).reach, done.state.reach)
    cache = causal_lm.RecurrentCache()
    model(prompt[:, :BORDER], cache=cache)
    with pytest.raises(
        ValueError, match=r"a row gets longer than 10 tokens.*cache.reset\(\).* and pass all tokens again"
    ):
        model(prompt[:, BORDER:], cache=cache)


def test_a_rotation_with_a_factor_for_every_length_ends_at_its_border() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    original = make("llama", **rotation(**dynamic), max_position_embeddings=BORDER)
    model, prompt = stir(lrt.adapt(original)), tokens(BORDER - 3, 3)
    expected = greedy(model, prompt, 3)
    assert torch.equal(lrt.generate(model, prompt, max_new_tokens=4, temperature=0.0)[:, :BORDER], expected)
    for call in (
        lambda: model(tokens(BORDER + 1, 0)),
        lambda: lrt.generate(model, prompt, max_new_tokens=6, temperature=0.0),
        lambda: model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None),
    ):
        with pytest.raises(
            ValueError, match="past 10 this decoder's RoPE .rope_type 'dynamic'. rotates every earlier key anew"
        ):
            call()
