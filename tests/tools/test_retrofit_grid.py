"""tools/experiments/retrofit_grid.py on a tiny decoder: resumes, ends in time, and treats the twin as it treats the model."""

import copy
import dataclasses
import gc
import json
import math
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_decoders import make
from torch._dynamo.utils import counters

import lrt
from lrt.schedules import from_config
from lrt.train.distributed.graphs import Runner, single_device, working_copy
from lrt.train.distributed.world import World

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools" / "experiments"))
import retrofit_grid as tool  # noqa: E402

SETS = {"model.sequence_length": 32, "training.batch_tokens": 128, "training.micro_batch": 2, "evaluation.batch": 4, "training.warmup_steps": 1}
ALL, STAGED = dict(tool.GRID), "refine 2, stage 1 of a fifth"
OPTIONS = [*(f"--set={key}={value}" for key, value in SETS.items()), "--grid-tokens", "384", "--final-tokens", "512", "--seeds", "2"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "GRID", {name: tool.GRID[name] for name in (STAGED, "refine 2")})
    monkeypatch.setattr(tool, "TWINS", {name: tool.TWINS[name] for name in ("twin, lr 1e-4", "twin, lr 3e-4")})
    make("smollm", vocab_size=260, dtype=torch.float32, layers=2).save_pretrained(tmp_path / "model")
    (tmp_path / "tokens").mkdir()
    text = np.frombuffer((ROOT / "lrt/data/demo/devils_dictionary_train.txt").read_bytes(), dtype=np.uint8).astype(np.uint16)
    np.save(tmp_path / "tokens" / "train.npy", text[:1000])
    np.save(tmp_path / "tokens" / "validation.npy", text[1000 : 1000 + 6 * 32 + 1])
    np.save(tmp_path / "tokens" / "bytes.npy", np.array([0, *[1] * 255, *[0] * 4], dtype=np.uint8))
    return tmp_path


