"""What callers pass to from_pretrained, from_config and save_pretrained, and what tools read of a config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_decoders import make, stir
from transformers import AutoConfig, AutoModelForCausalLM

import lrt
from lrt.huggingface import LRTForCausalLM
from lrt.serialization.tensors import size_in_bytes

TOKENS = torch.arange(8)[None]
NATIVE = (
    "[model]\nn_layers=2\nwidth=32\nn_heads=4\nn_kv_heads=2\nsequence_length=32\nvocab_size=61\n[training]\nsteps=1\n"
    "batch_tokens=32"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return stir(lrt.adapt(make("llama", dtype=torch.float32, attention="eager")))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lrt.save(model, tmp_path_factory.mktemp("folder") / "m")


def same(a: Any, b: Any) -> bool:
    with torch.no_grad():
        return torch.equal(a(TOKENS).logits, b(TOKENS).logits)


# ------------------------------------------------------------------ from_pretrained


@pytest.mark.parametrize(
    "given",
    [
        {"force_download": False, "strict": True, "weights_only": True, "ignore_mismatched_sizes": False},
        {"subfolder": "", "variant": None, "revision": "main", "use_safetensors": True, "load_in_8bit": False},
        {"max_memory": None, "low_cpu_mem_usage": True},
        {"device_map": "auto"}, {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}}, {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu")}, {"dtype": "auto"}, {"dtype": torch.float32}, {"torch_dtype": "float32"},
    ],
    ids=str,
)  # fmt: skip
def test_what_every_caller_passes(folder: Path, model: Any, given: dict[str, Any]) -> None:
    assert same(AutoModelForCausalLM.from_pretrained(folder, **given), model)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"load_in_8bit": True}, "takes no load_in_8bit"),
        ({"variant": "fp16"}, "takes no variant"),
        ({"use_safetensors": False}, "takes no use_safetensors=False"),
        ({"state_dict": {}}, "takes no state_dict"),
        ({"dtype": "float33"}, "dtype = 'float33'"),
        ({"dtype": 3}, "dtype = 3"),
        ({"device_map": {"model": "cpu", "lm_head": "meta"}}, "give one device"),
        ({"subfolder": "there"}, "holds no config.json|no such|does not exist|is not"),
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused(folder: Path, given: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, OSError), match=text):
        LRTForCausalLM.from_pretrained(folder, **given)


@pytest.mark.parametrize("native", [True, False])
def test_a_model_of_a_config_and_tensors(model: Any, native: bool) -> None:
    """As accelerate and DeepSpeed build one whose tensors were gathered."""
    first = LRTForCausalLM.of(lrt.build(lrt.config.parse_recipe(NATIVE))) if native else model
    again = LRTForCausalLM.from_pretrained(None, config=first.config, state_dict=first.state_dict())
    assert same(again, first.eval()) and {p.dtype for p in again.parameters()} == {torch.float32}
    for lacking in ({}, {"config": first.config}):
        with pytest.raises(ValueError, match=r"from_pretrained\(None, config=config, state_dict=tensors\)"):
            LRTForCausalLM.from_pretrained(None, **lacking)


def test_the_device_around_a_load_counts(folder: Path, model: Any, tmp_path: Path) -> None:
    native = lrt.save(lrt.build(lrt.config.parse_recipe(NATIVE)), tmp_path / "n")
    for place in (folder, native):
        with torch.device("cpu"):
            assert AutoModelForCausalLM.from_pretrained(place).device.type == "cpu"
        with torch.device("meta"), pytest.raises(RuntimeError, match="with a meta device context manager"):
            AutoModelForCausalLM.from_pretrained(place)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"variant": "fp16"}, "takes no variant: a folder holds one model with one config.json"),
        ({"safe_serialization": False}, "takes no safe_serialization=False"),
        ({"save_original_format": True}, "takes no save_original_format"),
    ],
)
def test_what_a_save_would_ignore_is_refused(model: Any, tmp_path: Path, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        model.save_pretrained(tmp_path / "m", **given)
    assert not (tmp_path / "m").exists()
    model.save_pretrained(
        tmp_path / "m", variant=None, safe_serialization=True, is_main_process=True, save_function=torch.save
    )
    assert same(lrt.load(tmp_path / "m"), model)


def test_every_kind_of_auto_class_says_what_there_is(folder: Path) -> None:
    for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        auto = getattr(transformers, f"AutoModelFor{kind}")
        for call in (
            lambda auto=auto: auto.from_pretrained(folder),
            lambda auto=auto: auto.from_config(AutoConfig.from_pretrained(folder)),
        ):
            with pytest.raises(
                ValueError, match="an lrt model has a language head alone: put a classifier on last_hidden_state"
            ):
                call()


@pytest.mark.parametrize("wrong", ["float33", "int8", torch.int8])
def test_a_dtype_that_no_weight_can_have(folder: Path, wrong: Any) -> None:
    """The Auto classes read it before we do; the error was one of transformers, or named the folder's code."""
    for load in (AutoModelForCausalLM.from_pretrained, LRTForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="dtype = .*: give a floating-point torch.dtype"):
            load(folder, dtype=wrong)


