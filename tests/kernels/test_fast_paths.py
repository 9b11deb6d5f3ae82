"""The fast attention paths compute what the plain masked one computes: on the CPU their arithmetic,
on a GPU the kernels.

GPU tolerance: a fast path may be at most ``WORSE`` times as far from a float32 reference as the plain path in the same
half precision is, on fresh random inputs; merging rounds each part once more than one kernel would.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_kernels import Plain
from torch.nn.attention.flex_attention import create_mask

import lrt
from lrt import passes
from lrt.attention import Buffer, causal_mask, grouped_attention, masked_attention
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.engine.compiled import CompiledEngine, TrimmedEntries
from lrt.kernels import gradients
from lrt.kernels.attention import _static_block_mask, _visible, block_mask, flex_groups, merged_attention, natural_order
from lrt.kernels.gradients import branch_compiled, fan_out, split
from lrt.loss import Scorer
from lrt.model import build_model
from lrt.types import MemoryInput

WORSE = 2.0


@st.composite
def settings_of_a_pass(draw, longest=12):
    groups = draw(st.integers(1, 4))
    length = draw(st.integers(groups, longest))
    return length, groups, draw(st.integers(0, groups - 1)), draw(st.one_of(st.none(), st.integers(0, length)))


def inputs(length, groups, residue, *, heads=(2, 2), width=8, batch=2, dtype=torch.float64, device="cpu"):
    """Query, keys and values by group, in that dtype, as leaves."""
    sizes = [len(range(g, length, groups)) for g in range(groups)]
    shapes = [(batch, sizes[residue], heads[0], width)] + [(batch, n, heads[1], width) for n in sizes * 2]
    leaves = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
    return leaves[0], leaves[1 : 1 + groups], leaves[1 + groups :]


def reference(query, keys, values, *, residue, window, scale=0.3, softcap=None, documents=None):
    """Masked attention over keys in their natural order."""
    groups, length = len(keys), sum(k.shape[1] for k in keys)
    places = torch.arange(length, device=query.device)
    cut = {} if documents is None else {"query_documents": documents[:, residue::groups], "key_documents": documents}
    mask = causal_mask(places[residue::groups], places, window=window, **cut)
    return masked_attention(query, natural_order(keys), natural_order(values), mask, scale=scale, softcap=softcap)


def with_gradients(function, leaves, grad):
    out = function()
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


# ------------------------------------------------------------------ arithmetic, in float64


@settings(max_examples=60)
@given(case=settings_of_a_pass(), heads=st.sampled_from([(2, 2), (4, 2)]), seed=st.integers(0, 99))
def test_merged_groups_are_one_attention(case, heads, seed):
    length, groups, residue, window = case
    torch.manual_seed(seed)
    query, keys, values = inputs(length, groups, residue, heads=heads)
    grad = torch.randn_like(query)
    leaves = [query, *keys, *values]
    merged = with_gradients(
        lambda: merged_attention(query, keys, values, residue=residue, window=window, scale=0.3, kernel=Plain),
        leaves,
        grad,
    )
    plain = with_gradients(lambda: reference(query, keys, values, residue=residue, window=window), leaves, grad)
    for got, want in zip(merged, plain):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # parts are joined in float32


@given(case=settings_of_a_pass(), softcap=st.sampled_from([None, 2.0]), seed=st.integers(0, 99))
def test_a_buffer_without_mask_sees_the_right_keys(case, softcap, seed):
    length, groups, residue, window = case
    torch.manual_seed(seed)
    query, keys, values = inputs(length, groups, residue)
    # the fresh ones take their place
    stale = [torch.full_like(k, float("nan")) if g == residue else k for g, k in enumerate(keys)]
    buffer = Buffer(tuple(stale), tuple(values), residue, None)
    got = buffer.attend(query, keys[residue], values[residue], window=window, scale=0.3, softcap=softcap)
    torch.testing.assert_close(got, reference(query, keys, values, residue=residue, window=window, softcap=softcap))


@given(case=settings_of_a_pass(), seed=st.integers(0, 99))
def test_block_masks_are_causal_masks(case, seed):
    length, groups, residue, window = case
    documents = torch.randint(0, 2, (2, length), generator=torch.Generator().manual_seed(seed)).cumsum(1)
    places = torch.arange(length)
    queries = places[residue::groups]
    for cut in (None, documents):
        seen = _visible(groups=groups, residue=torch.tensor(residue), window=window, documents=cut)
        got = create_mask(seen, 2, 1, len(queries), length, device="cpu")
        both = {} if cut is None else {"query_documents": cut[:, queries], "key_documents": cut}
        assert torch.equal(got, causal_mask(queries, places, window=window, **both).expand_as(got))


def test_a_block_mask_made_in_inference_mode_serves_a_backward_later():
    with torch.inference_mode():
        mask = _static_block_mask(320, 2, 1, 40, torch.device("cpu"))
    assert not mask.kv_num_blocks.is_inference()
    assert _static_block_mask(320, 2, 1, 40, torch.device("cpu")) is mask


def test_only_compiled_blocks_take_helpers_that_need_the_compiler(monkeypatch):
    """On a GPU the sums of ``fan`` are compiled, which a machine without a compiler cannot."""
    config = ModelConfig(n_layers=2, width=32, n_heads=2, vocab_size=64, sequence_length=16)
    model, used = build_model(config, RecurrenceConfig()), []
    model.init_weights()
    monkeypatch.setattr(gradients, "interleave", lambda *given, add=gradients.interleave: used.append(1) or add(*given))
    monkeypatch.setattr(gradients, "add_up", lambda parts, add=gradients.add_up: used.append(2) or add(parts))
    tokens = torch.randint(0, 64, (2, 17))
    for compiled in (False, True):
        for block in model.blocks:
            block._compiled_call_impl = block._call_impl if compiled else None
        model(tokens[:, :-1], targets=tokens[:, 1:], schedule=lrt.interleaved(2)).loss.backward()
        assert set(used) == ({1, 2} if compiled else set())


@given(length=st.integers(1, 12), groups=st.integers(1, 5))
def test_split_and_natural_order_are_inverse(length, groups):
    x = torch.randn(2, length, 3)
    parts = split(x, min(groups, length))
    assert all(torch.equal(part, x[:, g :: min(groups, length)]) for g, part in enumerate(parts))
    assert torch.equal(natural_order(parts), x)


@given(
    per_group=st.integers(1, 4),
    groups=st.integers(2, 4),
    read=st.lists(st.booleans(), min_size=9, max_size=9),
    seed=st.integers(0, 99),
)
def test_a_branch_gives_the_gradients_of_slices(per_group, groups, read, seed):
    """The whole and any of its residues may be read, these also without their last, or none."""
    torch.manual_seed(seed)
    x = torch.randn(2, per_group * groups, 3, dtype=torch.float64, requires_grad=True)
    whole, parts, shorter = branch_compiled(x, groups)
    plain = [x, *(x[:, g::groups] for g in range(groups)), *(x[:, g::groups][:, :-1] for g in range(groups))]
    branched = [whole, *parts, *shorter]
    assert all(torch.equal(a, b) for a, b in zip(branched, plain, strict=True))
    terms = [
        [(i + 1) * y.square().sum() for i, (y, used) in enumerate(zip(ys, read)) if used] for ys in (branched, plain)
    ]
    if terms[0]:
        got, want = (torch.autograd.grad(sum(t), x)[0] for t in terms)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("length", "subsets", "more", "cut"),
    [
        (8, 2, {}, True),
        (8, 4, {"order": "random"}, True),
        (4, 4, {}, True),
        (2, 4, {}, True),
        (6, 3, {"sweeps": 2}, True),
        (8, 4, {"kv_refresh": True}, False),  # then no key is the initialization's
        (6, 3, {"cut_gradient": True}, False),
        (7, 3, {}, False),
    ],
)
def test_keys_without_their_last_change_nothing(length, subsets, more, cut, monkeypatch):
    """As on a GPU, where no mask asks for all of them: loss and gradients are those of the plain path."""
    model = build_model(
        ModelConfig(n_layers=3, width=32, n_heads=2, vocab_size=64, sequence_length=length), RecurrenceConfig()
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens, seen = torch.randint(0, 64, (2, length + 1)), []

    def gradients():
        model.zero_grad()
        schedule, generator = lrt.interleaved(subsets, **more), torch.Generator().manual_seed(1)
        loss = model(tokens[:, :-1], targets=tokens[:, 1:], schedule=schedule, generator=generator).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = gradients()
    read = TrimmedEntries.read_by
    monkeypatch.setattr(passes, "engine_of", CompiledEngine)
    monkeypatch.setattr(CompiledEngine, "masks", lambda self, row, groups, residue: [None] * len(self.model.blocks))
    monkeypatch.setattr(
        TrimmedEntries,
        "read_by",
        lambda self, *place: seen.append([x.shape[1] for x in read(self, *place)]) or read(self, *place),
    )
    torch.testing.assert_close(gradients(), expected)
    whole = [len(range(g, length, min(subsets, length))) for g in range(min(subsets, length))]
    assert any(lengths != whole for lengths in seen) == cut


# ------------------------------------------------------------------ kernels, on a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def gpu_test(function):
    for mark in gpu:
        function = mark(function)
    return function


def assert_no_worse(fast, plain, exact, name, *, floor=1e-3):
    """Each tensor of ``fast`` is nearly as close to ``exact`` as ``plain`` is; below ``floor`` nothing is compared."""
    for index, (a, b, c) in enumerate(zip(fast, plain, exact)):
        scale = c.double().norm()
        far, near = ((x.double() - c.double()).norm() / scale for x in (a, b))
        assert far <= WORSE * near + floor, f"{name}: tensor {index}: relative error {far:.2e}, plain path {near:.2e}"


def three_ways(fast, leaves, groups, **call):
    """Outputs and gradients of a fast path, of the plain path, and of the plain path in float32."""
    grad = torch.randn_like(leaves[0])
    wide = [x.detach().float().requires_grad_() for x in leaves]
    parts = [(x[0], x[1 : 1 + groups], x[1 + groups :]) for x in (leaves, wide)]
    plain, exact = (with_gradients(lambda x=x: reference(*x, **call), y, grad) for x, y in zip(parts, (leaves, wide)))
    return with_gradients(lambda: fast(*parts[0]), leaves, grad), plain, exact


@gpu_test
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("window", [None, 100, 7])
@pytest.mark.parametrize("length, groups", [(256, 1), (256, 2), (255, 2), (250, 3), (512, 4)])
def test_kernels_against_float32(length, groups, window, heads):
    for residue in range(groups):
        query, keys, values = inputs(
            length, groups, residue, heads=heads, width=128, dtype=torch.bfloat16, device="cuda"
        )
        call = {"residue": residue, "window": window, "scale": 0.1, "softcap": None}
        errors = three_ways(functools.partial(grouped_attention, **call), [query, *keys, *values], groups, **call)
        assert_no_worse(*errors, f"T {length}, S {groups}, residue {residue}, window {window}, heads {heads}")


@gpu_test
@pytest.mark.parametrize("cut", [False, True])
def test_flex_against_float32(cut):
    length, groups, window, softcap = 512, 2, 100, 5.0
    compiled = torch.compile(flex_groups, fullgraph=True, dynamic=False)
    documents = (torch.rand(2, length, device="cuda") < 0.02).cumsum(1) if cut else None
    for residue in range(groups):
        query, keys, values = inputs(
            length, groups, residue, heads=(4, 2), width=128, dtype=torch.bfloat16, device="cuda"
        )
        mask = block_mask(
            length=length, groups=groups, residue=residue, window=window, documents=documents, device=query.device
        )
        call = {"residue": residue, "window": window, "scale": 0.1, "softcap": softcap, "documents": documents}
        fast = functools.partial(compiled, mask=mask, scale=0.1, softcap=softcap)
        assert_no_worse(
            *three_ways(fast, [query, *keys, *values], groups, **call), f"flex, residue {residue}, documents {cut}"
        )


def losses_and_gradients(model, tokens, schedule, **options):
    """Losses; gradients of all matrices and tables as one vector; gradients of all scales and gains."""
    model.zero_grad(set_to_none=True)
    out = model(tokens[:, :-1], targets=tokens[:, 1:], schedule=schedule, **options)
    out.loss.backward()
    wide = [
        [p.grad.float().flatten() for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False)
    ]
    return [torch.stack([out.loss.detach(), *out.groups]), *(torch.cat(part) for part in wide)]


EARLY_STOP = lrt.refine(1, weights=(0.0, 1.0))  # the first pass ends at the source block
STEPS = [
    ("L", {}, (lrt.refine(1), EARLY_STOP, lrt.interleaved(2))),
    ("SL", {}, (lrt.refine(1), EARLY_STOP, lrt.interleaved(2))),
    ("L", {}, (lrt.interleaved(3), lrt.interleaved(4))),  # the subsets of three are not equally long
    ("SL", {}, (lrt.interleaved(3), lrt.interleaved(4))),
    ("SL", {"documents": True}, (lrt.interleaved(2),)),
    ("SL", {"sharing": "layerwise"}, (EARLY_STOP, lrt.interleaved(2), lrt.interleaved(3))),
    ("LS", {"blocks": (2, 3)}, (lrt.refine(2, weights=(0.3, 0.0, 0.7)), lrt.interleaved(2), lrt.interleaved(3))),
]


@gpu_test
@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("pattern, options, schedules", STEPS)
def test_compiled_steps_against_float32(pattern, options, schedules):
    """Whole steps: the compiled half-precision model against an eager float32 one, and the eager half one as the
    yardstick."""
    compare_steps("cuda", pattern, schedules, backend="inductor", **options)


def compare_steps(device, pattern, schedules, *, backend, documents=False, sharing="shared", blocks=None, length=256):
    torch._dynamo.reset()
    config = ModelConfig(
        n_layers=2 if blocks is None else max(blocks),
        width=256,
        vocab_size=512,
        sequence_length=length,
        window_pattern=pattern,
    )
    recurrence = RecurrenceConfig(separator=3, sharing=sharing, blocks=blocks)
    wide = build_model(config, recurrence, device=device)
    wide.init_weights()
    for parameter in wide.parameters():  # the initial output projections are zero and would hide everything
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    assert wide.source < len(wide.blocks) and length % 3  # else there were no early stop, and no uneven subsets
    half, fast = (build_model(config, recurrence, device=device, dtype=torch.bfloat16) for _ in range(2))
    for model in (half, fast):
        model.load_state_dict(wide.state_dict())
    wide.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    for block in fast.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    fast.backbone.head.scorer = Scorer(*(torch.compile(f, dynamic=False, backend=backend) for f in Scorer()))
    tokens = torch.randint(0, 512, (2, length + 1), device=device)
    options = {"document_ids": (tokens[:, :-1] == 3).cumsum(1)} if documents else {}
    for schedule in schedules:
        exact, plain, got = (losses_and_gradients(model, tokens, schedule, **options) for model in (wide, half, fast))
        # few scales: their errors are luck
        assert_no_worse(got, plain, exact, f"{schedule}, {sharing}, windows {pattern}", floor=1e-2)


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("pattern, options, schedules", STEPS[-3:])  # the others take half a minute
def test_compiled_steps_are_eager_steps(pattern, options, schedules):
    """The same comparison on the CPU, where only the graph capture differs from eager."""
    compare_steps("cpu", pattern, schedules, backend="aot_eager", length=32, **options)


# ------------------------------------------------------------------ tensors that every block reads


@given(uses=st.lists(st.integers(0, 2), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_fan_gives_the_gradients_of_sharing(uses, seed):
    """Block i reads the tensor uses[i] times; aliases that nobody reads, and tensors of one block,
    are no special case."""
    torch.manual_seed(seed)
    shared = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    own = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    blocks = [MemoryInput(shared, own if i == 0 else None) for i in range(len(uses))]

    def total(tuples):
        terms = [(i + 1) * t.state.square() * use for i, (t, use) in enumerate(zip(tuples, uses)) if use]
        return sum(term.sum() for term in terms) + tuples[0].key.sum()

    fanned = fan_out([*blocks, None])
    assert fanned[-1] is None and len({id(t.state) for t in fanned[:-1]}) == len(blocks)
    for got, want in zip(torch.autograd.grad(total(fanned[:-1]), [shared, own], allow_unused=True),
                         torch.autograd.grad(total(blocks), [shared, own], allow_unused=True)):  # fmt: skip
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)
