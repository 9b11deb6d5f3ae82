"""Decoding: greedy ids against the plain-loop oracle, batches, rings, rows that come and go, streaming, seeds,
compile."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Oracle
from small_models import small
from strategies import SEPARATOR, VOCABULARY, model_configs, models, randomized, recurrence_configs, rows

import lrt
from lrt.decoding import prefill, scoring
from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.generation import complete, start
from lrt.decoding.request import Request
from lrt.decoding.sampling import Sampling, choose, keep_probable, row_seeds
from lrt.decoding.session import Session
from lrt.decoding.state import DecodeState
from lrt.model import build_model

GREEDY = Sampling(temperature=0.0)
exactly = st.one_of(
    st.just(prefill.exact()),
    st.builds(
        lambda g, c: prefill.fixed_point(g, tol=1e-300, chunk=c), st.integers(1, 6), st.sampled_from([None, 2, 3])
    ),
    st.builds(lambda c: prefill.refine(12, chunk=c), st.sampled_from([None, 3])),
)


def oracle_greedy(model, prompt, new):
    ids = list(prompt)
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(new):
            oracle = Oracle(model, ids)
            logits = (oracle.sequential() if model.recurrence is not None else oracle.initialize())[0]
            ids.append(int(logits[-1].argmax()))
    finally:
        torch.set_default_dtype(torch.float32)
    return ids


@settings(max_examples=20)
@given(models(), rows(length=st.integers(1, 6)), exactly)
def test_greedy_ids_are_the_oracles(model, row, method):
    with torch.no_grad():
        expected = [oracle_greedy(model.eval(), prompt, 4) for prompt in row[0].tolist()]
    assert lrt.generate(model, row[0], max_new_tokens=4, temperature=0.0, prefill=method).tolist() == expected


@settings(max_examples=10)
@given(model_configs(attention_reset=SEPARATOR), st.integers(0, 99), rows(length=st.integers(1, 6)))
def test_the_plain_twin_decodes_through_the_same_code(config, seed, row):
    model = randomized(build_model(config, None, dtype=torch.float64), seed).eval()
    with torch.no_grad():
        expected = [oracle_greedy(model, prompt, 4) for prompt in row[0].tolist()]
    assert lrt.generate(model, row[0], max_new_tokens=4, temperature=0.0).tolist() == expected


@settings(max_examples=20)
@given(
    models(),
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0]),
    exactly,
)
def test_a_batch_decodes_as_its_rows_alone_under_any_padding(model, lengths, left, seed, temperature, method):
    model.eval()
    width = max(lengths) + 1
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]
    batch, mask = torch.full((len(lengths), width), 5), torch.zeros(len(lengths), width, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        batch[i, where], mask[i, where] = prompt, 1
    generator = torch.Generator().manual_seed(seed)
    together = lrt.generate(
        model, batch, mask, max_new_tokens=5, temperature=temperature, generator=generator, prefill=method
    )
    generator.manual_seed(seed)  # one seed a row is drawn, in order
    for i, prompt in enumerate(prompts):
        alone = lrt.generate(
            model, prompt[None], max_new_tokens=5, temperature=temperature, generator=generator, prefill=method
        )
        assert together[i, width:].tolist() == alone[0, len(prompt) :].tolist()


@settings(max_examples=15)
@given(models(attention_reset=SEPARATOR), rows(length=st.integers(1, 10)), exactly, st.booleans())
def test_scoring_equals_the_sequential_schedule(model, row, method, padded):
    tokens, targets = row
    expected = model.eval().score(tokens, targets, lrt.sequential())[0]
    mask = None
    if padded:
        pad = torch.zeros(len(tokens), 2, dtype=torch.int64)
        mask = torch.cat([pad, torch.ones_like(tokens)], 1)
        tokens, targets, expected = (torch.cat([pad.to(x.dtype), x], 1) for x in (tokens, targets, expected))
    nats, _ = scoring.score(model, tokens, targets, mask, prefill=method)
    torch.testing.assert_close(nats, expected)


def test_continuations_are_scored_as_they_would_be_decoded():
    model = small()
    out = complete(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=5, sampling=GREEDY)
    scores = scoring.score_continuations(model, [[1, 2, 3], [4, 5, 6], [1, 2, 3]], [*out.tokens, [7]])
    torch.testing.assert_close(torch.tensor(scores[:2]), torch.tensor(out.logprobs))
    assert len(scores[2]) == 1 and scores[2][0] < 0
    with pytest.raises(ValueError, match="give one continuation a prompt"):
        scoring.score_continuations(model, [[1]], [])


# ------------------------------------------------------------------ rings


@settings(max_examples=20)
@given(st.data(), st.integers(0, 99), st.integers(1, 20))
def test_a_ring_decodes_as_a_full_cache(data, seed, length):
    config = data.draw(model_configs(sequence_length=4, window_pattern="S", layers=st.integers(2, 3)))
    model = randomized(
        build_model(config, data.draw(recurrence_configs(config.n_layers)), dtype=torch.float64), seed
    ).eval()
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
    out = complete(model, tokens, max_new_tokens=8, sampling=GREEDY)
    rings = [key.shape[1] for key, window in zip(out.state.keys, out.state.windows) if window is not None]
    assert rings and all(ring == min(3, length + 9) for ring in rings)
    # The model's own call keeps every key and masks by position.
    assert out.ids[0, -1] == model(out.ids[:, :-1], schedule=lrt.sequential()).logits[0, -1].argmax()


# ------------------------------------------------------------------ rows come and go


@settings(max_examples=15)
@given(models(), st.integers(0, 99), st.sampled_from([0.0, 1.0]), st.integers(1, 5))
def test_rows_are_retired_and_replaced_while_others_go_on(model, seed, temperature, every):
    model.eval()
    sampling = Sampling(temperature=temperature, repetition_penalty=1.3)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, VOCABULARY, (2, 4), generator=generator)
    late = torch.randint(0, VOCABULARY, (1, 6), generator=generator)
    seeds = row_seeds(3, generator, torch.device("cpu"))

    def alone(prompt, seed, new):
        state = prefill.run(model, prompt[:, :-1], capacity=30).state
        session = Session(
            model,
            state,
            prompt[:, -1],
            Request(max_new_tokens=new, sampling=sampling),
            history=prompt,
            seeds=seed[None],
        )
        for _ in session:
            pass
        return session.rows[0]

    state = prefill.run(model, first[:, :-1], capacity=30).state
    session = Session(
        model,
        state,
        first[:, -1],
        Request(max_new_tokens=9, sampling=sampling, every=every),
        history=first,
        seeds=seeds[:2],
    )
    session.advance()
    session.retire(1)
    session.advance()
    assert len(session.rows[1]) == min(every, 9)
    session.replace(1, late[0].tolist(), max_new_tokens=7, seed=int(seeds[2]))
    for _ in session:
        pass
    assert session.rows[0] == alone(first[:1], seeds[0], 9)
    assert session.rows[1] == alone(late, seeds[2], 7)


def test_a_replaced_row_must_fit():
    model = small()
    session, _ = start(model, torch.tensor([[1, 2]]), max_new_tokens=3)
    with pytest.raises(ValueError, match="do not fit the session's capacity 5"):
        session.replace(0, [1, 2, 3, 4], max_new_tokens=3)


# ------------------------------------------------------------------ stopping, streaming, seeds


def test_rows_stop_at_stop_ids_and_are_padded():
    model = small()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = complete(model, prompt, max_new_tokens=12, sampling=GREEDY).tokens
    stop = free[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    ids = lrt.generate(model, prompt, max_new_tokens=12, temperature=0.0, stop_ids=(stop,), pad_id=9)
    width = max(map(len, expected))
    assert ids[:, 3:].tolist() == [row + [9] * (width - len(row)) for row in expected]


@pytest.mark.parametrize("every", [1, 3, 8])
def test_streaming_equals_not_streaming(every):
    model = small()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = complete(model, prompt, max_new_tokens=11, generator=torch.Generator().manual_seed(1))
    session, _ = start(model, prompt, max_new_tokens=11, every=every, generator=torch.Generator().manual_seed(1))
    streamed: list[list[int]] = [[], []]
    for burst in session:
        assert max(map(len, burst.tokens)) <= every
        for row, new in enumerate(burst.tokens):
            streamed[row] += new
    assert streamed == whole.tokens


def test_a_row_stops_where_the_host_says():
    model = small()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = complete(model, prompt, max_new_tokens=10, sampling=GREEDY)
    cut = complete(
        model, prompt, max_new_tokens=10, sampling=GREEDY, every=4, stop_when=lambda new: 5 if len(new) >= 5 else None
    )
    assert cut.tokens == [row[:5] for row in free.tokens]
    assert [len(p) for p in cut.logprobs] == [5, 5]


def test_seeds_reproduce_and_differ():
    model = small(seed=5)
    prompt = torch.tensor([[1, 2, 3]] * 4)
    a, b, c = (
        lrt.generate(model, prompt, max_new_tokens=20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({tuple(row) for row in a.tolist()}) > 1


@settings(max_examples=5)
@given(st.integers(0, 10**6))
def test_draws_follow_the_distribution(seed):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]], dtype=torch.float64).expand(40000, -1)
    seeds = row_seeds(40000, torch.Generator().manual_seed(seed), torch.device("cpu"))
    lengths = torch.zeros(40000, dtype=torch.int64)
    token, logprob = choose(logits, Sampling(), seeds=seeds, history=None, lengths=lengths, seen=None)
    share = torch.bincount(token, minlength=5) / 40000
    torch.testing.assert_close(share, logits[0].softmax(-1).float(), atol=0.012, rtol=0)
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
    other, _ = choose(logits, Sampling(), seeds=seeds, history=None, lengths=lengths + 1, seen=None)
    assert (other == token).float().mean() < 0.8  # positions draw apart


@given(st.integers(0, 999), st.integers(1, 13), st.floats(0.05, 1.0), st.floats(0.01, 1.0))
def test_filters_keep_what_their_definitions_say(seed, k, p, minimum):
    logits = torch.randn(2, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    probability = logits.softmax(-1)
    kept = {
        name: keep_probable(logits, Sampling(**{name: v})) > float("-inf")
        for name, v in (("top_k", k), ("top_p", p), ("min_p", minimum))
    }
    assert (kept["top_k"].sum(1) == k).all()
    assert torch.equal(kept["min_p"], probability >= minimum * probability.amax(1, keepdim=True))
    for row in range(2):
        order = probability[row].sort(descending=True)
        fewest = int((order.values.cumsum(0) < p - 1e-12).sum()) + 1
        assert sorted(kept["top_p"][row].nonzero()[:, 0].tolist()) == sorted(order.indices[: min(fewest, 13)].tolist())


def test_repetition_penalty_and_processors_change_the_choice():
    model = small()
    prompt = torch.tensor([[1, 2, 3]])
    banned = int(complete(model, prompt, max_new_tokens=1, sampling=GREEDY).tokens[0][0])
    lengths = []

    def ban(logits, history, length):
        lengths.append((history[0, : int(length[0])].tolist(), int(length[0])))
        return logits.index_fill(1, torch.tensor([banned]), float("-inf"))

    out = complete(model, prompt, max_new_tokens=3, sampling=Sampling(temperature=0.0, processors=(ban,)))
    assert banned not in out.tokens[0]
    assert lengths[-1] == ([1, 2, 3, *out.tokens[0][:2]], 5)

    def penalize(logits, history, length):
        seen = torch.zeros(logits.shape[1], dtype=torch.bool)
        seen[history[0, : int(length[0])]] = True
        return torch.where(seen, torch.where(logits > 0, logits / 1.7, logits * 1.7), logits)

    by_hand = complete(
        model, prompt, max_new_tokens=8, sampling=Sampling(temperature=0.0, processors=(penalize,))
    ).tokens
    assert (
        complete(model, prompt, max_new_tokens=8, sampling=Sampling(temperature=0.0, repetition_penalty=1.7)).tokens
        == by_hand
    )
    assert by_hand != complete(model, prompt, max_new_tokens=8, sampling=GREEDY).tokens


# ------------------------------------------------------------------ compiled, long


@pytest.mark.parametrize("method", [prefill.exact(), prefill.fixed_point(4, tol=1e-300)])
def test_compiled_equals_eager_without_recompiles(method):
    torch._dynamo.reset()
    model = small(n_layers=2)
    fast = accelerate(model, backend="eager")
    prompt = torch.randint(0, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))
    settings = {
        "max_new_tokens": 8,
        "prefill": method,
        "sampling": Sampling(top_k=5, top_p=0.9, repetition_penalty=1.1),
    }

    def run(chosen):
        return complete(chosen, prompt, generator=torch.Generator().manual_seed(1), **settings)

    expected, got = run(model), run(fast)
    assert got.tokens == expected.tokens
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert run(fast).tokens == expected.tokens
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(fast)


def test_one_graph_serves_every_block_of_a_kind():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small(n_layers=6, window_pattern="SL")
    fast = accelerate(model, backend="eager")
    state = DecodeState.empty(fast, batch=2, capacity=8)
    for _ in range(3):
        decoding.decode_one_token(fast, state, torch.tensor([1, 2]), torch.tensor([True, True]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one a window


def test_long_decode_keeps_a_finite_state():
    model = small(dtype=torch.float32, sequence_length=16, n_layers=2)
    norms = []
    session, _ = start(
        model, torch.tensor([[1, 2, 3]]), max_new_tokens=5000, every=100, generator=torch.Generator().manual_seed(1)
    )
    for _ in session:
        norms.append(float(session.state.memory.norm()))
    norms = torch.tensor(norms)
    print(f"norm of the memory over 5000 tokens: {norms.min():.3f} to {norms.max():.3f}, last {norms[-1]:.3f}")
    assert len(session.rows[0]) == 5000 and norms.isfinite().all()
    torch.testing.assert_close(norms, torch.full_like(norms, 16**0.5), rtol=1e-2, atol=0)  # RMSNorm: sqrt(D)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_ids": torch.zeros(1, 0, dtype=torch.int64)},
            "the prompt is empty: begin it with the tokenizer's separator",
        ),
        ({"attention_mask": torch.zeros(1, 3, dtype=torch.int64)}, "the prompt is empty"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "zeros between ones"),
        ({"attention_mask": torch.ones(1, 2)}, "they must match"),
        ({"prompt_ids": torch.tensor([[1, 13]])}, "token id 13, but the vocabulary has 13 entries"),
        ({"prompt_ids": torch.tensor([[1, -1]])}, "token id -1"),
        ({"prompt_ids": torch.tensor([1.0])}, "expected token ids"),
        ({"temperature": -1.0}, r"temperature = -1.0: use 0 \(greedy\) or more"),
        ({"top_k": 14}, "top_k = 14: use 1..13, the size of the vocabulary"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0: use a number above 0"),
        ({"stop_ids": (13,)}, "not in the vocabulary of 13 tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"max_new_tokens": None}, "max_new_tokens = None: use a whole number"),
        ({"stop_ids": 5}, r"stop_ids = 5, pad_id = 0: use a list of token ids such as \[2\]"),
        ({"stop_ids": ["a"]}, "use a list of token ids"),
        ({"pad_id": None}, "pad_id = None: use a list of token ids"),
        ({"temperature": None}, r"temperature = None: use 0 \(greedy\) or more"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"top_k": "many"}, "top_k = 'many': use 1..13"),
        ({"top_p": "most"}, "top_p = 'most': use a number above 0"),
        ({"prompt_ids": [[1, 2]]}, r"the prompt is a list: expected a tensor \(batch, tokens\)"),
        ({"prompt_ids": "text"}, "the prompt is a str"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask is a list: expected a tensor"),
        ({"prefill": "exact"}, r"prefill = 'exact': use lrt.prefill.exact\(\)"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        lrt.generate(small(), **{"prompt_ids": torch.tensor([[1, 2, 3]]), **settings})


def test_nothing_new_is_asked_for():
    assert lrt.generate(small(), torch.tensor([[1, 2]]), max_new_tokens=0).tolist() == [[1, 2]]


def test_a_full_state_is_refused():
    model = small()
    state = prefill.run(model, torch.tensor([[1, 2, 3]]), capacity=4).state
    session = Session(model, state, torch.tensor([4]), Request(max_new_tokens=5))
    with pytest.raises(ValueError, match="do not fit a state of capacity 4"):
        for _ in session:
            pass


def test_a_captured_step_keeps_what_it_reads(monkeypatch):
    """A graph knows only where its tensors were; capturing itself is stood in for."""
    monkeypatch.setattr(decoding.torch, "cuda", MagicMock())
    held = torch.zeros(1)

    def step():
        held.add_(1)

    kept = weakref.ref(step)
    run = decoding.graphed(step, MagicMock(device=torch.device("cuda", 0)))
    del step
    gc.collect()
    assert kept() is not None
    run()
    assert held.item() == 3  # twice to warm up and once captured: a replay calls the graph alone
