"""Arguments that transformers and its tools pass to a call or to generate: each does what it says, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hf_decoders import make, stir

import lrt
from lrt.huggingface import RecurrentCache

SETTINGS: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SCHEDULES = [
    lrt.baseline(),
    lrt.interleaved(3),
    lrt.interleaved(2, kv_refresh=True, order="random"),
    lrt.refine(2),
    lrt.chunked(4),
    lrt.sequential(),
]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    blocks = (2, 3) if request.param == "gemma2" else None  # memory enters above the first block, or everywhere
    return stir(lrt.adapt(make(request.param), lrt.RecurrenceConfig(init="identity", blocks=blocks)))


def padded(tokens: torch.Tensor, side: str) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    return mask


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # norms of these decoders compute in float32


# ------------------------------------------------------------------ hidden states


def test_hidden_states_without_memory_are_the_decoder_s(tokens: torch.Tensor) -> None:
    decoder = make("llama")
    with torch.no_grad():
        theirs = decoder(tokens, output_hidden_states=True, use_cache=False).hidden_states
        ours = lrt.adapt(decoder)(tokens, schedule=lrt.baseline(), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 4 and all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_hidden_states_are_those_that_the_logits_came_from(model: Any, tokens: torch.Tensor, schedule: Any) -> None:
    """Of the last pass over every position, in the order of time: the source block's are the memory,
    the last one's make the logits."""
    mask = padded(tokens, "left")

    def call(**more: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return model(tokens, attention_mask=mask, schedule=schedule, generator=generator, return_logits=True, **more)

    out, without = call(output_hidden_states=True, labels=tokens), call(labels=tokens)
    assert without.hidden_states is None and torch.equal(out.logits, without.logits)
    close(out.loss, without.loss)
    close(model.memory_of(out.hidden_states[model.source]), out.memory)
    close(model.backbone.head(out.hidden_states[-1]), out.logits) if model.backbone.softcap is None else None
    real = mask.bool()
    close(out.hidden_states[0][real], model.backbone.embed(tokens, torch.arange(9))[0][real])
    out.hidden_states[1].sum().backward()
    assert (
        model.memory_projection.key.weight.grad is None or torch.isfinite(model.memory_projection.key.weight.grad).all()
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_of_decoding_are_those_of_the_sequential_schedule(
    model: Any, tokens: torch.Tensor, side: str
) -> None:
    mask = padded(tokens, side)
    real = mask.bool()
    with torch.no_grad():
        want = model(tokens, attention_mask=mask, output_hidden_states=True, schedule=lrt.sequential())
        found = model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=True)
    assert len(found.hidden_states) == 4
    for a, b in zip(found.hidden_states, want.hidden_states):
        close(a[real], b[real])
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == 4 and model(tokens, output_hidden_states=False).hidden_states is None


# ------------------------------------------------------------------ attention weights


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_attention_weights_without_memory_are_the_decoder_s(family: str, tokens: torch.Tensor) -> None:
    """Windows and softcaps included; a row that begins after padding counts its own tokens."""
    decoder = make(family, attention="eager")
    with torch.no_grad():
        theirs = decoder(tokens, output_attentions=True, use_cache=False).attentions
        out = lrt.adapt(decoder)(tokens, output_attentions=True)
    assert len(out.attentions) == 3
    for a, b in zip(out.attentions, theirs):
        close(a, b)


def test_attention_weights_with_memory_sum_to_one_and_see_no_later_token(model: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        cache = RecurrentCache()
        first = model(tokens[:, :5], output_attentions=True, cache=cache)
        then = model(tokens[:, 5:], output_attentions=True, cache=cache)
        whole = model(tokens, output_attentions=True)
        close(torch.cat([first.logits, then.logits], dim=1), model(tokens).logits)
    for a, b, c in zip(first.attentions, then.attentions, whole.attentions):
        assert a.shape == (2, 4, 5, 5) and b.shape == (2, 4, 4, 9)
        close(torch.cat([torch.nn.functional.pad(a, (0, 4)), b], dim=2), c)
        close(c.sum(-1), torch.ones_like(c[..., 0]))
        assert c.triu(1).abs().max() == 0


def test_attention_weights_in_training_are_refused(model: Any, tokens: torch.Tensor) -> None:
    for more in ({"labels": tokens}, {"schedule": lrt.baseline()}):
        with pytest.raises(ValueError, match="evaluation mode only"):
            model(tokens, output_attentions=True, **more)
    with pytest.raises(ValueError, match="evaluation mode only"):
        model.train()(tokens, output_attentions=True)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_returns_what_each_step_computed(model: Any, tokens: torch.Tensor, beams: int) -> None:
    asked = {
        "output_hidden_states": True,
        "output_attentions": True,
        "return_dict_in_generate": True,
        "num_beams": beams,
    }
    model.set_attn_implementation("eager")
    out = model.generate(tokens, max_new_tokens=3, **asked, **SETTINGS)
    assert torch.equal(out.sequences, model.generate(tokens, max_new_tokens=3, num_beams=beams, **SETTINGS))
    rows = 2 * beams
    assert [len(step) for step in out.hidden_states] == [4, 4, 4] and [len(step) for step in out.attentions] == [
        3,
        3,
        3,
    ]
    assert [tuple(step[-1].shape) for step in out.hidden_states] == [(rows, 9, 24), (rows, 1, 24), (rows, 1, 24)]
    assert [tuple(step[0].shape) for step in out.attentions] == [(rows, 4, 9, 9), (rows, 4, 1, 10), (rows, 4, 1, 11)]


# ------------------------------------------------------------------ logits


@pytest.mark.parametrize("keep", [0, 1, 4, torch.tensor([0, 3, 8])])
@pytest.mark.parametrize("cached", [False, True])
def test_logits_to_keep(model: Any, tokens: torch.Tensor, keep: Any, cached: bool) -> None:
    mask = padded(tokens, "left")
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, use_cache=cached).logits
        found = model(tokens, attention_mask=mask, use_cache=cached, logits_to_keep=keep).logits
    close(found, whole[:, keep] if isinstance(keep, torch.Tensor) else whole[:, -keep:])
    with pytest.raises(ValueError, match="logits_to_keep = -1"):
        model(tokens, logits_to_keep=-1)


def test_only_the_logits_that_are_kept_are_computed(model: Any, tokens: torch.Tensor) -> None:
    seen = []
    model.backbone.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for cached in (False, True):
        model(tokens, logits_to_keep=2, use_cache=cached)
    assert seen == [2, 2]


def test_return_dict_follows_the_config(model: Any, tokens: torch.Tensor) -> None:
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple) and model(tokens, return_dict=True).logits.shape == (2, 9, 61)


