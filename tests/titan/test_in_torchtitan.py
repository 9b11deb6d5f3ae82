"""Whole jobs of torchtitan's own trainer on the CPU: entry point, resuming, plans, refusals, Llama 3, conversion."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from runs import ROOT
from titan_runs import ADAMW, MUON, environment, launch, needs_torchtitan, run_jobs, titan_arguments

import lrt
from lrt.conversion import convert
from lrt.conversion.opening import open_model

pytestmark = [pytest.mark.slow, pytest.mark.dist, needs_torchtitan]

REFINE = 'kind = "refine"'
PHASES = 'phases = [{until = 0.6, kind = "baseline"}, {until = 1.0, kind = "refine"}]'
DEBUG = str(ROOT / "recipes" / "titan_lrt_debug.toml")
SHORT = [
    "--training.local_batch_size",
    "4",
    "--training.seq_len",
    "64",
    "--validation.seq_len",
    "64",
    "--validation.steps",
    "1",
]


def test_the_debug_recipe_by_both_commands(tmp_path):
    """The stock command, then ours, which goes on from what the first left."""
    job = [*SHORT, "--job.dump_folder", str(tmp_path / "job")]
    stock = ["--job.config_file", DEBUG, "--experimental.custom_import", "lrt.titan"]
    ran = launch("torchtitan.train", *stock, *job, "--training.steps", "2")
    assert ran.returncode == 0, ran.stderr[-3000:]
    log = ran.stdout + ran.stderr
    assert "Training completed" in log and "validate step:  1" in log
    sets = [
        f"training.steps=3 training.local_batch_size=4 training.seq_len=64 job.dump_folder={tmp_path / 'job'}",
        "validation.enable=false",
    ]
    overrides = [word for pair in " ".join(sets).split() for word in ("--set", pair)]
    line = [
        sys.executable,
        str(ROOT / "recipes" / "run.py"),
        "--engine",
        "torchtitan",
        "--recipe",
        "titan_lrt_debug.toml",
        *overrides,
    ]
    ran = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Training starts at step 3" in ran.stdout + ran.stderr
    opened = open_model(tmp_path / "job")
    assert opened.kind == "titan"
    for kind in ("lrt", "hf"):
        convert(tmp_path / "job", tmp_path / kind, target=kind, report=lambda line: None)
        assert all(
            torch.equal(p, q)
            for p, q in zip(lrt.load(tmp_path / kind).parameters(), opened.model.parameters(), strict=True)
        )
    convert(tmp_path / "job", tmp_path / "adapter", target="adapter", step=2, report=lambda line: None)
    prompt = torch.tensor([[84, 104, 101]])
    assert torch.equal(
        lrt.generate(opened.model, prompt, max_new_tokens=6, temperature=0.0),
        lrt.generate(lrt.load(tmp_path / "lrt"), prompt, max_new_tokens=6, temperature=0.0),
    )


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_resumed_job_ends_where_an_uninterrupted_one_does(tmp_path, optimizer):
    """Also out of a phase in which the memory rests, and in the middle of the data."""
    options = ["--checkpoint.enable", "--checkpoint.interval", "4", "--checkpoint.no-last_save_model_only"]
    whole = titan_arguments(tmp_path / "whole", PHASES, *options, optimizer=optimizer)
    first = run_jobs(tmp_path / "first", {"whole": {"titan": whole}})["whole"]
    assert "error" not in first, first["error"]
    shutil.copytree(tmp_path / "whole" / "checkpoint" / "step-4", tmp_path / "again" / "checkpoint" / "step-4")
    again = run_jobs(
        tmp_path / "second",
        {"again": {"titan": titan_arguments(tmp_path / "again", PHASES, *options, optimizer=optimizer)}},
    )["again"]
    assert again["losses"] == first["losses"][4:]
    assert all(torch.equal(again["weights"][name], tensor) for name, tensor in first["weights"].items())
    stored = open_model(tmp_path / "whole" / "checkpoint" / "step-4").model
    fresh = open_model(tmp_path / "again").model
    resting = [
        torch.equal(p, q) for p, q in zip(stored.memory_parameters().values(), fresh.memory_parameters().values())
    ]
    assert not all(resting)  # they rest until step 6, and train then


def test_plans_change_memory_and_not_numbers(tmp_path):
    options = {
        "plain": [],
        "full": ["--activation_checkpoint.mode", "full"],
        "op": ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"],
        "accumulated": ["--training.local_batch_size", "4", "--training.global_batch_size", "8"],
    }
    found = run_jobs(
        tmp_path / "jobs",
        {name: {"titan": titan_arguments(tmp_path / name, REFINE, *more, steps=3)} for name, more in options.items()},
    )
    for name, job in found.items():
        assert "error" not in job, job["error"]
        if name != "accumulated":  # other rows a batch
            assert job["losses"] == found["plain"]["losses"]
            assert all(torch.equal(job["weights"][key], tensor) for key, tensor in found["plain"]["weights"].items())


@pytest.mark.parametrize(
    "more",
    [["--parallelism.data_parallel_replicate_degree", "2"], ["--parallelism.fsdp_reshard_after_forward", "always"]],
)
def test_replicas_and_early_freeing_are_the_same_on_two_ranks(tmp_path, more):
    found = [
        run_jobs(
            tmp_path / f"{i}",
            {"job": {"titan": titan_arguments(tmp_path / f"job{i}", PHASES, *options, ranks=2)}},
            ranks=2,
        )["job"]
        for i, options in enumerate(([], more))
    ]
    assert max(abs(a - b) for a, b in zip(*(job["losses"] for job in found), strict=True)) < 1e-5
    far = [float((found[0]["weights"][key] - tensor).abs().max()) for key, tensor in found[1]["weights"].items()]
    assert max(far) < 1e-4


def test_two_ranks_leave_a_checkpoint_that_converts(tmp_path):
    arguments = titan_arguments(tmp_path / "job", REFINE, "--checkpoint.enable", steps=2, ranks=2)
    ran = run_jobs(tmp_path / "jobs", {"job": {"titan": arguments}}, ranks=2)["job"]
    assert len(list((tmp_path / "job" / "checkpoint" / "step-2").glob("*.distcp"))) == 2
    convert(tmp_path / "job", tmp_path / "out", target="lrt", report=lambda line: None)
    out = dict(lrt.load(tmp_path / "out").named_parameters())
    assert all(torch.equal(out[name], tensor) for name, tensor in ran["weights"].items())


def test_bad_jobs_are_refused_in_one_line(tmp_path):
    tiny = "--model.vocab_size=200"
    jobs = {
        "tokenizer": (
            titan_arguments(tmp_path / "a", REFINE, tiny),
            "model.vocab_size = 200, but the tokenizer of model.hf_assets_path has 257 ids",
        ),
        "separator": (
            titan_arguments(tmp_path / "b", REFINE, recurrence="separator = 0"),
            "separator = 0, but the tokenizer's separator is 256",
        ),
        "typo": (
            titan_arguments(tmp_path / "d", 'kind = "refined"'),
            "schedule.kind = 'refined': expected one of baseline",
        ),
        "flavor": (titan_arguments(tmp_path / "e", REFINE, flavor="13l"), "model.flavor = '13l': use one of tiny, 12l"),
        "plain": (
            titan_arguments(tmp_path / "f", 'kind = "baseline"', flavor="plain_tiny"),
            "has no effect on model.flavor = 'plain_tiny'",
        ),
        "phases": (
            titan_arguments(tmp_path / "g", "phases = [{until = 0.5}]"),
            "use rising shares of the steps, the last 1.0",
        ),
        "llama": (
            titan_arguments(tmp_path / "h", REFINE, "--model.width=8", name="lrt_llama3", flavor="debugmodel"),
            "model.width has no effect",
        ),
    }
    found = run_jobs(tmp_path / "jobs", {name: {"titan": arguments} for name, (arguments, _) in jobs.items()})
    for name, (_, words) in jobs.items():
        assert words in found[name]["error"] and found[name]["error"].count("\n") <= 2, found[name]
    two = {
        "tensor": {"titan": titan_arguments(tmp_path / "i", REFINE, "--parallelism.tensor_parallel_degree=2", ranks=2)}
    }
    assert "lrt.titan has no tensor parallelism (TP)" in run_jobs(tmp_path / "two", two, ranks=2)["tensor"]["error"]


RECIPES = """
import sys
from torchtitan.config import ConfigManager
import lrt, lrt.titan.spec as spec
for theirs, ours, sections in (
    ("titan_lrt_12l", "lrt_12l", ("model", "recurrence", "schedule", "optimizer")),
    ("titan_lrt_debug", "lrt_tiny", ("model", "recurrence", "schedule")),
):
    job = ConfigManager().parse_args(["--job.config_file", f"{sys.argv[1]}/recipes/{theirs}.toml"])
    here, there = spec.native_recipe(job), lrt.load_recipe(ours)
    for section in sections:
        assert getattr(here, section) == getattr(there, section), (theirs, section)
    assert here.training.batch_tokens == there.training.batch_tokens, theirs
