"""The guarantees of the method, by property, in float64, against the plain-loop oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import Oracle, oracle_loss
from strategies import SEPARATOR, VOCABULARY, models, randomized, rows

import lrt
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.model import build_model

SAME = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_model(layers):
    config = ModelConfig(n_layers=layers, width=8, n_heads=2, vocab_size=VOCABULARY)
    return randomized(build_model(config, RecurrenceConfig(), dtype=torch.float64), 0)


def oracles(model, tokens, method, *args, **kwargs):
    """Logits (T, V) of every group, for every row."""
    return [getattr(Oracle(model, row), method)(*args, **kwargs) for row in tokens.tolist()]


def logits_of(model, tokens, schedule, **kwargs):
    with torch.no_grad():
        return model(tokens, schedule=schedule, **kwargs).logits


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found)]


def assert_against_oracle(model, tokens, targets, schedule, expected, weights):
    """Logits, group losses, loss and every gradient."""
    out = model(tokens, targets=targets, schedule=schedule, return_logits=True)
    loss, losses = oracle_loss(expected, targets, weights)
    torch.testing.assert_close(out.logits, torch.stack([groups[-1] for groups in expected]), **SAME)
    for got, want, weight in zip(out.groups, losses, weights):
        if weight > 0:
            torch.testing.assert_close(got, want, **SAME)
    torch.testing.assert_close(out.loss, loss, **SAME)
    if not (targets != -100).any():
        assert out.loss == 0
        return
    for got, want in zip(gradients(out.loss, model), gradients(loss, model)):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------ every schedule is the oracle's


@settings(max_examples=15)
@given(
    model=models(),
    row=rows(length=st.integers(1, 7)),
    subsets=st.integers(1, 4),
    sweeps=st.integers(1, 2),
    data=st.data(),
)
def test_interleaved_is_the_oracle(model, row, subsets, sweeps, data):
    tokens, targets = row
    weights = data.draw(
        st.one_of(
            st.just("paper"),
            st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1 + sweeps, max_size=1 + sweeps).filter(any),
        )
    )
    numbers = [1.0] + [float(min(subsets, tokens.shape[1]))] * sweeps if weights == "paper" else weights
    expected = oracles(model, tokens, "interleaved", subsets, sweeps)
    assert_against_oracle(
        model, tokens, targets, lrt.interleaved(subsets, sweeps=sweeps, weights=weights), expected, numbers
    )


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(1, 6)), passes=st.integers(1, 3), data=st.data())
def test_refine_is_the_oracle(model, row, passes, data):
    tokens, targets = row
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.1, 0.6]), min_size=1 + passes, max_size=1 + passes).filter(any)
    )
    expected = oracles(model, tokens, "refine", passes)
    assert_against_oracle(model, tokens, targets, lrt.refine(passes, weights=weights), expected, weights)


@settings(max_examples=10)
@given(
    model=models(),
    row=rows(length=st.integers(1, 6)),
    passes=st.integers(1, 2),
    settle=st.integers(1, 3),
    data=st.data(),
)
def test_settled_memory_is_the_oracle(model, row, passes, settle, data):
    """Passes without gradient come between the initialization and those that are graded; every gradient is compared."""
    tokens, targets = row
    size = {"min_size": 1 + passes, "max_size": 1 + passes}
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.6]), **size).filter(any))
    expected = oracles(model, tokens, "refine", passes, settle)
    assert_against_oracle(model, tokens, targets, lrt.refine(passes, weights=weights, settle=settle), expected, weights)


@pytest.mark.parametrize("first", [0.0, 0.4])
def test_one_graded_pass_on_settled_memory_is_the_last_of_many_with_cut_gradients(first):
    model, tokens = small_model(3), torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    schedules = (
        lrt.refine(1, weights=(first, 0.6), settle=3),
        lrt.refine(4, weights=(first, 0, 0, 0, 0.6), cut_gradient=True),
    )
    ours, theirs = (model(tokens, targets=tokens, schedule=schedule, return_logits=True) for schedule in schedules)
    torch.testing.assert_close(ours.logits, theirs.logits, **SAME)
    torch.testing.assert_close(ours.loss, theirs.loss, **SAME)
    for got, want in zip(gradients(ours.loss, model), gradients(theirs.loss, model)):
        torch.testing.assert_close(got, want, **SAME)
    assert len(ours.groups) == 2 and schedules[0].token_compute == 5


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(1, 7)), chunk=st.integers(1, 8))
def test_chunked_is_the_oracle(model, row, chunk):
    tokens, targets = row
    assert_against_oracle(model, tokens, targets, lrt.chunked(chunk), oracles(model, tokens, "chunked", chunk), [1.0])


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(4, 7)), subsets=st.integers(2, 3))
def test_kv_refresh_is_the_oracle(model, row, subsets):
    tokens, targets = row
    expected = oracles(model, tokens, "interleaved", subsets, kv_refresh=True)
    assert_against_oracle(
        model, tokens, targets, lrt.interleaved(subsets, kv_refresh=True), expected, [1.0, float(subsets)]
    )


def test_kv_refresh_changes_what_it_should():
    model = small_model(2)
    tokens = torch.randint(0, VOCABULARY, (1, 8))
    plain, fresh = (logits_of(model, tokens, lrt.interleaved(2, kv_refresh=on)) for on in (False, True))
    torch.testing.assert_close(plain[:, :2], fresh[:, :2], **SAME)  # exact with and without
    assert (plain[:, 2:] - fresh[:, 2:]).abs().amax() > 1e-3


# ------------------------------------------------------------------ what is exact


@settings(max_examples=15)
@given(model=models(), row=rows())
def test_interleaved_T_is_sequential_in_outputs_loss_and_gradients(model, row):
    tokens, targets = row
    one = model(tokens, targets=targets, schedule=lrt.interleaved(tokens.shape[1], weights=(0, 1)), return_logits=True)
    two = model(tokens, targets=targets, schedule=lrt.sequential(), return_logits=True)
    torch.testing.assert_close(one.logits, two.logits, **SAME)
    torch.testing.assert_close(one.memory, two.memory, **SAME)
    torch.testing.assert_close(one.loss, two.loss, **SAME)
    if one.loss.requires_grad:
        for a, b in zip(gradients(one.loss, model), gradients(two.loss, model)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@given(model=models(), row=rows(), subsets=st.integers(2, 4), sweeps=st.integers(1, 3))
def test_positions_below_n_S_are_exact_after_n_sweeps(model, row, subsets, sweeps):
    tokens, _ = row
    exact = logits_of(model, tokens, lrt.sequential())
    known = sweeps * subsets
    got = logits_of(model, tokens, lrt.interleaved(subsets, sweeps=sweeps))
    torch.testing.assert_close(got[:, :known], exact[:, :known], **SAME)
    whole = logits_of(model, tokens, lrt.interleaved(subsets, sweeps=math.ceil(tokens.shape[1] / subsets)))
    torch.testing.assert_close(whole, exact, **SAME)


@given(
    model=models(),
    row=rows(),
    subsets=st.integers(2, 4),
    sweeps=st.integers(1, 3),
    order=st.sampled_from(["rotated", "random"]),
    seed=st.integers(0, 99),
)
def test_any_order_is_exact_on_the_first_n_plus_1(model, row, subsets, sweeps, order, seed):
    tokens, _ = row
    exact = logits_of(model, tokens, lrt.sequential())
    generator = torch.Generator().manual_seed(seed)
    got = logits_of(model, tokens, lrt.interleaved(subsets, sweeps=sweeps, order=order), generator=generator)
    torch.testing.assert_close(got[:, : sweeps + 1], exact[:, : sweeps + 1], **SAME)


@given(model=models(), row=rows(), passes=st.integers(1, 4))
def test_refine_is_exact_on_positions_0_to_K(model, row, passes):
    tokens, _ = row
    exact = logits_of(model, tokens, lrt.sequential())
    torch.testing.assert_close(
        logits_of(model, tokens, lrt.refine(passes))[:, : passes + 1], exact[:, : passes + 1], **SAME
    )


def test_the_next_position_is_in_general_not_exact():
    model = small_model(2)
    tokens = torch.arange(10)[None] + 1
    exact = logits_of(model, tokens, lrt.sequential())
    for schedule, known in [
        (lrt.interleaved(3), 3),
        (lrt.interleaved(3, sweeps=2), 6),
        (lrt.refine(2), 3),
        (lrt.baseline(), 1),
    ]:
        error = (logits_of(model, tokens, schedule) - exact).abs().amax((0, 2))
        assert error[:known].max() < 1e-9 < 1e-6 < error[known], schedule


@given(model=models(), row=rows(), passes=st.integers(1, 3))
def test_refine_is_interleaved_with_one_subset(model, row, passes):
    tokens, _ = row
    assert torch.equal(
        logits_of(model, tokens, lrt.refine(passes)), logits_of(model, tokens, lrt.interleaved(1, sweeps=passes))
    )


@given(model=models(), row=rows())
def test_chunked_of_the_whole_row_is_baseline(model, row):
    tokens, targets = row
    one, two = (
        model(tokens, targets=targets, schedule=s, return_logits=True)
        for s in (lrt.chunked(tokens.shape[1]), lrt.baseline())
    )
    torch.testing.assert_close(one.logits, two.logits, **SAME)
    torch.testing.assert_close(one.loss, two.loss, **SAME)


@given(model=models(), row=rows(), data=st.data())
def test_causality(model, row, data):
    tokens, _ = row
    length = tokens.shape[1]
    place = data.draw(st.integers(0, length - 1))
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1 + data.draw(st.integers(0, VOCABULARY - 3))) % VOCABULARY
    schedules = [
        lrt.baseline(),
        lrt.interleaved(2),
        lrt.interleaved(3, sweeps=2),
        lrt.refine(2),
        lrt.chunked(3),
        lrt.sequential(),
    ]
    if length > 2:
        schedules.append(lrt.interleaved(2, kv_refresh=True))
    for schedule in schedules:
        before, after = logits_of(model, tokens, schedule), logits_of(model, changed, schedule)
        torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-12)


@given(model=models(), row=rows(batch=st.just(3)))
def test_rows_do_not_influence_each_other(model, row):
    tokens, _ = row
    for schedule in (lrt.interleaved(2), lrt.refine(1), lrt.sequential()):
        together = logits_of(model, tokens, schedule)
        alone = torch.cat([logits_of(model, one[None], schedule) for one in tokens])
        torch.testing.assert_close(together, alone, **SAME)


@settings(max_examples=15)
@given(
    model=models(),
    row=rows(),
    schedule=st.sampled_from([lrt.interleaved(2), lrt.interleaved(3), lrt.refine(2), lrt.sequential()]),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
@example(
    model=small_model(1), row=(torch.tensor([[3]]), torch.tensor([[2]])), schedule=lrt.interleaved(2), left=1, right=0
)
def test_padding_on_either_side_changes_nothing(model, row, schedule, left, right):
    tokens, targets = row
    padded, mask, goals = (
        torch.nn.functional.pad(x, (left, right), value=v)
        for x, v in ((tokens, 1), (torch.ones_like(tokens), 0), (targets, 5))
    )
    plain = model(tokens, targets=targets, schedule=schedule, return_logits=True)
    got = model(padded, targets=goals, schedule=schedule, attention_mask=mask, return_logits=True)
    torch.testing.assert_close(got.logits[:, left : left + tokens.shape[1]], plain.logits, **SAME)
    for a, b in zip(got.groups, plain.groups):  # "paper" weights depend on T where S > T, so losses by group
        torch.testing.assert_close(a, b, **SAME)
    ours, theirs = (
        model(x, labels=x, schedule=schedule, attention_mask=y) for x, y in ((padded, mask), (tokens, None))
    )
    for a, b in zip(ours.groups, theirs.groups):  # labels at padding are not scored, though they are token ids
        torch.testing.assert_close(a, b, **SAME)


@given(
    model=models(recurrence={"separator": SEPARATOR}, attention_reset=SEPARATOR),
    lengths=st.lists(st.integers(1, 3).map(lambda n: 2 * n), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_packed_documents_are_the_documents_apart(model, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    documents = [
        torch.cat([torch.tensor([SEPARATOR]), torch.randint(1, VOCABULARY, (n - 1,), generator=generator)])
        for n in lengths
    ]
    packed = torch.cat(documents)[None]
    numbers = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])[None]
    for schedule in (lrt.baseline(), lrt.refine(2), lrt.sequential(), lrt.interleaved(2), lrt.interleaved(2, sweeps=2)):
        apart = torch.cat([logits_of(model, d[None], schedule) for d in documents], dim=1)
        torch.testing.assert_close(logits_of(model, packed, schedule), apart, **SAME)
        torch.testing.assert_close(logits_of(model, packed, schedule, document_ids=numbers), apart, **SAME)
        # Numbers that join all documents leave the separators' borders as they are.
        torch.testing.assert_close(
            logits_of(model, packed, schedule, document_ids=torch.zeros_like(numbers)), apart, **SAME
        )


@given(model=models(), row=rows())
def test_no_memory_equals_zero_memory(model, row):
    """A pass whose memory is exactly zero gives what a pass without memory gives."""
    from lrt.forward import run_blocks

    tokens, _ = row
    hidden, contexts = model.backbone.embed(tokens, torch.arange(tokens.shape[1]))
    none = run_blocks(model, hidden, contexts, None)
    zero = run_blocks(model, hidden, contexts, torch.zeros_like(hidden))
    torch.testing.assert_close(none.hidden, zero.hidden, rtol=0, atol=1e-12)
    for a, b in zip(none.kv, zero.kv):
        torch.testing.assert_close(a.key, b.key, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ gradients stop where they should


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(4, 8)))
def test_cut_gradient_keeps_values_and_removes_the_path_through_earlier_passes(model, row):
    tokens, targets = row
    for make in (
        lambda cut: lrt.interleaved(2, weights=(0, 1), cut_gradient=cut),
        lambda cut: lrt.refine(1, weights=(0, 1), cut_gradient=cut),
    ):
        whole, cut = (model(tokens, targets=targets, schedule=make(flag)) for flag in (False, True))
        torch.testing.assert_close(whole.loss, cut.loss, **SAME)
    cut = model(tokens, targets=targets, schedule=lrt.refine(1, cut_gradient=True, weights=(1, 0)))
    plain = model(tokens, targets=targets, schedule=lrt.baseline())
    if plain.loss.requires_grad and plain.loss > 0:
        for a, b in zip(gradients(cut.loss, model), gradients(plain.loss, model)):
            torch.testing.assert_close(a, b, **SAME)


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(4, 8)), data=st.data())
def test_what_only_feeds_across_a_cut_runs_without_gradient_and_changes_no_number(model, row, data):
    """Neither scored nor reached by a gradient: the pass is ungraded; run with gradients it gives the same ones."""
    tokens, targets = row
    cut = data.draw(st.sampled_from([True, "initialization"]))
    schedule = data.draw(st.sampled_from([
        lrt.refine(1, weights=(0, 1), cut_gradient=cut), lrt.refine(2, weights=(0, 0, 1), cut_gradient=cut),
        lrt.refine(2, weights=(0, 0.5, 1), cut_gradient=cut), lrt.interleaved(2, weights=(0, 1), cut_gradient=cut),
        lrt.interleaved(3, sweeps=2, weights=(0, 0.3, 1), cut_gradient=cut),
    ]))  # fmt: skip
    plan = type(schedule).plan
    assert not schedule.plan(8)[0].graded
    found = [model(tokens, targets=targets, schedule=schedule).loss]
    with pytest.MonkeyPatch.context() as patch:
        whole = lambda *args, **options: tuple(step._replace(graded=True) for step in plan(*args, **options))  # noqa: E731
        patch.setattr(type(schedule), "plan", whole)
        found.append(model(tokens, targets=targets, schedule=schedule).loss)
    torch.testing.assert_close(*found, **SAME)
    if found[0].requires_grad and found[0] > 0:
        for ours, theirs in zip(gradients(found[0], model), gradients(found[1], model)):
            torch.testing.assert_close(ours, theirs, **SAME)


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(4, 8)), subsets=st.integers(2, 3))
def test_a_cut_at_the_initialization_leaves_the_gradients_between_residues(model, row, subsets):
    """As if the keys, values and memory of the initialization were constants."""
    from lrt import passes

    tokens, targets = row
    run, calls = passes.Engine.run, []

    def constant_first(self, *args, **options):
        out = run(self, *args, **options)
        calls.append(out)
        if len(calls) > 1:
            return out
        kv = tuple(type(pair)(*(x.detach() for x in pair)) for pair in out.kv)
        return out._replace(memory=out.memory.detach(), kv=kv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "below_memory", lambda engine, row: (row, ()))  # what is shared is not cut
        cut = model(
            tokens, targets=targets, schedule=lrt.interleaved(subsets, weights=(0, 1), cut_gradient="initialization")
        ).loss
        patch.setattr(passes.Engine, "run", constant_first)
        expected = model(tokens, targets=targets, schedule=lrt.interleaved(subsets, weights=(0, 1))).loss
    torch.testing.assert_close(cut, expected, **SAME)
    if cut.requires_grad and cut > 0:
        for ours, theirs in zip(gradients(cut, model), gradients(expected, model)):
            torch.testing.assert_close(ours, theirs, **SAME)


def test_a_cut_gradient_reaches_no_refreshed_key(monkeypatch):
    """Refreshed keys have the local parts of the initialization, whose gradient belongs to an earlier pass."""
    from lrt.engine import Engine

    model, outputs, run = small_model(3), [], Engine.run
    monkeypatch.setattr(
        Engine, "run", lambda self, *args, **options: outputs.append(run(self, *args, **options)) or outputs[-1]
    )
    tokens = torch.randint(0, VOCABULARY, (1, 9))

    def reached(**options):
        outputs.clear()
        loss = model(tokens, targets=tokens, schedule=lrt.interleaved(3, kv_refresh=True, **options)).loss
        return torch.autograd.grad(loss, outputs[0].inputs[1])[0]

    alone = reached(weights=(1, 0))
    for cut in (True, "initialization"):
        torch.testing.assert_close(reached(weights=(1, 1), cut_gradient=cut), alone / 2, **SAME)
    assert (reached(weights=(1, 1)) - alone / 2).abs().max() > 1e-3


# ------------------------------------------------------------------ switched-off and newly added memory


@given(model=models(recurrence={"init": "identity"}), row=rows(), seed=st.integers(0, 99))
def test_identity_init_leaves_the_backbone_unchanged_bit_for_bit(model, row, seed):
    tokens, targets = row
    twin = randomized(build_model(model.backbone.config, None, dtype=torch.float64), seed)
    model.load_state_dict(twin.state_dict(), strict=False)
    model.init_memory()
    ours, theirs = (m(tokens, targets=targets, schedule=lrt.baseline(), return_logits=True) for m in (model, twin))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    if theirs.loss.requires_grad:
        names = [n for n, _ in twin.named_parameters()]
        got = torch.autograd.grad(ours.loss, [dict(model.named_parameters())[n] for n in names], allow_unused=True)
        want = torch.autograd.grad(theirs.loss, list(twin.parameters()), allow_unused=True)
        assert all(torch.equal(a, b) if b is not None else a is None for a, b in zip(got, want))
    for schedule in (lrt.interleaved(2), lrt.refine(2), lrt.sequential()):
        torch.testing.assert_close(logits_of(model, tokens, schedule), theirs.logits.detach(), **SAME)
