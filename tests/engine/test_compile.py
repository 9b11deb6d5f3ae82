"""Compiled steps: how many graphs there are, that none is compiled twice, and that a runner's gradients are the
model's."""

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import tiny
from torch._dynamo.utils import counters

import lrt
from lrt.backbone import TokenTable
from lrt.config import ModelConfig, ParallelConfig, Recipe, RecurrenceConfig
from lrt.data import Batch
from lrt.model import build
from lrt.train import plan
from lrt.train.checkpoint.starting_model import shapes_of
from lrt.train.distributed import graphs
from lrt.train.distributed.graphs import Captured, Place, Runner, single_device, working_copy
from lrt.train.distributed.world import World
from lrt.train.optim.groups import MuonAdamW, parameter_groups
from lrt.train.step import train_step
from lrt.train.timetable import Stretch, Timetable

TOOLS = Path(__file__).parent.parent.parent / "tools"
ALONE = World(0, 1, torch.device("cpu"), sharded=False)
ALIGNED = {"projection": "aligned", "residual": "projected"}
EAGER = ParallelConfig(compile=False, param_dtype="float32")


def small(pattern="L", **recurrence):
    torch.manual_seed(0)
    config = ModelConfig(n_layers=3, width=32, n_heads=2, vocab_size=64, sequence_length=16, window_pattern=pattern)
    model = build(Recipe(model=config, recurrence=RecurrenceConfig(separator=1, **recurrence)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(seed=0, length=16):
    tokens = torch.randint(0, 64, (2, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def graphs_of(step):
    """Graphs that the first call compiles; three further ones must compile none."""
    before = counters["stats"]["unique_graphs"]
    step()
    first = counters["stats"]["unique_graphs"]
    for _ in range(3):
        step()
    assert counters["stats"]["unique_graphs"] == first, "a steady step compiled again"
    return first - before


# ------------------------------------------------------------------ graphs


@pytest.mark.parametrize(
    "pattern, windows, recurrence, settled", [("L", 1, {}, 2), ("SL", 2, {}, 4), ("L", 1, ALIGNED, 1)]
)
@torch._dynamo.config.patch(recompile_limit=64)
def test_one_graph_a_window_and_kind_of_pass(pattern, windows, recurrence, settled):
    """All blocks of a window share the graph of a kind of pass: three blocks, and the first is no special case."""
    torch._dynamo.reset()
    model = small(pattern, **recurrence)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    tokens, targets = batch()

    def step(schedule):
        return lambda: model(tokens, targets=targets, schedule=schedule).loss.backward()

    assert graphs_of(step(lrt.baseline())) == windows
    assert graphs_of(step(lrt.refine(1))) == windows  # the pass with memory
    assert graphs_of(step(lrt.refine(3))) == 0
    # The pass with memory and without gradient, and the one whose memory has none to hand on;
    # what a map made of it has one.
    assert graphs_of(step(lrt.refine(1, settle=1))) == settled
    assert graphs_of(step(lrt.refine(2, settle=3))) == 0
    # An initialization that keeps its keys, and one graph a residue: on the CPU the window is in the mask alone.
    assert graphs_of(step(lrt.interleaved(2))) == windows + 2
    # residue 0, all of whose neighbours are fresh, and residue 1 where it is not the last
    assert graphs_of(step(lrt.interleaved(2, sweeps=2))) == 2


@pytest.mark.parametrize("recurrence", [{}, ALIGNED])
@torch._dynamo.config.patch(recompile_limit=64)
def test_narrow_passes_compile_no_more_graphs(recurrence):
    """What the shared blocks leave is laid out as what a block leaves; numbers and gradients are those of eager
    blocks."""
    torch._dynamo.reset()
    model = small(blocks=(2, 3), **recurrence)
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    tokens, targets = batch()

    def step(schedule):
        return lambda: model(tokens, targets=targets, schedule=schedule).loss.backward()

    # Without gates in the first block: without memory, with keys that are kept or not, and with memory.
    counts = [
        graphs_of(step(schedule))
        for schedule in (lrt.refine(1), lrt.refine(3, weights=(0.3, 0, 0, 0.7)), lrt.interleaved(2))
    ]
    assert counts == [3, 0, 3]
    for schedule in (lrt.refine(2, weights=(0.3, 0, 0.7)), lrt.interleaved(2), lrt.interleaved(2, sweeps=2)):
        for one in (model, eager):
            one.zero_grad(set_to_none=True)
            one.loss = one(tokens, targets=targets, schedule=schedule).loss
            one.loss.backward()
        torch.testing.assert_close(model.loss, eager.loss)
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@torch._dynamo.config.patch(recompile_limit=8)
def test_many_chunks_compile_nothing_for_each(monkeypatch):
    """Keys grow from chunk to chunk: the loop runs eagerly, what runs once over the row is compiled."""
    torch._dynamo.reset()
    model = small(blocks=(2, 3), source_layer=2)
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    tokens, targets = batch()
    assert graphs_of(lambda: model(tokens, targets=targets, schedule=lrt.sequential()).loss.backward()) == 2
    for one in (model, eager):
        one.zero_grad(set_to_none=True)
        one(tokens, targets=targets, schedule=lrt.sequential()).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_changed_batch_compiles_nothing():
    torch._dynamo.reset()
    model = small()
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    seeds = iter(range(9))

    def step():
        tokens, targets = batch(next(seeds))
        model(tokens, targets=targets, schedule=lrt.interleaved(2)).loss.backward()

    assert graphs_of(step) > 0


@torch._dynamo.config.patch(recompile_limit=64)
def test_changing_schedules_compile_nothing_once_each_was_seen():
    """A plain phase, then a mixture, the memory's parameters at rest at first: whole steps of the trainer."""
    torch._dynamo.reset()
    model = small()
    recipe = Recipe(model=model.backbone.config, recurrence=model.recurrence)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    optimizer = MuonAdamW(parameter_groups(model.named_parameters(), recipe))
    runner = Runner(model, model, graphs=False)
    mixed = lrt.mixture([(0.5, lrt.refine(1)), (0.3, lrt.interleaved(2)), (0.2, lrt.baseline())])
    table = Timetable((Stretch(0, 4, lrt.baseline(), 0), Stretch(4, 40, mixed, 0)), 1)
    seen, compiled = set(), {}
    for step in range(40):
        before = counters["stats"]["unique_graphs"]
        schedule, tokens = table.schedule(step), batch(step)
        frozen = tuple(model.memory_parameters().values()) if table.at(step).plain else ()
        train_step(
            runner,
            optimizer,
            [Batch(*tokens, ())],
            schedule=schedule,
            seed=step,
            clip_norm=1.0,
            world=ALONE,
            frozen=frozen,
        )
        if schedule in seen:
            assert counters["stats"]["unique_graphs"] == before, f"step {step}, {schedule}, compiled again"
        else:
            compiled[schedule] = counters["stats"]["unique_graphs"] - before
        seen.add(schedule)
    assert seen == set(table.kinds) and all(compiled.values())


# ------------------------------------------------------------------ the runner


SCHEDULES = [
    lrt.baseline(),
    lrt.refine(1, weights=(0.0, 1.0)),
    lrt.refine(1, weights=(0.0, 1.0), settle=2),
    lrt.interleaved(2),
    lrt.interleaved(2, weights=(0, 1), cut_gradient="initialization"),
    lrt.interleaved(3, order="random"),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_runner_leaves_the_gradients_of_the_model(schedule):
    """Over accumulated micro-batches and several updates of the masters, in float32, bit for bit."""
    model = small()
    plain = copy.deepcopy(model)
    runner = single_device(model, EAGER, ALONE)
    for update in range(2):
        for seed in (1, 2):
            tokens, targets = batch(seed)
            valid = torch.tensor(2 * targets.numel())
            scores = runner.forward_backward(tokens, targets, schedule=schedule, seed=update, valid_targets=valid)
            out = plain(
                tokens,
                targets=targets,
                schedule=schedule,
                valid_targets=valid,
                generator=torch.Generator().manual_seed(update),
            )
            out.loss.backward()
            assert torch.equal(scores, torch.stack([out.loss.detach(), *out.groups]))
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None:
                assert torch.equal(ours.grad, theirs.grad), name
                for parameter in (ours, theirs):
                    parameter.data.add_(parameter.grad, alpha=0.1)
                    parameter.grad = None


def test_a_half_precision_copy_computes_in_half_and_leaves_float32_gradients():
    model = small()
    runner = single_device(model, ParallelConfig(compile=False, param_dtype="bfloat16"), ALONE)
    tokens, targets = batch()
    options = {"schedule": lrt.interleaved(2), "seed": 0, "valid_targets": torch.tensor(targets.numel())}
    runner.forward_backward(tokens, targets, **options)
    exact, half = copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)
    for other in (exact, half):
        other.zero_grad(set_to_none=True)
        other(tokens, targets=targets, schedule=lrt.interleaved(2)).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    ours, theirs, yardstick = (
        torch.cat([p.grad.float().flatten() for p in m.parameters()]) for m in (model, exact, half)
    )
    error, expected = ((x - theirs).norm() / theirs.norm() for x in (ours, yardstick))
    assert 1e-4 < error < 2 * expected + 1e-2  # it rounds, and not more than a model that is half precision throughout


def test_a_working_copy_shares_token_tables_and_keeps_ties():
    model = small()
    model.backbone.head.extra = model.backbone.head.weight  # a tied weight
    work = working_copy(model, dtype=torch.bfloat16)
    pairs = list(zip(model.modules(), work.modules()))
    assert all(b.weight is a.weight for a, b in pairs if isinstance(a, TokenTable))
    assert work.backbone.head.extra is work.backbone.head.weight and work.backbone.head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        model.backbone.head.weight.fill_(2.0)
    assert (Runner(model, work, graphs=False).refresh().backbone.head.weight == 2.0).all()


def test_a_replay_leaves_the_gradients_of_other_graphs_alone():
    """Graphs share their memory, so what one computes may lie where another has gradients."""
    model, (tokens, targets), schedules = small(), batch(), (lrt.baseline(), lrt.refine(1))
    runner, replayed = Runner(model, model, graphs=False), []
    gradients = [tuple(torch.full_like(p, float(n)) for p in model.parameters()) for n in (1, 2)]

    class Graph:
        def __init__(self, number):
            self.number = number

        def replay(self):
            for mine, others in zip(gradients[self.number], gradients[1 - self.number]):
                mine.fill_(self.number + 1.0), others.fill_(float("nan"))
            replayed.append(self.number)

    runner._graphs = {
        (tuple(tokens.shape), s, s.plan(16), False): {
            Place(): Captured(Graph(n), tokens.clone(), targets.clone(), torch.tensor(32), torch.zeros(2), gradients[n])
        }
        for n, s in enumerate(schedules)
    }
    for schedule in schedules:
        runner.forward_backward(tokens, targets, schedule=schedule, seed=0, valid_targets=torch.tensor(32))
    assert replayed == [0, 1] and all((p.grad == 3).all() for p in model.parameters())


def test_plans_beyond_the_graphs_run_eagerly_and_it_is_said_once(monkeypatch):
    model, (tokens, targets), said = small(), batch(), []
    runner = Runner(model, model, graphs=False, report=said.append)
    runner._graphs = {number: {} for number in range(graphs.GRAPHS - 1)}
    monkeypatch.setattr(
        runner,
        "_capture",
        lambda places, *a, **k: {places[0]: Captured(Nothing(), tokens, targets, torch.tensor(1), tokens, ())},
    )
    options = {"seed": 0, "valid_targets": torch.tensor(targets.numel())}
    for schedule in (lrt.baseline(), lrt.refine(1), lrt.refine(2), lrt.refine(1), lrt.baseline()):
        known = len(runner._graphs)
        runner.forward_backward(tokens.clone(), targets.clone(), schedule=schedule, **options)
        assert len(runner._graphs) == graphs.GRAPHS >= known
    assert len(said) == 1 and "more than 16 plans of passes" in said[0] and "schedule.mix" in said[0]


class Nothing:
    def replay(self):
        pass


def test_what_runs_a_model_under_which_plan(monkeypatch):
    recipe = tiny("unused")
    model, runner = plan.build(recipe, ALONE)
    assert runner.compute is runner.model is model and runner._graphs is None and runner.sums is None
    model, runner = plan.build(recipe, World(0, 1, torch.device("cpu"), sharded=False, working_copy=True))
    assert runner.compute is not model is runner.model and runner.sums is not None
    cuda = World(0, 2, torch.device("cuda", 0), sharded=True)
    assert graphs.graphed(ParallelConfig(), cuda) and not graphs.graphed(ParallelConfig(), ALONE)
    assert not graphs.graphed(EAGER, cuda) and not graphs.graphed(ParallelConfig(cuda_graphs=False), cuda)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    runner = Runner(model, model, graphs=True)
    assert runner.compute is model and runner._graphs == {}


def test_a_plain_native_model_is_built_once(monkeypatch):
    """No second copy is made to be copied from; its values are those of ``lrt.build``, "
    "and shapes given are not made."""
    recipe, made = tiny("unused"), []

    def counted(*args, **more):
        made.append(more.get("device"))
        return build(*args, **more)

    for place in ("lrt.train.plan.build_native", "lrt.train.checkpoint.starting_model.build"):
        monkeypatch.setattr(place, counted)
    for world in (ALONE, World(0, 1, torch.device("cpu"), sharded=False, working_copy=True)):
        made.clear()
        model, _ = plan.build(recipe, world, shapes=shapes_of(recipe))
        assert [str(device) for device in made] == ["meta", "cpu"]
        for (name, ours), theirs in zip(model.named_parameters(), build(recipe).parameters()):
            assert torch.equal(ours, theirs), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_graphs_are_eager_steps():
    """The same numbers from a captured graph as from the same kernels launched one by one, on changing batches,
    and those of the plain model."""
    model = small().cuda()
    config = ParallelConfig(param_dtype="bfloat16")
    world = World(0, 1, torch.device("cuda", 0), sharded=False, working_copy=True)
    replayed, eager = single_device(model, config, world), single_device(copy.deepcopy(model), config, world)
    eager._graphs = None
    for schedule in (lrt.refine(1), lrt.interleaved(2)):
        for seed in range(3):
            for runner in (replayed, eager):
                for _ in range(2):  # accumulated
                    tokens, targets = (x.cuda() for x in batch(seed))
                    options = {
                        "schedule": schedule,
                        "seed": seed,
                        "valid_targets": torch.tensor(targets.numel(), device="cuda"),
                    }
                    runner.scores = runner.forward_backward(tokens, targets, **options)
            torch.testing.assert_close(replayed.scores, eager.scores)
            for a, b in zip(replayed.model.parameters(), eager.model.parameters()):
                torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=1e-4)  # sums of atomics come in any order
            ours = flat_gradients(replayed.model)
            exact, half = (
                flat_gradients(plain_steps(copy.deepcopy(model).to(dtype), schedule, seed))
                for dtype in (torch.float32, torch.bfloat16)
            )
            assert (ours - exact).norm() <= 2 * (half - exact).norm()
            for a, b in zip(replayed.model.parameters(), eager.model.parameters()):
                a.grad = b.grad = None


def plain_steps(model, schedule, seed):
    """The model, with the gradients of the same micro-batch twice."""
    model.zero_grad(set_to_none=True)
    tokens, targets = (x.cuda() for x in batch(seed))
    for _ in range(2):
        model(tokens, targets=targets, schedule=schedule).loss.backward()
    return model


def flat_gradients(model):
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


# ------------------------------------------------------------------ tools/bench/training.py


@pytest.fixture
def bench():
    return importlib.import_module("lrt.commands.bench.training")


def speeds(path, suite, *variants):
    rows = [{"variant": v, "tokens_per_second": 100.0} for v in variants]
    path.write_text(json.dumps({"suites": [{"suite": suite, "rows": rows}]}))
    return path


def test_the_benchmark_runs_on_a_cpu(tmp_path):
    """Its tiny shapes, the kinds of graph that there are: exit code 0 means that the counts are as it expects."""
    variants = ["baseline", "refine(1)", "interleaved(2)"]
    one = speeds(tmp_path / "one.json", "tiny", *variants)
    options = [
        "--suites",
        "tiny",
        "--variants",
        *variants,
        "--turns",
        "1",
        "--steps",
        "1",
        "--whole-step",
        variants[2],
        "--against",
        one,
    ]
    options += ["--backend", "aot_eager"]  # the counts are the same, and no code is generated
    command = [sys.executable, TOOLS / "bench" / "training.py", *options, "--out", "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == summary
    rows = {row["variant"]: row for row in summary["suites"][0]["rows"]}
    assert list(rows) == variants and rows["baseline"]["ratio"] == 1.0
    assert all(
        row["recompiles"] == 0 and row["ms"] > 0 and row["scaling"] == row["tokens_per_second"] / 100
        for row in rows.values()
    )
    assert summary["suites"][0]["whole_steps"][0]["ms"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--against", "none.json"], "--against none.json: cannot be read"),
        (["--against", "."], "--against .: cannot be read"),
        (["--against", "text.json"], "--against text.json: not a result of this tool"),
        (["--against", "one.json"], 'has no speed of "tiny: refine(1)"; it has "tiny: baseline"'),
        (["--against", "one.json", "--suites", "d12"], 'has no speed of "d12: baseline", "d12: refine(1)"'),
        (
            ["--whole-step", "interleaved(4)"],
            '--whole-step "interleaved(4)": not timed here; use any of "baseline", "refine(1)"',
        ),
        (["--profile", "interleaved(4)"], '--profile "interleaved(4)": not timed here'),
        (["--reference", "."], "--reference .: no checkout of the official code"),
        (["--reference-lrt"], "name your checkout with --reference"),
        (["--out", "no/folder.json"], "--out no/folder.json: cannot be written"),
        (["--backend", "fast"], "--backend fast: torch.compile has no such backend"),
        (["--variants"], "nothing to time"),
    ],
)
def test_the_benchmark_refuses_before_anything_is_built(bench, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "open_world", None)
    Path("text.json").write_text("12 ms")
    speeds(Path("one.json"), "tiny", "baseline")
    assert bench.main(["--suites", "tiny", "--variants", "baseline", "refine(1)", *options]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and message in out.err and not out.out


@torch._dynamo.config.patch(recompile_limit=8)
def test_a_benchmark_that_is_cut_keeps_what_it_has(bench, tmp_path, monkeypatch, capsys):
    def suite(name, world, options, *, one, keep):
        if name == "d12":
            raise RuntimeError("cut")
        keep({"suite": name, "rows": [], "failed": []})

    monkeypatch.setattr(bench, "run_suite", suite)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    with pytest.raises(RuntimeError, match="cut"):
        bench.main(["--suites", "tiny", "d12", "--out", str(tmp_path / "out.json")])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["suite"] for s in printed["suites"]] == ["tiny"] and json.loads(
        (tmp_path / "out.json").read_text()
    ) == printed
