"""PEFT beside the memory: what trains, what is saved, and that it comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_decoders import make, stir
from strategies import randomized
from torch import Tensor

import lrt
from lrt.config import parse_recipe
from lrt.conversion import convert
from lrt.serialization.decoders import SAFE

peft = pytest.importorskip("peft")
TOKENS = torch.arange(9)[None] * 3 % 61
NATIVE = (
    "recurrence = false\n[schedule]\nkind = 'baseline'\n[model]\nn_layers = 2\nwidth = 32\nn_heads = 2\nvocab_size = 64"
)


def decoder(seed: int = 0) -> Any:
    return make("llama", dtype=torch.float32, seed=seed)


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, schedule=lrt.refine(1)).logits


def train(model: Any, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


# ------------------------------------------------------------------ adapt, then LoRA


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", "two"), ("llama", "all-linear"), ("native", "two"), ("native", "all-linear")]
)
def test_the_memory_trains_and_is_saved_with_lora(kind: str, targets: str, tmp_path: Path) -> None:
    """PEFT alone would freeze the memory at zero and leave it out of its file."""

    def fresh() -> Any:
        return lrt.adapt(decoder() if kind == "llama" else randomized(lrt.build(parse_recipe(NATIVE)), 0))

    model = fresh()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")][:2]
    wrapped = peft.get_peft_model(
        model, lora(target_modules=names if targets == "two" else targets, exclude_modules=["backbone.head"])
    )
    assert not [name for name in model.memory_parameters() if "lora" in name]
    memory = [p for p in model.memory_parameters().values() if p.requires_grad]
    assert len(memory) == len(fresh().memory_parameters()) and not any(p.any() for p in memory)
    train(wrapped)
    assert all(p.any() for p in memory)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(wrapped))
    whole = lrt.load(lrt.save(model, tmp_path / "whole"))
    assert torch.equal(logits(whole), logits(model)) and set(dict(whole.named_parameters())) == set(
        dict(model.named_parameters())
    )
    merged = wrapped.merge_and_unload()
    assert set(merged.memory_parameters()) == set(fresh().memory_parameters()) and not hasattr(merged, "peft_config")
    assert torch.equal(logits(lrt.load(lrt.save(merged, tmp_path / "merged"))), logits(merged))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_maps_of_the_memory_train_beside_lora_in_the_projections_that_read_them(family: str, tmp_path: Path) -> None:
    def fresh() -> Any:
        config = lrt.RecurrenceConfig(projection="aligned", residual="projected", init="identity")
        return lrt.adapt(make(family, dtype=torch.float32), config)

    model = fresh()
    before = {name: p.detach().clone() for name, p in model.memory_parameters().items()}
    expected = logits(model)
    wrapped = peft.get_peft_model(
        model, lora(target_modules="all-linear", exclude_modules=["backbone.head"], init_lora_weights=True)
    )
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-5, atol=1e-5)
    train(wrapped)
    memory = {
        n.replace("modules_to_save.default.", ""): p for n, p in model.memory_parameters().items() if p.requires_grad
    }
    assert memory.keys() == before.keys() and all((p != before[name]).any() for name, p in memory.items())
    whole = lrt.load(lrt.save(model, tmp_path / "whole"))
    assert torch.equal(logits(whole), logits(model))
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["PEFT first", "checkpointing first"])
def test_checkpointed_blocks_change_no_name(order: str, tmp_path: Path) -> None:
    model = lrt.adapt(decoder())
    if order == "checkpointing first":
        model.gradient_checkpointing_enable()
    wrapped = peft.get_peft_model(model, lora())
    if order == "PEFT first":
        model.gradient_checkpointing_enable()
    train(wrapped)
    assert model.is_gradient_checkpointing and all(
        p.any() for p in model.memory_parameters().values() if p.requires_grad
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(lrt.adapt(decoder()), tmp_path / "adapter")), logits(wrapped)
    )


def test_lora_in_the_native_head_is_refused() -> None:
    model = lrt.adapt(lrt.build(parse_recipe(NATIVE)))
    with pytest.raises(
        ValueError, match=r'computes its own loss: LoraConfig\(..., exclude_modules=\["backbone.head"\]\)'
    ):
        peft.get_peft_model(model, lora(target_modules="all-linear"))


def test_the_memory_is_left_alone_where_that_is_asked_for() -> None:
    model = stir(lrt.adapt(decoder()))
    before = {name: p.clone() for name, p in model.memory_parameters().items()}
    wrapped = peft.get_peft_model(model, lora(modules_to_save=[]))
    train(wrapped)
    assert all(torch.equal(p, before[name]) for name, p in model.memory_parameters().items())
    head = peft.get_peft_model(lrt.adapt(decoder()), lora(modules_to_save=["head"]))
    assert (
        any(p.requires_grad for p in head.base_model.model.memory_parameters().values())
        and head.base_model.model.backbone.head.modules_to_save
    )


def test_add_adapter_then_save_pretrained_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it may ask for one that is not released
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = lrt.adapt(decoder())
    model.add_adapter(lora())
    train(model)
    model.save_pretrained(tmp_path / "folder")
    for again in (
        lrt.load(tmp_path / "folder"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", **SAFE),
    ):
        assert torch.equal(logits(again), logits(model))
        assert set(dict(again.named_parameters())) == set(dict(model.named_parameters()))


# ------------------------------------------------------------------ LoRA, then adapt


def test_lora_then_adapt_then_trainer_saves_and_resumes(tmp_path: Path) -> None:
    def trainer() -> Any:
        torch.manual_seed(0)
        model = lrt.adapt(peft.get_peft_model(decoder(), lora()))
        rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
        more = {
            "per_device_train_batch_size": 2,
            "report_to": [],
            "use_cpu": True,
            "save_steps": 2,
            "max_steps": 4,
            "learning_rate": 0.01,
        }
        return transformers.Trainer(
            model, transformers.TrainingArguments(str(tmp_path / "run"), **more), train_dataset=rows
        )

    first = trainer()
    first.train()
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(p.any() for p in first.model.memory_parameters().values())
    for name, parameter in first.model.named_parameters():
        assert torch.equal(dict(second.model.named_parameters())[name], parameter), name
    again = lrt.load(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(again), logits(first.model)) and hasattr(lrt.release(again), "merge_and_unload")


@pytest.mark.parametrize("order", ["LoRA first", "adapt first"])
def test_memory_and_lora_travel_alone(order: str, tmp_path: Path) -> None:
    model = stir(lrt.adapt(peft.get_peft_model(decoder(), lora()) if order == "LoRA first" else decoder()))
    if order == "adapt first":
        peft.get_peft_model(model, lora())
    train(model)
    lrt.save(model, tmp_path / "small", adapter_only=True)
    lrt.save(model, tmp_path / "whole")
    assert (tmp_path / "small" / "model.safetensors").stat().st_size * 2 < (
        tmp_path / "whole" / "model.safetensors"
    ).stat().st_size
    assert torch.equal(logits(lrt.load(tmp_path / "small", base=decoder())), logits(model))
    assert torch.equal(logits(lrt.load(tmp_path / "whole")), logits(model))
    plain = decoder(seed=3)
    with pytest.raises(ValueError, match="with other weights than this one"):
        lrt.load(tmp_path / "small", base=plain)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]  # the failed load left it as it was
    if order == "LoRA first":
        assert torch.equal(
            logits(lrt.load(tmp_path / "small", base=peft.get_peft_model(decoder(), lora()))), logits(model)
        )
    with pytest.raises(ValueError, match="holds a LoRA adapter beside the memory: lrt.load it, merge it"):
        convert(tmp_path / "whole", tmp_path / "out", source="lrt", target="adapter", report=lambda _: None)


REFUSED: dict[str, tuple[Any, str]] = {
    "another kind": (
        lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
        "is IA3, and a folder holds LoRA alone: merge it",
    ),
    "a setting": (lambda: lora(lora_bias=True), "sets lora_bias, which a folder does not hold: merge it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_folder_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    config, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        lrt.save(lrt.adapt(peft.get_peft_model(decoder(), config())), tmp_path / "folder")
    wrapped = peft.get_peft_model(decoder(), lora())
    model = lrt.adapt(wrapped)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the decoder's weights for now: unmerge_adapter"):
        lrt.save(model, tmp_path / "folder")
    wrapped.unmerge_adapter()
    wrapped.add_adapter("second", lora())
    with pytest.raises(ValueError, match="holds 2 PEFT adapters, and a folder one"):
        lrt.save(model, tmp_path / "folder")


def test_an_adapter_of_a_folder_imports_nothing(tmp_path: Path) -> None:
    """PEFT imports the module that a config calls megatron_core."""
    folder = lrt.save(lrt.adapt(peft.get_peft_model(decoder(), lora())), tmp_path / "folder")
    table = json.loads((folder / "config.json").read_text())
    table["adapter"]["lora"] |= {"megatron_config": {}, "megatron_core": "antigravity"}
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="lrt reads r, lora_alpha, .*, so it was changed"):
        lrt.load(folder)
