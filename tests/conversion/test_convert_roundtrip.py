"""Converting is not believed, it is checked: every pair of kinds, there and back, gives the same tensors and logits."""

import json

import pytest
import torch
from conversions import NANOCHAT, logits, quiet, same_tensors
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import model_configs, randomized, recurrence_configs

import lrt
from lrt.config import ModelConfig
from lrt.conversion import KINDS, convert, streamed_model
from lrt.conversion.official import official_from_native, schedule_from_official
from lrt.conversion.official_reference import Precision
from lrt.conversion.verification import verify
from lrt.model import build_model
from lrt.schedules import from_config
from lrt.serialization import native_config
from lrt.serialization.tensors import in_memory

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # an example writes many files: shrinking would take minutes
WRITTEN = ("lrt", "official", "nanochat", "hf")
OFFICIAL = {"rope_dtype": "bfloat16", "mlp_ratio": 4.0, "qk_norm": True, "softcap": 15.0, "vocab_multiple": 64}
SCHEDULES = st.sampled_from(
    [
        lrt.interleaved(2),
        lrt.interleaved(3, kv_refresh=True),
        lrt.refine(2),
        lrt.refine(2, weights=(0.1, 0.3, 0.6), cut_gradient=True),
    ]
)


@st.composite
def any_models(draw):
    config = draw(model_configs())
    recurrence = draw(st.one_of(st.none(), recurrence_configs(config.n_layers)))
    model = randomized(build_model(config, recurrence), draw(st.integers(0, 2**31)))
    if recurrence is not None:
        model.train_schedule = draw(SCHEDULES)
    return model.eval()


@st.composite
def models_for(draw, kinds):
    """A model that every one of ``kinds`` can express."""
    if "nanochat" in kinds:
        config = draw(
            model_configs(
                **OFFICIAL,
                value_embeddings="alternating",
                gate_channels=None,
                residual_scales=True,
                embedding_residual=True,
            )
        )
        return randomized(build_model(config, None), draw(st.integers(0, 2**31))).eval()
    if "official" not in kinds:
        return draw(any_models())
    recurrent = draw(st.booleans())
    config = draw(model_configs(**OFFICIAL, **({"value_embeddings": "all"} if recurrent else {})))
    recurrence = None
    if recurrent:
        norms = st.sampled_from(["rms", "final"])
        recurrence = lrt.RecurrenceConfig(
            sharing="layerwise",
            source_layer=config.n_layers,
            gate_channels=config.gate_channels,
            memory_norm=draw(norms),
        )
    model = randomized(build_model(config, recurrence), draw(st.integers(0, 2**31)))
    if recurrent:
        model.train_schedule = draw(SCHEDULES)
    return model.eval()


@pytest.mark.parametrize("first", WRITTEN)
@pytest.mark.parametrize("second", WRITTEN)
@settings(max_examples=4, phases=QUICK)
@given(data=st.data())
def test_every_pair_there_and_back(tmp_path_factory, first, second, data):
    model, place = data.draw(models_for((first, second))), tmp_path_factory.mktemp("pair")
    lrt.save(model, place / "start", shard_size=data.draw(st.sampled_from([None, 2000])))
    for number, (source, target) in enumerate([("lrt", first), (first, second), (second, "lrt")]):
        path = place / ("start" if number == 0 else str(number - 1))
        convert(
            path,
            place / str(number),
            source=source,
            target=target,
            shard_size=data.draw(st.sampled_from([None, 3000])),
            report=quiet,
        )
    back = lrt.load(place / "2")
    assert same_tensors(model.state_dict(), back.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(logits(model), logits(back)))
    assert back.train_schedule == model.train_schedule


@settings(max_examples=4, phases=QUICK)
@given(model=any_models(), dtype=st.sampled_from([None, torch.float64]))
def test_loaded_tensors_lie_where_torch_puts_its_own(tmp_path_factory, model, dtype):
    """A tensor of a file may begin at any address: equal weights gave other logits on processors whose kernels look at
    it."""
    place = tmp_path_factory.mktemp("aligned")
    lrt.save(model, place / "m", shard_size=3000)
    back = lrt.load(place / "m", dtype=dtype)
    assert torch.empty(3).data_ptr() % 64 == 0
    assert [name for name, p in back.named_parameters() if p.data_ptr() % 64] == []


