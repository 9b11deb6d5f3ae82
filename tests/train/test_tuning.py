"""Supervised tuning: conversations packed without leakage, a run from end to end, LoRA beside the memory,
and a chat with the result."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
import torch
from hf_decoders import make, stir
from runs import files_equal, tiny, train_records
from strategies import randomized
from transformers import AutoModelForCausalLM

import lrt
from lrt.commands import evaluate, generate
from lrt.commands.chat import template as template_of
from lrt.config import ModelConfig, RecurrenceConfig, TuningConfig
from lrt.conversion.opening import open_model
from lrt.data import load_tokenizer
from lrt.data.chat import Message, open_chat
from lrt.data.conversations import Packed, TuningLoader
from lrt.data.examples import Example, open_examples
from lrt.data.tokenizer import tokenizer_json
from lrt.decoding.generation import start
from lrt.eval.answers import exact_match
from lrt.eval.folders import Settings, evaluate_folder
from lrt.eval.runs import read_records
from lrt.model import build_model
from lrt.train.checkpoint.starting_model import read_backbone
from lrt.train.trainer import train

PAIRS = [
    {"prompt": f"{a}+{b}?", "completion": f"#### {a + b}", "steps": 1 + (b > 1)} for a in range(4) for b in range(4)
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}"
)
NATIVE = {
    "model.attention_reset": 256,
    "schedule.kind": "refine",
    "tuning.problems": 6,
    "tuning.answer_tokens": 4,
    "training.steps": 4,
}
NO_ANSWERS = {"tuning.answer_tokens": 96}  # the default, which has no effect without problems


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A Llama with a chat template beside its tokenizer."""
    place = tmp_path_factory.mktemp("hub") / "decoder"
    make("smollm", vocab_size=264, dtype=torch.float32).save_pretrained(place)
    special = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    (place / "tokenizer.json").write_text(
        tokenizer_json({bytes([i]): i for i in range(256)}, pattern=r"\S+|\s+", special=special)
    )
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (place / "tokenizer_config.json").write_text(json.dumps(names))
    return place


def native(talks, folder, **sets):
    return tiny(folder, **{**NATIVE, "tuning.train": talks, **sets})


def adapted(talks, decoder, folder, **sets):
    recipe = native(talks, folder)
    text = {
        "run.backbone": decoder,
        "data.tokenizer": decoder,
        "optimizer.kind": "adamw",
        "optimizer.adamw_lr": 1e-2,
        "recurrence.init": "identity",
    }
    defaults = {f"model.{key}": getattr(ModelConfig(), key) for key in ("n_layers", "vocab_size")}
    free = {
        "model.width": "none",
        "model.n_heads": "none",
        "model.gate_channels": "none",
        "recurrence.gate_channels": "none",
    }
    return native(
        talks, folder, **{**defaults, **free, **text, "model.sequence_length": recipe.model.sequence_length, **sets}
    )


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("schedule", [lrt.baseline(), lrt.refine(2)], ids=str)
@pytest.mark.parametrize("kind", ["native", "llama"])
def test_a_packed_row_is_its_conversations_run_apart(kind, schedule):
    """Memory and attention begin anew at every separator, and only answers are scored:
    loss and gradients are those of each by itself."""
    tokenizer = load_tokenizer("bytes")
    chat = open_chat(tokenizer, "bytes")
    talks = [
        Example((Message("user", "ab"[: 1 + i % 2]), Message("assistant", "xyz"[: 1 + i % 3])), "", None)
        for i in range(12)
    ]
    recurrence = RecurrenceConfig(separator=256, source_layer=1)
    if kind == "native":
        config = ModelConfig(
            n_layers=2,
            width=16,
            n_heads=2,
            vocab_size=257,
            sequence_length=108,
            window_pattern="L",
            attention_reset=256,
        )
        model = randomized(build_model(config, recurrence, dtype=torch.float64), 1, 0.3)
    else:
        model = stir(lrt.adapt(make("llama", vocab_size=260), recurrence))
        model.backbone.attention_reset = 256
    batch = next(TuningLoader(Packed(talks, chat, tokenizer, length=109, key=""), rows=2, rank=0, world_size=1, seed=1))
    apart = [one for row in zip(batch.input_ids, batch.targets) for one in split(*row)]
    assert len(apart) >= 5
    valid = (batch.targets != -100).sum()

    def gradients(rows):
        model.zero_grad()
        total = sum(
            model(ids[None], targets=targets[None], schedule=schedule, valid_targets=valid).loss
            for ids, targets in rows
        )
        total.backward()
        return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    ours, theirs = gradients(zip(batch.input_ids, batch.targets)), gradients(apart)
    tight = {"rtol": 1e-9, "atol": 1e-12} if kind == "native" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(ours, theirs, **tight)


