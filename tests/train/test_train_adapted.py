"""Runs that train a Hugging Face decoder from a folder: with memory, its memory alone, and its twin without."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from hf_decoders import make, stir
from runs import ONE, ROOT, files_equal, train_records
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import lrt
from lrt.accounting import count_parameters, forward_flops, mean_keys, query_width, training_flops
from lrt.commands.bench.timing import graph_count
from lrt.config import parse_recipe
from lrt.data import build_loader, load_tokenizer
from lrt.loss import Scorer
from lrt.train.checkpoint.starting_model import read_backbone, shapes_of
from lrt.train.distributed.graphs import single_device
from lrt.train.distributed.parallel import checkpointed, free_gathered, named_parameters
from lrt.train.distributed.world import open_world
from lrt.train.dry_run import dry_run
from lrt.train.plan import build
from lrt.train.trainer import train

LENGTH = 24
RECIPE = f"""
[model]
sequence_length = {LENGTH}
[recurrence]
init = "identity"
separator = 256
[schedule]
kind = "refine"
passes = 1
weights = [0.3, 0.7]
[training]
steps = 4
batch_tokens = {4 * LENGTH}
micro_batch = 2
clip_norm = 1.0
[optimizer]
kind = "adamw"
adamw_lr = 1e-2
adamw_memory_lr = 3e-2
betas = [0.9, 0.95]
eps = 1e-8
reference_batch_tokens = {4 * LENGTH}
[parallel]
compile = false
param_dtype = "float32"
loss_chunk = 16
[checkpoint]
every = 2
[metrics]
every = 1
plot = false
[evaluation]
tokens = {8 * LENGTH}
batch = 4
sample_tokens = 4
"""
TWIN = {"recurrence": "false", "schedule.kind": "baseline"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with tied embeddings for the byte tokenizer, with its tokenizer, as Hugging Face saves one."""
    place = tmp_path_factory.mktemp("hub") / "decoder"
    make("smollm", vocab_size=260, dtype=torch.float32).save_pretrained(place)
    load_tokenizer("bytes").save(place)
    return place


def recipe_for(folder, output, **overrides):
    sets = {"run.output": output, "run.name": "run", "run.backbone": folder, "data.tokenizer": folder, **overrides}
    return parse_recipe(RECIPE, overrides=[f"{k}={v}" for k, v in sets.items()])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    return train(recipe_for(folder, tmp_path_factory.mktemp("runs")))


def backbone_of(model):
    memory = model.memory_parameters()
    return {name: p for name, p in model.named_parameters() if name not in memory}


# ------------------------------------------------------------------ a run


def test_a_run_trains_the_decoder_and_its_memory(folder, finished):
    assert finished.stopped is None and finished.step == 4
    assert set(finished.bpb) == {"zero", "parallel", "decode"} and all(
        1 < value < 20 for value in finished.bpb.values()
    )
    records = train_records(finished.folder)
    assert records[-1]["loss"] < records[0]["loss"] and set(records[0]["lr"]) == {"backbone", "memory"}
    start, model = read_backbone(recipe_for(folder, "unused")), lrt.load(finished.folder / "export")
    before = dict(start.named_parameters())
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == set()
    assert model.backbone.head.weight is model.backbone.embedding.weight
    assert model.train_schedule == lrt.refine(1, weights=(0.3, 0.7)) and model.recurrence.separator == 256
    prompt = torch.tensor([[256, 84, 104, 101]])
    again = AutoModelForCausalLM.from_pretrained(finished.folder / "export")
    ours = lrt.generate(model, prompt, max_new_tokens=5, temperature=0.0)
    assert torch.equal(again.generate(prompt, max_new_tokens=5, do_sample=False), ours)
    assert load_tokenizer(finished.folder / "export").bos_id == 256


def test_it_starts_as_the_decoder(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path)
    model, decoder = read_backbone(recipe).eval(), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 257, (2, LENGTH))
    assert torch.equal(model(ids, schedule=lrt.baseline()).logits, decoder(ids, use_cache=False).logits)
    assert model.backbone.loss_chunk == 16
    result = train(recipe_for(folder, tmp_path, **{"training.steps": 0}))
    assert result.bpb["zero"] == pytest.approx(result.bpb["decode"], rel=1e-6)


def test_resumed_equals_uninterrupted_bit_for_bit(folder, finished, tmp_path):
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copytree(finished.folder / "checkpoints" / "step_00000002", copy / "checkpoints" / "step_00000002")
    shutil.copy(finished.folder / "metrics.jsonl", copy / "metrics.jsonl")
    result = train(recipe_for(folder, tmp_path))
    files_equal(copy / "checkpoints" / "step_00000004", finished.folder / "checkpoints" / "step_00000004")
    assert train_records(copy) == train_records(finished.folder) and result.bpb == finished.bpb