@settings(max_examples=8, phases=QUICK)
@given(model=any_models(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_narrower_dtype_rounds_every_tensor_once(tmp_path_factory, model, dtype):
    place = tmp_path_factory.mktemp("dtype")
    lrt.save(model, place / "start")
    lines = []
    done = convert(place / "start", place / "out", source="lrt", target="lrt", dtype=dtype, report=lines.append)
    assert same_tensors({n: t.to(dtype) for n, t in model.state_dict().items()}, lrt.load(place / "out").state_dict())
    assert [c.mode for c in done.verification.rounding] == ["zero", "decode"] and any(
        "rounding to" in line for line in lines
    )


@settings(max_examples=8, phases=QUICK)
@given(model=any_models())
def test_what_the_official_code_cannot_say_is_refused_or_converted_exactly(tmp_path_factory, model):
    """No third outcome: a random model either arrives with the same logits, or is refused with every reason."""
    place = tmp_path_factory.mktemp("refused")
    lrt.save(model, place / "start")
    try:
        convert(place / "start", place / "out", source="lrt", target="official", report=quiet)
    except ValueError as error:
        assert "cannot express this model" in str(error) or "answers differently" in str(error)
        assert sorted(p.name for p in place.iterdir()) == ["start"]
    else:
        assert verify(
            KINDS["lrt"].read(place / "start"), KINDS["official"].read(place / "out"), report=quiet
        ).comparisons


@pytest.mark.parametrize("tag", ["d2_lrt", "d2_baseline"])
def test_a_folder_that_the_official_code_wrote(tmp_path, tag):
    """In float64, where processors agree: what is left is the float32 noise of the record,
    1.32e-5 and 0.87e-5 on logits of 11.8."""
    expected = load_file(NANOCHAT / "base_checkpoints" / tag / "expected.safetensors")
    convert(NANOCHAT / "base_checkpoints" / tag, tmp_path / "lrt", source="official", target="lrt", report=quiet)
    model = lrt.load(tmp_path / "lrt", dtype=torch.float64)
    with torch.no_grad():
        out = model(expected["tokens"], schedule=lrt.baseline())
    assert (out.logits - expected["logits"]).abs().max() < 1.4e-5
    assert json.loads((tmp_path / "lrt" / "config.json").read_text())["step"] == 100


def test_back_to_the_official_folder_byte_for_byte_in_values(tmp_path):
    """The official file comes back: names, order of rows in the triple gate, and values (bfloat16 embeddings as
    float32)."""
    source = NANOCHAT / "base_checkpoints" / "d2_lrt"
    convert(source, tmp_path / "lrt", source="official", target="lrt", report=quiet)
    convert(tmp_path / "lrt", tmp_path / "back", source="lrt", target="official", report=quiet)
    there = torch.load(source / "model_000100.pt", weights_only=True)
    back = torch.load(tmp_path / "back" / "base_checkpoints" / "d2" / "model_000100.pt", weights_only=True)
    assert same_tensors({n: t.float() for n, t in there.items()}, back)
    metas = [
        json.loads((p / "meta_000100.json").read_text())
        for p in (source, tmp_path / "back" / "base_checkpoints" / "d2")
    ]
    assert metas[0]["model_config"] == metas[1]["model_config"] and metas[1]["step"] == 100


def test_exact_rotary_tables_are_noticed_when_exporting(tmp_path):
    """A model with float32 tables would answer differently under the official code:
    the comparison says so, nothing is left."""
    config = ModelConfig(n_layers=2, width=32, n_heads=2, vocab_size=50, sequence_length=16)
    recurrence = lrt.RecurrenceConfig(sharing="layerwise", source_layer=2)
    lrt.save(randomized(build_model(config, recurrence), 0), tmp_path / "start")
    with pytest.raises(ValueError, match="answers differently"):
        convert(tmp_path / "start", tmp_path / "out", source="lrt", target="official", report=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["start"]
    lines = []
    convert(tmp_path / "start", tmp_path / "out", source="lrt", target="official", compare=None, report=lines.append)
    assert any("model.rope_dtype" in line for line in lines)


def official_config(schedule):
    recurrence = lrt.RecurrenceConfig(sharing="layerwise", source_layer=1, gate_channels=32)
    model = build_model(ModelConfig(n_layers=1, rope_dtype="bfloat16", gate_channels=32), recurrence, device="meta")
    model.train_schedule = schedule
    return official_from_native(native_config(model))


NAMED = [
    lrt.interleaved(2),
    lrt.interleaved(5, kv_refresh=True),
    lrt.refine(1),
    lrt.refine(3, weights=(0, 1, 1, 2), cut_gradient=True),
]


@pytest.mark.parametrize("schedule", NAMED)
def test_a_schedule_with_an_official_name_keeps_it(schedule):
    official, _ = official_config(schedule)
    assert from_config(schedule_from_official(official)) == schedule


def test_the_schedule_of_the_recipes_is_written_as_the_official_code_reads_it():
    """Before one pass the initialization is all that there is to cut; the official key is a boolean."""
    official, notes = official_config(lrt.refine(1, weights=(0, 1), cut_gradient="initialization"))
    assert official["multi_refine_detach"] is True and not any("has no official name" in note for note in notes)
    assert from_config(schedule_from_official(official)) == lrt.refine(1, weights=(0, 1), cut_gradient=True)


@pytest.mark.parametrize("schedule, written", [
    (lrt.interleaved(2, sweeps=2), "interleaved(2)"),
    (lrt.interleaved(2, cut_gradient="initialization"), "interleaved(2)"),
    (lrt.refine(2, cut_gradient="initialization"), "refine(2)"), (lrt.refine(1, settle=2), "refine(1)"),
])  # fmt: skip
def test_a_schedule_without_one_is_said(schedule, written):
    official, notes = official_config(schedule)
    assert any(f"has no official name: written as {written}" in note for note in notes)
    assert official.get("multi_refine_detach") in (None, False)


def official_variant(place, tag, *, config=lambda c: c, state=lambda s: s, drop=()):
    """A copy of an official checkpoint as another commit, or another script of it, would have written it."""
    source = NANOCHAT / "base_checkpoints" / tag
    meta = json.loads((source / "meta_000100.json").read_text())
    place.mkdir()
    kept = {k: v for k, v in meta.items() if k not in drop}
    (place / "meta_000100.json").write_text(json.dumps(kept | {"model_config": config(meta["model_config"])}))
    torch.save(state(torch.load(source / "model_000100.pt", weights_only=True)), place / "model_000100.pt")
    return place


SEVEN = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
VARIANTS = {
    "sft": ("d2_lrt", {"config": lambda c: {k: c[k] for k in SEVEN}}),
    "rl": ("d2_lrt", {"drop": ("step", "user_config")}),
    "compiled": ("d2_lrt", {"state": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()}}),
    "old_file_format": ("d2_lrt", {}),
    "no_residual_scales": (
        "d2_lrt",
        {"state": lambda s: {n: t for n, t in s.items() if n not in ("resid_lambdas", "x0_lambdas")}},
    ),
    "old_nanochat": (
        "d2_baseline",
        {
            "config": lambda c: {k: c[k] for k in SEVEN[:-1]},
            "state": lambda s: {
                n: t for n, t in s.items() if n.startswith(("transformer", "lm_head")) and "ve_gate" not in n
            },
        },
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_of_other_times_and_scripts(tmp_path, name):
    tag, change = VARIANTS[name]
    source = official_variant(tmp_path / "source", tag, **change)
    if name == "old_file_format":
        path = source / "model_000100.pt"
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    done = convert(source, tmp_path / "out", source="official", target="lrt", report=quiet)
    model = lrt.load(tmp_path / "out")
    assert done.verification.comparisons and done.source.step == 100
    assert (model.recurrence is not None) == (tag == "d2_lrt")
    if name == "old_nanochat":
        assert model.backbone.config.window_pattern == "L" and model.backbone.config.value_embeddings == "none"


@pytest.mark.parametrize("mode", ["zero", "decode"])
def test_matrices_that_are_read_when_their_module_runs_are_called_in_every_pass(monkeypatch, mode):
    """A block that joins its projections into one product must not take them from modules that are yet to be filled."""
    monkeypatch.setattr(streamed_model, "SMALL", 16)
    config = ModelConfig(n_layers=2, width=32, n_heads=2, vocab_size=64, sequence_length=16)
    model = randomized(build_model(config, lrt.RecurrenceConfig()), 0).eval()
    shapes = build_model(config, lrt.RecurrenceConfig(), device="meta")
    filled = streamed_model.filled_model(shapes, in_memory(model.state_dict()), Precision(keep=False))
    tokens = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        streamed_model.native_logits(filled, tokens, mode), streamed_model.native_logits(model, tokens, mode)
    )
