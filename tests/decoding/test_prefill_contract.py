"""Prefill: what is exact for certain, stopping and freezing by row, chunks, reports; states as values;
the prefix cache."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small
from strategies import SEPARATOR, VOCABULARY, models, rows

import lrt
from lrt.accounting import block_flops, forward_flops, shared_flops
from lrt.decoding import prefill
from lrt.decoding.generation import complete
from lrt.decoding.prefill_passes import Span
from lrt.decoding.prefix_cache import PrefixCache
from lrt.decoding.sampling import Sampling
from lrt.decoding.state import DecodeState, fingerprint
from lrt.decoding.step import decode_one_token


def next_logits(model, state, steps=3):
    state = state.fork()
    active = torch.ones(state.batch, dtype=torch.bool)
    return torch.stack(
        [decode_one_token(model, state, torch.full((state.batch,), 3 + i), active) for i in range(steps)]
    )


# ------------------------------------------------------------------ exactness


@settings(max_examples=30)
@given(
    models(attention_reset=SEPARATOR), rows(length=st.integers(1, 12)), st.integers(1, 5), st.integers(1, 4), st.data()
)
def test_positions_reported_exact_are_exact(model, row, groups, sweeps, data):
    tokens = row[0]
    length = tokens.shape[1]
    method = data.draw(
        st.sampled_from([prefill.fixed_point(groups, tol=1e-300, max_sweeps=sweeps), prefill.refine(sweeps)])
    )
    done = prefill.run(model.eval(), tokens, method=method, everywhere=True)
    step = groups if isinstance(method, prefill.FixedPoint) else 1
    expected = prefill.run(model, tokens, everywhere=True)
    memory = model(tokens, schedule=lrt.sequential(), return_logits=False).memory
    torch.testing.assert_close(expected.state.memory, memory[:, -1])
    for row in range(len(tokens)):
        certain = min(length, step * done.report.sweeps[row] + 1)
        # a source that does not feel the memory
        still = isinstance(method, prefill.FixedPoint) and done.report.residual[row] == 0
        assert done.report.sweeps[row] == sweeps or certain == length or still
        assert done.report.exact_positions[row] == certain and done.state.exact[row] == (certain == length)
        assert done.report.converged[row] == (certain == length or still)
        torch.testing.assert_close(done.hidden[row, :certain], expected.hidden[row, :certain])
    if done.state.exact.all():
        torch.testing.assert_close(next_logits(model, done.state), next_logits(model, expected.state))


def test_the_position_after_the_exact_ones_differs():
    model, tokens = small(), torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    exact = prefill.run(model, tokens, everywhere=True).hidden
    for method, certain in ((prefill.fixed_point(3, tol=1e-300, max_sweeps=2), 7), (prefill.refine(4), 5)):
        done = prefill.run(model, tokens, method=method, everywhere=True)
        assert (done.hidden[:, :certain] - exact[:, :certain]).abs().max() < 1e-12
        assert (done.hidden[:, certain] - exact[:, certain]).abs().max() > 1e-9


@settings(max_examples=25)
@given(
    models(attention_reset=SEPARATOR),
    rows(length=st.integers(2, 12)),
    st.integers(1, 11),
    st.sampled_from([None, 1, 3]),
    st.data(),
)
def test_a_prompt_may_come_in_parts(model, row, cut, chunk, data):
    tokens = row[0]
    cut = min(cut, tokens.shape[1] - 1)
    capacity = tokens.shape[1] + 4
    whole = prefill.run(model.eval(), tokens, capacity=capacity).state
    methods = [prefill.exact(), prefill.refine(12, chunk=chunk), prefill.fixed_point(3, tol=1e-300, chunk=chunk)]
    first = prefill.run(model, tokens[:, :cut], capacity=capacity, method=data.draw(st.sampled_from(methods)))
    before = first.state.fork()
    second = prefill.run(model, tokens[:, cut:], state=first.state, method=data.draw(st.sampled_from(methods)))
    torch.testing.assert_close(second.state.memory, whole.memory)
    torch.testing.assert_close(next_logits(model, second.state), next_logits(model, whole))
    settling = [done for done in (first, second) if done.report.method.startswith("fixed_point")]
    still = any(
        done.report.residual[row] == 0 and not done.state.exact[row] for done in settling for row in range(len(tokens))
    )
    # a fixed point that is reached before it is certain: a source that hardly feels the memory
    assert second.state.exact.all() or still
    for a, b in zip((*first.state.keys, first.state.memory), (*before.keys, before.memory)):
        assert torch.equal(a, b)  # the state that was continued is as it was


def test_an_approximate_beginning_keeps_the_whole_from_being_exact():
    model, tokens = small(), torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    rough = prefill.run(model, tokens[:, :8], capacity=20, method=prefill.refine(1)).state
    rest = prefill.run(model, tokens[:, 8:], state=rough)
    assert rest.report.exact_positions == (2,) and not rest.state.exact.any()


@settings(max_examples=20)
@given(models(), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([None, 5]))
def test_blocks_run_over_as_many_positions_as_is_counted(model, lengths, groups, chunk):
    """Those below the first receiver and those above the source once."""
    tokens, seen = torch.randint(0, VOCABULARY, (len(lengths), max(lengths))), [0] * len(model.blocks)
    for index, block in enumerate(model.eval().blocks):
        block.register_forward_pre_hook(
            lambda module, args, index=index: seen.__setitem__(index, seen[index] + args[0][..., 0].numel())
        )
    spans = []
    for method in (prefill.refine(2, chunk=chunk), prefill.fixed_point(groups, max_sweeps=3, chunk=chunk)):
        spans.clear()
        state = DecodeState.empty(model, batch=len(lengths), capacity=12)
        seen[:] = [0] * len(seen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                prefill,
                "_span",
                lambda *args, make=prefill._span, **kind: spans.append(make(*args, **kind)) or spans[-1],
            )
            prefill.run(model, tokens, lengths=torch.tensor(lengths), state=state, method=method)
        work = [part for span in spans for part in span.ran]
        assert seen == [
            sum(part.positions for part in work if part.start <= index < part.stop) for index in range(len(seen))
        ]
        once = [*seen[: min(model.receivers)], *seen[model.source :]]
        assert set(once) <= {tokens.numel()}


# ------------------------------------------------------------------ stopping and freezing


@settings(max_examples=20)
@given(
    models(),
    st.lists(st.integers(1, 14), min_size=2, max_size=4),
    st.integers(1, 4),
    st.sampled_from([1e-1, 1e-3]),
    st.integers(0, 99),
)
def test_rows_stop_and_freeze_as_if_they_were_alone(model, lengths, groups, tol, seed):
    method = prefill.fixed_point(groups, tol=tol)
    tokens = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    together = prefill.run(model.eval(), tokens, lengths=torch.tensor(lengths), method=method)
    for i, length in enumerate(lengths):
        alone = prefill.run(model, tokens[i : i + 1, :length], method=method)
        assert (together.report.sweeps[i], together.report.exact_positions[i]) == (
            alone.report.sweeps[0],
            alone.report.exact_positions[0],
        )
        assert together.report.residual[i] == pytest.approx(alone.report.residual[0], rel=1e-6, abs=1e-12)
        torch.testing.assert_close(together.state.memory[i], alone.state.memory[0])
        torch.testing.assert_close(together.hidden[i], alone.hidden[0])


def test_the_residual_is_the_largest_relative_change_of_the_last_sweep():
    model, tokens = small(), torch.randint(1, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(2))
    snapshots = [prefill_memory(model, tokens, sweeps) for sweeps in (1, 2)]
    change = (snapshots[1] - snapshots[0]).norm(dim=-1) / snapshots[1].norm(dim=-1)
    report = prefill.run(model, tokens, method=prefill.fixed_point(4, tol=1e-300, max_sweeps=2)).report
    assert report.residual[0] == pytest.approx(float(change.max()), rel=1e-5)
    assert report.sweeps == (2,) and report.converged == (False,)


def prefill_memory(model, tokens, sweeps):
    span = Span(model, DecodeState.empty(model, batch=1, capacity=40), tokens, torch.tensor([tokens.shape[1]]))
    with torch.no_grad():
        span.first()
        for sweep in range(sweeps):
            for first in range(4 * sweep + 1, 4 * sweep + 5):
                span.sweep(slice(first, tokens.shape[1], 4))
    return span.memory[:, 1:].clone()


def test_exact_positions_and_frozen_rows_are_not_swept_again(monkeypatch):
    swept = []
    sweep = Span.sweep

    def watch(self, where):
        swept.append((len(self.counts), list(range(where.start, where.stop, where.step))))
        return sweep(self, where)

    monkeypatch.setattr(Span, "sweep", watch)
    model = small()
    tokens = torch.randint(1, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
    prefill.run(model, tokens, lengths=torch.tensor([10, 4]), method=prefill.fixed_point(3, tol=1e-300))
    assert swept[:3] == [(2, [1, 4, 7]), (2, [2, 5, 8]), (2, [3, 6, 9])]  # the first sweep starts at residue 1
    assert swept[3:] == [(1, [4, 7]), (1, [5, 8]), (1, [6, 9]), (1, [7]), (1, [8]), (1, [9])]  # row 1 is exact after it


def test_flops_count_every_pass():
    model, tokens = small(), torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    flops = {
        str(m): prefill.run(model, tokens, method=m).report.flops
        for m in (prefill.exact(), prefill.refine(1), prefill.refine(3))
    }
    step = flops["refine(3)"] - flops["refine(1)"]
    blocks, each = block_flops(model, 12), forward_flops(model, 12)
    assert step == pytest.approx(2 * 12 * (shared_flops(model) + sum(map(sum, blocks[: model.source]))))
    assert flops["exact"] == pytest.approx(12 * (each.blocks + each.attention + each.memory) + each.head)


def test_the_default_tolerance_depends_on_the_dtype_and_reaches_it():
    for dtype, tol in ((torch.float64, 1e-6), (torch.float32, 0.1), (torch.bfloat16, 0.1)):
        model = small(dtype=dtype)
        tokens = torch.randint(1, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(4))
        report = prefill.run(model, tokens, method=prefill.fixed_point()).report
        assert all(report.converged) and 0 < max(report.residual) <= tol
        assert max(report.sweeps) < 45 and report.exact_positions == tuple(n + 1 for n in report.sweeps)  # one group


# ------------------------------------------------------------------ states as values


@settings(max_examples=20)
@given(models(), rows(batch=st.integers(2, 3), length=st.integers(1, 9)), st.data())
def test_forks_and_selections_go_their_own_way(model, row, data):
    tokens = row[0]
    state = prefill.run(model.eval(), tokens, capacity=16).state
    expected = next_logits(model, state)
    forked = state.fork(2)
    torch.testing.assert_close(next_logits(model, forked), expected.repeat_interleave(2, dim=1))
    index = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=4))
    torch.testing.assert_close(next_logits(model, state.select(index)), expected[:, index])
    with tempfile.TemporaryDirectory() as folder:
        loaded = DecodeState.load(state.save(f"{folder}/state.safetensors"), model=model)
    assert torch.equal(next_logits(model, loaded), expected)
    assert (loaded.capacity, loaded.windows, loaded.kept_at) == (state.capacity, state.windows, state.kept_at)
    small_state = state.shrink(tokens.shape[1])
    wide = DecodeState.empty(model, batch=len(tokens) + 1, capacity=20)
    wide.put(list(range(1, len(tokens) + 1)), small_state)
    torch.testing.assert_close(next_logits(model, wide)[:, 1:], expected)


@settings(max_examples=20)
@given(models(window_pattern="L"), rows(length=st.integers(2, 9)), st.data())
def test_truncation_goes_back_to_kept_lengths(model, row, data):
    tokens = row[0]
    length = data.draw(st.integers(1, tokens.shape[1] - 1))
    method = data.draw(st.sampled_from([prefill.exact(), prefill.fixed_point(2, tol=1e-300, chunk=3)]))
    state = prefill.run(model.eval(), tokens, capacity=16, keep_at=[length, 12], method=method).state
    shorter = prefill.run(model, tokens[:, :length], capacity=16).state
    torch.testing.assert_close(next_logits(model, state.truncate(length)), next_logits(model, shorter))
    assert torch.equal(next_logits(model, state.truncate(state.lengths.tolist())), next_logits(model, state))
    empty = DecodeState.empty(model, batch=len(tokens), capacity=16)
    torch.testing.assert_close(next_logits(model, state.truncate(0)), next_logits(model, empty))


def test_decoding_keeps_the_memory_at_declared_lengths():
    model = small(window_pattern="L")
    out = complete(model, torch.tensor([[1, 2, 3]]), max_new_tokens=6, sampling=Sampling(temperature=0.0), keep_at=[5])
    again = complete(model, out.ids[:, :6], max_new_tokens=3, sampling=Sampling(temperature=0.0))
    assert again.ids.tolist() == out.ids.tolist()
    state = prefill.run(model, out.ids[:, :5], capacity=9).state
    torch.testing.assert_close(next_logits(model, out.state.truncate(5)), next_logits(model, state))


def test_what_cannot_be_truncated_is_refused_with_the_reason():
    state = prefill.run(small(window_pattern="L"), torch.tensor([[1, 2, 3, 4]]), keep_at=[2]).state
    with pytest.raises(ValueError, match=r"the memory is kept at lengths \[2\] only: declare 3 in keep_at"):
        state.truncate(3)
    with pytest.raises(ValueError, match=r"row 0 has consumed 4 tokens; use 0..4"):
        state.truncate(5)
    ring = prefill.run(small(), torch.randint(1, VOCABULARY, (1, 8)), keep_at=[6]).state
    with pytest.raises(ValueError, match="a sliding window of 4 tokens has overwritten older keys"):
        ring.truncate(6)
    with pytest.raises(ValueError, match="one number, or one a row"):
        state.truncate([1, 2])


def test_a_state_of_another_model_is_refused(tmp_path):
    model, other = small(seed=1), small(seed=2)
    state = prefill.run(model, torch.tensor([[1, 2, 3]]), capacity=8).state
    path = state.save(tmp_path / "state.safetensors")
    for use in (
        lambda: DecodeState.load(path, model=other),
        lambda: prefill.run(other, torch.tensor([[1]]), state=state),
    ):
        with pytest.raises(ValueError, match="this state belongs to another model"):
            use()
    with torch.no_grad():
        model.backbone.head.weight[0, 0] += 1  # an optimizer's step makes it another model
    with pytest.raises(ValueError, match="use the weights and dtype it was made with"):
        state.check_model(model)
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        DecodeState.load(tmp_path / "broken", model=model)
    with pytest.raises(ValueError, match="no such file"):
        DecodeState.load(tmp_path / "none", model=model)
    assert fingerprint(small(seed=1)) == fingerprint(small(seed=1)) != fingerprint(other)


def test_a_state_costs_the_plain_cache_and_one_vector_a_row():
    model, plain = small(), small()
    state = DecodeState.empty(model, batch=3, capacity=32)
    plain.recurrence, plain.source, plain.receivers, plain.memory_projection, plain.injection = None, 0, (), None, None
    assert state.nbytes == DecodeState.empty(plain, batch=3, capacity=32).nbytes + 3 * 16 * 8


# ------------------------------------------------------------------ the prefix cache


@settings(max_examples=20)
@given(models(), st.integers(1, 8), st.integers(2, 6), st.integers(0, 99))
def test_a_cached_beginning_changes_no_token(model, shared, rest, seed):
    generator = torch.Generator().manual_seed(seed)
    beginning = torch.randint(0, VOCABULARY, (1, shared), generator=generator)
    prompts = [
        torch.cat([beginning, torch.randint(0, VOCABULARY, (1, rest), generator=generator)], 1) for _ in range(2)
    ]
    cache = PrefixCache()
    greedy = Sampling(temperature=0.0)
    complete(model.eval(), torch.cat([beginning, beginning[:, :1]], 1), max_new_tokens=1, prefix_cache=cache)
    for prompt in prompts:
        out = complete(model, prompt, max_new_tokens=4, sampling=greedy, prefix_cache=cache)
        assert out.ids.tolist() == complete(model, prompt, max_new_tokens=4, sampling=greedy).ids.tolist()
    found = cache.find(prompts[0][0].tolist(), model=model, method=prefill.exact())
    assert found is not None and int(found.lengths[0]) >= shared


def test_an_approximate_state_is_never_served_for_an_exact_one():
    model, tokens = small(), list(range(1, 11))
    cache, rough = PrefixCache(), prefill.refine(1)
    state = prefill.run(model, torch.tensor([tokens]), method=rough).state
    cache.put(tokens, state, method=rough)
    assert cache.find(tokens, model=model, method=prefill.exact()) is None
    assert cache.find(tokens, model=model, method=prefill.refine(2)) is None
    assert cache.find(tokens, model=model, method=rough) is not None
    assert cache.find(tokens, model=small(seed=9), method=rough) is None
    short, long = prefill.fixed_point(2, max_sweeps=1), prefill.fixed_point(2, max_sweeps=2)
    cache.put(tokens, prefill.run(model, torch.tensor([tokens]), method=short).state, method=short)
    assert cache.find(tokens, model=model, method=long) is None
    exact = prefill.fixed_point(3, tol=1e-300)  # goes on until everything is exact for certain
    cache.put(tokens, prefill.run(model, torch.tensor([tokens]), method=exact).state, method=exact)
    assert bool(cache.find(tokens, model=model, method=prefill.exact()).exact.all())


def test_the_cache_forgets_the_least_recently_used():
    model = small()
    states = {n: prefill.run(model, torch.arange(1, n + 1)[None]).state for n in (4, 5, 6)}
    cache = PrefixCache(max_bytes=states[4].nbytes + states[6].nbytes + 1)
    for n, state in states.items():
        cache.put(range(1, n + 1), state, method=prefill.exact())
    assert len(cache) == 1 or cache.nbytes <= cache.max_bytes
    assert int(cache.find(range(1, 9), model=model, method=prefill.exact()).lengths[0]) == 6
    with pytest.raises(ValueError, match="give one row that consumed them"):
        cache.put([1, 2], states[4], method=prefill.exact())


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prefill.refine(0), "use a whole number of 1 or more"),
        (lambda: prefill.fixed_point(0), r"fixed_point\(groups=0\)"),
        (lambda: prefill.fixed_point(groups=None), r"fixed_point\(groups=None\)"),
        (
            lambda: prefill.run(small(), torch.tensor([[1, 2, 3]]), method="exact"),
            r"prefill = 'exact': use lrt.prefill.exact\(\)",
        ),
        (lambda: prefill.fixed_point(max_sweeps=0), r"fixed_point\(max_sweeps=0\)"),
        (
            lambda: prefill.fixed_point(tol=0.0),
            "use a number above 0, leave it out for the measured default, or use prefill.exact",
        ),
        (lambda: prefill.fixed_point(tol=-1.0), "use a number above 0"),
        (lambda: prefill.refine(1, chunk=0), "prefill chunk = 0"),
        (
            lambda: prefill.run(small(), torch.tensor([[1, 2, 3]]), capacity=2),
            "needs room for 3 tokens, but the state's capacity is 2",
        ),
        (lambda: prefill.run(small(), torch.tensor([[1, 2]]), lengths=torch.tensor([0])), "the prompt is empty"),
        (lambda: DecodeState.empty(small(), batch=0, capacity=4), "use 1 or more of both"),
        (lambda: DecodeState.empty(small(), batch=1, capacity=4, keep_at=[5]), "use lengths 1..4"),
        (lambda: DecodeState.empty(small(), batch=2, capacity=4).select([2]), "this state has rows 0..1"),
        (lambda: DecodeState.empty(small(), batch=2, capacity=4).fork(0), "use 1 or more"),
        (lambda: PrefixCache(max_bytes=0), "use 1 or more"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