def split(ids, targets):
    """The conversations of a row, each with its targets; what fills the row is left out."""
    begins = [i for i, token in enumerate(ids.tolist()) if token == 256]
    parts = [(ids[a:b], targets[a:b]) for a, b in zip(begins, [*begins[1:], len(ids)])]
    return [part for part in parts if (part[1] != -100).any()]


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def finished(talks, tmp_path_factory):
    return train(native(talks, tmp_path_factory.mktemp("runs"), **{"checkpoint.every": 2, "evaluation.every": 2}))


def test_a_run_learns_answers_and_is_asked_for_some(finished):
    records = read_records(finished.folder / "metrics.jsonl")
    asked = [r for r in records if r["kind"] == "evaluation"]
    assert [r["step"] for r in asked] == [2, 4]
    for record in asked:
        assert set(record["exact_match"]) == {"zero", "decode"} and set(record["exact_match_by_steps"]["decode"]) <= {
            "1",
            "2",
        }
        assert set(record["bpb"]) == {"zero", "parallel", "decode"}
    assert train_records(finished.folder)[-1]["loss"] < train_records(finished.folder)[0]["loss"]
    assert not (finished.folder / "export" / "chat_template.jinja").exists()


def test_a_sharded_run_is_asked_too(talks, tmp_path):
    """In half precision FSDP holds the model even on one process; a plain copy answers."""
    sets = {"training.steps": 1, "parallel.param_dtype": "bfloat16", "evaluation.modes": '["zero"]'}
    sets |= {"checkpoint.export_at_end": "false"}
    records = read_records(train(native(talks, tmp_path, **sets)).folder / "metrics.jsonl")
    (record,) = [r for r in records if r["kind"] == "evaluation"]
    assert set(record["exact_match"]) == {"zero", "decode"}


def test_a_resumed_tuning_is_the_same_run_bit_for_bit(talks, finished, tmp_path):
    copy = tmp_path / "tiny"
    name = "checkpoints/step_00000002"
    shutil.copytree(finished.folder / name, copy / name)
    shutil.copy(finished.folder / "metrics.jsonl", copy)
    train(native(talks, tmp_path, **{"checkpoint.every": 2, "evaluation.every": 2}))
    files_equal(copy / "checkpoints" / "step_00000004", finished.folder / "checkpoints" / "step_00000004")
    assert train_records(copy) == train_records(finished.folder)


