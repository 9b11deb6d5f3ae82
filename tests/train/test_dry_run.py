"""Dry runs: what they say without data or a GPU, memory estimates held to measured peaks,
and devices whose peak is known."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrt.accounting import count_parameters, mfu, peak_flops
from lrt.config import ParallelConfig, load_recipe
from lrt.train.checkpoint.starting_model import shapes_of
from lrt.train.dry_run import dry_run, expected_memory
from lrt.train.horizon import plan_horizon, shards_of
from lrt.train.trainer import train

ROOT = Path(__file__).resolve().parent.parent.parent
# torchtitan's
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml") if not path.stem.startswith("titan_"))


@pytest.mark.parametrize("name", ["lrt_24l", "lrt_tiny"])
def test_dry_run_answers_without_data(name):
    text = dry_run(load_recipe(name), world_size=8)
    for words in (
        "tokens_per_parameter",
        "memory projections",
        "FLOPs a token",
        "FLOPs a step",
        "expected memory of one GPU",
        "fits",
        "assumed MFU",
    ):
        assert words in text


def test_dry_run_counts_memory_by_the_plan():
    def total(**sets):
        recipe = load_recipe("lrt_24l_paper", overrides=[f"{k}={v}" for k, v in sets.items()])
        text = dry_run(recipe, world_size=8)
        return float(re.search(r"expected memory of one GPU, GiB: ([\d.]+)", text)[1])

    whole = total()
    assert total(**{"parallel.activation_checkpointing": "block"}) < 0.5 * whole
    assert total(**{"training.micro_batch": 32}) > 2 * whole
    assert total(**{"parallel.reshard": "after_forward"}) < whole
    assert "does not fit: lower training.micro_batch" in dry_run(
        load_recipe("lrt_24l_paper", overrides=["training.micro_batch=32"]), world_size=8
    )


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith(("lrt_", "baseline_"))])
def test_what_ships_fits_eight_gpus_of_80_gib(name):
    assert re.search(r"expected memory of one GPU, GiB: [\d.]+ of 80: fits\n", dry_run(load_recipe(name), world_size=8))


# ------------------------------------------------------------------ how many GPUs


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size"),
    [(1, 3, 8), (4, -1, 1), (2, -1, 1), (3, -1, 8), (2, 8, 8), (1, 2, 1), (16, -1, 8)],
)
def test_a_mesh_that_the_gpus_do_not_make_is_refused_by_runs_and_dry_runs(tmp_path, replicate, shard, world_size):
    mesh = {"parallel.replicate": replicate, "parallel.shard": shard}
    recipe = load_recipe("lrt_tiny", overrides=[f"{k}={v}" for k, v in {**mesh, "run.output": tmp_path}.items()])
    text = (
        f"parallel.replicate = {replicate} x parallel.shard = {shard} does not make {world_size} process.*divides "
        f"{world_size}, and shard = -1"
    )
    with pytest.raises(ValueError, match=text):
        dry_run(recipe, world_size=world_size)
    if world_size == 1:
        with pytest.raises(ValueError, match=text):
            train(recipe)


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "shards"),
    [(1, -1, 8, 8), (2, -1, 8, 4), (8, -1, 8, 1), (2, 3, 6, 3), (1, -1, 1, 1)],
)
def test_shards(replicate, shard, world_size, shards):
    assert shards_of(ParallelConfig(replicate=replicate, shard=shard), world_size) == shards


def run(*args, **environment):
    command = [sys.executable, str(ROOT / "recipes" / "run.py"), "--recipe", "lrt_tiny", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_the_number_of_gpus_can_be_chosen_and_one_rank_reports():
    gpus = run("--dry-run", "--gpus", "2", WORLD_SIZE="4")
    assert gpus.returncode == 0 and re.search(r"a step +2 GPUs x", gpus.stdout)
    first = run("--dry-run", WORLD_SIZE="4", RANK="0")
    assert first.returncode == 0 and re.search(r"a step +4 GPUs x", first.stdout)
    other = run("--dry-run", WORLD_SIZE="4", RANK="3")
    assert (other.returncode, other.stdout) == (0, "")


@pytest.mark.parametrize("args", [("--gpus", "2"), ("--dry-run", "--gpus", "0")])
def test_gpus_are_for_dry_runs(args):
    refused = run(*args)
    assert refused.returncode == 2 and "--gpus needs --dry-run and a number of 1 or more" in refused.stderr


# ------------------------------------------------------------------ memory estimates


FULL = "model.window_pattern=L"  # no windows
STEP, BARE = "whole step", "forward + backward"  # with the optimizer's state, or without
OLD = ", sums of gradients not counted"  # measured before one GPU had them beside the passes
MEASURED = [  # docs/benchmarks.md: recipe, rows a forward, tokens a step, GPUs, what ran, peak GiB
    (f"baseline_12l {FULL}", 16, 32768, 1, BARE, 16.2),
    (f"lrt_12l schedule.kind=refine {FULL}", 16, 32768, 1, BARE, 27.3),
    (f"lrt_12l_paper {FULL}", 16, 32768, 1, BARE, 27.5),
    (f"lrt_12l_layerwise {FULL}", 16, 32768, 1, BARE, 28.6),
    ("lrt_12l_paper", 16, 32768, 1, BARE, 28.4),
    ("lrt_12l_paper", 16, 524288, 1, STEP, 31.4),
    (f"baseline_20l {FULL}", 8, 16384, 1, BARE + OLD, 23.1),
    (f"lrt_20l schedule.kind=refine {FULL}", 8, 16384, 1, BARE + OLD, 38.5),
    (f"lrt_20l_paper {FULL}", 8, 16384, 1, BARE + OLD, 38.8),
    (f"lrt_20l_paper schedule.subsets=4 {FULL}", 8, 16384, 1, BARE + OLD, 43.8),
    (f"lrt_20l_layerwise {FULL}", 8, 16384, 1, BARE + OLD, 41.0),
    (f"baseline_20l {FULL}", 8, 32768, 2, BARE, 22.3),
    (f"lrt_20l_paper {FULL}", 8, 32768, 2, BARE, 38.1),
    (f"lrt_20l_paper {FULL}", 8, 524288, 2, BARE, 42.9),
    (f"lrt_20l_paper parallel.reshard=after_forward {FULL}", 8, 32768, 2, BARE, 35.7),
    ("lrt_12l_paper", 16, 262144, 2, STEP, 29.7),
    ("lrt_24l_paper", 4, 32768, 1, STEP + OLD, 46.4),
]


@pytest.mark.parametrize(("name", "rows", "batch", "gpus", "ran", "gib"), MEASURED)
def test_the_memory_estimate_is_near_what_was_measured(name, rows, batch, gpus, ran, gib):
    file, *sets = name.split()
    recipe = load_recipe(file, overrides=[*sets, f"training.micro_batch={rows}", f"training.batch_tokens={batch}"])
    model = shapes_of(recipe)
    horizon = plan_horizon(recipe, count_parameters(model), world_size=gpus)
    assert horizon.rows == rows
    counted = expected_memory(recipe, model, horizon, world_size=gpus)
    if ran.startswith(BARE):
        counted = counted._replace(optimizer=0.0, update=0.0)
    if ran.endswith(OLD):
        counted = counted._replace(kept_gradients=0.0)
    assert counted.total == pytest.approx(gib, rel=0.03)
    line = f"| `{name}` | {rows} x 2048 | {gpus} | {ran} | {gib} | {counted.total:.1f} |"
    assert line in (ROOT / "docs" / "train.md").read_text()


# ------------------------------------------------------------------ devices

DEVICES = [  # names as torch reports them
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA GH200 144G HBM3e", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA B300 SXM6 AC", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA GB300", 2500e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100-PCIE-40GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("A100-SXM4-40GB", 312e12),
    ("NVIDIA L40S", 362e12),
    ("AMD Instinct MI300X", 1307e12),
    ("AMD Instinct MI325X", 1307e12),
    ("AMD Instinct MI250X", 191.5e12),
    ("NVIDIA RTX A1000", None),
    ("NVIDIA RTX A1000 Laptop GPU", None),
    ("NVIDIA A10", None),
    ("NVIDIA A10G", None),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("GRID A100-10C", None),
    ("NVIDIA H20", None),
    ("NVIDIA L40", None),
    ("NVIDIA L4", None),
    ("NVIDIA GeForce RTX 4090", None),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
    ("Tesla V100-SXM2-16GB", None),
    ("AMD Instinct MI300A", None),
    ("AMD Radeon RX 7900 XTX", None),
    ("cpu", None),
]


@pytest.mark.parametrize(("name", "peak"), DEVICES, ids=[name for name, _ in DEVICES])
def test_peaks_of_devices(name, peak):
    assert peak_flops(name) == peak
    assert mfu(1e12, name) == (None if peak is None else 1e12 / peak)
