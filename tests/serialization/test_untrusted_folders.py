"""Folders from anywhere: no code of theirs runs, nothing is asked, nothing is fetched."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversions import save_step
from hf_decoders import make

import lrt
from lrt.commands import convert as convert_tool
from lrt.commands import inspect as inspect_tool
from lrt.config import parse_recipe
from lrt.conversion import convert
from lrt.serialization.decoders import open_config, open_decoder, open_tokenizer

ROOT = next(place for place in Path(__file__).parents if (place / "pyproject.toml").is_file())

CODE = """
from pathlib import Path
Path({marker!r}).touch()
import transformers
class Config(transformers.LlamaConfig):
    model_type = "evil"
class Model(transformers.LlamaForCausalLM):
    config_class = Config
class Tokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""
MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModel": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", None],
}


def llama() -> Any:
    return make("llama", dtype=torch.float32)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that evil code would write; whoever asks on stdin hears "y", and whoever fetches fails the test."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    import huggingface_hub

    def fetched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"fetched: {args} {kwargs}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", fetched)
    return tmp_path / "marker"


@pytest.fixture
def unasked(marker: Path) -> Any:
    yield marker
    assert not marker.exists()
    assert sys.stdin.readline() == "y\n" and sys.stdin.tell() == 2  # nobody read an answer


def evil(folder: Path, marker: Path, **config: Any) -> Path:
    """A Llama with code beside it that its config.json names."""
    llama().save_pretrained(folder)
    table = json.loads((folder / "config.json").read_text()) | {"model_type": "evil", "auto_map": MAP} | config
    (folder / "config.json").write_text(json.dumps(table))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": MAP}))
    return folder


def run_around(folder: Path, base: Path) -> Path:
    """A training checkpoint whose recipe names ``base`` as its decoder."""
    model = lrt.adapt(llama())
    recipe = parse_recipe(f'[run]\nbackbone = "{base}"\n[recurrence]\ninit = "identity"\n')
    save_step(folder, 4, SimpleNamespace(state_dict=lambda: dict(model.named_parameters())), recipe=recipe)
    return folder


def test_the_fixture_is_dangerous(marker: Path, tmp_path: Path) -> None:
    """transformers alone asks and runs this folder's code, so the tests below can fail."""
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(evil(tmp_path / "evil", marker))
    assert marker.exists()