def test_a_tuned_folder_is_scored_on_the_conversations_that_its_run_held_out(talks, finished, decoder, tmp_path):
    """Native and adapted, whose attention is cut between conversations as in the run."""
    sets = {"evaluation.modes": '["zero", "decode"]', "training.steps": 1, "tuning.problems": 0, **NO_ANSWERS}
    for run in (finished, train(adapted(talks, decoder, tmp_path, **sets))):
        record = [r for r in read_records(run.folder / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
        for mode in ("zero", "decode"):
            found = evaluate_folder(run.folder, Settings(memory=mode), device=torch.device("cpu")).scores[mode]
            assert (
                found.value == pytest.approx(record["bpb"][mode], rel=1e-5)
                and found.tokens == record["scored"]["tokens"]
            )


def test_answers_of_a_folder_are_counted(talks, finished, capsys):
    record = [r for r in read_records(finished.folder / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    held_out = finished.folder / "held_out.jsonl"
    examples = open_examples(TuningConfig(train=str(talks)), split="validation")[:6]
    lines = [
        {"messages": [m._asdict() for m in one.messages], "answer": one.answer, "steps": one.steps} for one in examples
    ]
    held_out.write_text("\n".join(map(json.dumps, lines)))
    options = [str(finished.folder), "--answers", str(held_out), "--answer-tokens", "4", "--device", "cpu"]
    assert evaluate.main(options) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        found["answers"] == len(examples)
        and {mode: one["value"] for mode, one in found["exact_match"].items()} == record["exact_match"]
    )
    assert (
        evaluate.main([*options, "--memory", "parallel"]) == 2
        and "an answer is decoded: use decode, zero or all" in capsys.readouterr().err
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert (
            evaluate.main(options) == 2 and "given by one process: start it without torchrun" in capsys.readouterr().err
        )
    for idle in (["--data", "demo"], ["--documents", "documents.npz"], ["--tokens", "5"], ["--decode", "refine:1"]):
        assert (
            evaluate.main([*options, *idle]) == 2
            and f"{idle[0]} has no effect with --answers" in capsys.readouterr().err
        )
    assert evaluate.main([str(finished.folder), "--answer-tokens", "4"]) == 2
    assert "--answer-tokens has no effect without --answers" in capsys.readouterr().err


def test_the_template_of_a_run_that_has_no_export_is_that_of_its_tokenizer(talks, decoder, tmp_path):
    """Hugging Face keeps many templates in tokenizer_config.json; a checkpoint holds no tokenizer."""
    sets = {
        "evaluation.modes": '["zero"]',
        "training.steps": 1,
        "tuning.problems": 0,
        "checkpoint.export_at_end": "false",
        **NO_ANSWERS,
    }
    opened = open_model(train(adapted(talks, decoder, tmp_path, **sets)).folder, device="cpu")
    messages = [Message("user", "1+1?")]
    found = template_of(opened, load_tokenizer(decoder), name=None)
    assert found.prompt(messages) == open_chat(load_tokenizer(decoder), decoder).prompt(messages)
    assert found.prompt(messages) == open_chat(load_tokenizer(decoder), decoder / "tokenizer.json").prompt(messages)


def test_right_answers_are_counted_by_mode_and_number_of_steps():
    """What the model writes greedily, token by token, under true recurrence or without memory, is taken for right;
    then one is not."""
    tokenizer = load_tokenizer("bytes")
    chat = open_chat(tokenizer, "bytes")
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=64, window_pattern="L")
    model = randomized(build_model(config, RecurrenceConfig(separator=256)), 1, 0.5).eval()

    def greedy(question, schedule):
        ids = chat.prompt([Message("user", question)])
        asked = len(ids)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]), schedule=schedule).logits[0, -1].argmax()))
            if ids[-1] in chat.stop_ids:
                break
        return tokenizer.decode([token for token in ids[asked:] if token not in chat.stop_ids]).strip()

    questions = {"a": 1, "bcd": 2, "e": 2}
    for mode, schedule in (("decode", lrt.sequential()), ("zero", lrt.baseline())):
        right = [
            Example((Message("user", q), Message("assistant", "")), greedy(q, schedule), steps)
            for q, steps in questions.items()
        ]
        found = exact_match(model, right, chat, tokenizer, max_new_tokens=4)[mode]
        assert found.value == 1.0 and found.describe() == "100.0 % (1 step 100.0 %, 2 steps 100.0 %)"
        wrong = [*right[:2], right[2]._replace(answer="another")]
        found = exact_match(model, wrong, chat, tokenizer, max_new_tokens=4)[mode]
        assert found.by_steps == {1: 1.0, 2: 0.5} and found.value == pytest.approx(2 / 3)


class Part:
    """One of several processes, which run one after the other here: the sum is known when the last has run."""

    def __init__(self, rank, size, sums):
        self.rank, self.size, self.sums = rank, size, sums

    def total(self, tensor):
        self.sums.append(tensor.clone())
        return sum(self.sums) if self.rank == self.size - 1 else tensor


