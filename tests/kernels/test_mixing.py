"""Gates, memory, token values, RoPE and QK-norm as one operator: its place in a block on the CPU,
its kernels on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrt
from lrt import backbone
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.kernels import mixing
from lrt.model import build_model


@pytest.fixture
def one_operator(monkeypatch):
    """Blocks take the operator's way, with its reference in plain torch in the operator's place."""
    monkeypatch.setattr(backbone, "usable", lambda x, head_dim: x.shape[1] > 1)
    monkeypatch.setattr(mixing, "_forward", mixing.reference)


def losses_and_gradients(model, tokens, schedule):
    model.zero_grad(set_to_none=True)
    out = model(tokens[:, :-1], targets=tokens[:, 1:], schedule=schedule, return_logits=True)
    out.loss.backward()
    return [out.logits, *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    "schedule", [lrt.baseline(), lrt.refine(1), lrt.interleaved(2), lrt.interleaved(3, kv_refresh=True)]
)
@pytest.mark.parametrize("kv_heads, sharing, channels", [(2, "shared", None), (1, "layerwise", 8), (2, "shared", 5)])
def test_a_block_that_mixes_at_once_computes_the_same(request, schedule, kv_heads, sharing, channels):
    torch.manual_seed(0)
    config = ModelConfig(
        n_layers=3,
        width=32,
        n_heads=2,
        n_kv_heads=kv_heads,
        vocab_size=64,
        sequence_length=16,
        window_pattern="SL",
        gate_channels=channels,
    )
    model = build_model(config, RecurrenceConfig(separator=1, sharing=sharing, gate_channels=channels)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, 64, (2, 17))
    want = losses_and_gradients(model, tokens, schedule)
    request.getfixturevalue("one_operator")
    for got, expected in zip(losses_and_gradients(model, tokens, schedule), want):
        torch.testing.assert_close(got, expected)


@torch._dynamo.config.patch(recompile_limit=64)
def test_compiled_blocks_keep_the_operator(one_operator):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = ModelConfig(n_layers=2, width=32, n_heads=2, vocab_size=64, sequence_length=16, window_pattern="SL")
    model, fast = (build_model(config, RecurrenceConfig(separator=1)).double() for _ in range(2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fast.load_state_dict(model.state_dict())
    for block in fast.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    tokens = torch.randint(0, 64, (2, 17))
    for got, expected in zip(*(losses_and_gradients(m, tokens, lrt.interleaved(2, sweeps=2)) for m in (fast, model))):
        torch.testing.assert_close(got, expected)


def test_a_wrapped_projection_is_called_and_not_read(one_operator):
    model = build_model(ModelConfig(n_layers=1, width=32, n_heads=2, vocab_size=64), RecurrenceConfig())
    block = model.blocks[0].block
    hidden = torch.zeros(1, 4, 32)
    assert block.can_mix(hidden) and not block.can_mix(hidden[:, :1])  # single tokens have kernels of their own
    handle = block.value.register_forward_hook(lambda module, args, out: 0 * out)
    assert not block.can_mix(hidden)
    assert not block.project(
        hidden + torch.randn(32), model.backbone.embed(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4))[1][0]
    ).value.any()
    handle.remove()
    assert block.can_mix(hidden)
    block.key = torch.nn.Sequential(block.key)
    assert not block.can_mix(hidden)


def test_a_gate_without_a_table_is_no_column(one_operator, monkeypatch):
    """Its column would lie beyond the padding that the backward kernel fills with zeros."""
    model = build_model(ModelConfig(n_layers=1, width=224, n_heads=14, vocab_size=64), RecurrenceConfig()).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block, tokens, seen = model.blocks[0], torch.randint(0, 64, (1, 5)), []
    assert block.block.value_gate is not None
    hidden, (context,) = model.backbone.embed(tokens, torch.arange(5))
    context = context._replace(token_value=None)

    def watched(joint, *rest):
        seen.append(joint.shape[-1])
        return mixing.reference(joint, *rest)

    monkeypatch.setattr(mixing, "_forward", watched)
    got = block(hidden, None, context, None)[0]
    assert seen == [mixing.columns(14, 14, 16, local=True, token=False)]
    monkeypatch.setattr(backbone, "usable", lambda x, head_dim: False)
    torch.testing.assert_close(got, block(hidden, None, context, None)[0])


def test_launches_of_any_size_with_any_stride_of_a_single_head():
    """CUDA takes 65,535 programs in any but the first dimension; the compiler may choose the stride of a dimension of
    one element."""
    batch, length, width = 1024, 2048, 16
    joint = torch.zeros(1).expand(batch, length, 64)
    memory = (
        torch.zeros(1, 1, 1, width).expand(batch, length, 1, width).as_strided((batch, length, 1, width), (0, 0, 1, 1))
    )
    angles = torch.zeros(1, length, 1, width // 2)
    grid, *_ = mixing._launch(joint, memory, memory, None, angles, angles, 1, 1, width, True, True)
    assert grid == (batch * length // mixing.BLOCK,)


def test_other_tensors_take_the_plain_way():
    assert not mixing.usable(torch.zeros(1, 4, 32, dtype=torch.bfloat16), 16)  # not on a GPU


# ------------------------------------------------------------------ kernels, on a GPU


@st.composite
def cases(draw):
    local = draw(st.booleans())
    return {
        "groups": draw(st.sampled_from([1, 2, 3])),
        "share": draw(st.sampled_from([1, 2])),
        "width": draw(st.sampled_from([16, 64, 128])),
        "batch": draw(st.integers(1, 3)),
        "length": draw(st.integers(2, 70)),
        "local": local,
        "memory": local and draw(st.booleans()),
        "token": draw(st.booleans()),
        "norm": draw(st.booleans()),
        "hand_on": draw(st.sampled_from([0, 1, 2])),
        "seed": draw(st.integers(0, 99)),
    }


def inputs(case, dtype):
    """Arguments of the operator, token values strided as a subset of positions is, and gradients strided as attention's
    are."""
    torch.manual_seed(case["seed"])
    batch, length, groups, width = (case[name] for name in ("batch", "length", "groups", "width"))
    heads = groups * case["share"]

    def random(*shape):
        return torch.randn(shape, device="cuda", dtype=dtype)

    total = mixing.columns(heads, groups, width, local=case["local"], token=case["token"])
    memory = [random(batch, length, groups, width) if case["memory"] else None for _ in range(2)]
    token = random(batch, 2 * length, groups * width)[:, ::2] if case["token"] else None
    angles = torch.randn(1, length, 1, width // 2, device="cuda")
    arguments = [random(batch, length, total), *memory, token, angles.cos(), angles.sin(), heads, groups, width]
    outputs = [heads, groups, groups, *([groups, groups] if case["hand_on"] else [])]
    grads = [random(batch, n, length, width).transpose(1, 2) for n in outputs]
    return [*arguments, case["local"], case["norm"], case["hand_on"]], grads


def with_gradients(function, arguments, grads):
    leaves = [x.detach().requires_grad_() for x in arguments[:4] if x is not None]
    given = iter(leaves)
    out = function(*(None if x is None else next(given) for x in arguments[:4]), *arguments[4:])[: len(grads)]
    return [*out[:3], *torch.autograd.grad(out, leaves, grads, materialize_grads=True)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings(max_examples=15, deadline=None)  # most of the time goes into compiling a kernel for each case
@given(case=cases())
def test_kernels_against_float64(case):
    """In float32 and in bfloat16 no worse than twice what plain torch loses in it;
    one wrong number would be 1e-3 of a tensor."""
    whole, grads = inputs(case, torch.float32)
    for dtype, slack in ((torch.float32, 2e-6), (torch.bfloat16, 1e-3)):
        given = [x.to(dtype) if isinstance(x, torch.Tensor) and i < 4 else x for i, x in enumerate(whole)]
        given_grads = [x.to(dtype) for x in grads]
        wide = [x.double() if isinstance(x, torch.Tensor) else x for x in given]
        exact = with_gradients(mixing.reference, wide, [x.double() for x in given_grads])
        plain, fast = (with_gradients(f, given, given_grads) for f in (mixing.reference, mixing._forward))
        for index, (a, b, c) in enumerate(zip(fast, plain, exact)):
            far, near = ((x.double() - c).norm() / c.norm().clamp_min(1e-9) for x in (a, b))
            assert far <= 2 * near + slack, (
                f"tensor {index} in {dtype}: relative error {far:.2e}, plain torch {near:.2e}"
            )
