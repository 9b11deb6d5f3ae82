"""The fast paths of parallel prefill give what the plain one gives: merged kernels, recorded passes, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_kernels import Plain
from small_models import small
from strategies import VOCABULARY, models

from lrt.config import ModelConfig, RecurrenceConfig
from lrt.decoding import prefill, prefill_passes
from lrt.decoding.fast import prefill_graphs
from lrt.decoding.fast.acceleration import Accelerated, accelerate
from lrt.decoding.fast.prefill_graphs import Recorder, padded
from lrt.decoding.step import decode_one_token
from lrt.kernels import attention
from lrt.model import build_model

methods = st.one_of(
    st.builds(prefill.fixed_point, st.integers(1, 5), st.sampled_from([1e-9, 1e-3, 1e-1]), st.integers(1, 4)),
    st.builds(prefill.refine, st.integers(1, 3)),
)
# as many sweeps whatever the last bits are: near a tolerance two paths would stop at different ones
counted = st.one_of(
    st.builds(prefill.fixed_point, st.integers(1, 5), st.just(1e-30), st.integers(1, 4)),
    st.builds(prefill.refine, st.integers(1, 3)),
)


def recording(model):
    """The model with recorded passes; on the CPU they run without graphs."""
    return Accelerated(model, one_token=model, blocks=list(model.blocks), compiled=lambda f: f, recorded=True)


def draw_tokens(lengths, seed):
    return torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))


def next_logits(model, state):
    ones = torch.ones(state.batch, dtype=torch.int64, device=state.lengths.device)
    return decode_one_token(model, state.fork(), ones, ones.bool())


def assert_same(got, want, model, **tolerance):
    for name in ("sweeps", "exact_positions", "converged"):
        assert getattr(got.report, name) == getattr(want.report, name), name
    assert got.report.residual == pytest.approx(
        want.report.residual, rel=tolerance.get("rtol", 1e-6), abs=tolerance.get("atol", 1e-12)
    )
    assert torch.equal(got.state.lengths, want.state.lengths) and torch.equal(
        got.state.approximate_from, want.state.approximate_from
    )
    torch.testing.assert_close(got.hidden, want.hidden, **tolerance)
    torch.testing.assert_close(got.state.memory, want.state.memory, **tolerance)
    torch.testing.assert_close(next_logits(model, got.state), next_logits(model, want.state), **tolerance)


# ------------------------------------------------------------------ recorded passes


@settings(max_examples=25)
@given(
    models(),
    st.lists(st.lists(st.integers(1, 20), min_size=2, max_size=2), min_size=1, max_size=3),
    methods,
    st.integers(0, 99),
)
def test_recorded_passes_are_plain_ones(model, prompts, method, seed):
    """One recorder, several prompts of one shape: nothing of an earlier prompt is left."""
    fast = recording(model.eval())
    for number, lengths in enumerate(prompts):
        tokens, counts = draw_tokens(lengths, seed + number), torch.tensor(lengths)
        got, want = (prefill.run(m, tokens, lengths=counts, capacity=24, method=method) for m in (fast, model))
        assert_same(got, want, model)
    assert len(fast.recorder.shapes) == 1  # they were all padded to one length


def test_recorded_passes_leave_exact_positions_and_frozen_rows_bit_for_bit(monkeypatch):
    model = small()
    fast, seen = recording(model), []
    again = prefill_graphs.RecordedSpan.round

    def watch(self, rows, **where):
        before = self.memory.clone(), [kv.key.clone() for kv in self.work.values()]
        out = again(self, rows, **where)
        frozen = torch.tensor([row not in rows for row in range(len(self.counts))])
        still = (self.places <= where["number"] * where["groups"]) | frozen[:, None]
        assert torch.equal(self.memory[:, 1:][still], before[0][:, 1:][still])
        for kv, key in zip(self.work.values(), before[1]):
            assert torch.equal(kv.key[still], key[still]) and not torch.equal(kv.key, key)
        seen.append(rows)
        return out

    monkeypatch.setattr(prefill_graphs.RecordedSpan, "round", watch)
    prefill.run(fast, draw_tokens([20, 5], 1), lengths=torch.tensor([20, 5]), method=prefill.fixed_point(3, tol=1e-300))
    assert seen[:3] == [[0, 1], [0, 1], [0]]  # row 1 is exact after two rounds


def test_every_output_may_be_asked_for_and_the_next_prompt_leaves_it_alone():
    model = small()
    fast = recording(model)
    results = [
        prefill.run(fast, draw_tokens([7, 7], seed), method=prefill.refine(2), everywhere=True) for seed in (1, 2)
    ]
    for seed, got in zip((1, 2), results):
        want = prefill.run(model, draw_tokens([7, 7], seed), method=prefill.refine(2), everywhere=True)
        assert got.hidden.shape == (2, 7, 16)
        assert_same(got, want, model)


@pytest.mark.parametrize("inside", [(True, False), (False, True)])
def test_prompts_inside_inference_mode_and_outside_share_a_recorder(inside):
    model = small()
    fast = recording(model)
    for seed, mode in enumerate(inside):
        with torch.inference_mode(mode):
            for method in (prefill.fixed_point(3), prefill.refine(2)):
                got, want = (
                    prefill.run(m, draw_tokens([7, 5], seed), capacity=24, method=method) for m in (fast, model)
                )
                assert_same(got, want, model)


def test_what_is_not_recorded(monkeypatch):
    """States that have begun, attention cut at separators, many positions: the plain path;
    shapes are forgotten in turn."""
    model = small()
    recorder, counts = Recorder(model, record=False), torch.tensor([4])
    begun = prefill.run(model, draw_tokens([4], 1), capacity=8).state
    assert recorder.span(begun, draw_tokens([4], 1), counts, kind=2) is None
    cut = small(attention_reset=0)
    fresh = prefill_passes.DecodeState.empty(cut, batch=1, capacity=8)
    assert Recorder(cut, record=False).span(fresh, draw_tokens([4], 1), counts, kind=2) is None
    monkeypatch.setattr(prefill_graphs, "POSITIONS", 63)
    assert recorder.span(fresh, draw_tokens([4], 1), counts, kind=2) is None
    monkeypatch.setattr(prefill_graphs, "POSITIONS", 64)
    monkeypatch.setattr(prefill_graphs, "SHAPES", 2)
    for kind in (1, 2, 1, 3):
        assert recorder.span(fresh, draw_tokens([4], 1), counts, kind=kind) is not None
    assert [key[2] for key in recorder.shapes] == [1, 3]


@given(st.integers(1, 40000))
def test_padding_wastes_at_most_an_eighth_or_sixty_three_positions(length):
    assert length <= padded(length) < length + max(64, length / 8 + 1) and padded(padded(length)) == padded(length)


# ------------------------------------------------------------------ merged kernels


@settings(max_examples=40)
@given(
    models(), st.lists(st.integers(1, 14), min_size=1, max_size=3), st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.booleans(), st.sampled_from([None, 2, 5]), counted, st.integers(0, 99),
)  # fmt: skip
def test_merged_kernels_see_the_right_keys(model, lengths, more, ragged, chunk, method, seed):
    """On the CPU with a kernel in plain torch: first prompts, and prompts that follow, in rings that have wrapped or
    not."""
    if not ragged:
        lengths, more = lengths[:1] * 2, more[:1] * 2
    more = more[: len(lengths)]
    method = type(method)(**{**method.__dict__, "chunk": chunk})

    def both_turns():
        state = prefill.run(
            model.eval(), draw_tokens(lengths, seed), lengths=torch.tensor(lengths), capacity=24, method=method
        ).state
        return prefill.run(model, draw_tokens(more, seed + 1), lengths=torch.tensor(more), state=state, method=method)

    want = both_turns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_passes, "usable", lambda **_: True)
        patch.setattr(attention, "_kernel", lambda *_: Plain)
        patch.setattr(attention, "Flash", Plain)
        got = both_turns()
    pairs = [(r.hidden, r.state.memory, next_logits(model, r.state)) for r in (got, want)]
    torch.testing.assert_close(*pairs, rtol=1e-8, atol=1e-9)
    assert torch.equal(got.state.lengths, want.state.lengths)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pattern", ["L", "SL"])
@pytest.mark.parametrize(
    "method", [prefill.fixed_point(1, 1e-30, 2), prefill.fixed_point(4, 1e-30, 3), prefill.refine(2)], ids=str
)
def test_graphs_and_kernels_against_float32(method, pattern):
    config = ModelConfig(
        n_layers=4, width=256, vocab_size=512, sequence_length=128, window_pattern=pattern, gate_channels=32
    )
    wide = build_model(config, RecurrenceConfig(separator=3, gate_channels=32), device="cuda").eval()
    wide.init_weights()
    for parameter in wide.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    half = build_model(
        config, RecurrenceConfig(separator=3, gate_channels=32), device="cuda", dtype=torch.bfloat16
    ).eval()
    half.load_state_dict(wide.state_dict())
    wide.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    fast = accelerate(half)
    known = {}
    for turn, lengths in enumerate([[300, 260], [290, 300], [260, 299], [300, 300]]):
        tokens = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(turn)).cuda()
        counts = torch.tensor(lengths, device="cuda")
        exact, plain, got = (
            prefill.run(m, tokens, lengths=counts, capacity=360, method=method, everywhere=True)
            for m in (wide, half, fast)
        )
        for name, of in (
            ("hidden", lambda x, lengths=lengths: torch.cat([h[:n] for h, n in zip(x.hidden, lengths)])),
            ("memory", lambda x: x.state.memory),
        ):
            far, near = (float((of(x).float() - of(exact)).norm() / of(exact).norm()) for x in (got, plain))
            assert far <= 2 * near + 1e-3, f"turn {turn}, {name}: relative error {far:.2e}, plain path {near:.2e}"
        assert got.report.exact_positions == exact.report.exact_positions
        (shape,) = fast.recorder.shapes.values()
        graphs = {name: graph for name, (graph, _) in shape._graphs.items()}
        assert len(graphs) == (0 if turn == 0 else 3) and all(graphs[name] is graph for name, graph in known.items())
        known = graphs
        follow = [
            prefill.run(m, tokens[:, :50], state=x.state, method=method).state.memory
            for m, x in ((fast, got), (half, plain))
        ]
        far = float((follow[0].float() - follow[1].float()).norm() / follow[1].float().norm())
        assert far < 0.1, f"turn {turn}: tokens that follow: {far:.2e}"
