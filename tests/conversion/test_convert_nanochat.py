"""NanoChatForCausalLM of transformers becomes a native model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversions import leave_nanochat

import lrt
from lrt.conversion import convert
from lrt.conversion.kinds import kind_of

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "NanoChatConfig"), reason="this version of transformers has no NanoChat"
)


@pytest.mark.parametrize(
    "more",
    [{}, {"vocab_size": 320, "final_logit_softcapping": 7.0, "num_key_value_heads": 4}],
    ids=["as it is", "others"],
)
def test_it_answers_as_before(tmp_path: Path, more: dict[str, Any]) -> None:
    model, lines = leave_nanochat(tmp_path / "theirs", **more), list[str]()
    assert kind_of(tmp_path / "theirs") == "nanochat"
    convert(tmp_path / "theirs", tmp_path / "ours", target="lrt", report=lines.append)
    ours = lrt.load(tmp_path / "ours")
    tokens = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    for module in model.modules():  # ours adds the smallest step of the dtype, as nanochat itself does
        if hasattr(module, "eps"):
            module.eps = torch.finfo(torch.float32).eps
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert "rms_norm_eps = 1e-06" in " ".join(lines) and ours.backbone.config.rope_base == 5000.0
    made = lrt.adapt(ours)  # and can become recurrent
    assert made.recurrence is not None


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True, but a native model has False alone"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.rope_type = 'linear'",
        ),
    ],
)
def test_what_a_native_model_has_not_is_refused(tmp_path: Path, more: dict[str, Any], text: str) -> None:
    leave_nanochat(tmp_path / "theirs", **more)
    with pytest.raises(ValueError, match=text):
        convert(tmp_path / "theirs", tmp_path / "ours", target="lrt")
    assert not (tmp_path / "ours").exists()


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match='is a "llama" of transformers, not a "nanochat"'):
        convert(tmp_path / "llama", tmp_path / "ours", source="nanochat", target="lrt")
