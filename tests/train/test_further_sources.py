"""A validation set per source: each scored by itself, with its own names and mistakes."""

import json
import math

import pytest
from runs import tiny

from lrt.eval.runs import read_records
from lrt.train.trainer import train


@pytest.fixture
def texts(tmp_path):
    """Training text, its validation, and two further sources."""
    for name, words in (("train", "one two "), ("held", "two one "), ("easy", "one two "), ("hard", "zq9!kx ")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([words * 60] * 6))
    return tmp_path


def run(folder, sources, **sets):
    given = {
        "data.train": folder / "train.txt",
        "data.validation": folder / "held.txt",
        "evaluation.sources": json.dumps(sources),
    }
    return tiny(folder, **given, **sets)


def test_every_source_has_its_own_score(texts, capsys):
    train(run(texts, [str(texts / "easy.txt"), f"odd={texts / 'hard.txt'}"], **{"evaluation.every": 4}))
    records = [r for r in read_records(texts / "tiny" / "metrics.jsonl") if r["kind"] == "evaluation"]
    for record in records:
        found = record["bpb_of_sources"]
        assert list(found) == ["easy", "odd"] and set(found["odd"]) == {"zero", "parallel", "decode"}
        assert found["easy"]["decode"] < found["odd"]["decode"] and found["easy"]["decode"] != record["bpb"]["decode"]
    shown = capsys.readouterr().out
    last = records[-1]["bpb_of_sources"]
    assert len(records) == 2 and f"odd   zero {last['odd']['zero']:.4f}" in shown[shown.index("bits per byte of\n") :]


def test_a_source_is_scored_as_the_validation_rows_are(texts):
    """The same file as validation and as a source: one number."""
    (texts / "again.txt").write_text((texts / "held.txt").read_text())
    train(run(texts, [str(texts / "again.txt")]))
    (record,) = [r for r in read_records(texts / "tiny" / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert record["bpb_of_sources"]["again"] == record["bpb"] and math.isfinite(record["bpb"]["decode"])


@pytest.mark.parametrize(
    "sources, message",
    [
        (["{0}/train.txt"], "train.txt is also in data.train, so its score would be of text that was learned"),
        (["{0}/easy.txt", "easy={0}/hard.txt"], "two are called 'easy': give them names, as NAME=PATH"),
        (["odd={0}/none.txt"], "evaluation.sources: 'odd=.*none.txt"),
    ],
)
def test_a_wrong_source_is_refused_before_the_run(texts, sources, message):
    with pytest.raises(ValueError, match=message):
        train(run(texts, [source.format(texts) for source in sources]))
    assert not (texts / "tiny" / "run.json").exists()  # nothing was begun
