"""Kinds that only come in, or need another library: training checkpoints, adapters, Hugging Face."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conversions import SMALL, logits, quiet, same_tensors, save_step, small_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lrt
from lrt.config import parse_recipe
from lrt.conversion import convert, inspect_checkpoint
from lrt.conversion.inspection import describe


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def llama(**more):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


# ------------------------------------------------------------------ training checkpoints


def worker(rank, ranks, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29877")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    group = dist.new_group(backend="gloo")
    recipe = parse_recipe(SMALL)
    save_step(
        Path(folder), 7, small_model(), recipe=recipe, rank=rank, world_size=ranks, group=group,
        shard=lambda t: distribute_tensor(t.contiguous(), mesh, [Shard(0)]),
    )  # fmt: skip
    dist.destroy_process_group()


def test_a_training_checkpoint_of_one_rank(tmp_path):
    recipe = parse_recipe(SMALL + "\n[run]\nname = 'mine'\n")
    for step, seed in ((5, 1), (9, 2)):
        save_step(tmp_path / "run" / "checkpoints", step, small_model(seed=seed), recipe=recipe)
    done = convert(tmp_path / "run", tmp_path / "newest", source="dcp", target="lrt", report=quiet)
    assert done.source.step == 9 and same_tensors(
        lrt.load(tmp_path / "newest").state_dict(), small_model(seed=2).state_dict()
    )
    convert(tmp_path / "run", tmp_path / "older", target="lrt", step=5, report=quiet)
    assert same_tensors(lrt.load(tmp_path / "older").state_dict(), small_model(seed=1).state_dict())
    assert json.loads((tmp_path / "older" / "config.json").read_text())["step"] == 5
    assert lrt.load(tmp_path / "older").train_schedule == lrt.interleaved(2)
    assert (tmp_path / "older" / "tokenizer.json").is_file()  # of data.tokenizer = "bytes"
    with pytest.raises(ValueError, match="no checkpoint of step 6"):
        convert(tmp_path / "run", tmp_path / "none", source="dcp", target="lrt", step=6)
    text = "\n".join(describe(inspect_checkpoint(tmp_path / "run"), "run"))
    assert "dcp, whole" in text and "mine" in text and "step        9" in text


def test_a_training_checkpoint_of_an_adapted_decoder(tmp_path, transformers):
    """Its recipe names the decoder; tensors have our names, a tied head is stored once."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = lrt.adapt(llama(tie_word_embeddings=True))
    for parameter in model.memory_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    recipe = parse_recipe(f'[run]\nbackbone = "{tmp_path / "base"}"\n[recurrence]\ninit = "identity"\n')
    tensors = dict(model.named_parameters())
    save_step(tmp_path / "run", 4, SimpleNamespace(state_dict=lambda: tensors), recipe=recipe)
    convert(tmp_path / "run", tmp_path / "out", source="dcp", target="hf", report=quiet)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(logits(read), logits(model.eval())))


@pytest.mark.dist
def test_a_training_checkpoint_of_several_ranks(tmp_path):
    """Rows of 32 over 3 ranks are uneven, and the gates have fewer rows than that."""
    mp.spawn(worker, args=(3, str(tmp_path / "checkpoints")), nprocs=3)
    convert(tmp_path, tmp_path / "out", source="dcp", target="hf", shard_size=20000, report=quiet)
    assert same_tensors(lrt.load(tmp_path / "out").state_dict(), small_model().state_dict())