def run(place, *more):
    code = tool.main(["run", str(place / "model"), str(place / "tokens"), str(place / "results.jsonl"), *OPTIONS, *more])
    path = place / "results.jsonl"
    return code, [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_the_whole_comparison_and_again(place, capsys):
    code, lines = run(place)
    assert code == 0
    names = [(x["phase"], x["name"], x["seed"], x["tokens"]) for x in lines]
    assert names[:6] == [
        ("start", "twin", 0, 0), ("start", "adapted", 0, 0), ("grid", "twin, lr 1e-4", 0, 384), ("grid", "twin, lr 3e-4", 0, 384),
        ("grid", STAGED, 0, 384), ("grid", "refine 2", 0, 384),
    ]  # fmt: skip
    chosen = min(lines[4:6], key=lambda x: x["decode"])["name"]
    twin = min(lines[2:4], key=lambda x: x["plain"])["name"]
    assert names[6:] == [("final", name, seed, 512) for seed in (1, 2) for name in (chosen, twin)]
    assert [x["stage_1"] for x in lines[:6]] == [0.0, 0.0, 0.0, 0.0, 0.2, 0.0] and {x["stage_1"] for x in lines[6::2]} == {lines[6]["stage_1"]}
    start = lines[1]
    assert start["zero"] == pytest.approx(lines[0]["plain"]) == pytest.approx(start["decode"]) == pytest.approx(start["parallel"])
    assert all(x["plain"] < start["zero"] for x in lines[2:4]) and all(x["decode"] < start["zero"] for x in lines[4:6])
    said = capsys.readouterr().out
    assert "| zero | parallel | **decode** | twin (no memory) |" in said
    gap = [x["decode"] - y["plain"] for x, y in zip(lines[6::2], lines[7::2])]
    assert f"{chosen}, 512 tokens, decode minus twin, bits per byte: {sum(gap) / 2:+.4f}, standard deviation" in said
    other = [{**x, "graphs": True} if x["phase"] == "final" and "plain" in x else x for x in lines]
    assert "minus twin" in tool.table(lines) and "minus twin" not in tool.table(other)
    # A run that was killed: its last whole line is missing, and half of it is there.
    path = place / "results.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:-1], whole[-1][:30]]))
    assert tool.main(["table", str(path)]) == 0
    code = tool.main(["run", str(place / "model"), str(place / "tokens"), str(path), *OPTIONS])
    again = tool.read_lines(path)
    assert code == 0 and len(again) == len(lines) and path.read_text().splitlines()[: len(whole) - 1] == whole[:-1]
    assert {k: v for k, v in again[-1].items() if "seconds" not in k} == {k: v for k, v in lines[-1].items() if "seconds" not in k}


def test_shares_make_up_the_whole(place, monkeypatch):
    """Two processes: one waits for the grid of the other, and each then runs seeds of its own."""
    waited = []
    monkeypatch.setattr(tool.time, "sleep", lambda seconds: waited.append(run(place, "--share", "0/2")))  # the other, while this one waits
    code, lines = run(place, "--share", "1/2")
    assert code == 0 and [(code, len(x)) for code, x in waited] == [(0, 8)]
    alone = place / "alone.jsonl"
    assert tool.main(["run", str(place / "model"), str(place / "tokens"), str(alone), *OPTIONS]) == 0
    key = lambda x: (x["phase"], x["name"], x["seed"], x.get("decode"), x.get("plain"))  # noqa: E731
    assert sorted(map(str, map(key, lines))) == sorted(map(str, map(key, tool.read_lines(alone)))) and len(lines) == 10


@pytest.mark.parametrize("text", ["1", "2/2", "a/b", "-1/2"])
def test_a_share_that_is_none(place, text, capsys):
    with pytest.raises(SystemExit):
        run(place, f"--share={text}")
    assert "is not I/N with 0 <= I < N" in capsys.readouterr().err


def test_it_ends_in_time_and_the_grid_leaves_time_for_the_rest(place, monkeypatch):
    code, lines = run(place, "--seconds", "0")
    assert code == 0 and lines == []
    trained = []
    monkeypatch.setattr(tool, "train", lambda *args, deadline, **more: trained.append(deadline) or None)  # as if every deadline had come
    code, lines = run(place, "--seconds", "1000", "--grid-seconds", "500")
    assert [x["phase"] for x in lines] == ["start", "start"] and len(trained) == 4
    assert max(trained) - min(trained) < 10  # the grid's deadline, less the time that scores take


def test_seeds_run_in_pairs_and_stages_are_told_apart(place, monkeypatch):
    asked = []

    def train(*args, deadline, **more):
        asked.append((more["seed"], more["stage_1"]))
        return None if len(asked) == 7 else 1000.0  # the second seed of the chosen setting meets its deadline

    monkeypatch.setattr(tool, "train", train)
    code, lines = run(place, "--seconds", "1e6")
    assert code == 0 and [x["seed"] for x in lines if x["phase"] == "final"] == [1, 1]
    assert [seed for seed, _ in asked] == [0, 0, 0, 0, 1, 1, 2] and [stage for _, stage in asked[:4]] == [0.0, 0.0, 0.2, 0.0]
    # A second seed that would leave no time for its twin is not begun.
    code, lines = run(place, "--seconds", "1500")
    assert code == 0 and len(asked) == 7 and len(lines) == 8
    line = next(x for x in lines if x["name"] == STAGED)
    task = tool.Task("grid", STAGED, 0, 384, tuple(line["overrides"]), 0.2)
    assert task.is_written(line) and not task._replace(stage_1=0.0).is_written(line) and not task._replace(graphs=True).is_written(line)


@pytest.mark.parametrize("name", [STAGED, "refine 2", "interleaved 2", "twin, lr 3e-4"])
def test_the_runner_trains_as_the_model_itself(place, name):
    """Through both stages, in float32, bit for bit; a stage's runner is gone before the next is made; scores are of what was trained."""
    setting = {**ALL, **tool.TWINS}[name]
    recipe = lrt.load_recipe(tool.RECIPE, overrides=[*(f"{key}={value}" for key, value in SETS.items()), *setting.overrides])
    rows = torch.randint(0, 256, (9, 33), generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(recipe.parallel, compile=False, param_dtype="float32")
    made = []

    def make_runner(model):
        gc.collect()
        assert all(compute() is None for compute, _ in made)
        runner = single_device(model, config, World(0, 1, rows.device, sharded=False, working_copy=True))
        made.append((weakref.ref(runner.compute), {n for n, p in runner.compute.named_parameters() if p.requires_grad}))
        return runner

    plain = tool.prepare(make("smollm", vocab_size=260, dtype=torch.float32, layers=2), recipe, recurrent=not name.startswith("twin"))
    ours = copy.deepcopy(plain)
    more = {"seed": 3, "tokens": 10 * 128, "stage_1": setting.stage_1}
    assert tool.train(plain, recipe, rows, **more) and tool.train(ours, recipe, rows, make_runner=make_runner, **more)
    before = dict(tool.prepare(make("smollm", vocab_size=260, dtype=torch.float32, layers=2), recipe, recurrent=False).named_parameters())
    for (key, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert torch.equal(a, b) and a.grad is None and not torch.equal(a, before.get(key, torch.zeros_like(a))), key
    memory, everything = set(ours.memory_parameters()), {n for n, _ in ours.named_parameters()}
    assert [names for _, names in made] == ([memory, everything] if setting.stage_1 and memory else [everything])
    sizes = torch.ones(260, dtype=torch.int64)
    scores = [tool.bits_per_byte(model, recipe, rows[:4], sizes, runner=lrt.decoding.step.eager) for model in (ours, plain)]
    assert scores[0] == scores[1]


@torch._dynamo.config.patch(recompile_limit=64)
def test_runs_share_compiled_graphs():
    """A graph for each kind of pass, stage 1's also for the first block and the others; another model of its kind compiles none."""
    torch._dynamo.reset()
    rows = torch.randint(0, 256, (9, 33), generator=torch.Generator().manual_seed(0))
    for name, graphs in (("twin, lr 3e-4", 1), ("twin, lr 1e-3", 0), (STAGED, 2 + 4), ("refine 2", 0), ("refine 1", 0)):
        setting = {**ALL, **tool.TWINS}[name]
        recipe = lrt.load_recipe(tool.RECIPE, overrides=[*(f"{key}={value}" for key, value in SETS.items()), *setting.overrides])
        model = tool.prepare(make("smollm", vocab_size=260, dtype=torch.float32, layers=2), recipe, recurrent=not name.startswith("twin"))
        before = counters["stats"]["unique_graphs"]
        tool.train(model, recipe, rows, seed=0, tokens=5 * 128, stage_1=setting.stage_1, make_runner=compiled_runner)
        assert counters["stats"]["unique_graphs"] - before == graphs, name
        del model
        gc.collect()  # as between runs


def compiled_runner(model):
    compute = working_copy(model, dtype=torch.bfloat16)
    for block in compute.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    return Runner(model, compute, graphs=False)


def test_the_grid_stands_around_the_recipe():
    assert len(ALL) <= 8 and ALL["refine 2"] == tool.Setting() and ALL[STAGED] == tool.Setting(stage_1=0.2)
    recipes = [lrt.load_recipe(tool.RECIPE, overrides=list(setting.overrides)) for setting in (*ALL.values(), *tool.TWINS.values())]
    assert len({(repr(r), s.stage_1) for r, s in zip(recipes, (*ALL.values(), *tool.TWINS.values()))}) == len(ALL) + 2  # a twin has the recipe's rate
    assert sorted(r.optimizer.adamw_lr for r in recipes[len(ALL) :])[1] == lrt.load_recipe(tool.RECIPE).optimizer.adamw_lr == 3e-4
    assert all(from_config(r.schedule) for r in recipes)


def test_a_decoder_that_cannot_be_captured_is_scored_eagerly(place, monkeypatch, capsys):
    def refuse(step, active):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(tool.decoding, "graphed", refuse)
    monkeypatch.setattr(tool, "GRID", {})
    code, lines = run(place, "--grid-tokens", "128")
    assert code == 0 and lines[1]["decode"] == pytest.approx(lines[0]["plain"])
    said = capsys.readouterr().err
    assert said.count("--decode graphed failed (operation not permitted when stream is capturing): eager from here on") == 1


def test_training_stops_at_its_deadline(place):
    recipe = lrt.load_recipe(tool.RECIPE, overrides=[f"{key}={value}" for key, value in SETS.items()])
    model = tool.prepare(make("smollm", vocab_size=260, dtype=torch.float32, layers=2), recipe, recurrent=True)
    rows = torch.randint(0, 256, (8, 33))
    assert tool.train(model, recipe, rows, seed=0, tokens=10**9, deadline=0.0) is None


def test_the_twin_sees_the_same_rows_at_the_same_rates(monkeypatch):
    recipe = lrt.load_recipe(tool.RECIPE, overrides=[f"{key}={value}" for key, value in SETS.items()])
    rows = torch.randint(0, 256, (9, 33), generator=torch.Generator().manual_seed(0))
    seen = {}
    for recurrent in (True, False):
        model = tool.prepare(make("smollm", vocab_size=260, dtype=torch.float32, layers=2), recipe, recurrent=recurrent)
        assert (len(model.memory_parameters()) > 0) == recurrent and model.backbone.loss_chunk == recipe.parallel.loss_chunk
        log = seen[recurrent] = []
        original = type(model).forward

        def forward(self, ids, *args, log=log, original=original, **more):
            log.append(ids.clone())
            return original(self, ids, *args, **more)

        monkeypatch.setattr(type(model), "forward", forward)
        step = torch.optim.AdamW.step

        def spy(self, *args, log=log, step=step, **more):
            log.append(torch.tensor(self.param_groups[0]["lr"]))
            return step(self, *args, **more)

        monkeypatch.setattr(torch.optim.AdamW, "step", spy)
        tool.train(model, recipe, rows, seed=3, tokens=7 * 128)
        monkeypatch.undo()
    assert len(seen[True]) == 7 * (2 + 1) == len(seen[False])
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False]))


def test_the_twin_is_the_decoder(place):
    decoder = make("smollm", vocab_size=260, dtype=torch.float32, layers=2)
    recipe = lrt.load_recipe(tool.RECIPE)
    ids = torch.randint(0, 256, (2, 33))
    expected = decoder(ids[:, :-1], labels=None).logits
    twin = tool.prepare(decoder, recipe, recurrent=False)
    assert torch.equal(twin(ids[:, :-1], return_logits=True).logits, expected)
    rows, sizes = ids, torch.ones(260, dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids[:, 1:].flatten())
    score = tool.bits_per_byte(twin, recipe, rows, sizes, runner=lrt.decoding.step.eager)
    assert score == {"plain": pytest.approx(loss.item() / math.log(2))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "/nowhere", "/nowhere", "r.jsonl"], "error: "),
        (["run", "/nowhere", "/nowhere", "r.jsonl", "--set", "optimizer.adamw_lrr=1"], "unknown key 'optimizer.adamw_lrr'"),
        (["tokens", "/nowhere", "/tmp/none", "/nowhere/*.parquet", "x"], "error: "),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert tool.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not any("Traceback" in line for line in said)
