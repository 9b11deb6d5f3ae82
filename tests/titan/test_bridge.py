"""The bridge without torchtitan: its settings, its loss, its plan, and what it leaves for conversion."""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT
from titan_parts import RECURRENCE, SMALL, job, leave_checkpoint, recurrence, schedule, small, trainee

import lrt
from lrt.accounting import training_flops
from lrt.commands import torchtitan as command
from lrt.commands.train import main
from lrt.conversion import convert
from lrt.conversion.opening import open_model, open_tokenizer
from lrt.conversion.titan import sharded
from lrt.model import build
from lrt.titan.model import grouped_loss, native, parallel_form, parameters_and_flops, with_state
from lrt.titan.settings import FLAVORS, model_keys, recipe_of

ALONE = SimpleNamespace(world_size=1, dp_replicate=1, dp_shard=1, world_mesh=SimpleNamespace(device_type="cpu"))
PHASES = schedule(phases=[{"until": 0.5, "kind": "baseline"}, {"until": 1.0, "kind": "refine"}])


def rows():
    tokens = torch.randint(0, 257, (4, 33), generator=torch.Generator().manual_seed(5))
    labels = tokens[:, 1:].clone()
    labels[1, 20:] = -100
    return tokens[:, :-1], labels


# ------------------------------------------------------------------ without the extra, and the command