@pytest.mark.parametrize("words", ["inspect", "dcp", "adapter", "hf", "lrt", "shapes", "train", "tokenizer"])
def test_code_of_a_folder_never_runs(words: str, unasked: Path, tmp_path: Path, capsys: Any) -> None:
    base = evil(tmp_path / "evil", unasked)
    run = run_around(tmp_path / "run", base)
    out = ["--output", str(tmp_path / "out")]
    capsys.readouterr()
    if words == "inspect":
        assert inspect_tool.main([str(run)]) == 1
        said = capsys.readouterr().out
    elif words == "dcp":
        assert convert_tool.main(["--from", "dcp", "--to", "lrt", "--input", str(run), *out]) == 2
        said = capsys.readouterr().err
    elif words == "adapter":
        lrt.save(lrt.adapt(llama()), tmp_path / "memory", adapter_only=True)
        arguments = ["--from", "adapter", "--base", str(base), "--to", "lrt", "--input", str(tmp_path / "memory")]
        capsys.readouterr()
        assert convert_tool.main([*arguments, *out]) == 2
        said = capsys.readouterr().err
    elif words in ("hf", "lrt"):
        lrt.save(lrt.adapt(llama()), tmp_path / "ours")
        table = json.loads((tmp_path / "ours" / "config.json").read_text()) | {"auto_map": MAP, "model_type": "evil"}
        (tmp_path / "ours" / "config.json").write_text(json.dumps(table))
        (tmp_path / "ours" / "evil.py").write_text(CODE.format(marker=str(unasked)))
        assert convert_tool.main(["--from", words, "--to", "hf", "--input", str(tmp_path / "ours"), *out]) == 2
        said = capsys.readouterr().err
        assert 'model_type = "evil"' in said
        return
    elif words == "tokenizer":
        with pytest.raises(ValueError) as caught:
            open_tokenizer(base)
        said = str(caught.value)
    else:
        from lrt.train.checkpoint.starting_model import read_backbone, shapes_of

        recipe = parse_recipe(
            f'[run]\nbackbone = "{base}"\n[recurrence]\ninit = "identity"\n[optimizer]\nkind = "adamw"\n'
        )
        with pytest.raises(ValueError) as caught:
            (shapes_of if words == "shapes" else read_backbone)(recipe)
        said = str(caught.value)
    assert "needs code of its own (auto_map), and lrt runs no code of a folder" in said and "evil" in said
    assert len(said.strip().splitlines()) <= 2


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a kernel": (
        {"attn_implementation": "owner/kernel"},
        "'owner/kernel' in .*attn_implementation, a kernel to be fetched from the hub",
    ),
    "flash attention": (
        {"attn_implementation": "flash_attention_2"},
        "'flash_attention_2' in .*attn_implementation, a kernel to be fetched from",
    ),
    "a newer one": (
        {"_attn_implementation": "flash_attention_3"},
        "'flash_attention_3' in .*attn_implementation, a kernel to be fetched from",
    ),
    "attention by part": (
        {"attn_implementation": {"text_config": "flash_attention_2"}},
        "in .*attn_implementation.text_config, a kernel",
    ),
    "attention of a part": (
        {"text_config": {"attn_implementation": "flash_attention_2"}},
        "in .*text_config.attn_implementation, a kernel",
    ),
    "a kernel of experts": ({"experts_implementation": "owner/kernel"}, "a kernel to be fetched"),
    "a part": ({"vision_config": {"auto_map": MAP}}, r"code for a part of the model \(vision_config.auto_map"),
    "quantized": ({"quantization_config": {"quant_method": "mxfp4"}}, "is quantized, .*: save it dequantized first"),
    "weights elsewhere": ({"transformers_weights": "../../model.bin"}, "names its own file of weights"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_would_fetch_is_refused(name: str, unasked: Path, tmp_path: Path) -> None:
    more, text = CONFIGS[name]
    base = evil(tmp_path / "evil", unasked, **{"model_type": "llama", "auto_map": {}} | more)
    for opened in (open_config, lambda place: open_decoder(place, dtype="auto")):
        with pytest.raises(ValueError, match=text):
            opened(base)
    lrt.save(lrt.adapt(llama()), tmp_path / "ours")
    table = json.loads((tmp_path / "ours" / "config.json").read_text())
    table["adapted"]["config"] |= more
    (tmp_path / "ours" / "config.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=text):
        lrt.load(tmp_path / "ours")


def test_attention_in_the_config_of_our_folder_is_refused_and_may_be_asked_for(tmp_path: Path) -> None:
    import transformers

    folder = lrt.save(lrt.adapt(llama()), tmp_path / "ours")
    chosen = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
    assert chosen._attn_implementation == "eager"
    table = json.loads((folder / "config.json").read_text())
    for allowed in (None, "sdpa"):
        (folder / "config.json").write_text(json.dumps(table | {"attn_implementation": allowed}))
        lrt.load(folder)
    (folder / "config.json").write_text(json.dumps(table | {"attn_implementation": "flash_attention_2"}))
    for opened in (
        lrt.load,
        transformers.AutoConfig.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
    ):
        with pytest.raises(
            ValueError, match="'flash_attention_2' in attn_implementation, a kernel to be fetched from the hub"
        ):
            opened(folder)


def test_a_known_decoder_with_code_beside_it_opens_without_the_code(unasked: Path, tmp_path: Path) -> None:
    """Many folders of the hub carry the code from before transformers knew their decoder."""
    base = evil(tmp_path / "evil", unasked, model_type="llama")
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(open_decoder(base, dtype="auto")(tokens).logits, llama()(tokens).logits)
    convert(run_around(tmp_path / "run", base), tmp_path / "out", source="dcp", target="lrt", report=lambda _: None)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())["adapted"]["config"]


def test_the_file_that_opens_our_folders_is_not_run_where_lrt_is(unasked: Path, tmp_path: Path) -> None:
    """Anybody may have put something else under its name."""
    import transformers

    model = lrt.adapt(llama())
    folder = lrt.save(model, tmp_path / "ours")
    assert (folder / "modeling_lrt.py").is_file()
    (folder / "modeling_lrt.py").write_text(CODE.format(marker=str(unasked)))
    convert(folder, tmp_path / "out", source="lrt", target="hf", report=lambda _: None)
    convert(folder, tmp_path / "again", source="hf", target="lrt", report=lambda _: None)
    lrt.load(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    transformers.AutoConfig.from_pretrained(folder)
    assert "marker" not in (tmp_path / "out" / "modeling_lrt.py").read_text()  # the copy is ours


@pytest.mark.parametrize(
    "name", ["pipeline", "Trainer", "AutoModelForCausalLM", "DetrForObjectDetection", "evil", "__spec__", 3, None]
)
def test_only_a_causal_language_model_is_built_from_a_config(name: Any, unasked: Path, tmp_path: Path) -> None:
    lrt.save(lrt.adapt(llama()), tmp_path / "ours")
    table = json.loads((tmp_path / "ours" / "config.json").read_text())
    table["adapted"]["architecture"] = name
    (tmp_path / "ours" / "config.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"transformers .* has no causal language model {name}"):
        lrt.load(tmp_path / "ours")


def test_an_adapter_does_not_lead_to_its_base(unasked: Path, tmp_path: Path) -> None:
    base = evil(tmp_path / "evil", unasked, model_type="llama")
    (base / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/evil", "peft_type": "LORA"})
    )
    with pytest.raises(ValueError, match="is a PEFT adapter: merge it"):
        open_decoder(base, dtype="auto")


def test_weights_that_are_pickled_or_damaged_are_named_in_one_line(unasked: Path, tmp_path: Path) -> None:
    base = evil(tmp_path / "evil", unasked, model_type="llama", auto_map={})
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-9])
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: weights.write_bytes(content.replace(b'"F32"', b'"F99"')), "model.safetensors: .*F99")
    ]
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        open_decoder(base, dtype="auto")
    for change, text in cases:
        change()
        with pytest.raises(ValueError, match=text) as caught:
            open_decoder(base, dtype="auto")
        assert "\n" not in str(caught.value)
    weights.unlink()
    torch.save(llama().state_dict(), base / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="holds no model.safetensors but pytorch_model.bin, which lrt does not open: load it"
    ) as caught:
        open_decoder(base, dtype="auto")
    assert "\n" not in str(caught.value)


