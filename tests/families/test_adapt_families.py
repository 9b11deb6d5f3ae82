"""adapt, one family after the other: the decoder is unchanged at step 0, and recurrence is exact on top of it.

Norms of Hugging Face decoders compute in float32 whatever the model's dtype, so "up to rounding" means 1e-5 here.
"""

from __future__ import annotations

import pytest
import torch
from hf_decoders import DESCRIBED, FAMILIES, NIGHTLY, known, make, stir

import lrt

ROWS, LENGTH = 2, 13  # longer than every window of the tiny decoders
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# nightly: pytest -m slow
MORE = [pytest.param(family, marks=pytest.mark.slow) for family in known(DESCRIBED | NIGHTLY)]


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 58, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_baseline_is_the_original_bit_for_bit(family: str, attention: str, tokens: torch.Tensor) -> None:
    """With a cache transformers copies its keys to other strides, and differs from its own pass without one by
    rounding."""
    decoder = make(family, attention=attention)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -100)
    theirs = decoder(tokens, labels=labels, use_cache=False)
    theirs.loss.backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    model = lrt.adapt(decoder)
    ours = model(tokens, labels=labels, schedule=lrt.baseline(), return_logits=True)
    ours.loss.backward()
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    found = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()  # a vision tower has none
    assert [n for n, grad in found.items() if not torch.equal(grad, expected[n])] == []


def test_other_schedules_are_the_original_up_to_rounding(family: str, tokens: torch.Tensor) -> None:
    decoder = make(family)
    with torch.no_grad():
        theirs = decoder(tokens).logits
        model = lrt.adapt(decoder)
        for schedule in (
            lrt.interleaved(3),
            lrt.interleaved(2, sweeps=2),
            lrt.refine(2),
            lrt.chunked(5),
            lrt.sequential(),
        ):
            torch.testing.assert_close(model(tokens, schedule=schedule).logits, theirs, **CLOSE)


@pytest.mark.parametrize("sharing", ["shared", "layerwise"])
def test_schedules_reach_true_recurrence(family: str, sharing: str, tokens: torch.Tensor) -> None:
    model = stir(lrt.adapt(make(family), lrt.RecurrenceConfig(sharing=sharing, source_layer=2, init="identity")))
    with torch.no_grad():
        exact = model(tokens, schedule=lrt.sequential()).logits
        assert (exact - model(tokens, schedule=lrt.baseline()).logits).abs().max() > 0.05
        for schedule in (lrt.interleaved(LENGTH), lrt.refine(LENGTH - 1), lrt.interleaved(4, sweeps=4)):
            torch.testing.assert_close(model(tokens, schedule=schedule).logits, exact, **CLOSE)
        partly = model(tokens, schedule=lrt.refine(3)).logits
    torch.testing.assert_close(partly[:, :4], exact[:, :4], **CLOSE)
    assert (partly[:, -1] - exact[:, -1]).abs().max() > 1e-4


def test_interleaved_over_all_positions_has_the_gradients_of_sequential(family: str, tokens: torch.Tensor) -> None:
    model = stir(lrt.adapt(make(family)))
    found = []
    for schedule in (lrt.sequential(), lrt.interleaved(LENGTH, weights=(0, 1))):
        model.zero_grad()
        model(tokens, labels=tokens, schedule=schedule).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "schedule", [lrt.interleaved(3), lrt.refine(2), lrt.chunked(4), lrt.sequential()], ids=lambda s: type(s).__name__
)
def test_a_token_changes_nothing_before_it_and_no_other_row(
    family: str, schedule: object, tokens: torch.Tensor
) -> None:
    model = stir(lrt.adapt(make(family)))
    other = tokens.clone()
    other[0, 6] = (other[0, 6] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens, schedule=schedule).logits, model(other, schedule=schedule).logits
    torch.testing.assert_close(after[0, :6], before[0, :6], **CLOSE)
    torch.testing.assert_close(after[1], before[1], **CLOSE)
    assert (after[0, 6:] - before[0, 6:]).abs().amax(-1).min() > 1e-4


