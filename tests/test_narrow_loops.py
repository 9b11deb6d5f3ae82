"""Narrow loops: what memory does not reach is computed once, and nothing but the cost is different."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_decoders import make, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Oracle, oracle_loss
from strategies import PARTS, SEPARATOR, VOCABULARY, WAYS, model_configs, randomized, rows
from torch.utils.flop_counter import FlopCounterMode

import lrt
from lrt import passes
from lrt.accounting import block_flops, block_forwards, training_flops
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.decoding import prefill
from lrt.decoding.state import DecodeState
from lrt.engine import CompiledEngine, Engine
from lrt.model import build_model
from lrt.train.distributed.parallel import checkpointed

SAME = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@st.composite
def narrow_models(draw):
    """Memory enters from a block above the first on, maybe with gaps, and maybe not up to the source."""
    config = draw(model_configs(layers=st.integers(2, 4), attention_reset=draw(st.sampled_from([None, SEPARATOR]))))
    first = draw(st.integers(2, config.n_layers))
    more = draw(st.sets(st.integers(first, config.n_layers)))
    parts = draw(st.sampled_from(PARTS))
    sharing, projection = draw(st.sampled_from(WAYS if parts[0] else WAYS[:2]))
    recurrence = RecurrenceConfig(
        blocks=(first, *sorted(more - {first})),
        source_layer=draw(st.one_of(st.none(), st.integers(first, config.n_layers))), sharing=sharing,
        projection=projection, kv_projection=parts[0], residual=parts[1],
        separator=draw(st.sampled_from([None, SEPARATOR])),
    )  # fmt: skip
    return randomized(build_model(config, recurrence, dtype=torch.float64), draw(st.integers(0, 2**31)))


@st.composite
def schedules(draw, cut=(False, True, "initialization"), orders=("ascending", "rotated", "random")):
    """Every schedule that runs a position more than once; a cut of interleaved ones is another matter."""

    def weights(groups):
        return draw(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=groups, max_size=groups).filter(any))

    if draw(st.booleans()):
        passes = draw(st.integers(1, 3))
        return lrt.refine(passes, weights=weights(1 + passes), cut_gradient=draw(st.sampled_from(cut)))
    subsets, sweeps = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    refresh = sweeps == 1 and draw(st.booleans())
    order = draw(st.sampled_from(orders))
    return lrt.interleaved(subsets, sweeps=sweeps, order=order, kv_refresh=refresh, weights=weights(1 + sweeps))


def numbers(model, tokens, targets, schedule):
    """Outputs, losses, memory and every gradient."""
    model.zero_grad(set_to_none=True)
    out = model(
        tokens, targets=targets, schedule=schedule, return_logits=True, generator=torch.Generator().manual_seed(7)
    )
    if out.loss.requires_grad:
        out.loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [out.loss.detach(), out.logits.detach(), out.memory.detach(), *out.groups, *grads]


def whole(engine, row):
    """In the place of ``below_memory``: every pass runs every block."""
    return row, ()


# ------------------------------------------------------------------ nothing moves


@settings(max_examples=25, deadline=None)
@given(model=narrow_models(), row=rows(length=st.integers(5, 9)), schedule=schedules())
def test_the_shortcut_changes_no_number(model, row, schedule):
    expected = None
    for replaced in (whole, passes.below_memory):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "below_memory", replaced)
            got = numbers(model, *row, schedule)
        expected = expected or got
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **SAME)


@settings(max_examples=12, deadline=None)
@given(
    model=narrow_models(), row=rows(length=st.integers(5, 7)), schedule=schedules(cut=(False,), orders=("ascending",))
)
def test_narrow_schedules_are_the_oracle(model, row, schedule):
    tokens, targets = row
    refine = hasattr(schedule, "passes")
    given = (schedule.passes,) if refine else (schedule.subsets, schedule.sweeps, schedule.kv_refresh)
    groups = [getattr(Oracle(model, r), "refine" if refine else "interleaved")(*given) for r in tokens.tolist()]
    loss, losses = oracle_loss(groups, targets, schedule.weights)
    found = [torch.zeros_like(p) for p in model.parameters()]
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found = [zero if grad is None else grad for zero, grad in zip(found, grads)]
    expected = [
        loss,
        torch.stack([logits[-1] for logits in groups]),
        *(x * (w > 0) for x, w in zip(losses, schedule.weights)),
        *found,
    ]
    got = numbers(model, tokens, targets, schedule)
    del got[2]  # the memory
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@settings(max_examples=12, deadline=None)
@given(model=narrow_models(), row=rows(length=st.integers(2, 7)), chunk=st.integers(1, 4))
def test_narrow_chunks_are_the_oracle(model, row, chunk):
    tokens, targets = row
    groups = [Oracle(model, r).chunked(chunk) for r in tokens.tolist()]
    loss, _ = oracle_loss(groups, targets, [1.0])
    found = [torch.zeros_like(p) for p in model.parameters()]
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found = [zero if grad is None else grad for zero, grad in zip(found, grads)]
    logits, *ours = (x for i, x in enumerate(numbers(model, tokens, targets, lrt.chunked(chunk))) if i not in (0, 2))
    torch.testing.assert_close(logits, torch.stack([one[-1] for one in groups]), **SAME)
    for got, expected in zip(ours, [loss, *found], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    with torch.no_grad():  # keys and values written in place
        torch.testing.assert_close(model(tokens, schedule=lrt.chunked(chunk)).logits, logits, **SAME)


@settings(max_examples=15, deadline=None)
@given(
    model=narrow_models(),
    row=rows(length=st.integers(5, 9)),
    schedule=st.one_of(schedules(), st.integers(1, 4).map(lrt.chunked)),
)
def test_engines_and_checkpointing_agree(model, row, schedule):
    """Branched tensors, transient keys and summed gradients around the blocks;
    activations computed again inside them."""
    expected = numbers(model, *row, schedule)
    again = copy.deepcopy(model)
    for index, block in enumerate(again.blocks):
        again.blocks[index] = checkpointed(block, selective=False)
    for one, engine in ((model, CompiledEngine), (again, Engine), (again, CompiledEngine)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "engine_of", engine)
            got = numbers(one, *row, schedule)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **SAME)


@pytest.mark.parametrize("family", ["smollm", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "schedule", [lrt.refine(2, weights=(0.3, 0, 0.7)), lrt.interleaved(3), lrt.interleaved(2, kv_refresh=True)]
)
def test_adapted_decoders_to_the_rounding_of_their_norms(family, schedule):
    model = stir(lrt.adapt(make(family), RecurrenceConfig(blocks=(2, 3), init="identity")))
    tokens = torch.randint(1, 61, (2, 13), generator=torch.Generator().manual_seed(7))
    got = numbers(model, tokens, tokens, schedule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "below_memory", whole)
        expected = numbers(model, tokens, tokens, schedule)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_cut_of_interleaved_passes_leaves_the_shared_blocks_whole():
    """They belong to no pass, so later passes reach them, and only them, through their positions of the first."""
    model = narrow(3, (2, 3), source_layer=2)
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    values, parts = [], []
    for cut in (False, True):
        schedule = lrt.interleaved(2, weights=(0, 1), cut_gradient=cut)
        loss = model(tokens, targets=tokens, schedule=schedule).loss
        values.append(loss.detach())
        parts.append(torch.autograd.grad(loss, list(model.blocks[0].parameters())))
    torch.testing.assert_close(*values, **SAME)
    assert all(x.abs().max() > 0 for x in parts[1]) and any((a - b).abs().max() > 1e-6 for a, b in zip(*parts))


# ------------------------------------------------------------------ and the cost is what is counted


def narrow(layers, blocks, **recurrence):
    config = ModelConfig(
        n_layers=layers, width=8, n_heads=2, vocab_size=VOCABULARY, sequence_length=8, window_pattern="SL"
    )
    return randomized(build_model(config, RecurrenceConfig(blocks=blocks, **recurrence), dtype=torch.float64), 0)


@settings(max_examples=20, deadline=None)
@given(model=narrow_models(), length=st.integers(5, 9), schedule=st.one_of(schedules(), st.just(lrt.baseline())))
def test_blocks_run_as_often_as_is_counted(model, length, schedule):
    seen = [0] * len(model.blocks)
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda module, args, index=index: seen.__setitem__(index, seen[index] + args[0].shape[1])
        )
    model(torch.zeros(1, length, dtype=torch.long), schedule=schedule)
    assert [n / length for n in seen] == pytest.approx(block_forwards(model, schedule, length))


@pytest.mark.parametrize(
    ("layers", "blocks", "source", "schedule", "cost"),
    [
        (24, range(13, 25), 16, lrt.refine(1, weights=(0, 1)), 28 / 24),
        (24, range(13, 25), 16, lrt.refine(1), 36 / 24),
        (24, range(13, 25), 16, lrt.refine(2, weights=(0.3, 0, 0.7)), 40 / 24),
        (24, range(13, 25), 16, lrt.refine(4, weights=(0.3, 0, 0, 0, 0.7)), 48 / 24),
        (24, range(13, 25), 16, lrt.interleaved(2), 36 / 24),
        (24, None, None, lrt.refine(2), 3),
        (12, range(7, 13), 8, lrt.sequential(), 1),
    ],
)
def test_the_cost_in_block_forwards(layers, blocks, source, schedule, cost):
    recurrence = RecurrenceConfig(blocks=None if blocks is None else tuple(blocks), source_layer=source)
    model = build_model(
        ModelConfig(n_layers=layers, width=64, n_heads=1, sequence_length=64, vocab_size=64), recurrence, device="meta"
    )
    assert sum(block_forwards(model, schedule, 64)) / layers == pytest.approx(cost)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("way", "residual"), [*((way, True) for way in WAYS), (WAYS[0], "projected"), (WAYS[2], "projected")], ids=str
)
@pytest.mark.parametrize(
    "schedule",
    [lrt.baseline(), lrt.refine(1, weights=(0, 1)), lrt.refine(2, weights=(0.3, 0, 0.7)), lrt.interleaved(2, sweeps=2)],
)
def test_flops_are_those_that_torch_counts(schedule, way, residual, frozen):
    """Products of matrices; attention is left out, because torch counts hidden keys too."""
    config = ModelConfig(n_layers=6, width=64, n_heads=2, vocab_size=64, sequence_length=16, window_pattern="SL")
    recurrence = RecurrenceConfig(blocks=(4, 6), sharing=way[0], projection=way[1], residual=residual)
    model = randomized(build_model(config, recurrence, dtype=torch.float64), 0)
    added = set(map(id, model.memory_parameters().values()))
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen or id(parameter) in added)
    ids = torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, targets=ids, schedule=schedule).loss.backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)) / 16
    blocks, runs = block_flops(model, 16), block_forwards(model, schedule, 16)
    reached = [3.0 if not frozen or index >= 3 else 1.0 for index in range(6)]
    attention = sum(r * b.attention * n for r, b, n in zip(reached, blocks, runs))
    assert products == pytest.approx(training_flops(model, schedule, 16) - attention, rel=0.06 if frozen else 0.01)


@settings(max_examples=20, deadline=None)
@given(model=narrow_models(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_true_recurrence_loops_over_no_more_than_it_must(model, lengths):
    """Exact prefill and sequential(): blocks below the first receiver and above the source run once,
    over all positions."""
    tokens, seen = torch.randint(0, VOCABULARY, (len(lengths), max(lengths))), [[] for _ in model.blocks]
    for index, block in enumerate(model.eval().blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: seen[index].append(args[0].shape[1]))
    length, loop = max(lengths), range(min(model.receivers), model.source)
    state = DecodeState.empty(model, batch=len(lengths), capacity=9)
    runs = [lambda: prefill.run(model, tokens, lengths=torch.tensor(lengths), state=state)]
    if length > 1:
        runs += [
            lambda: model(tokens, schedule=lrt.sequential()),
            lambda: model(tokens, schedule=lrt.sequential()).logits.sum().backward(),
        ]
    for run in runs:
        for calls in seen:
            calls.clear()
        run()
        assert seen == [[1] * length if index in loop else [length] for index in range(len(seen))]


@settings(max_examples=20, deadline=None)
@given(
    model=narrow_models(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    more=st.integers(1, 4),
    chunk=st.sampled_from([2, 2048]),
)
def test_exact_prefill_is_the_oracle(model, lengths, more, chunk):
    """Rows of different length that go on afterwards, in one stretch or in several."""
    tokens = torch.randint(
        0, VOCABULARY, (len(lengths), max(lengths) + more), generator=torch.Generator().manual_seed(sum(lengths))
    )
    exact = prefill.Exact(chunk=chunk)
    first = prefill.run(model.eval(), tokens, lengths=torch.tensor(lengths), capacity=20, everywhere=True, method=exact)
    rest = torch.stack([row[n : n + more] for row, n in zip(tokens, lengths)])
    second = prefill.run(model, rest, state=first.state, everywhere=True, method=exact)
    for row, n in enumerate(lengths):
        oracle = Oracle(model, tokens[row, : n + more].tolist())
        with torch.no_grad():
            oracle.sequential()
        got = torch.cat([first.hidden[row, :n], second.hidden[row]])
        torch.testing.assert_close(got, torch.stack(oracle.hidden), **SAME)
        torch.testing.assert_close(second.state.memory[row], oracle.memory[-1], **SAME)
    assert second.state.exact.all()


# ------------------------------------------------------------------ what is refused


def test_the_source_is_never_below_the_first_receiver():
    assert [RecurrenceConfig(blocks=(b, 12)).source_index(12) for b in (1, 8, 9, 12)] == [8, 8, 9, 12]
    for source in (3, 0.25):
        with pytest.raises(
            ValueError,
            match=r"recurrence.source_layer = .*, block 3, lies below the first block that receives memory, 5",
        ):
            build_model(ModelConfig(), RecurrenceConfig(blocks=(5, 6), source_layer=source), device="meta")
