"""lm-evaluation-harness: an adapted, untrained model answers as the original does, and the memory mode stands in the
results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_decoders import make, stir
from strategies import randomized

import lrt
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.data import load_tokenizer
from lrt.model import build_model

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

PAIRS = [
    ("The fox", " runs"),
    ("The fox", " sleeps all day"),
    ("", "A dog"),
    ("One and two are", " three"),
    ("The fox ", "runs"),
]
TEXTS = ["The fox runs over the dog and back again, as foxes do.", "Short."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    decoder = make("llama", dtype=torch.float32, vocab_size=257, max_position_embeddings=48)
    decoder.save_pretrained(place / "original")
    lrt.save(lrt.adapt(decoder), place / "fresh")
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=32)
    lrt.save(randomized(build_model(config, RecurrenceConfig(separator=256)), 1, 0.3), place / "native")
    for name in ("original", "fresh", "native"):
        load_tokenizer("bytes").save(place / name)
    return place


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def original(folders):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folders / "original" / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|bos|>"
    )
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folders / "original"),
        tokenizer=tokenizer,
        batch_size=2,
        device="cpu",
        max_length=48,
    )


@pytest.mark.parametrize("memory", ["decode", "zero", "parallel"])
def test_an_untrained_adapted_model_answers_as_the_original(folders, original, memory):
    from lrt.eval.harness import LatentRecurrentLM

    ours = LatentRecurrentLM(str(folders / "fresh"), memory=memory, device="cpu", batch_size=3)
    assert ours.get_model_info()["memory_mode"] == memory
    found, expected = (m.loglikelihood(instances("loglikelihood", PAIRS)) for m in (ours, original))
    for (mine, greedy), (theirs, theirs_greedy) in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4) and greedy == theirs_greedy
    rolling, theirs = (
        m.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in TEXTS])) for m in (ours, original)
    )
    assert rolling == pytest.approx(theirs, rel=1e-4)
    asked = instances("generate_until", [(t, {"until": ["e"], "max_gen_toks": 12, "do_sample": False}) for t in TEXTS])
    if memory == "parallel":
        with pytest.raises(ValueError, match="generate with memory=decode"):
            ours.generate_until(asked)
    else:
        assert ours.generate_until(asked) == original.generate_until(asked)


def test_memory_changes_the_answers_of_a_trained_model(folders, tmp_path):
    from lrt.eval.harness import LatentRecurrentLM

    model = stir(lrt.load(folders / "fresh"))
    lrt.save(model, tmp_path / "stirred")
    load_tokenizer("bytes").save(tmp_path / "stirred")
    by_mode = {}
    for memory, schedule in (("decode", lrt.sequential()), ("zero", lrt.baseline())):
        ours = LatentRecurrentLM(str(tmp_path / "stirred"), memory=memory, device="cpu")
        (by_mode[memory],) = ours.loglikelihood(instances("loglikelihood", PAIRS[:1]))
        row = torch.tensor([list("".join(PAIRS[0]).encode())])
        with torch.no_grad():
            nats = model.score(row[:, :-1], row[:, 1:], schedule)[0, 0, -len(PAIRS[0][1]) :]
        assert by_mode[memory][0] == pytest.approx(-float(nats.sum()), rel=1e-4)
    assert by_mode["decode"] != by_mode["zero"]


def test_the_command_runs_a_task_and_names_the_mode(folders, tmp_path):
    """A native model's contexts begin with the separator, as its training rows do."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(json.dumps({"q": f"The fox {n} ", "a": ["runs", "sleeps"], "y": n % 2}) for n in range(4))
    )
    (tmp_path / "small.yaml").write_text(
        f"task: small\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: "
        "test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: '{{y}}'\nmetric_list: [{metric: acc}]\n"
    )
    command = [
        sys.executable,
        "-m",
        "lrt.eval.harness",
        "--model",
        "lrt",
        "--tasks",
        "small",
        "--include_path",
        str(tmp_path),
    ]
    more = [
        "--model_args",
        f"pretrained={folders / 'native'},memory=decode",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, timeout=280, cwd=Path(lrt.__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["config"]["memory_mode"] == "decode" and found["results"]["small"]["acc,none"] in (
        0,
        0.25,
        0.5,
        0.75,
        1,
    )