def test_generate_of_both_libraries_is_true_recurrence(family: str, tokens: torch.Tensor) -> None:
    decoder = make(family)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    original = decoder.generate(tokens, **settings)
    model = lrt.adapt(decoder)
    assert torch.equal(model.generate(tokens, **settings), original)
    stir(model)
    expected = tokens
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat(
                [expected, model(expected, schedule=lrt.sequential()).logits[:, -1:].argmax(-1)], dim=1
            )
    assert torch.equal(model.generate(tokens, **settings), expected)
    assert torch.equal(lrt.generate(model, tokens, max_new_tokens=5, temperature=0.0), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str, tokens: torch.Tensor) -> None:
    model = stir(lrt.adapt(make(family)))
    short, pad = tokens[:1, :5], torch.zeros(1, LENGTH - 5, dtype=torch.int64)
    order = [pad, short] if side == "left" else [short, pad]
    rows = torch.cat([torch.cat(order, dim=1), tokens[1:]])
    mask = torch.cat(
        [
            torch.cat([torch.ones_like(x) if x is short else x for x in order], dim=1),
            torch.ones(1, LENGTH, dtype=torch.int64),
        ]
    )
    with torch.no_grad():
        together = model(rows, attention_mask=mask, schedule=lrt.interleaved(3)).logits
        real = together[0, mask[0].bool()]
        torch.testing.assert_close(real, model(short, schedule=lrt.interleaved(3)).logits[0], **CLOSE)
        torch.testing.assert_close(together[1], model(tokens[1:], schedule=lrt.interleaved(3)).logits[0], **CLOSE)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batched = model.generate(rows, attention_mask=mask, **settings)[:, LENGTH:]
    assert torch.equal(batched[:1], model.generate(short, **settings)[:, 5:])
    assert torch.equal(batched[1:], model.generate(tokens[1:], **settings)[:, LENGTH:])


def test_release_gives_the_original_back(family: str, tokens: torch.Tensor) -> None:
    decoder = make(family)
    state = {name: t.clone() for name, t in decoder.state_dict().items()}
    modes = [m.training for m in decoder.modules()]
    with torch.no_grad():
        theirs = decoder(tokens).logits
        model = stir(lrt.adapt(decoder))
        model(tokens, schedule=lrt.interleaved(3))
        assert lrt.release(model) is decoder
        assert torch.equal(decoder(tokens).logits, theirs)
    assert decoder.state_dict().keys() == state.keys() and all(
        torch.equal(t, state[n]) for n, t in decoder.state_dict().items()
    )
    assert [m.training for m in decoder.modules()] == modes
    lrt.adapt(decoder)  # and it can be adapted again


def test_bfloat16_follows_the_decoder(family: str, tokens: torch.Tensor) -> None:
    decoder = make(family, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = decoder(tokens, use_cache=False).logits
    model = lrt.adapt(decoder)
    assert {p.dtype for p in model.memory_parameters().values()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(tokens, schedule=lrt.baseline()).logits, theirs)
    out = stir(model)(tokens, labels=tokens, schedule=lrt.interleaved(2))
    out.loss.backward()
    assert out.memory.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_folders(family: str, tokens: torch.Tensor, tmp_path: object) -> None:
    # float32: constants of Gemma that are no parameters are rounded to it when a float64 model is made,
    # not when it is loaded.
    config = lrt.RecurrenceConfig(sharing="layerwise", source_layer=0.5, init="identity")
    model = stir(lrt.adapt(make(family, dtype=torch.float32), config))
    with torch.no_grad():
        expected = model(tokens, schedule=lrt.sequential()).logits
        whole = lrt.load(lrt.save(model, f"{tmp_path}/whole"))
        assert torch.equal(whole(tokens, schedule=lrt.sequential()).logits, expected)
        small = lrt.save(model, f"{tmp_path}/memory", adapter_only=True)
        again = lrt.load(small, base=make(family, dtype=torch.float32))
        assert torch.equal(again(tokens, schedule=lrt.sequential()).logits, expected)
    with pytest.raises(ValueError, match="pass base=, the decoder it was trained on"):
        lrt.load(small)