DOORS = {
    "from_pretrained": {
        "lrt/serialization/decoders.py",
        "lrt/serialization/adapted.py",
        "lrt/huggingface/loading.py",
        "tools/experiments/extract_smollm2.py",
    },  # the last three: a config that is built already, a GenerationConfig, and an installed package
    "from_config": {"lrt/serialization/decoders.py"},
}


def test_every_other_door_is_shut() -> None:
    """Foreign folders are opened in one module, torch.load takes tensors alone, and no pickle is loaded as it is."""
    files = [file for folder in ("lrt", "tools", "recipes") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 60
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            here = f"{name}:{call.lineno}: {ast.unparse(call)}"
            if call.func.attr == "from_pretrained" or call.func.attr == "from_config" and owner.startswith("Auto"):
                assert name in DOORS[call.func.attr], here
            elif owner == "torch" and call.func.attr == "load":
                assert given.get("weights_only") == "True", here
            elif owner in ("pickle", "dill", "marshal", "shelve", "joblib"):
                assert call.func.attr not in ("load", "loads", "open"), here
            elif owner == "np" and call.func.attr == "load":
                assert given.get("allow_pickle", "False") == "False", here


@pytest.mark.parametrize("positions", [-1, 0, "x", 1.5])
def test_a_decoder_whose_config_has_odd_positions_is_refused_in_one_line(tmp_path: Path, positions: Any) -> None:
    """Found by fuzzing: -1 was a RuntimeError of the comparison with the decoder."""
    llama().save_pretrained(tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    table = json.loads(config.read_text()) | {"max_position_embeddings": positions}
    config.write_text(json.dumps(table))
    from lrt.conversion.opening import open_model

    if positions == 0:  # as if it named none
        open_model(tmp_path / "odd")
        return
    with pytest.raises(ValueError, match="max_position_embeddings"):
        open_model(tmp_path / "odd")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"recurrence": {"x": 1}}, "unknown key 'recurrence.x'"),
        ({"recurrence": []}, r"recurrence = \[\]: expected a table"),
        ({"recurrence": {"kv_projection": "yes"}}, "recurrence.kv_projection = 'yes': expected true or false"),
        ({"schedule": {"kind": ["refine"]}}, "schedule.kind = .*: expected one of"),
        ({"schedule": {"kind": "interleaved", "sweeps": True}}, "schedule.sweeps = True: expected a whole number"),
        ({"schedule": None}, "schedule = None: expected a table"),
        ({"torch_dtype": "int4096"}, "torch_dtype is missing or of another kind"),
        ({"torch_dtype": 3}, "torch_dtype is missing or of another kind"),
        ({"adapted": 0}, "adapted is missing or of another kind"),
        ({"adapted": {"architecture": {}, "config": {}}}, "no causal language model"),
        ({"adapter": [1]}, "adapter is missing or of another kind"),
        ({"base_fingerprint": {"a": 1}}, "base_fingerprint is missing or of another kind"),
    ],
)
def test_a_saved_models_config_of_any_shape_is_refused_in_one_line(tmp_path: Path, changes: Any, message: str) -> None:
    lrt.save(lrt.adapt(llama()), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as refused:
        lrt.load(tmp_path / "model")
    assert len(str(refused.value)) < 2000