"""


def test_the_recipes_say_what_ours_say():
    line = [sys.executable, "-c", RECIPES, str(ROOT)]
    ran = subprocess.run(line, env=environment() | {"LOCAL_RANK": "0"}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]


LLAMA = """
import sys, torch
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import Transformer, llama3_args
import lrt, lrt.titan.spec as spec
from lrt.titan.model import describe
job = ConfigManager().parse_args(sys.argv[2:])
args = spec.LLAMA_ARGS[job.model.flavor]
args.update_from_config(job)
with torch.device("meta"):
    model = spec.make_model(args)
model.to_empty(device="cpu")
model.init_weights()
theirs = llama3_args[job.model.flavor]
theirs.update_from_config(job)
torch.manual_seed(job.debug.seed)
theirs.vocab_size = args.vocab_size
plain = Transformer(theirs)
with torch.no_grad():
    plain.init_weights()
tokens = torch.randint(0, 257, (2, 24))
model.eval()
with torch.no_grad():
    wanted = plain(tokens)
    own = lambda schedule: lrt.model.LatentRecurrentModel.forward(model, tokens, schedule=schedule).logits
    schedules = {"refine": lrt.refine(2), "interleaved": lrt.interleaved(3), "sequential": lrt.sequential()}
    schedules["baseline"] = lrt.baseline()
    far = {name: float((own(schedule) - wanted).abs().max()) for name, schedule in schedules.items()}
    # and away from step 0, with every part of the memory at work
    for p in model.memory_parameters().values():
        p.normal_(std=0.1)
    moved = {name: own(schedule) for name, schedule in schedules.items()}
