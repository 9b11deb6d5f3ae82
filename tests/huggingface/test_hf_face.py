"""The Hugging Face habits of adapted and native models: generate, Trainer, accelerate, Auto classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_decoders import make, stir
from trainers import Rows, trainer

import lrt
from lrt.huggingface.causal_lm import LRTOutput, RecurrentCache

SETTINGS: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> Any:
    return stir(lrt.adapt(make("llama")))


# ------------------------------------------------------------------ the call


def test_output_is_a_model_output(model: Any, tokens: torch.Tensor) -> None:
    out = model(tokens, labels=tokens, schedule=lrt.refine(1))
    assert (
        isinstance(out, LRTOutput)
        and isinstance(model, lrt.LatentRecurrentModel)
        and isinstance(model, transformers.PreTrainedModel)
    )
    assert out[0] is out.loss and out["loss"] is out.loss and out.logits is None and len(out.groups) == 2
    assert model(tokens).logits.shape == (2, 9, 61)
    assert isinstance(model(tokens, return_dict=False), tuple)


def test_names_are_neither_doubled_nor_lost(tokens: torch.Tensor) -> None:
    decoder = make("smollm")
    count = sum(p.numel() for p in decoder.parameters())
    model = lrt.adapt(decoder)
    added = model.memory_parameters()
    assert sum(p.numel() for p in model.parameters()) == count + sum(p.numel() for p in added.values())
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    assert set(added) <= {name for name, _ in model.named_parameters()}
    assert not [name for name in model.state_dict() if "original" in name or ".decoder." in name]


def test_num_items_in_batch_normalises_the_loss(model: Any, tokens: torch.Tensor) -> None:
    whole = model(tokens, labels=tokens, schedule=lrt.refine(1)).loss
    halves = [
        model(row[None], labels=row[None], schedule=lrt.refine(1), num_items_in_batch=torch.tensor(16)).loss
        for row in tokens
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ generate


def test_beams_carry_their_memory(model: Any, tokens: torch.Tensor) -> None:
    """Beam search with the cache equals beam search that computes every candidate from scratch."""
    found = model.generate(
        tokens, num_beams=3, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, **SETTINGS
    )
    for row, prompt in enumerate(tokens):
        beams: list[tuple[float, torch.Tensor]] = [(0.0, prompt)]
        for _ in range(5):
            grown = []
            for score, sequence in beams:
                with torch.no_grad():
                    logits = model(sequence[None], schedule=lrt.sequential()).logits[0, -1]
                top = torch.log_softmax(logits.float(), dim=-1).topk(3)
                grown += [(score + float(s), torch.cat([sequence, t[None]])) for s, t in zip(top.values, top.indices)]
            beams = sorted(grown, key=lambda beam: -beam[0])[:3]
        assert found.sequences[row].tolist() == beams[0][1].tolist()


def test_sampling_draws_from_true_recurrence(model: Any, tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    out = model.generate(
        tokens,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences.shape == (6, 13)
    with torch.no_grad():
        expected = model(out.sequences, schedule=lrt.sequential()).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_cache_goes_on_where_it_stopped(model: Any, tokens: torch.Tensor) -> None:
    cache = RecurrentCache()
    first = model.generate(tokens, max_new_tokens=3, past_key_values=cache, **SETTINGS)
    second = model.generate(first, max_new_tokens=70, past_key_values=cache, **SETTINGS)
    assert cache.get_seq_length() == second.shape[1] - 1 > 64  # it grew past its first capacity
    assert torch.equal(second, model.generate(tokens, max_new_tokens=73, **SETTINGS))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_its_old_and_its_new_name(model: Any, tokens: torch.Tensor, name: str) -> None:
    """transformers 5.24 renamed past_key_values to cache, in outputs and in arguments."""
    cache = RecurrentCache()
    with torch.no_grad():
        out = model(tokens[:, :6], **{name: cache})
        assert out[name] is getattr(out, name) is out.get(name) is out.to_tuple()[-1] is cache and name in out
        rest = model(tokens[:, 6:], **{name: out[name]})
        torch.testing.assert_close(rest.logits, model(tokens, schedule=lrt.sequential()).logits[:, 6:])
        assert model(tokens).get(name, 3) == 3 and name not in model(tokens)
    ready = model.prepare_inputs_for_generation(torch.cat([tokens, tokens[:, :2]], dim=1), **{name: cache})
    assert ready["cache"] is cache and ready["input_ids"].shape == (2, 2)
    first = model.generate(tokens, max_new_tokens=3, **SETTINGS, return_dict_in_generate=True)
    more = model.generate(first.sequences, max_new_tokens=2, **SETTINGS, **{name: first.past_key_values})
    assert torch.equal(more, model.generate(tokens, max_new_tokens=5, **SETTINGS))
    with pytest.raises(ValueError, match=f"{name} is a DynamicCache, which would drop the recurrent memory"):
        model(tokens, **{name: transformers.DynamicCache()})
    with pytest.raises(ValueError, match="cache and past_key_values are two caches"):
        model(tokens, cache=cache, past_key_values=RecurrentCache())


def test_logits_of_a_padded_prompt_end_with_the_next_token(model: Any, tokens: torch.Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, use_cache=True)
        alone = model(tokens[:1, :6]).logits
        torch.testing.assert_close(out.logits[0, :6], alone[0])
        torch.testing.assert_close(out.logits[0, -1], alone[0, -1])
        torch.testing.assert_close(out.memory[:1], model(tokens[:1, :6]).memory[:, -1:])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"past_key_values": transformers.DynamicCache()}, "DynamicCache, which would drop the recurrent memory"),
        ({"cache_implementation": "static"}, "'static' would drop the recurrent memory"),
        ({"prompt_lookup_num_tokens": 2, "eos_token_id": 60}, "cannot be cut back"),
    ],
)
def test_what_would_drop_the_memory_is_refused(
    model: Any, tokens: torch.Tensor, given: dict[str, Any], text: str
) -> None:
    repeated = tokens[:1, :2].repeat(1, 5)
    with pytest.raises(ValueError, match=text):
        model.generate(repeated, max_new_tokens=8, **SETTINGS | given)


@pytest.mark.parametrize(
    "more",
    [{}, {"num_beams": 3}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])}],
    ids=["greedy", "beams", "padded"],
)
def test_without_a_cache_every_row_is_decoded_anew(model: Any, tokens: torch.Tensor, more: dict[str, Any]) -> None:
    """Tools switch the cache off (trainers that checkpoint blocks do); the memory must not go with it."""
    settings: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, **SETTINGS, **more}
    model.eval_schedule = lrt.refine(1)  # of calls, not of generate
    want, found = (model.generate(tokens, use_cache=cached, **settings) for cached in (True, False))
    assert (
        torch.equal(want.sequences, found.sequences)
        and found.past_key_values is None
        and want.past_key_values is not None
    )
    assert not torch.equal(want.sequences, make("llama").generate(tokens, **settings).sequences)


def test_calls_that_cannot_work_say_so(model: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        model(inputs_embeds=torch.zeros(1, 2, 24))
    with pytest.raises(ValueError, match="labels, targets, schedule and document_ids do not apply"):
        model(tokens, past_key_values=RecurrentCache(), labels=tokens)
    with pytest.raises(ValueError, match="resize the decoder's embeddings before lrt.adapt"):
        model.resize_token_embeddings(70)
    cache = RecurrentCache()
    model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows, but 1 came"):
        model(tokens[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="works with no other model"):
        make("llama")(tokens, past_key_values=RecurrentCache())


# ------------------------------------------------------------------ Trainer and accelerate


def test_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path, tokens: torch.Tensor) -> None:
    decoder = make("smollm", dtype=torch.float32)
    original = trainer(decoder, tmp_path / "original").evaluate()["eval_loss"]
    model = lrt.adapt(decoder)
    run = trainer(model, tmp_path / "run", gradient_accumulation_steps=2)
    before = run.evaluate()["eval_loss"]
    assert abs(before - original) < 1e-4
    run.train()
    assert run.evaluate()["eval_loss"] < before - 1
    assert all(float(p.detach().abs().max()) > 0 for p in model.memory_parameters().values())
    with torch.no_grad():
        final = model(tokens).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-12")
        torch.testing.assert_close(again(tokens).logits, final)
    resumed = lrt.adapt(make("smollm", seed=5, dtype=torch.float32))
    trainer(resumed, tmp_path / "run", gradient_accumulation_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6")
    )
    with torch.no_grad():
        torch.testing.assert_close(resumed.eval()(tokens).logits, final, rtol=1e-4, atol=1e-4)


def test_accelerate_needs_no_special_code() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = lrt.adapt(make("gpt2", dtype=torch.float32), lrt.RecurrenceConfig(init="identity"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(Rows(), batch_size=4))
    model.train()
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5


# ------------------------------------------------------------------ folders and Auto classes


def test_auto_classes_read_native_and_adapted_folders(tmp_path: Path, model: Any, tokens: torch.Tensor) -> None:
    native = lrt.build(
        lrt.config.parse_recipe(
            "[model]\nn_layers=2\nwidth=32\nsequence_length=32\nvocab_size=61\n[training]\nsteps=1\nbatch_tokens=32"
        )
    )
    stir(native)
    for name, made in (("native", native), ("adapted", model.float())):
        folder = lrt.save(made, tmp_path / name)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(again, lrt.LatentRecurrentModel) and not again.training
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, made.eval()(tokens).logits)
        greedy = again.generate(tokens, max_new_tokens=4, **SETTINGS)
        assert torch.equal(greedy, lrt.generate(made, tokens, max_new_tokens=4, temperature=0.0))
        again.save_pretrained(tmp_path / f"{name}-again")
        assert torch.equal(lrt.load(tmp_path / f"{name}-again")(tokens).logits, made(tokens).logits)
        assert "library_name: lrt" in (folder / "README.md").read_text() and (folder / "config.json").exists()
        half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "order", ["import lrt, transformers", "import transformers; transformers.AutoModelForCausalLM; import lrt"]
)
def test_importing_lrt_is_quick_and_registers(order: str) -> None:
    program = f"""
import sys
{order}
assert "lrt.huggingface.causal_lm" in sys.modules or "transformers.modeling_utils" not in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.for_model("lrt").model_type == "lrt"
from lrt.huggingface.causal_lm import LRTConfig, LRTForCausalLM
assert AutoModelForCausalLM._model_mapping[LRTConfig] is LRTForCausalLM
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent.parent)