def test_a_damaged_training_checkpoint_is_refused(tmp_path):
    save_step(tmp_path / "checkpoints", 3, small_model(), recipe=parse_recipe(SMALL))
    shard = next((tmp_path / "checkpoints" / "step_00000003").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged|no checkpoint"):
        convert(tmp_path / "checkpoints" / "step_00000003", tmp_path / "out", source="dcp", target="lrt")
    found = inspect_checkpoint(tmp_path / "checkpoints" / "step_00000003")
    assert not found.whole and "damaged" in found.problem


# ------------------------------------------------------------------ Hugging Face


def test_a_native_model_in_hugging_face_hands(tmp_path, transformers):
    save_step(tmp_path / "run", 1, small_model(), recipe=parse_recipe(SMALL))
    convert(tmp_path / "run", tmp_path / "hf", source="dcp", target="hf", report=quiet)
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= names
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(logits(model), logits(small_model())))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("Aé").input_ids == [256, 65, 195, 169] and tokenizer.bos_token_id == 256
    assert model.generation_config.eos_token_id == 256
    out = model.generate(torch.tensor([[256, 65, 66]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(
        out,
        lrt.generate(small_model(), torch.tensor([[256, 65, 66]]), max_new_tokens=4, temperature=0.0, stop_ids=(256,)),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_decoder_travels_whole_and_as_an_adapter(tmp_path, tied, transformers):
    decoder = llama(tie_word_embeddings=tied)
    decoder.save_pretrained(tmp_path / "base")
    model = lrt.adapt(llama(tie_word_embeddings=tied))
    for index, parameter in enumerate(model.memory_parameters().values()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    lrt.save(model.eval(), tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "hf", source="lrt", target="hf", shard_size=10000, report=quiet)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(logits(read), logits(model)))
    convert(tmp_path / "hf", tmp_path / "adapter", source="hf", target="adapter", report=quiet)
    alone = lrt.load(tmp_path / "adapter", base=llama(tie_word_embeddings=tied))
    assert all(torch.equal(a, b) for a, b in zip(logits(alone), logits(model)))
    convert(
        tmp_path / "adapter", tmp_path / "again", source="adapter", target="hf", base=tmp_path / "base", report=quiet
    )
    again = lrt.load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(logits(again), logits(model)))
    with pytest.raises(ValueError, match="adapts a LlamaForCausalLM"):
        convert(tmp_path / "whole", tmp_path / "official", source="lrt", target="official")


# ------------------------------------------------------------------ adapters of native models


def test_an_adapter_of_a_native_model(tmp_path):
    model, other = small_model(seed=1), small_model(seed=2)
    lrt.save(model, tmp_path / "model")
    lrt.save(other, tmp_path / "other")
    convert(tmp_path / "model", tmp_path / "adapter", source="lrt", target="adapter", report=quiet)
    convert(
        tmp_path / "adapter", tmp_path / "same", source="adapter", target="lrt", base=tmp_path / "model", report=quiet
    )
    assert same_tensors(lrt.load(tmp_path / "same").state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="was trained on other weights than those of"):
        convert(
            tmp_path / "adapter",
            tmp_path / "moved",
            source="adapter",
            target="lrt",
            base=tmp_path / "other",
            report=quiet,
        )
    found = inspect_checkpoint(tmp_path / "adapter")
    assert found.kind == "adapter" and found.whole and found.parts.keys() == {"memory"}


def test_an_adapter_of_a_native_model_in_python(tmp_path):
    model, plain = small_model(), replace_recurrence(small_model())
    lrt.save(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "adapter", source="lrt", target="adapter", report=quiet)
    with pytest.raises(ValueError, match="only the memory of a native decoder: pass base="):
        lrt.load(tmp_path / "adapter")
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if n not in model.memory_parameters()})
    assert all(torch.equal(a, b) for a, b in zip(logits(lrt.load(tmp_path / "adapter", base=plain)), logits(model)))


def test_an_adapter_refuses_another_decoder(tmp_path):
    lrt.save(small_model(), tmp_path / "model")
    lrt.save(small_model(SMALL.replace("n_heads = 2", "n_heads = 4")), tmp_path / "other")
    convert(tmp_path / "model", tmp_path / "adapter", source="lrt", target="adapter", report=quiet)
    with pytest.raises(ValueError, match="another decoder"):
        convert(tmp_path / "adapter", tmp_path / "out", source="adapter", target="lrt", base=tmp_path / "other")
    with pytest.raises(ValueError, match="--base"):
        convert(tmp_path / "adapter", tmp_path / "out", source="adapter", target="lrt")
    with pytest.raises(ValueError, match="only memory parameters"):
        convert(tmp_path / "adapter", tmp_path / "out", source="lrt", target="hf")
    with pytest.raises(ValueError, match="no recurrence"):
        lrt.save(replace_recurrence(small_model()), tmp_path / "plain")
        convert(tmp_path / "plain", tmp_path / "out", source="lrt", target="adapter")


def replace_recurrence(model):
    """The plain twin."""
    recipe = parse_recipe(SMALL)
    return lrt.build(replace(recipe, recurrence=None, schedule=replace(recipe.schedule, kind="baseline")))