def test_processes_share_the_problems(monkeypatch):
    """Each is answered once, in one process, and what all find is what one alone finds; there may be more processes
    than problems."""
    tokenizer = load_tokenizer("bytes")
    chat, asked = open_chat(tokenizer, "bytes"), []

    def answers(model, examples, *rest, **more):
        asked.append([one.answer for one in examples])
        return [f"wrong, #### {one.answer if one.answer != '2' else 'no'}" for one in examples]

    monkeypatch.setattr("lrt.eval.answers._answers", answers)
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=64)
    model = build_model(config, RecurrenceConfig(separator=256)).eval()
    problems = [Example((Message("user", "?"), Message("assistant", n)), n, 1) for n in "12345"]
    alone = exact_match(model, problems, chat, tokenizer, modes=["decode"])["decode"]
    assert alone.right == (True, False, True, True, True) and asked == [list("12345")]
    for size in (2, 7):
        asked.clear()
        sums = []
        for rank in range(size):
            found = exact_match(model, problems, chat, tokenizer, modes=["decode"], processes=Part(rank, size, sums))[
                "decode"
            ]
        assert found.right == alone.right and sorted(sum(asked, [])) == list("12345") and max(map(len, asked)) <= 3


@pytest.mark.parametrize("recurrent", [True, False], ids=["memory", "twin"])
def test_lora_trains_beside_the_memory_and_leaves_the_decoder(talks, decoder, tmp_path, recurrent):
    sets = {"tuning.lora_rank": 2, "tuning.lora_targets": '["q_proj", "v_proj"]', "evaluation.modes": '["decode"]'}
    twin = {} if recurrent else {"recurrence": "false", "schedule.kind": "baseline"}
    result = train(adapted(talks, decoder, tmp_path, **sets, **twin))
    assert [r["lr_scale"] for r in train_records(result.folder)][0] == 1.0
    before, export = dict(AutoModelForCausalLM.from_pretrained(decoder).named_parameters()), result.folder / "export"
    assert (export / "chat_template.jinja").read_text() == TEMPLATE
    if recurrent:
        model = lrt.load(export)
        named = dict(model.named_parameters())
        added = {name: p for name, p in named.items() if "lora_" in name}
        assert len(added) == 2 * 2 * len(model.blocks) and all(p.abs().max() > 0 for p in added.values())
        assert all(p.abs().max() > 0 for p in model.memory_parameters().values())
        theirs = {name.replace("model.layers.", "blocks."): p for name, p in before.items()}
        kept = [n for n in named if n.endswith("q_proj.base_layer.weight")]
        assert len(kept) == len(model.blocks)
        assert all(
            torch.equal(named[n], theirs[n.replace(".block.layer", "").replace(".base_layer", "")]) for n in kept
        )
    else:
        merged = dict(AutoModelForCausalLM.from_pretrained(export).named_parameters())
        moved = {name for name, p in merged.items() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "q_proj" in name or "v_proj" in name}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_compiled_tuning_is_the_same_run(talks, decoder, tmp_path, monkeypatch, rank):
    sets = {"evaluation.modes": '["zero"]', "tuning.problems": 2, "training.steps": 2, "tuning.lora_rank": rank}
    eager = train(adapted(talks, decoder, tmp_path, **sets, **{"run.name": "eager"}))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # a C++ compiler takes minutes
    compiled = train(adapted(talks, decoder, tmp_path, **sets, **{"parallel.compile": "true"}))
    losses = [[r["loss"] for r in train_records(run.folder)] for run in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_lora_goes_on_from_a_memory_that_has_learned(talks, decoder, tmp_path):
    """The backbone is a folder of ``lrt.save``: its decoder gets the adapters, and its memory is not begun afresh."""
    first = stir(
        lrt.adapt(AutoModelForCausalLM.from_pretrained(decoder), RecurrenceConfig(init="identity", separator=256))
    )
    lrt.save(first, tmp_path / "first")
    shutil.copy(decoder / "tokenizer.json", tmp_path / "first")
    recipe = adapted(
        talks, decoder, tmp_path, **{"run.backbone": tmp_path / "first", "tuning.lora_rank": 2, "training.steps": 0}
    )
    model = read_backbone(recipe)
    memory = first.memory_parameters()
    assert all(torch.equal(p, memory[name]) for name, p in model.memory_parameters().items()) and len(memory) > 2
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and not frozen & {*memory} and not any("lora_" in name for name in frozen)
    ids = torch.randint(0, 256, (1, 9))
    assert torch.equal(model(ids, schedule=lrt.refine(1)).logits, first(ids, schedule=lrt.refine(1)).logits)
    lrt.save(model.eval(), tmp_path / "second")
    with pytest.raises(ValueError, match="holds a LoRA adapter already: merge it first, or leave tuning.lora_rank out"):
        read_backbone(adapted(talks, decoder, tmp_path, **{"run.backbone": tmp_path / "second", "tuning.lora_rank": 2}))


def test_a_model_answers_in_its_template(talks, finished, decoder, tmp_path, monkeypatch, capsys):
    """An empty line begins anew: the third line is asked as the first was, the second after it."""
    result = train(
        adapted(
            talks,
            decoder,
            tmp_path,
            **{"evaluation.modes": '["zero"]', "training.steps": 1, "tuning.problems": 0, **NO_ANSWERS},
        )
    )
    asked = []
    monkeypatch.setattr(
        generate, "start", lambda model, ids, **more: (asked.append(ids[0].tolist()), start(model, ids, **more))[1]
    )
    for folder, template in ((finished.folder, "bytes"), (result.folder, decoder)):
        lines = iter(["1+1?", "2?", "", "1+1?"])
        monkeypatch.setattr(generate, "read_line", lambda lines=lines: next(lines, None))
        assert (
            generate.main([str(folder), "--chat", "--max-new-tokens", "3", "--prefill", "exact", "--device", "cpu"])
            == 0
        )
        chat = open_chat(load_tokenizer(template), template)
        first, second, third = asked[-3:]
        assert (
            first == third == chat.prompt([Message("user", "1+1?")])
            and second[: len(first)] == first
            and len(second) > len(first) + 3
        )
        again = iter(["1+1?", "2?", "2?"])
        monkeypatch.setattr(generate, "read_line", lambda lines=again: next(lines, None))
        options = ["--chat", "--single-turn", "--max-new-tokens", "3", "--prefill", "exact", "--device", "cpu"]
        assert generate.main([str(folder), *options]) == 0
        assert asked[-3] == first and asked[-2] == asked[-1] == chat.prompt([Message("user", "2?")])
    assert capsys.readouterr().err.count("memory mode decode") == 12
    with pytest.raises(SystemExit):
        generate.main([str(finished.folder), "--system", "x"])


BAD = {
    "tuning.lora_rank=4": 'tuning.lora_rank adapts a decoder from a folder, but run.backbone = "native"',
    "tuning.lora_alpha=4": "tuning.lora_alpha = 4.0 has no effect with tuning.lora_rank = 0",
    "model.attention_reset=none": "[tuning] packs conversations into rows, and model.attention_reset keeps them apart",
    "recurrence.separator=none": "recurrence.separator keeps them apart: set it to the tokenizer's separator",
    "data.train=text": "data.train = 'text' has no effect with [tuning], which has data of its own",
    'evaluation.sources=["a"]': "evaluation.sources has no effect with [tuning]",
    "tuning.problems=0": "tuning.answer_tokens = 4 has no effect with tuning.problems = 0",
    "tuning.rank=4": "unknown key 'tuning.rank'",
}


@pytest.mark.parametrize("sets", BAD)
def test_settings_that_do_not_fit_are_refused(sets, talks, tmp_path):
    with pytest.raises(ValueError, match=re.escape(BAD[sets])):
        native(talks, tmp_path, **dict([sets.split("=", 1)]))


def test_names_of_matrices_that_are_not_there_are_refused(talks, decoder, tmp_path):
    with pytest.raises(ValueError, match=r"tuning.lora_targets = \['nothing'\]: Target modules"):
        train(adapted(talks, decoder, tmp_path, **{"tuning.lora_rank": 2, "tuning.lora_targets": '["nothing"]'}))