# ------------------------------------------------------------------ ids of every integer dtype


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_ids_and_labels_of_every_integer_dtype(model: Any, tokens: torch.Tensor, dtype: torch.dtype) -> None:
    want = model(tokens, labels=tokens, schedule=lrt.interleaved(2)).loss
    assert torch.equal(model(tokens.to(dtype), labels=tokens.to(dtype), schedule=lrt.interleaved(2)).loss, want)
    targets = torch.roll(tokens, -1, 1)
    assert torch.equal(
        model.score(tokens.to(dtype), targets.to(dtype), lrt.refine(1)), model.score(tokens, targets, lrt.refine(1))
    )
    with torch.no_grad():
        assert torch.equal(model(tokens.to(dtype), use_cache=True).logits, model(tokens, use_cache=True).logits)
    assert torch.equal(lrt.generate(model, tokens.to(dtype), max_new_tokens=2, temperature=0.0)[:, :9].long(), tokens)
    with pytest.raises(ValueError, match="targets have dtype torch.float32"):
        model(tokens, targets=tokens.float())


# ------------------------------------------------------------------ generate


@pytest.mark.parametrize("chunk", [1, 2, 4, 20])
@pytest.mark.parametrize("side", [None, "left"])
def test_a_prompt_in_chunks_is_the_same_prompt(model: Any, tokens: torch.Tensor, chunk: int, side: str | None) -> None:
    mask = torch.ones_like(tokens) if side is None else padded(tokens, side)
    want = model.generate(tokens, attention_mask=mask, max_new_tokens=4, **SETTINGS)
    assert torch.equal(
        model.generate(tokens, attention_mask=mask, max_new_tokens=4, prefill_chunk_size=chunk, **SETTINGS), want
    )


@pytest.mark.parametrize("kind", ["static", "dynamic", "quantized", "offloaded", "paged"])
def test_every_other_cache_is_refused(model: Any, tokens: torch.Tensor, kind: str) -> None:
    with pytest.raises(ValueError, match="would drop the recurrent memory|Invalid `cache_implementation` \\(paged\\)"):
        model.generate(tokens, max_new_tokens=2, cache_implementation=kind, **SETTINGS)