describe(model, job)
folder = job.job.dump_folder + "/checkpoint/step-1"
torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
torch.save({"far": far, "moved": moved, "tokens": tokens}, sys.argv[1])
"""


@pytest.mark.parametrize(
    "recurrence", ["gate_channels = 32", 'sharing = "layerwise"\nresidual = "projected"', 'projection = "aligned"']
)
def test_llama_is_unchanged_at_step_0_and_converts(tmp_path, recurrence):
    arguments = titan_arguments(tmp_path / "job", REFINE, name="lrt_llama3", flavor="debugmodel", recurrence=recurrence)
    line = [sys.executable, "-c", LLAMA, str(tmp_path / "found.pt"), *arguments]
    ran = subprocess.run(line, env=environment() | {"LOCAL_RANK": "0"}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert max(found["far"].values()) < 2e-5, found["far"]
    convert(tmp_path / "job", tmp_path / "out", target="hf", report=lambda line: None)
    model = lrt.load(tmp_path / "out").eval()
    opened = open_model(tmp_path / "job").model
    for name, schedule in {"baseline": lrt.baseline(), "refine": lrt.refine(2), "sequential": lrt.sequential()}.items():
        for one in (model, opened):
            with torch.no_grad():
                logits = one(found["tokens"], schedule=schedule).logits
            torch.testing.assert_close(logits, found["moved"][name], rtol=0, atol=5e-4)
    assert (found["moved"]["refine"] - found["moved"]["baseline"]).abs().max() > 0.1


def test_llama_trains_in_torchtitan(tmp_path):
    more = ["--checkpoint.enable", "--activation_checkpoint.mode", "selective"]
    arguments = titan_arguments(
        tmp_path / "job", PHASES, *more, name="lrt_llama3", flavor="debugmodel", recurrence="", steps=4
    )
    ran = run_jobs(tmp_path / "jobs", {"job": {"titan": arguments}})["job"]
    assert "error" not in ran, ran["error"]
    assert ran["losses"][-1] < ran["losses"][0]
    assert open_model(tmp_path / "job").model.recurrence.init == "identity"