def test_an_attention_backend_reaches_the_decoder(folder: Path) -> None:
    """The Auto classes put it into the config, where it was forgotten."""
    for load in (AutoModelForCausalLM.from_pretrained, LRTForCausalLM.from_pretrained):
        read = load(folder, attn_implementation="sdpa")
        assert read.original[0].config._attn_implementation == read.config._attn_implementation == "sdpa"
        with pytest.raises((ValueError, ImportError), match="nonsense"):
            load(folder, attn_implementation="nonsense")


def test_loading_info_and_subfolders(folder: Path, model: Any) -> None:
    read, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert (
        same(read, model)
        and not any(info.values())
        and set(info) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    )
    assert same(AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name), model)


def test_a_generation_config_is_taken(folder: Path) -> None:
    mine = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=60, pad_token_id=0)
    read = LRTForCausalLM.from_pretrained(folder, generation_config=mine)
    assert read.generate(TOKENS, do_sample=False).shape[1] <= 11


def test_a_config_changes_calls_but_not_the_model(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.output_hidden_states = True
    assert AutoModelForCausalLM.from_pretrained(folder, config=config)(TOKENS).hidden_states is not None
    assert AutoModelForCausalLM.from_pretrained(folder, return_dict=False)(TOKENS)[0].shape == (1, 8, 61)
    config.recurrence = dict(config.recurrence, residual=False)
    with pytest.raises(ValueError, match="config.recurrence is not what"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_a_model_that_does_not_fit_the_accelerator_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: torch is made to say that there is one, with so much free memory."""
    from lrt.huggingface.loading import device_of

    free = [10**9]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free[0], 10**9))
    assert device_of("auto", folder, max_memory=None) == torch.device("cuda", 0)
    for given in (None, {0: 10**9}):
        free[0] = 1000 if given is None else 10**9
        with pytest.raises(ValueError, match="do not fit the .* for several, load the decoder with it"):
            device_of("balanced", folder, max_memory={0: 1000} if given else None)


# ------------------------------------------------------------------ from_config


def test_from_config_takes_an_attention_backend(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    stored = AutoModelForCausalLM.from_config(config)
    assert stored.config._attn_implementation == stored.original[0].config._attn_implementation == "eager"
    chosen = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa")
    assert chosen.config._attn_implementation == chosen.original[0].config._attn_implementation == "sdpa"
    native = LRTForCausalLM.of(lrt.build(lrt.config.parse_recipe(NATIVE))).config
    assert AutoModelForCausalLM.from_config(native, attn_implementation="sdpa")(TOKENS).logits.shape == (1, 8, 61)
    with pytest.raises(ValueError, match="this native model chooses its attention itself"):
        AutoModelForCausalLM.from_config(native, attn_implementation="eager")


def test_a_config_asks_for_checkpointed_blocks(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert not AutoModelForCausalLM.from_config(config).is_gradient_checkpointing
    config.gradient_checkpointing = True
    assert AutoModelForCausalLM.from_config(config).is_gradient_checkpointing


# ------------------------------------------------------------------ what tools read of a config


@pytest.mark.parametrize(
    "changed", [{"hidden_size": 64}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}]
)
def test_a_mirrored_attribute_that_is_changed_is_refused(folder: Path, changed: dict[str, Any]) -> None:
    """It was ignored: the model is built from config.adapted or config.model."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in changed.items():
        setattr(config, name, value)
    for call in (
        AutoModelForCausalLM.from_config,
        lambda config: AutoModelForCausalLM.from_pretrained(folder, config=config),
    ):
        with pytest.raises(ValueError, match=f"config.{next(iter(changed))} = .* would have no effect"):
            call(config)
    config = AutoConfig.from_pretrained(folder)
    config.eos_token_id, config.max_position_embeddings = 7, 4096
    assert AutoModelForCausalLM.from_config(config).config.eos_token_id == 7


def test_a_config_is_saved_by_itself(folder: Path, tmp_path: Path) -> None:
    """The newest releases check the types of layers when a config is saved; ours is one that they do not know."""
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path / "c")
    again = AutoConfig.from_pretrained(tmp_path / "c")
    assert again.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path / "c")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "smollm"])