def test_continuous_batching_is_refused(model: Any, tokens: torch.Tensor) -> None:
    for start in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(ValueError, match="continuous batching"):
            start(inputs=tokens.tolist())
    assert model.config.layer_types == ["recurrent_memory"] * 3
    paged = pytest.importorskip("transformers.generation.continuous_batching.cache")
    if hasattr(paged, "ATTN_TYPE_TO_ALLOCATOR"):  # older versions look at the types later, when pages are laid out
        with pytest.raises(ValueError, match="recurrent_memory"):
            paged.group_layers_by_attn_type(model.config)


def test_what_would_be_ignored_is_refused(model: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="token_type_ids have no meaning"):
        model(tokens, token_type_ids=torch.zeros_like(tokens))
    cache = RecurrentCache()
    model(tokens, cache=cache, position_ids=torch.arange(9)[None])
    model(tokens[:, :1], cache=cache, position_ids=torch.tensor([[9]]))
    with pytest.raises(ValueError, match="position_ids do not count on"):
        model(tokens[:, :1], cache=cache, position_ids=torch.tensor([[3]]))


@pytest.mark.parametrize(
    "given",
    [{"token_type_ids": torch.zeros(2, 9, dtype=torch.int64)}, {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)}],
)
def test_generate_passes_on_what_it_does_not_know(model: Any, tokens: torch.Tensor, given: dict[str, Any]) -> None:
    """It was dropped without a word."""
    with pytest.raises(ValueError, match="token_type_ids have no meaning|nor do seq_idx"):
        model.generate(tokens, max_new_tokens=2, **given, **SETTINGS)
    inputs = model.prepare_inputs_for_generation(tokens, output_attentions=True, mine=3)
    assert inputs["mine"] == 3 and inputs["output_attentions"] is True


def test_generate_looks_at_the_positions_of_a_prompt(model: Any, tokens: torch.Tensor) -> None:
    mask = padded(tokens, "left")
    given = mask.long().cumsum(1).sub(1).clamp(min=0)
    want = model.generate(tokens, attention_mask=mask, max_new_tokens=3, **SETTINGS)
    for cached in (True, False):
        assert torch.equal(
            model.generate(
                tokens, attention_mask=mask, position_ids=given, max_new_tokens=3, use_cache=cached, **SETTINGS
            ),
            want,
        )
    with pytest.raises(ValueError, match="position_ids do not count on"):
        model.generate(tokens, attention_mask=mask, position_ids=given + 5, max_new_tokens=2, **SETTINGS)


def test_shift_labels_are_targets(model: Any, tokens: torch.Tensor) -> None:
    """Newer versions of transformers hand over targets that are shifted already; they take the place of labels."""
    shifted = torch.roll(tokens, -1, 1)
    want = model(tokens, targets=shifted, schedule=lrt.refine(1)).loss
    assert torch.equal(model(tokens, shift_labels=shifted, labels=tokens, schedule=lrt.refine(1)).loss, want)


def test_a_refused_call_leaves_the_cache_as_it_was(model: Any, tokens: torch.Tensor) -> None:
    cache = RecurrentCache()
    model(tokens, cache=cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="holds 2 rows, but 1 came"):
            model(tokens[:1], cache=cache)
    assert cache.get_seq_length() == 9


# ------------------------------------------------------------------ without the head


def test_auto_model_gives_the_last_hidden_state(model: Any, tokens: torch.Tensor, tmp_path: Any) -> None:
    model.float().save_pretrained(tmp_path / "m")
    assert transformers.AutoModel.from_pretrained(tmp_path / "m").can_generate() is False
    body = transformers.AutoModel.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        want = model.eval()(tokens, output_hidden_states=True, schedule=lrt.refine(1))
        found = body(tokens, schedule=lrt.refine(1))
        close(found.last_hidden_state, want.hidden_states[-1])
        close(found.memory, want.memory)
        assert found.hidden_states is None and len(body(tokens, output_hidden_states=True).hidden_states) == 4
        cached = body(tokens, use_cache=True)
        close(cached.last_hidden_state, body(tokens).last_hidden_state)
        assert cached.past_key_values is cached.cache and isinstance(body(tokens, return_dict=False)[0], torch.Tensor)
