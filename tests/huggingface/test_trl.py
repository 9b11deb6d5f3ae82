"""The trainers of TRL on a tiny adapted model, five steps each; docs/adapt.md names the command."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_decoders import make
from pages import blocks

import lrt

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
ON_CPU = "max_steps=5, use_cpu=True, bf16=False, report_to=[], logging_steps=1, learning_rate=1e-2"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", *"abcdefghijklmnopqrstuvwxyz ."])
    }
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def scope(decoder: Any) -> dict[str, Any]:
    def reward(completions: list[str], **more: Any) -> list[float]:
        return [float(text.count("a")) for text in completions]

    return {
        "lrt": lrt, "torch": torch, "decoder": decoder, "tokenizer": tokenizer(), "reward": reward,
        "texts": datasets.Dataset.from_dict({"text": ["the cat sat.", "a dog ran home.", "hello there."] * 16}),
        "pairs": datasets.Dataset.from_dict(
            {"prompt": ["the cat "] * 16, "chosen": ["sat."] * 16, "rejected": ["ran."] * 16}
        ),
        "prompts": datasets.Dataset.from_dict({"prompt": ["the cat ", "a dog "] * 16}),
    }  # fmt: skip


def decoder() -> Any:
    return make("llama", dtype=torch.float32)


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "GRPOTrainer"])
def test_the_page_says_what_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    history: list[Any] = []
    kind = getattr(trl, name)
    original = kind.train
    monkeypatch.setattr(kind, "train", lambda self, *a, **k: (original(self, *a, **k), history.append(self))[0])
    for block in blocks("adapt.md", holding=f"import {name.removesuffix('Trainer')}Config"):
        exec(re.sub("max_steps=1000", ON_CPU, block), scope(decoder()))  # noqa: S102
    (trainer,) = history
    assert trainer.state.global_step == 5
    # no reward, no gradient
    assert any(p.any() for p in trainer.model.memory_parameters().values()) or name == "GRPOTrainer"
    if name == "SFTTrainer":
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert losses[-1] < losses[0] - 0.1


def test_lora_of_trl_trains_the_memory(tmp_path: Path) -> None:
    from peft import LoraConfig

    given = scope(decoder())
    arguments = trl.SFTConfig(str(tmp_path), max_steps=5, use_cpu=True, bf16=False, report_to=[], learning_rate=1e-2)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = trl.SFTTrainer(
        lrt.adapt(given["decoder"]),
        args=arguments,
        train_dataset=given["texts"],
        processing_class=given["tokenizer"],
        peft_config=lora,
    )
    trainer.train()
    assert any(p.any() for p in trainer.model.base_model.model.memory_parameters().values())


@pytest.mark.parametrize("kind", ["a copy", "LoRA"])
def test_a_policy_that_is_its_reference_has_no_margin(kind: str, tmp_path: Path) -> None:
    """Both are computed under one schedule, so the loss of the first step is log 2 whatever the memory does."""
    import copy

    from hf_decoders import stir
    from peft import LoraConfig

    given = scope(decoder())
    model = stir(lrt.adapt(given["decoder"]))
    common = {"use_cpu": True, "bf16": False, "report_to": []}
    arguments = trl.DPOConfig(str(tmp_path), max_steps=1, logging_steps=1, learning_rate=0.0, **common)
    more = {"args": arguments, "train_dataset": given["pairs"], "processing_class": given["tokenizer"]}
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    trainer = trl.DPOTrainer(model, **more, **({"ref_model": copy.deepcopy(model)} if kind == "a copy" else lora))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
