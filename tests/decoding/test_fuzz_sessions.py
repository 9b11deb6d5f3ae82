"""A fuzzer of states and sessions: after any operations, every row goes on as its whole prompt decoded anew would.

LRT_FUZZ_SECONDS says for how long (20), LRT_FUZZ_SEED with which seed (0); a finding names its seed and try.
"""

import os
import random
import time

import pytest
import torch
from small_models import small
from strategies import VOCABULARY

import lrt
from lrt.config import RecurrenceConfig
from lrt.decoding import prefill
from lrt.decoding.generation import complete, start
from lrt.decoding.sampling import Sampling
from lrt.decoding.state import DecodeState

SECONDS, SEED = float(os.environ.get("LRT_FUZZ_SECONDS", 20)), int(os.environ.get("LRT_FUZZ_SEED", 0))
GREEDY = Sampling(temperature=0.0)
KEPT = (2, 4)


def tokens_of(drawn, least=1, most=7):
    return [drawn.randrange(VOCABULARY) for _ in range(drawn.randint(least, most))]


def expected(model, row, new):
    """Greedy tokens after a row, decoded anew."""
    return lrt.generate(model, torch.tensor([row]), max_new_tokens=new, temperature=0.0)[0, len(row) :].tolist()


def consumed(model, rows, capacity):
    state = DecodeState.empty(model, batch=len(rows), capacity=capacity, keep_at=KEPT)
    width = max(map(len, rows))
    if width:
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        prefill.consume(model, state, ids, torch.tensor(list(map(len, rows))), method=prefill.exact())
    return state


def change(model, drawn, state, rows, folder):
    """One operation on a state, and the rows that it must stand for."""
    kind = drawn.choice(["fork", "select", "truncate", "shrink", "put", "file", "feed"])
    if kind == "fork":
        n = drawn.randint(1, 2)
        return kind, state.fork(n), [row for row in rows for _ in range(n)]
    if kind == "select":
        index = [drawn.randrange(len(rows)) for _ in range(drawn.randint(1, 3))]
        return kind, state.select(index), [rows[i] for i in index]
    if kind == "truncate":
        wanted = [drawn.choice([n for n in (0, *KEPT, len(row)) if n <= len(row)]) for row in rows]
        try:
            return kind, state.truncate(wanted), [row[:n] for row, n in zip(rows, wanted)]
        except ValueError as error:  # a ring has overwritten what is needed, or a document began in between
            assert "prefill" in str(error)
            return kind, state, rows
    if kind == "shrink":
        least = max(max(map(len, rows)), *KEPT)
        capacity = drawn.randint(least, max(least, state.capacity))
        return kind, state.shrink(capacity), rows
    if kind == "put":
        other, row = tokens_of(drawn, least=0, most=min(5, state.capacity)), drawn.randrange(len(rows))
        state = state.fork()
        state.put([row], consumed(model, [other], max(len(other), *KEPT)))
        return kind, state, [other if i == row else old for i, old in enumerate(rows)]
    if kind == "file":
        return kind, DecodeState.load(state.save(folder / "state.safetensors"), model=model), rows
    more = [tokens_of(drawn, least=0, most=3) for _ in rows]
    if max(map(len, more)) == 0 or max(len(a) + len(b) for a, b in zip(rows, more)) > state.capacity:
        return kind, state, rows
    ids = torch.tensor([row + [0] * (3 - len(row)) for row in more])
    state = state.fork()
    prefill.consume(model, state, ids, torch.tensor(list(map(len, more))), method=prefill.exact())
    return kind, state, [a + b for a, b in zip(rows, more)]


@pytest.mark.slow
@pytest.mark.timeout(0)  # the budget ends it
def test_states_and_sessions(tmp_path):
    drawn, tries, operations, until = random.Random(SEED), 0, 0, time.monotonic() + SECONDS
    models = [small(), small(recurrence=RecurrenceConfig(separator=1)), small(window_pattern="SL", sequence_length=8)]
    while time.monotonic() < until:
        tries += 1
        model = drawn.choice(models)
        rows = [tokens_of(drawn, least=0) for _ in range(drawn.randint(1, 3))]
        state, done = consumed(model, rows, capacity=drawn.randint(8, 16)), []
        for _ in range(drawn.randint(0, 5)):
            kind, state, rows = change(model, drawn, state, rows, tmp_path)
            done.append(kind)
            operations += 1
        at = f"seed {SEED}, try {tries}, {done}, rows {rows}"
        assert state.lengths.tolist() == list(map(len, rows)), at
        last = [tokens_of(drawn, most=3) for _ in rows]
        width = max(map(len, last))
        ids = torch.tensor([[0] * (width - len(part)) + part for part in last])
        mask = torch.tensor([[0] * (width - len(part)) + [1] * len(part) for part in last])
        new = drawn.randint(1, 6)
        rows = [row + part for row, part in zip(rows, last)]
        if drawn.random() < 0.5:
            assert complete(model, ids, mask, max_new_tokens=new, sampling=GREEDY, state=state).tokens == [
                expected(model, row, new) for row in rows
            ], at
            continue
        session, _ = start(
            model, ids, mask, max_new_tokens=new, sampling=GREEDY, state=state, every=drawn.randint(1, 4)
        )
        session.advance()
        fresh, ended = tokens_of(drawn, most=3), drawn.randrange(len(rows))
        session.retire(ended)
        kept = len(session.rows[ended])
        room = session.state.capacity - len(fresh) + 1
        if drawn.random() < 0.5 and room > 0:
            session.replace(ended, fresh, max_new_tokens=min(new, room))
            rows[ended], kept = fresh, min(new, room)
        for _ in session:
            pass
        lengths = [kept if i == ended else new for i in range(len(rows))]
        assert session.rows == [expected(model, row, n) if n else [] for row, n in zip(rows, lengths)], at
    print(f"seed {SEED}: {tries} tries, {operations} operations, no finding")
