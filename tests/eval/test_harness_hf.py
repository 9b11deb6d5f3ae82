"""lm-evaluation-harness's own model ``hf`` on our folders: an adapted, untrained one gives the original's results.

pytest -m slow tests/eval/test_harness_hf.py         # minutes, in an environment with the extra eval
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_decoders import make
from strategies import randomized

import lrt
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.data import load_tokenizer
from lrt.model import build_model

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

TASKS = {  # the three things that lm-evaluation-harness asks a model
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: '{{y}}'\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    "doc_to_target: '{{q}} and so on, for more than a row of text'\nmetric_list: [{metric: bits_per_byte}]\n",
    "written": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a[0]}}'\n"
    "generation_kwargs: {until: ['zz'], max_gen_toks: 8, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    data = place / "data.jsonl"
    data.write_text(
        "\n".join(json.dumps({"q": f"The fox {n} ", "a": ["runs", "sleeps"], "y": n % 2}) for n in range(4))
    )
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (place / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    return place


def results_of(folder, tasks, out, *, program=("lm_eval",), model="hf", more="trust_remote_code=True"):
    """Results and what was written, by lm-evaluation-harness's own command."""
    command = [
        sys.executable,
        "-m",
        *program,
        "--model",
        model,
        "--model_args",
        f"pretrained={folder},{more}",
        "--tasks",
        ",".join(TASKS),
    ]
    options = [
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
        "--batch_size",
        "2",
        "--output_path",
        str(out),
        "--log_samples",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=Path(lrt.__file__).parent.parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    (written,) = out.rglob("samples_written_*.jsonl")
    texts = [json.loads(line)["resps"] for line in written.read_text().splitlines()]
    numbers = {
        name: {key: value for key, value in metrics.items() if isinstance(value, float)}
        for name, metrics in found.items()
    }
    return numbers, texts


def line_of_the_page():
    """The command that docs/adapt.md shows, without its interpreter, its folder and its tasks."""
    page = (Path(lrt.__file__).parents[1] / "docs" / "adapt.md").read_text(encoding="utf-8")
    (line,) = [line.split() for line in page.splitlines() if line.startswith("    lm_eval ")]
    return line[0], line[line.index("--model") + 1], line[line.index("--model_args") + 1].partition(",")[2]


@pytest.mark.slow
def test_an_adapted_untrained_model_gives_the_results_of_the_original(tmp_path, tasks):
    decoder = make("llama", dtype=torch.float32, vocab_size=257, max_position_embeddings=64)
    decoder.save_pretrained(tmp_path / "original")
    lrt.save(lrt.adapt(decoder), tmp_path / "fresh")
    for name in ("original", "fresh"):
        load_tokenizer("bytes").save(tmp_path / name)
    expected, theirs = results_of(tmp_path / "original", tasks, tmp_path / "out_original")
    program, model, more = line_of_the_page()
    found, ours = results_of(
        tmp_path / "fresh", tasks, tmp_path / "out_fresh", program=(program,), model=model, more=more
    )
    assert set(found) == set(TASKS) and ours == theirs
    assert all(found[name] == pytest.approx(expected[name], rel=1e-5, nan_ok=True) for name in TASKS)


@pytest.mark.slow
def test_model_hf_scores_true_recurrence_as_our_own_model_does(tmp_path, tasks):
    """A native model with memory; ``hf`` puts no separator before a context, unless tools/convert.py made it."""
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=64)
    lrt.save(randomized(build_model(config, RecurrenceConfig(separator=256)), 1, 0.3), tmp_path / "native")
    load_tokenizer("bytes").save(tmp_path / "native")
    found, theirs = results_of(tmp_path / "native", tasks, tmp_path / "out_hf")
    expected, ours = results_of(
        tmp_path / "native",
        tasks,
        tmp_path / "out_lrt",
        program=("lrt.eval.harness",),
        model="lrt",
        more="memory=decode,add_bos_token=False",
    )
    assert ours == theirs
    assert all(found[name] == pytest.approx(expected[name], rel=1e-4, nan_ok=True) for name in TASKS)