def test_a_missing_torchtitan_or_another_version_is_said_in_one_line(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert main(["--engine", "torchtitan", "--recipe", "titan_lrt_debug"]) == 2
    assert (
        capsys.readouterr().err
        == 'error: lrt.titan needs torchtitan 0.2.2, which is not installed: pip install -e ".[titan]"\n'
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.0")
    with pytest.raises(
        ImportError, match=r"torchtitan 0\.3\.0 is installed, but lrt\.titan is written for 0\.2\.2, the last"
    ):
        command.check_torchtitan()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.2")
    monkeypatch.setitem(sys.modules, "torchtitan.models.moe.kernels", SimpleNamespace())
    command.check_torchtitan()


def test_the_command_hands_a_recipe_over(monkeypatch):
    monkeypatch.setattr(command, "check_torchtitan", lambda: None)
    ran, here = [], {}
    monkeypatch.setattr(command.os, "execv", lambda program, line: ran.append(line))
    monkeypatch.setattr(command.os, "environ", here)
    overrides = [
        "training.steps=5",
        "compile.enable=true",
        "checkpoint.enable=false",
        "schedule.weights=[0.5, 0.5]",
        "job.dump_folder=a b",
    ]
    command.hand_over("titan_lrt_debug", overrides=overrides)
    recipe = str(ROOT / "recipes" / "titan_lrt_debug.toml")
    flags = [
        "--training.steps=5",
        "--compile.enable",
        "--checkpoint.no-enable",
        "--schedule.weights",
        "0.5",
        "0.5",
        "--job.dump_folder=a b",
    ]
    stock = ["-m", "torchtitan.train", "--job.config_file", recipe, "--experimental.custom_import", "lrt.titan"]
    assert ran == [[sys.executable, *stock, *flags]] and here["WORLD_SIZE"] == "1"
    with pytest.raises(ValueError, match="write section.key=value"):
        command.arguments_of("titan_lrt_debug", overrides=["steps=3"])
    with pytest.raises(ValueError, match="write them into a file"):
        command.arguments_of("titan_lrt_debug", overrides=['schedule.phases=[{"until": 1.0}]'])


def test_a_recipe_for_the_other_trainer_is_told_apart(capsys):
    with pytest.raises(ValueError, match="lrt_tiny.toml has no .job., so it is a recipe of lrt's own trainer"):
        command.arguments_of("lrt_tiny", overrides=[])
    assert main(["--recipe", "titan_lrt_12l"]) == 2
    assert (
        capsys.readouterr().err
        == "error: titan_lrt_12l.toml is a recipe for torchtitan's trainer: add --engine torchtitan\n"
    )


def test_one_file_alone_names_torchtitan():
    files = {path: path.read_text(encoding="utf-8") for path in (ROOT / "lrt").rglob("*.py")}
    importing = [
        str(path.relative_to(ROOT))
        for path, text in files.items()
        if re.search(r"(?m)^\s*(from|import) torchtitan", text)
    ]
    assert importing == ["lrt/titan/spec.py"]


# ------------------------------------------------------------------ settings


def test_flavors_are_the_models_of_our_recipes():
    for name in ("tiny", "12l", "20l", "24l"):
        made = job(
            model={"flavor": name},
            recurrence=recurrence(),
            training={"seq_len": lrt.load_recipe(f"lrt_{name}").model.sequence_length},
        )
        assert recipe_of(made, model=model_keys(made), recurrent=True).model == lrt.load_recipe(f"lrt_{name}").model
        assert FLAVORS[f"plain_{name}"] == FLAVORS[name]


REFUSED = {
    "parallelism.tensor_parallel_degree = 2: lrt.titan has no tensor parallelism (TP)": {
        "parallelism": {"tensor_parallel_degree": 2}
    },
    "parallelism.context_parallel_degree = 4: lrt.titan has no context parallelism (CP)": {
        "parallelism": {"context_parallel_degree": 4}
    },
    "parallelism.pipeline_parallel_degree = 2: lrt.titan has no pipeline parallelism (PP)": {
        "parallelism": {"pipeline_parallel_degree": 2}
    },
    "parallelism.expert_parallel_degree = 2: lrt.titan has no expert": {"parallelism": {"expert_parallel_degree": 2}},
    "schedule.ramp = 3 would add the values of recurrence.init": {
        "schedule": schedule(kind="refine", ramp=3),
        "checkpoint": {"enable": True, "initial_load_path": "folder"},
    },
    "schedule.phases end at until = [0.5]": {"schedule": schedule(phases=[{"until": 0.5}])},
    "has shares that sum to 0.5": {"schedule": schedule(kind="mixture", mix=[{"share": 0.5}])},
    "source_layer = 9": {"recurrence": recurrence(source_layer=9)},
    "training.dtype = 'bfloat16'": {"training": {"dtype": "bfloat16"}},
    "training.enable_cpu_offload = true": {"training": {"enable_cpu_offload": True}},
    "model.converters = ['float8']": {"model": {"converters": ["float8"]}},
    "optimizer.early_step_in_backward = true": {"optimizer": {"early_step_in_backward": True}},
    "checkpoint.last_save_in_hf = true": {"checkpoint": {"enable": True, "last_save_in_hf": True}},
    "activation_checkpoint.mode = 'memory_budget'": {"activation_checkpoint": {"mode": "memory_budget"}},
    "compile.backend = 'eager'": {"compile": {"enable": True, "backend": "eager"}},
    "compile.components = ['loss']": {"compile": {"enable": True, "components": ["loss"]}},
    'optimizer.matrix_lr has no effect on optimizer.name = "AdamW"': {"optimizer": {"matrix_lr": 0.1}},
    'optimizer.lr = 0.1 has no effect on optimizer.name = "Muon"': {"optimizer": {"name": "Muon", "lr": 0.1}},
    "recurrence = False: the twin without memory is a flavor": {"recurrence": False},
    "model.flavor = '13l': use one of tiny, 12l": {"model": {"flavor": "13l"}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_the_bridge_cannot_do_is_refused_by_name(words):
    made = job(**REFUSED[words])
    with pytest.raises(ValueError) as refused:
        recipe_of(made, model=model_keys(made), recurrent=True)
    assert words in str(refused.value) and "\n" not in str(refused.value).strip()


def test_memory_settings_beside_a_plain_flavor_are_refused():
    made = job(model={"flavor": "plain_tiny"}, recurrence=RECURRENCE)
    with pytest.raises(ValueError, match="recurrence.gate_channels has no effect on model.flavor = 'plain_tiny'"):
        recipe_of(made, model=model_keys(made), recurrent=False)
    made = job(model={"flavor": "plain_tiny"})
    assert recipe_of(made, model=model_keys(made), recurrent=False).recurrence is None
    bare = SimpleNamespace(model=made.model)
    with pytest.raises(ValueError, match='job.custom_config_module is not given, .* set it to "lrt.titan"'):
        recipe_of(bare, model={}, recurrent=False)


# ------------------------------------------------------------------ model, loss and plan

SCHEDULES = {
    "baseline": schedule(kind="baseline"),
    "interleaved": schedule(subsets=3, order="random", sweeps=2),
    "refine": schedule(kind="refine", passes=2, weights=[0.0, 0.3, 0.7], settle=1),
    "chunked": schedule(kind="chunked", chunks=5),
    "mixture": schedule(kind="mixture", mix=[{"share": 0.5, "kind": "baseline"}, {"share": 0.5, "kind": "refine"}]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_loss_and_gradients_are_the_models_own(name):
    model, recipe, _ = trainee(SCHEDULES[name])
    twin = build(recipe)
    for module in (model, twin):
        module.double().train()
    tokens, labels = rows()
    model.step = lambda: 4
    predicted = model(tokens)
    assert type(predicted) is tuple
    loss = grouped_loss(predicted, labels) / (labels != -100).sum()
    drawn, generator = model.timetable.schedule(4), torch.Generator().manual_seed(model.timetable.seed_of(4))
    own = twin(tokens, targets=labels, schedule=drawn, generator=generator).loss
    torch.testing.assert_close(loss, own, rtol=0, atol=1e-12)
    loss.backward()
    own.backward()
    for (key, mine), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12, msg=key)


def test_validation_scores_the_last_group_of_the_last_phase():
    last = {"until": 1.0, "kind": "refine", "passes": 2, "weights": [1.0, 0.0, 0.0]}
    model, recipe, _ = trainee(schedule(phases=[PHASES.phases[0], last]))
    tokens, labels = rows()
    model.eval()
    with torch.no_grad():
        found = grouped_loss(model(tokens), labels) / (labels != -100).sum()
        wanted = model.score(tokens, labels, lrt.refine(2))[-1].sum() / (labels != -100).sum()
    torch.testing.assert_close(found, wanted)


def test_weights_are_those_of_our_trainer_and_flops_count_every_pass():
    model, recipe, _ = trainee(PHASES)
    twin = build(recipe)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    number, flops = parameters_and_flops(model, recipe)
    each = [training_flops(twin, passes, 32) for passes in (lrt.baseline(), lrt.refine(1))]
    assert (
        number == sum(p.numel() for p in twin.parameters())
        and flops == pytest.approx(sum(each) / 2, rel=1e-6)
        and each[1] > 1.9 * each[0]
    )


def test_memory_rests_in_a_plain_phase_and_has_a_state_all_the_same(tmp_path):
    made, recipe = small(PHASES, job={"dump_folder": str(tmp_path)})
    model = parallel_form(native(recipe), ALONE, made)
    model.init_weights()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = with_state([torch.optim.AdamW(model.parameters(), lr=0.1)], model)[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(
        float(optimizer.state[p]["step"]) == 0 and not optimizer.state[p]["exp_avg"].any() for p in model.parameters()
    )
    assert optimizer.param_groups[0]["lr"] == 0.1 and all(p.grad is None for p in model.parameters())
    memory, (tokens, labels) = set(model.memory_parameters()), rows()
    for step, rests in ((4, True), (5, False)):
        model.step = lambda step=step: step
        grouped_loss(model(tokens), labels).backward()
        graded = {name for name, p in model.named_parameters() if p.grad is not None}
        assert graded & memory == (set() if rests else memory) and len(graded - memory) > 10
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "mode, option, wrapped",
    [("full", "2", (0, 1, 2, 3)), ("selective", "2", (1, 3)), ("selective", "op", (0, 1, 2, 3))],
)
def test_activation_checkpointing_as_torchtitan_names_it(tmp_path, mode, option, wrapped):
    settings = {
        "activation_checkpoint": {"mode": mode, "selective_ac_option": option},
        "job": {"dump_folder": str(tmp_path)},
    }
    made = job(recurrence=RECURRENCE, schedule=schedule(kind="refine"), model={**SMALL, "n_layers": 4}, **settings)
    recipe = recipe_of(made, model=model_keys(made), recurrent=True)
    found, gradients = [], []
    for form in (native(recipe), parallel_form(native(recipe), ALONE, made)):
        form.init_weights()
        grouped_loss(form(rows()[0]), rows()[1]).backward()
        found.append(tuple(i for i, block in enumerate(form.blocks) if type(block).__name__ == "CheckpointWrapper"))
        gradients.append([p.grad for p in form.parameters() if p.grad is not None])
    assert found == [(), wrapped]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ------------------------------------------------------------------ checkpoints


@pytest.fixture
def written(tmp_path):
    return tmp_path / "job", leave_checkpoint(tmp_path / "job")


@pytest.mark.parametrize("inside", ["", "checkpoint", "checkpoint/step-7"])
def test_a_checkpoint_converts_and_opens(written, tmp_path, inside):
    folder, model = written
    opened = open_model(folder / inside)
    assert opened.kind == "titan" and open_tokenizer(opened).vocab_size == 257
    assert opened.model.train_schedule == lrt.refine(1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), opened.model.parameters(), strict=True))
    done = convert(folder / inside, tmp_path / "out", target="lrt", report=lambda line: None)
    assert done.source.step == 7 and (tmp_path / "out" / "tokenizer.json").is_file()
    tokens = rows()[0][:2]
    assert torch.equal(lrt.load(tmp_path / "out")(tokens).logits, opened.model(tokens).logits)


def test_a_checkpoint_is_refused_where_it_cannot_be_believed(written, tmp_path):
    folder, _ = written
    with pytest.raises(ValueError, match=r"holds no checkpoint of torchtitan of step 3; it has 7"):
        convert(folder, tmp_path / "out", target="lrt", step=3)
    step, description = folder / "checkpoint" / "step-7", folder / "lrt_titan.json"
    text = description.read_text()
    description.write_text(json.dumps({**json.loads(text), "format": 2}))
    with pytest.raises(ValueError, match="format 2, but this version of lrt reads 1"):
        open_model(folder)
    description.unlink()
    with pytest.raises(ValueError, match="no lrt_titan.json lies there or up to two folders above"):
        open_model(folder)
    description.write_text(text)
    kept = (step / ".metadata").read_bytes()

    class Evil:
        def __reduce__(self):
            return (print, ("no pickle of a checkpoint runs",))

    (step / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        ValueError, match=r"refused, not a table of contents of tensors alone \(it names builtins\.print\)"
    ):
        open_model(folder)
    (step / ".metadata").write_bytes(kept)
    data = next(step.glob("*.distcp"))
    data.write_bytes(bytes(len(data.read_bytes())))
    with pytest.raises(ValueError, match="damaged at byte"):
        sharded(step)["backbone.head.weight"].read()
    data.unlink()
    with pytest.raises(ValueError, match="is missing: the checkpoint is not whole"):
        sharded(step)["backbone.head.weight"].read()