def test_a_config_says_what_the_decoder_s_says(family: str, tmp_path: Path) -> None:
    decoder = make(family)
    theirs = decoder.config
    shape = {"num_key_value_heads": 4 if family == "gpt2" else 2, "head_dim": 6 if family in ("gpt2", "llama") else 8}
    model = lrt.adapt(decoder)
    lrt.save(model, tmp_path / "m")
    for config in (model.config, AutoConfig.from_pretrained(tmp_path / "m")):
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        ):  # fmt: skip
            assert getattr(config, name) == getattr(theirs, name), name
        assert {name: getattr(config, name) for name in shape} == shape
        assert config.use_cache is True
        if family in ("llama", "smollm"):
            assert config.rope_parameters["rope_theta"] == 10000.0


def test_a_native_config_says_the_same(tmp_path: Path) -> None:
    lrt.save(lrt.build(lrt.config.parse_recipe(NATIVE)), tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    )
    assert [getattr(config, name) for name in names] == [32, 2, 4, 2, 8, 32]
    assert config.bos_token_id is config.eos_token_id is config.pad_token_id is None
    assert config.intermediate_size == 128 and config.tie_word_embeddings is False
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


# ------------------------------------------------------------------ shards


@pytest.mark.parametrize("size", [10000, "10KB", "10 kb", "0.01MB"])
def test_sizes_of_shards(model: Any, tmp_path: Path, size: Any) -> None:
    lrt.save(model, tmp_path / "ours", shard_size=size)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    for place in (tmp_path / "ours", tmp_path / "theirs"):
        shards = sorted(place.glob("model-*.safetensors"))
        named = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"].values()
        assert {shard.name for shard in shards} == set(named) and len(shards) > 7
        assert all(shard.stat().st_size < 12000 for shard in shards) and same(lrt.load(place), model)
    shutil.rmtree(tmp_path / "ours")


def test_units_of_sizes() -> None:
    assert [size_in_bytes(x) for x in (None, 7, "7", "5GB", "1.5 GiB", "2TB", "3k")] == [
        None,
        7,
        7,
        5 * 10**9,
        3 * 2**29,
        2 * 10**12,
        3000,
    ]
    for wrong in ("much", "", "-1KB", 0, "0.1", "5 XB"):
        with pytest.raises(ValueError, match="give bytes of the largest file"):
            size_in_bytes(wrong)
