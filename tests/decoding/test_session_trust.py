"""Going on from a state, rows that fill their room, and numbers from which nothing may be chosen."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import small
from strategies import SEPARATOR, VOCABULARY, models

import lrt
from lrt.decoding import prefill
from lrt.decoding.generation import complete, start
from lrt.decoding.request import Request
from lrt.decoding.sampling import Sampling, choose, row_seeds
from lrt.decoding.session import Session
from lrt.decoding.state import DecodeState

# ------------------------------------------------------------------ generate from a state


@settings(max_examples=25)
@given(
    model=models(),
    data=st.data(),
    seed=st.integers(0, 9),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.booleans(),
)
def test_going_on_from_a_state_is_the_whole_prompt_at_once(model, data, seed, temperature, penalty):
    """Any cut of every row into what the state has consumed and what follows; the state stays as it is."""
    model = model.eval()
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    rows = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=n, max_size=n)) for n in lengths]
    cuts = [data.draw(st.integers(0, n - 1)) for n in lengths]

    def padded(parts):
        width = max(1, *map(len, parts))
        ids = torch.tensor([[SEPARATOR] * (width - len(p)) + p for p in parts])
        return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in parts])

    def seeded():
        return torch.Generator().manual_seed(seed)

    settings = {"max_new_tokens": 5, "sampling": Sampling(temperature=temperature)}
    whole = complete(model, *padded(rows), **settings, generator=seeded())
    state = DecodeState.empty(model, batch=len(rows), capacity=max(1, *cuts), keep_at=[1])
    firsts = [row[:cut] for row, cut in zip(rows, cuts)]
    width = max(1, *cuts)
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in firsts])
    if max(cuts):
        prefill.consume(model, state, tokens, torch.tensor(cuts), method=prefill.exact())
    before = state.fork()
    rest = padded([row[cut:] for row, cut in zip(rows, cuts)])
    done = complete(model, *rest, **settings, generator=seeded(), state=state)
    assert done.tokens == whole.tokens and done.state.lengths.tolist() == whole.state.lengths.tolist()
    assert all(torch.equal(a, b) for a, b in zip((*state.keys, state.lengths), (*before.keys, before.lengths)))
    ids = lrt.generate(model, rest[0], rest[1], 5, temperature, generator=seeded(), state=state)
    assert torch.equal(ids, done.ids)


def test_a_conversation_goes_on_from_what_was_generated():
    model = small()
    first = complete(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4, sampling=Sampling(temperature=0.0))
    more = torch.tensor([[first.tokens[0][-1], 5, 6]])  # the state lacks the last token
    second = lrt.generate(model, more, max_new_tokens=4, temperature=0.0, state=first.state)
    whole = torch.tensor([[1, 2, 3, *first.tokens[0], 5, 6]])
    assert second[0, 3:].tolist() == lrt.generate(model, whole, max_new_tokens=4, temperature=0.0)[0, -4:].tolist()


def test_a_state_that_does_not_fit_is_refused_with_the_way_out():
    model, ids = small(), torch.tensor([[1, 2]])
    state = prefill.run(model, ids).state
    with pytest.raises(ValueError, match=r"the state has 1 rows, but the prompt 2: .*state.fork\(n\)"):
        lrt.generate(model, ids.expand(2, 2), state=state)
    with pytest.raises(ValueError, match="another model"):
        lrt.generate(small(seed=4), ids, state=state)
    with pytest.raises(ValueError, match="leave both out"):
        start(model, ids, state=state, keep_at=[1])
    assert lrt.generate(model, ids.expand(2, 2), max_new_tokens=1, state=state.fork(2)).shape == (2, 3)


def test_penalties_see_the_tokens_that_are_given_and_no_padding():
    model, ids = small(), torch.tensor([[3, 4, 5, 6]])
    state = prefill.run(model, ids[:, :2]).state
    session, _ = start(model, ids[:, 2:], state=state, sampling=Sampling(repetition_penalty=1.5), max_new_tokens=2)
    assert session.seen[0].nonzero()[:, 0].tolist() == [5, 6]


# ------------------------------------------------------------------ room


def room(capacity, lengths, remaining):
    model = small()
    state = DecodeState.empty(model, batch=len(lengths), capacity=capacity)
    counts = torch.tensor(lengths)
    if max(lengths):
        prefill.consume(
            model, state, torch.ones(len(lengths), max(lengths), dtype=torch.int64), counts, method=prefill.exact()
        )
    session = Session(
        model,
        state,
        torch.ones(len(lengths), dtype=torch.int64),
        Request(max_new_tokens=1, sampling=Sampling(temperature=0.0)),
    )
    session.remaining.copy_(torch.tensor(remaining))
    session.active.copy_(session.remaining > 0)
    session.live = session.active.tolist()
    return session


def test_a_row_that_fits_is_never_refused_for_the_stride_or_for_finished_rows():
    session = room(
        12, [10, 12, 3], [2, 0, 9]
    )  # 10 + 2 and 3 + 9 fill the room to the last token; row 1 is full and done
    assert [len(row) for burst in session for row in burst.tokens]
    assert [len(row) for row in session.rows] == [2, 0, 9]


def test_a_row_without_room_is_named_and_the_others_go_on_after_it_is_retired():
    session = room(6, [4, 1], [5, 4])
    assert [len(row) for row in session.advance().tokens] == [2, 2]  # as far as the room of row 0
    with pytest.raises(
        ValueError, match=r"row 0 has 6 tokens, and 3 more do not fit a state of capacity 6: end it with retire\(0\)"
    ):
        session.advance()
    session.retire(0)
    assert [len(row) for burst in session for row in burst.tokens] and [len(row) for row in session.rows] == [2, 4]


@pytest.mark.parametrize("row", [-1, 2, True, 0.0])
def test_rows_that_do_not_exist_are_refused(row):
    session = room(6, [1, 1], [2, 2])
    for use in (session.retire, lambda row: session.replace(row, [1], max_new_tokens=1)):
        with pytest.raises(ValueError, match="this session has rows 0..1"):
            use(row)
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="whole number of 1 or more steps"):
            session.advance(steps)


# ------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-45, 1e-38, 1e-30, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_near_zero_is_greedy(temperature, dtype):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).to(dtype) * 30
    logits[:8] = 0.0  # of equal ones, the first
    seeds, lengths = row_seeds(64, torch.Generator().manual_seed(1), torch.device("cpu")), torch.arange(64)
    for more in ({}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}):
        sampling = Sampling(temperature=temperature, **more)
        token, logprob = choose(logits, sampling, seeds=seeds, history=None, lengths=lengths, seen=None)
        assert torch.equal(token, logits.argmax(-1)) and logprob.isfinite().all()


def test_a_hot_draw_is_even_over_what_is_allowed():
    logits = torch.tensor([[1.0, float("-inf"), 2.0, 3.0]]).expand(600, 4)
    seeds = row_seeds(600, torch.Generator().manual_seed(1), torch.device("cpu"))
    token, _ = choose(
        logits, Sampling(temperature=1e300), seeds=seeds, history=None, lengths=torch.arange(600), seen=None
    )
    counts = torch.bincount(token, minlength=4).tolist()
    assert counts[1] == 0 and all(150 < n < 250 for n in (counts[0], *counts[2:]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_logits_from_which_nothing_can_be_chosen_raise(bad, temperature):
    def spoil(logits, history, lengths):
        return torch.where((lengths == 4)[:, None], torch.full_like(logits, bad), logits)

    settings = {"max_new_tokens": 8, "sampling": Sampling(temperature=temperature, processors=(spoil,))}
    with pytest.raises(ValueError, match=r"no token can be chosen for rows \[1\]: their logits are NaN or all -inf"):
        complete(
            small(),
            torch.tensor([[1, 0, 0], [1, 2, 3]]),
            torch.tensor([[1, 0, 0], [1, 1, 1]]),
            **settings | {"max_new_tokens": 2},
        )
    broken = small()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"no token can be chosen for rows \[0\]"):
        lrt.generate(broken, torch.tensor([[1, 2, 3]]), temperature=temperature)


def test_a_processor_of_another_width_is_refused():
    for other in (
        lambda logits, *_: logits[:, :-1],
        lambda logits, *_: torch.cat([logits, logits], -1),
        lambda logits, *_: logits[:1, 0],
    ):
        with pytest.raises(
            ValueError,
            match=r"a processor of sampling.processors gave logits of shape .* but took .*: "
            r"it must change numbers alone",
        ):
            complete(small(), torch.tensor([[1, 2], [3, 4]]), max_new_tokens=2, sampling=Sampling(processors=(other,)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_prompts_of_other_dtypes_are_refused_in_words(dtype):
    with pytest.raises(
        ValueError,
        match=r"the prompt has shape \(1, 2\) and dtype .*: expected token ids .batch, tokens. in torch.int64",
    ):
        lrt.generate(small(), torch.ones(1, 2, dtype=dtype), max_new_tokens=1)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_prompts_of_shorter_integers_are_the_same_prompts(dtype):
    prompt, greedy = torch.ones(1, 2, dtype=torch.int64), {"max_new_tokens": 3, "temperature": 0.0}
    assert (
        lrt.generate(small(), prompt.to(dtype), **greedy).tolist() == lrt.generate(small(), prompt, **greedy).tolist()
    )


# ------------------------------------------------------------------ states in files


HARM = {
    "capacity": lambda about, tensors: about.update(capacity=10**12),
    "negative capacity": lambda about, tensors: about.update(capacity=-1),
    "windows": lambda about, tensors: about.update(windows=[3]),
    "kept_at": lambda about, tensors: about.update(kept_at=[99]),
    "kept_at words": lambda about, tensors: about.update(kept_at="ab"),
    "missing key": lambda about, tensors: tensors.pop("key.0"),
    "extra tensor": lambda about, tensors: tensors.update(x=torch.zeros(1)),
    "shape": lambda about, tensors: tensors.update({"value.1": tensors["value.1"][:, 1:].clone()}),
    "dtype": lambda about, tensors: tensors.update({"value.1": tensors["value.1"].half()}),
    "no memory": lambda about, tensors: tensors.pop("memory"),
    "lengths too long": lambda about, tensors: tensors["lengths"].fill_(99),
    "negative lengths": lambda about, tensors: tensors["lengths"].fill_(-1),
    "documents": lambda about, tensors: tensors["document_starts"].fill_(5),
    "approximate": lambda about, tensors: tensors["approximate_from"].fill_(-5),
    "no rows": lambda about, tensors: tensors.update({n: t[:0].clone() for n, t in tensors.items()}),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_state_that_does_not_fit_together_is_not_read(tmp_path, harm):
    model = small()
    state = DecodeState.empty(model, batch=2, capacity=7, keep_at=[2])
    prefill.consume(model, state, torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 2]), method=prefill.exact())
    path = state.save(tmp_path / "state.safetensors")
    again = DecodeState.load(path, model=model)
    assert all(
        torch.equal(a, b)
        for a, b in zip((*state.keys, state.memory, state.kept), (*again.keys, again.memory, again.kept))
    )
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["lrt_state"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    HARM[harm](about, tensors)
    save_file(tensors, path, metadata={"lrt_state": json.dumps(about)})
    with pytest.raises(
        ValueError, match=r"state.safetensors: .*the file was changed, or its model has another shape"
    ) as caught:
        DecodeState.load(path, model=model)
    assert len(str(caught.value).splitlines()) == 1
