"""What a description must see: windows that are used, and noise and losses of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_decoders import DESCRIBED, known, make, stir
from hypothesis import given
from hypothesis import strategies as st
from own_decoders import PLAIN, plain
from torch import Tensor, nn

import lrt

LENGTH = 13
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 58, (2, LENGTH), generator=torch.Generator().manual_seed(7))


def rows(seed: int, vocabulary: int = 61) -> Tensor:
    return torch.randint(1, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", known(DESCRIBED))
def test_a_described_family_is_the_original(family: str, tokens: Tensor) -> None:
    decoder = make(family)
    with torch.no_grad():
        theirs = decoder(tokens).logits
        model = lrt.adapt(decoder)
        assert torch.equal(model(tokens, schedule=lrt.baseline()).logits, theirs)
        for schedule in (lrt.sequential(), lrt.interleaved(3)):
            torch.testing.assert_close(model(tokens, schedule=schedule).logits, theirs, **CLOSE)


# ------------------------------------------------------------------ windows

KINDS = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=3, max_size=3)
# nothing of them reads config.sliding_window
UNUSED = ("llama", "olmo2", "granite", "glm", "ernie4_5", "seed_oss", "minimax_m2")
USED = ("mistral", "phi3", "mixtral", "starcoder2")  # in every block
# by layer_types
LISTED = (
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "gemma2",
    "gemma3",
    "cohere2",
    "exaone4",
    "gpt_oss",
    "olmo3",
    "cwm",
    "ministral",
)


@given(
    family=st.sampled_from(known(UNUSED + USED + LISTED)),
    keys=st.integers(1, 2 * LENGTH),
    kinds=KINDS,
    seed=st.integers(0, 99),
)
def test_windows_are_those_that_the_decoder_uses(family: str, keys: int, kinds: list[str], seed: int) -> None:
    listed = {"layer_types": kinds, "use_sliding_window": True} if family in LISTED else {}
    decoder = make(family, sliding_window=keys, **listed)
    before = decoder.config.sliding_window
    model = lrt.adapt(decoder)
    assert decoder.config.sliding_window == before
    expected = [family not in UNUSED and (family in USED or kind == "sliding_attention") for kind in kinds]
    assert [block.window for block in model.blocks] == [keys - 1 if slides else None for slides in expected]
    ids = rows(seed, 58)
    with torch.no_grad():
        theirs = decoder(ids).logits
        assert torch.equal(model(ids, schedule=lrt.baseline()).logits, theirs)
        torch.testing.assert_close(model(ids, schedule=lrt.sequential()).logits, theirs, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "granite", "seed_oss"])
def test_a_window_of_zero_is_none(family: str) -> None:
    model = lrt.adapt(make(family, sliding_window=0))
    assert {block.window for block in model.blocks} == {None}
    with pytest.raises(ValueError, match="this Qwen2ForCausalLM itself fails on 8 tokens|computes something else"):
        lrt.adapt(make("qwen2", sliding_window=0))  # its own sliding blocks see nothing


def test_a_window_that_no_description_mentions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj is given something else there.*window"):
        lrt.adapt(
            make("mistral", sliding_window=4096, max_position_embeddings=8192), family=lrt.Family(**without_window())
        )


def without_window() -> dict[str, Any]:
    return {
        "name": "mine",
        "rotary": "model.rotary_emb",
        "attention_in": ("input_layernorm",),
        "mlp_in": ("post_attention_layernorm",),
    }


# ------------------------------------------------------------------ training

NOISE: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.3},
    "starcoder2": {"attention_dropout": 0.2, "residual_dropout": 0.3, "embedding_dropout": 0.2},
    "seed_oss": {"residual_dropout": 0.3},
    "phi3": {"attention_dropout": 0.2, "resid_pdrop": 0.3},
    "phi": {"attention_dropout": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.2},
    "stablelm": {"hidden_dropout": 0.3},
    "stablelm_parallel": {"hidden_dropout": 0.3},
    "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.2},
    "gpt_bigcode": {"attn_pdrop": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.2},
    "gpt_neox": {"attention_dropout": 0.2, "hidden_dropout": 0.3},
    "gpt_oss": {"attention_dropout": 0.2},
    "phimoe": {"router_jitter_noise": 0.2},
    "opt": {"attention_dropout": 0.2, "dropout": 0.3},
}


@pytest.mark.parametrize("family", known(NOISE))
def test_training_has_the_noise_of_the_original(family: str, tokens: Tensor) -> None:
    decoder = make(family, **NOISE[family]).train()
    torch.manual_seed(5)
    theirs = decoder(tokens, labels=tokens)
    torch.manual_seed(6)
    assert not torch.equal(decoder(tokens).logits, theirs.logits)
    model = lrt.adapt(decoder)
    assert model.training
    torch.manual_seed(5)
    ours = model(tokens, labels=tokens, schedule=lrt.baseline(), return_logits=True)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("family", known(["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe"]))
def test_a_loss_that_would_be_left_out_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="it adds a loss of its own.*config.output_router_logits = False"):
        lrt.adapt(make(family, output_router_logits=True))
    lrt.adapt(make(family, output_router_logits=False))


def test_noise_that_no_module_shows_is_refused(tokens: Tensor) -> None:
    decoder = plain()
    decoder.stack[1].register_forward_hook(lambda layer, given, out: nn.functional.dropout(out, 0.3, layer.training))
    with pytest.raises(
        ValueError, match="in training mode it computes something else.*output_dropout, embedding_dropout, dropout"
    ):
        lrt.adapt(decoder, family=PLAIN)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("family", "wrong", "fields"),
    [
        ("granite", {}, "embedding_scale, embedding_factor"),
        ("granite", {"embedding_factor": "embedding_multiplier"}, "residual_factor"),
        (
            "granite",
            {"embedding_factor": "embedding_multiplier", "residual_factor": "residual_multiplier"},
            "logit_factor, logit_divisor",
        ),
        ("smollm3", {}, "rotates"),
        ("gemma3", {}, r"self_attn\.q_norm is not part of this family \(query_norm, key_norm\)"),
        ("gpt_oss", {}, r"self_attn\.sinks is not part of this family \(sinks\)"),
    ],
)
def test_a_refusal_names_the_fields_that_would_mend_it(family: str, wrong: dict[str, Any], fields: str) -> None:
    with pytest.raises(ValueError, match=fields):
        lrt.adapt(make(family), family=lrt.Family(**without_window(), window=lrt.families.LLAMA.window, **wrong))


def test_no_refusal_is_a_raw_error() -> None:
    for decoder in map(make, known(["gpt_neox", "gpt2", "phi", "nanochat"])):
        for family in lrt.families.FAMILIES:
            try:
                lrt.release(lrt.adapt(decoder, family=family))
            except ValueError:
                continue


def test_memory_enters_a_decoder_with_sinks_and_clips(tokens: Tensor) -> None:
    for family in ("gpt_oss", "olmo", "granite"):
        model = stir(lrt.adapt(make(family)))
        found = []
        for schedule in (lrt.sequential(), lrt.interleaved(LENGTH, weights=(0, 1))):
            model.zero_grad()
            model(tokens, labels=tokens, schedule=schedule).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, expected in found[0].items():
            torch.testing.assert_close(
                found[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, at=f"{family} {name}": f"{at}: {text}"
            )