def test_stage_memory_leaves_the_decoder_bit_for_bit(folder, tmp_path):
    result = train(recipe_for(folder, tmp_path, **{"training.stage": "memory"}))
    model = lrt.load(result.folder / "export")
    before = dict(read_backbone(recipe_for(folder, tmp_path)).named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in backbone_of(model).items())
    assert all(not torch.equal(p, before[name]) for name, p in model.memory_parameters().items())
    # Stage 2, from the run's weights or from its export, starts where stage 1 ended.
    again = {"run.name": "second", "training.steps": 0}
    warm = train(recipe_for(folder, tmp_path, **{**again, "training.init_from": result.folder}))
    assert warm.bpb == pytest.approx(result.bpb)
    export = result.folder / "export"
    second = train(recipe_for(export, tmp_path, **{**again, "run.name": "third"}))
    assert second.bpb == pytest.approx(result.bpb)


def test_the_twin_is_the_decoder_trained_as_it_is(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path, **TWIN, **{"evaluation.modes": '["zero", "decode"]'})
    result = train(recipe)
    trained = AutoModelForCausalLM.from_pretrained(result.folder / "export")
    assert result.bpb["zero"] == result.bpb["decode"] and trained.config.model_type == "llama"
    assert count_parameters(shapes_of(recipe)).memory == 0
    # The same steps with transformers and torch alone.
    decoder = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    loader = build_loader(
        recipe.data, tokenizer=load_tokenizer(folder), sequence_length=LENGTH, rows=4, seed=recipe.run.seed
    )
    for record in train_records(result.folder):
        batch = next(loader)
        logits = decoder(batch.input_ids).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * record["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_memory_trains_as_in_a_loop_of_ones_own(folder, tmp_path):
    """Narrow aligned memory with rates of its own: the trainer's steps are those of ``lrt.adapt`` and torch's AdamW."""
    sets = {
        "recurrence.projection": "aligned", "recurrence.residual": "projected", "recurrence.blocks": "[2, 3]",
        "optimizer.memory_gate_scale": 2.0, "optimizer.memory_gain_scale": 3.0,
    }  # fmt: skip
    recipe = recipe_for(folder, tmp_path, **sets)
    result = train(recipe)
    model = lrt.adapt(AutoModelForCausalLM.from_pretrained(folder), recipe.recurrence).train()
    rates = {"": 1e-2, ".map": 3e-2, ".gate": 6e-2, "gains": 9e-2}
    groups = {end: [] for end in rates}
    for name, parameter in model.named_parameters():
        memory = name in model.memory_parameters()
        groups[next(end for end in reversed(rates) if end in name) if memory else ""].append(parameter)
    assert all(groups.values())
    optimizer = torch.optim.AdamW(
        [{"params": groups[end], "lr": 0.0} for end in rates], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    loader = build_loader(
        recipe.data, tokenizer=load_tokenizer(folder), sequence_length=LENGTH, rows=4, seed=recipe.run.seed
    )
    for record in train_records(result.folder):
        batch = next(loader)
        loss = model(batch.input_ids, targets=batch.targets, schedule=lrt.refine(1, weights=(0.3, 0.7))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, rate in zip(optimizer.param_groups, rates.values()):
            group["lr"] = rate * record["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert model.injection.gains.abs().max() > 0.01
    trained = dict(lrt.load(result.folder / "export").named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-2, atol=2e-3, msg=name)


def test_a_healed_decoder_branches_into_memory_and_twin(folder, tmp_path):
    """Plain training first; a branch of its checkpoint, with its optimizer, is the twin, another one gets memory."""
    plain = {**TWIN, "training.lr_schedule": "wsd"}
    healed = train(recipe_for(folder, tmp_path, **plain, **{"run.name": "healed"}))
    begin = {"training.lr_schedule": "wsd", "training.branch_from": healed.folder / "checkpoints" / "step_00000002"}
    twin = train(recipe_for(folder, tmp_path, **TWIN, **begin, **{"run.name": "twin"}))
    files_equal(
        twin.folder / "checkpoints" / "step_00000004",
        healed.folder / "checkpoints" / "step_00000004",
        except_for={"began"},
    )
    memory = train(recipe_for(folder, tmp_path, **begin, **{"run.name": "memory"}))
    first, theirs = train_records(memory.folder)[0], train_records(healed.folder)[2]
    assert first["step"] == 3 and first["groups"] == pytest.approx([theirs["loss"]] * 2, rel=1e-5)
    assert all(p.abs().max() > 0 for p in lrt.load(memory.folder / "export").memory_parameters().values())
    # The same in one run of two phases.
    phases = '[{until=0.5, kind="baseline"}, {until=1.0, kind="refine", weights=[0.3, 0.7]}]'
    whole = train(
        recipe_for(folder, tmp_path, **{"run.name": "phases", "training.lr_schedule": "wsd", "schedule.phases": phases})
    )
    assert [r["loss"] for r in train_records(whole.folder)[:2]] == [r["loss"] for r in train_records(healed.folder)[:2]]
    assert train_records(whole.folder)[2]["groups"] == pytest.approx(first["groups"], rel=1e-5)


@pytest.mark.slow
def test_compiled_blocks_are_the_same_run_and_resume_bit_for_bit(folder, tmp_path, monkeypatch):
    sets = {"recurrence.blocks": "[2, 3]", "evaluation.modes": '["parallel"]'}
    eager = train(recipe_for(folder, tmp_path, **sets, **{"run.name": "eager"}))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # a C++ compiler takes minutes
    before, sets = graph_count(), {**sets, "parallel.compile": "true"}
    whole = train(recipe_for(folder, tmp_path, **sets))
    assert graph_count() > before
    losses = [[r["loss"] for r in train_records(run.folder)] for run in (whole, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    again = tmp_path / "again" / "run"
    shutil.copytree(whole.folder / "checkpoints" / "step_00000002", again / "checkpoints" / "step_00000002")
    shutil.copy(whole.folder / "metrics.jsonl", again)
    train(recipe_for(folder, again.parent, **sets))
    files_equal(again / "checkpoints" / "step_00000004", whole.folder / "checkpoints" / "step_00000004")


@pytest.mark.parametrize("family", ["smollm", "llama", "gemma2"])
def test_a_scored_loss_is_the_decoders_own(family):
    """The trainer's compiled parts of the loss make gradients in the forward;
    a tied head, an untied one, and one with a cap."""
    decoder = make(family)
    model = lrt.adapt(decoder).train()
    size = model.vocab_size
    ids = torch.randint(0, size, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(9) > 6, -100)

    def numbers():
        model.zero_grad()
        out = model(ids, targets=targets, schedule=lrt.refine(1))
        out.loss.backward()
        # its own is float32
        return [out.loss.detach().double(), *(p.grad for p in model.parameters() if p.grad is not None)]

    model.backbone.loss_chunk = 4
    own = numbers()
    assert model.backbone.is_linear
    model.backbone.scorer = Scorer()
    ours = numbers()
    assert len(own) == len(ours) and len(own) > 10
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-7)


def test_accumulation_and_checkpointed_blocks_change_no_number(folder, finished, tmp_path):
    sets = {"training.micro_batch": 4, "parallel.activation_checkpointing": "block", "parallel.loss_chunk": 0}
    losses = [r["loss"] for r in train_records(train(recipe_for(folder, tmp_path, **sets)).folder)]
    assert losses == pytest.approx([r["loss"] for r in train_records(finished.folder)], rel=1e-4)


def test_a_sharded_run_is_the_same_run(folder, finished, tmp_path):
    """bfloat16 on a CPU is the plan of several processes: FSDP2 around every block."""
    result = train(recipe_for(folder, tmp_path, **{"parallel.param_dtype": "bfloat16", "training.steps": 2}))
    losses = [r["loss"] for r in train_records(result.folder)]
    assert losses == pytest.approx([r["loss"] for r in train_records(finished.folder)][:2], rel=0.02)
    model = lrt.load(result.folder / "export")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_working_copy_of_one_gpu_keeps_ties(folder):
    recipe = recipe_for(folder, "unused", **{"parallel.param_dtype": "bfloat16"})
    model = build(recipe, ONE).model
    runner = single_device(model, recipe.parallel, ONE)
    assert runner.compute.backbone.head.weight is runner.compute.backbone.embedding.weight
    assert {p.dtype for p in runner.compute.parameters()} == {torch.bfloat16} and {
        p.dtype for p in model.parameters()
    } == {torch.float32}
    ids = torch.randint(0, 257, (2, LENGTH))
    runner.forward_backward(ids, ids, schedule=lrt.refine(1), seed=0, valid_targets=torch.tensor(ids.numel()))
    reference = read_backbone(recipe)
    reference(ids, targets=ids, schedule=lrt.refine(1)).loss.backward()
    for (name, p), q in zip(named_parameters(model), reference.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() <= 0.1 * q.grad.norm() + 1e-6, name


@pytest.mark.dist
def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """Folders hold models whose memory is awake; each rank takes half the rows through the trainer's plan."""
    for family in ("smollm", "llama"):  # tied and untied heads
        lrt.save(stir(lrt.adapt(make(family, dtype=torch.float32))), tmp_path / family)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(tmp_path),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr[-2000:]


def two_ranks(folder):
    """What each process of the test above runs."""
    sets = {
        "recurrence.separator": "none",
        "parallel.activation_checkpointing": "block",
        "parallel.timeout_minutes": 0.5,
    }
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(0))
    recipes = [recipe_for(f"{folder}/{family}", folder, **sets) for family in ("smollm", "llama")]
    with open_world(recipes[0]) as world:
        for recipe in recipes:
            sharded, whole = (numbers(recipe, place, ids[place.rank :: place.size]) for place in (world, ONE))
            torch.testing.assert_close(sharded, whole, rtol=1e-4, atol=1e-6)
            if world.main:
                print("equal")


def numbers(recipe, world, ids):
    """Losses of two schedules, and every gradient of their sum."""
    (model, runner), losses = build(recipe, world), []
    for schedule in (lrt.refine(2), lrt.interleaved(3)):
        part = runner.forward_backward(
            ids[:, :-1], ids[:, 1:], schedule=schedule, seed=0, valid_targets=torch.tensor(32)
        )
        losses.append(world.total(part))
    free_gathered(model)
    return losses + [
        p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for _, p in named_parameters(model)
    ]


# ------------------------------------------------------------------ what is counted


@pytest.mark.parametrize("family", ["smollm", "gpt2", "phi3", "gpt_neox"])
def test_counts_are_those_of_the_decoder(family):
    decoder = make(family, dtype=torch.float32)
    model = lrt.adapt(decoder)
    parts = count_parameters(model)
    assert parts.total - parts.memory == sum(p.numel() for p in decoder.parameters())
    assert parts.memory == sum(p.numel() for p in model.memory_parameters().values())
    ids = torch.zeros(1, LENGTH, dtype=torch.long)

    def products(run):  # what torch counts, attention left out: it counts hidden keys too
        with FlopCounterMode(display=False) as counter:
            run()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)) / LENGTH

    flops = forward_flops(model, LENGTH)
    assert products(lambda: model(ids, schedule=lrt.baseline())) == pytest.approx(flops.blocks + flops.head, rel=0.01)
    windows = [block.window for block in model.blocks]
    assert flops.attention == 4 * query_width(model) * sum(mean_keys(LENGTH, w) for w in windows)
    schedule = lrt.refine(1)

    def step():
        model(ids, targets=ids, schedule=schedule).loss.backward()

    attention = 2 * 3 * flops.attention
    assert products(step) == pytest.approx(training_flops(model, schedule, LENGTH) - attention, rel=0.01)
    for p in backbone_of(model).values():
        p.requires_grad_(False)
    frozen = training_flops(model, schedule, LENGTH) - attention
    assert 0.9 * frozen < products(step) < 1.01 * frozen  # below the first gate of three blocks no gradient is needed


def test_a_dry_run_needs_the_config_alone(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    decoder = AutoModelForCausalLM.from_pretrained(folder)
    model = lrt.adapt(decoder)
    text = dry_run(recipe_for(bare, tmp_path, **{"data.tokenizer": "bytes"}), world_size=1)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text and "3 blocks of width 24, 260 token ids" in text

    def number(name, **sets):
        found = re.search(rf"^  {name} +([\d.e+]+)", dry_run(recipe_for(bare, tmp_path, **sets), world_size=1), re.M)
        return float(found[1])

    whole, memory, twin = (number("FLOPs a token", **sets) for sets in ({}, {"training.stage": "memory"}, TWIN))
    assert 1.9 < whole / twin < 2.4 and 0.5 < memory / whole < 0.95


def test_a_dry_run_of_a_saved_folder(finished, tmp_path):
    text = dry_run(recipe_for(finished.folder / "export", tmp_path), world_size=1)
    assert f"{finished.parameters:,}" in text


# ------------------------------------------------------------------ bad input

BAD = {
    "run.backbone=/nowhere": 'run.backbone = "/nowhere" is no folder: use "native", a local Hugging Face folder',
    "model.n_layers=3 model.softcap=none": "model.n_layers = 3, model.softcap = None would have no effect: "
    "the decoder in run.backbone decides this",
    "model.vocab_size=260": "model.vocab_size = 260 would have no effect",
    "optimizer.kind=muon": 'set optimizer.kind = "adamw" for a decoder from run.backbone',
    "recurrence.init=paper": 'recurrence.init = "paper" would disturb the decoder',
    "recurrence.separator=3": "recurrence.separator = 3, but the tokenizer's separator is 256",
    "training.stage=memory recurrence=false schedule.kind=baseline": 'training.stage = "memory", but recurrence is off',
    "recurrence.source_layer=9": "recurrence.source_layer = 9, but the model has 3 blocks",
}


@pytest.mark.parametrize("sets", BAD)
def test_bad_input_is_one_line(folder, tmp_path, sets):
    with pytest.raises(ValueError, match=re.escape(BAD[sets])) as caught:
        train(recipe_for(folder, tmp_path, **dict(s.split("=") for s in sets.split())))
    assert len(str(caught.value).splitlines()) == 1


def test_tokenizers_that_do_not_fit(folder, tmp_path):
    small = tmp_path / "small"
    make("llama", dtype=torch.float32).save_pretrained(small)
    with pytest.raises(
        ValueError,
        match=r'data.tokenizer = "bytes" has 257 ids, but the decoder in run.backbone = ".*small" a vocabulary of 61',
    ):
        train(recipe_for(small, tmp_path, **{"data.tokenizer": "bytes"}))
    other = tmp_path / "other"
    load_tokenizer("bytes").save(other)
    table = json.loads((other / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": 257, "content": "<x>"})
    (other / "tokenizer.json").write_text(json.dumps(table))
    (other / "lrt_tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r'is not the tokenizer of run.backbone = .*: set data.tokenizer = "'):
        train(recipe_for(folder, tmp_path, **{"data.tokenizer": other}))


def test_build_refuses_a_folder(folder):
    with pytest.raises(
        ValueError,
        match=r"run.backbone = .*: lrt.build makes native models: lrt.adapt the decoder, or train the recipe",
    ):
        lrt.build(recipe_for(folder, "unused"))


def test_folders_that_hold_something_else(folder, finished, tmp_path):
    def error(place, **sets):
        with pytest.raises(ValueError) as caught:
            read_backbone(recipe_for(place, tmp_path, **sets))
        return str(caught.value)

    export = finished.folder / "export"
    assert "holds another recurrence than the recipe: recurrence.sharing = 'shared' there, 'layerwise' here" in error(
        export, **{"recurrence.sharing": "layerwise"}
    )
    assert "was trained with memory, but recurrence is off" in error(export, **TWIN)
    lrt.save(lrt.adapt(AutoModelForCausalLM.from_pretrained(folder)), tmp_path / "memory", adapter_only=True)
    assert "holds the memory alone" in error(tmp_path / "memory")
    lrt.save(
        lrt.build(parse_recipe("[model]\nn_layers = 1\nwidth = 16\nn_heads = 2\nvocab_size = 64")), tmp_path / "native"
    )
    assert 'holds a native model: set run.backbone = "native"' in error(tmp_path / "native")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    assert "cannot be read as a causal language model" in error(broken)
    torch.save(load_file(folder / "model.safetensors"), broken / "pytorch_model.bin")  # pickled weights are not read
    assert "cannot be read as a causal language model" in error(broken)
    (broken / "config.json").write_text("{")
    assert "config.json is not valid JSON" in error(broken)
    (broken / "config.json").unlink()
    assert "holds no config.json" in error(broken)


if __name__ == "__main__":
    two_ranks(sys.argv[1])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("3", "config.json is not a JSON object"),
        ("[" * 200_000, "config.json is not valid JSON"),
        ('{"lrt_format": "1"}', "config.json: lrt_format = '1', but a model that lrt wrote has a whole number there"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(text, match, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for opened in (shapes_of, read_backbone):
        with pytest.raises(ValueError, match=match):
            opened(recipe_for(tmp_path, tmp_path / "runs"))


def test_a_dropout_without_a_module_is_drawn_again_alike():
    """Llama's attention reads its rate from an attribute: computed again with other draws,
    its gradients were wrong without a word."""
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))

    def gradients(wrap):
        torch.manual_seed(2)
        model = lrt.adapt(make("llama")).train()
        for index, block in enumerate(model.blocks):
            block.block.layer.self_attn.attention_dropout = 0.5
            model.blocks[index] = wrap(block)
        torch.manual_seed(3)
        model(ids, targets=ids, schedule=lrt.baseline()).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(lambda block: block), gradients(lambda block: checkpointed(block, selective=False))
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again))
