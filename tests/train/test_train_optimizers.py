"""Muon, the table of groups, masking of non-finite steps, and the rates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.config import ModelConfig, OptimizerConfig, RecurrenceConfig, TrainingConfig, parse_recipe
from lrt.model import build_model
from lrt.train.optim import muon
from lrt.train.optim.groups import (
    MEMORY_GROUPS,
    MuonAdamW,
    clip_factor,
    gradient_norm,
    group_of,
    is_memory,
    parameter_groups,
)
from lrt.train.optim.rates import Rates, lr_scale, rates_at

SHAPES = {
    "backbone.embedding.weight": (32, 8),
    "backbone.head.weight": (32, 8),
    "blocks.0.block.query.weight": (8, 8),
    "blocks.1.block.query.weight": (8, 8),
    "blocks.0.block.mlp_in.weight": (16, 8),
    "blocks.0.block.mlp_out.weight": (8, 16),
    "backbone.residual_scales": (2,),
    "backbone.embedding_scales": (2,),
}


def small_model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def small_recipe(**overrides):
    sets = {
        "model.n_layers": 2,
        "model.width": 8,
        "model.n_heads": 1,
        "model.gate_channels": 8,
        "training.batch_tokens": 524288,
        **overrides,
    }
    return parse_recipe("", overrides=[f"{k}={v}" for k, v in sets.items()])


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def plain_muon(param, gradient, momentum, second, *, lr, beta, beta2, weight_decay):
    """Spec section 5 for one matrix, in plain steps and float64."""
    w, g, m, s = (x.double() for x in (param, gradient, momentum, second))
    m = beta * m + (1 - beta) * g
    x = (1 - beta) * g + beta * m
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() * 1.02 + 1e-6)
    for a, b, c in muon.POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    x = x.T if tall else x
    dim = 1 if x.shape[0] >= x.shape[1] else 0
    mean = x.square().mean(dim, keepdim=True)
    s = beta2 * s + (1 - beta2) * mean
    normed = x / s.sqrt()
    x = normed * x.norm() / normed.norm()
    x = x + weight_decay * w * (x * w >= 0)
    return w - lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x, m, s


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 9), columns=st.integers(2, 9), count=st.integers(1, 3), seed=st.integers(0, 999))
def test_muon_follows_the_plain_formula(rows, columns, count, seed):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(rows, columns)) for _ in range(count)]
    momenta = [torch.zeros_like(p) for p in params]
    seconds = [muon.second_moment_like(p) for p in params]
    expected = [(p.detach().clone(), m.clone(), s.clone()) for p, m, s in zip(params, momenta, seconds)]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        expected = [
            plain_muon(w, p.grad, m, s, lr=0.02, beta=0.9, beta2=0.95, weight_decay=0.1)
            for p, (w, m, s) in zip(params, expected)
        ]
        with torch.no_grad():
            muon.muon_step(
                params, momenta, seconds, lr=0.02, momentum=0.9, beta2=0.95, weight_decay=0.1, finite=torch.ones(())
            )
    for p, (w, _, _) in zip(params, expected):
        # near-singular draws amplify float32 rounding
        torch.testing.assert_close(p.detach().double(), w, rtol=2e-3, atol=2e-4)


def test_polar_express_gives_singular_values_near_one():
    for shape in ((3, 12, 12), (2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(
            muon.orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        )
        assert values.max() < 1.35 and values.min() > 0.4


def test_agrees_with_torch_muon_where_both_do_the_same():
    """torch.optim.Muon has no second moment and runs in bfloat16: same momentum, coefficients and rate,
    equal to 3 %."""
    coefficients = ((3.4445, -4.7750, 2.0315),) * 5

    def same_as_torch(stack, second, *, rate):
        return muon.orthogonalize(stack, coefficients=coefficients, safety=1.0), second

    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(24, 16))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    group = {
        "name": "m",
        "kind": "muon",
        "params": [("w", ours)],
        "lr": 0.02,
        "betas": (0.95, 0.95),
        "eps": 1e-10,
        "weight_decay": 0.0,
    }
    optimizer = MuonAdamW([group], direction=same_as_torch)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.0)
    for _ in range(4):
        gradient = torch.randn(24, 16)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() / moved < 0.03


def test_one_compiled_call_a_shape():
    calls = []

    def counted(stack, second, *, rate):
        calls.append(tuple(stack.shape))
        return muon.direction(stack, second, rate=rate)

    params = small_model()
    set_gradients(params, 1)
    MuonAdamW(parameter_groups(params, small_recipe()), direction=counted).step()
    assert sorted(calls) == [(1, 8, 16), (1, 16, 8), (2, 8, 8)]


def test_the_table_of_groups_is_the_specification():
    recipe = small_recipe(**{"training.batch_tokens": 131072})
    groups = {g["name"]: g for g in parameter_groups(small_model(), recipe)}
    batch, width = 0.5, (8 / 768) ** -0.5
    assert groups["matrices"]["lr"] == pytest.approx(0.02 * batch) and groups["matrices"]["kind"] == "muon"
    assert groups["matrices"]["weight_decay"] == pytest.approx(0.2 * 36)
    assert groups["embeddings"]["lr"] == pytest.approx(0.3 * batch * width)
    assert groups["head"]["lr"] == pytest.approx(0.004 * batch * width)
    assert groups["residual_scales"]["lr"] == pytest.approx(0.005 * batch)
    assert groups["embedding_scales"]["lr"] == pytest.approx(0.5 * batch) and groups["embedding_scales"]["betas"] == (
        0.96,
        0.95,
    )
    assert (
        groups["head"]["betas"] == (0.8, 0.95)
        and groups["head"]["eps"] == 1e-10
        and groups["head"]["weight_decay"] == 0.0
    )
    assert sum(len(g["params"]) for g in groups.values()) == len(SHAPES)


@pytest.mark.parametrize("sets", [{}, {"optimizer.kind": "adamw", "optimizer.adamw_lr": 1e-4}])
def test_one_number_scales_every_rate(sets):
    """So a search of rates has one axis, beside the batch's reference, whichever rule each parameter follows."""
    named = [*small_model(), ("injection.gains", torch.nn.Parameter(torch.zeros(2)))]
    plain = {g["name"]: g["lr"] for g in parameter_groups(named, small_recipe(**sets))}
    more = {"optimizer.rate_scale": 3.0, "optimizer.reference_batch_tokens": 131072}
    scaled = {g["name"]: g["lr"] for g in parameter_groups(named, small_recipe(**sets, **more))}
    assert len(plain) >= 2 and scaled == {name: pytest.approx(6 * lr) for name, lr in plain.items()}


def test_unknown_parameters_and_vectors_for_muon_are_refused():
    with pytest.raises(ValueError, match="parameter 'adapter.weight' of shape .* matches none .*optimizer.kind"):
        group_of("adapter.weight", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="Muon takes matrices"):
        group_of("blocks.0.block.norm.weight", torch.zeros(2))
    with pytest.raises(ValueError, match="takes no closure"):
        MuonAdamW(parameter_groups(small_model(), small_recipe())).step(lambda: None)


def test_adamw_everywhere_has_two_rates():
    recipe = small_recipe(**{"optimizer.kind": "adamw", "optimizer.adamw_lr": 1e-4, "optimizer.adamw_memory_lr": 1e-2})
    named = [*small_model(), ("memory_projection.key.weight", torch.nn.Parameter(torch.zeros(4, 4)))]
    groups = {g["name"]: g for g in parameter_groups(named, recipe)}
    assert groups["backbone"]["lr"] == 1e-4 and groups["memory"]["lr"] == 1e-2
    assert [name for name, _ in groups["memory"]["params"]] == ["memory_projection.key.weight"]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_maps_gates_and_gains_have_rates_of_their_own(kind):
    """Every parameter of the memory in exactly one group, its rate times its own factor; the backbone's rates stay."""
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=32)
    ways = ({}, {"sharing": "layerwise"}, {"projection": "aligned", "residual": "projected"})
    for model in (build_model(config, RecurrenceConfig(**way), device="meta") for way in ways):

        def rates(model=model, **sets):
            groups = parameter_groups(model.named_parameters(), small_recipe(**{"optimizer.kind": kind, **sets}))
            return {name: (group["name"], group["lr"]) for group in groups for name, _ in group["params"]}

        factors = {"memory_map_scale": 3.0, "memory_gate_scale": 5.0, "memory_gain_scale": 7.0}
        plain, scaled = rates(), rates(**{f"optimizer.{key}": value for key, value in factors.items()})
        assert plain.keys() == scaled.keys() == {name for name, _ in model.named_parameters()}
        assert len({group for group, _ in plain.values()} & {*MEMORY_GROUPS}) == (1 if kind == "adamw" else 3)
        for name, (group, rate) in plain.items():
            factor = 1.0 if not is_memory(name) else 7.0 if name.endswith("gains") else 5.0 if ".gate." in name else 3.0
            assert scaled[name][1] == pytest.approx(factor * rate)
            assert (group in MEMORY_GROUPS) == (scaled[name][0] in MEMORY_GROUPS) == is_memory(name)


def test_a_parameter_of_the_memory_that_no_row_matches_is_refused_at_unequal_rates():
    named = [("memory_projection.shift.weight", torch.nn.Parameter(torch.zeros(4, 4)))]
    with pytest.raises(
        ValueError, match="parameter 'memory_projection.shift.weight' .* matches none of the optimizer's groups"
    ):
        parameter_groups(named, small_recipe(**{"optimizer.kind": "adamw", "optimizer.memory_gain_scale": 2.0}))


@pytest.mark.parametrize(
    ("key", "way"),
    [("map", {"kv_projection": "false"}), ("gate", {"kv_projection": "false"}), ("gain", {"residual": "false"})],
)
def test_rates_of_parts_that_are_not_there_are_refused(key, way):
    sets = {f"recurrence.{name}": value for name, value in way.items()}
    with pytest.raises(
        ValueError, match=rf"optimizer.memory_{key}_scale = 2.0 has no effect with recurrence.{next(iter(way))} = false"
    ):
        small_recipe(**sets, **{f"optimizer.memory_{key}_scale": 2.0})
    twin = small_recipe(**{"recurrence": "false", "schedule.kind": "baseline", f"optimizer.memory_{key}_scale": 2.0})
    assert twin.recurrence is None


def test_compiled_parts_do_the_same_in_place_and_once_for_all_rates():
    params = [
        (f"w{i}", torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(i)))) for i in range(2)
    ]
    twins = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in params]
    group = {"name": "m", "kind": "muon", "lr": 0.02, "betas": (0.95, 0.95), "eps": 1e-10, "weight_decay": 0.5}
    compiled = MuonAdamW([{**group, "params": params}], compile=True)
    eager = MuonAdamW([{**group, "params": twins}])
    tensors = [p for _, p in params] + [compiled.state[p]["momentum"] for _, p in params]
    places = [t.data_ptr() for t in tensors]
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for step, (scale, finite) in enumerate([(1.0, 1.0), (0.25, 1.0), (math.nan, 0.0), (0.5, 1.0)]):
        for optimizer, named in ((compiled, params), (eager, twins)):
            optimizer.set_rates(
                Rates(lr_scale=1.0 / (step + 1), momentum=0.85 + 0.03 * step, decay_scale=1.0 - 0.2 * step)
            )
            set_gradients(named, step)
            if not finite:
                named[0][1].grad.fill_(math.nan)
            optimizer.step(finite=torch.tensor(finite), scale=torch.tensor(scale))
            optimizer.zero_grad()
    assert graphs["unique_graphs"] == before + 3
    assert [t.data_ptr() for t in tensors] == places
    for (_, ours), (_, theirs) in zip(params, twins):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        for key, value in compiled.state[ours].items():
            torch.testing.assert_close(value, eager.state[theirs][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.3, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(scale):
    params = small_model()
    optimizer = MuonAdamW(parameter_groups(params, small_recipe()))
    scale = None if scale is None else torch.tensor(scale)
    set_gradients(params, 1)
    optimizer.step(finite=torch.tensor(1.0))
    tensors = [p.detach() for _, p in params] + list(optimizer.named_state().values())
    before, places = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    for _, p in params:
        p.grad.fill_(math.nan)
    norm = gradient_norm(p for _, p in params)
    optimizer.step(finite=torch.isfinite(norm), scale=scale)
    after = [p.detach() for _, p in params] + list(optimizer.named_state().values())
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(map(torch.atleast_1d, before), map(torch.atleast_1d, after))
    )
    assert [t.data_ptr() for t in after] == places
    set_gradients(params, 2)
    optimizer.step(finite=torch.isfinite(gradient_norm(p for _, p in params)))
    assert not any(torch.equal(a, b.detach()) for a, (_, b) in zip(before, params))


def test_parameters_without_gradient_are_left_alone():
    params = small_model()
    optimizer = MuonAdamW(parameter_groups(params, small_recipe()))
    set_gradients(params, 1)
    params[2][1].grad = None
    before = params[2][1].detach().clone()
    optimizer.step()
    assert torch.equal(before, params[2][1].detach())


def test_clipping_is_global():
    params = small_model()
    set_gradients(params, 1)
    only = [p for _, p in params]
    norm = gradient_norm(only)
    torch.testing.assert_close(norm, torch.cat([p.grad.flatten() for p in only]).norm())
    torch.testing.assert_close(norm * clip_factor(norm, clip_norm=0.5), torch.tensor(0.5), rtol=1e-4, atol=0)
    assert clip_factor(norm, clip_norm=2 * float(norm)) == 1


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1.0), seed=st.integers(0, 999))
def test_a_factor_of_the_gradients_is_as_good_as_scaled_gradients(scale, seed):
    named = small_model(seed), small_model(seed)
    optimizers = [MuonAdamW(parameter_groups(params, small_recipe())) for params in named]
    for step in range(3):
        for params in named:
            set_gradients(params, seed + step)
        for _, p in named[1]:
            p.grad *= scale
        optimizers[0].step(scale=torch.tensor(scale))
        optimizers[1].step()
    for (name, ours), (_, theirs) in zip(*named):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4, msg=name)  # as of the plain formula, above
    for (name, ours), theirs in zip(optimizers[0].named_state().items(), optimizers[1].named_state().values()):
        tight = {} if "second_moment" not in name else {"rtol": 2e-3, "atol": 2e-4}
        torch.testing.assert_close(ours, theirs, **tight, msg=name)


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 40),
    fraction=st.floats(0, 1),
    final=st.floats(0, 1),
    kind=st.sampled_from(["warmdown", "wsd", "cosine"]),
)
def test_learning_rate_schedules(total, warmup, fraction, final, kind):
    config = TrainingConfig(warmup_steps=warmup, warmdown_fraction=fraction, final_lr_fraction=final, lr_schedule=kind)
    values = [lr_scale(step, total=total, training=config) for step in range(total + 1)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    ramp = values[: min(warmup, total)]
    assert ramp == sorted(ramp)
    rest = values[min(warmup, total) :]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rest, rest[1:]))  # a cosine near 1 rounds
    if kind == "cosine" and total > warmup or kind != "cosine" and round(fraction * total) > 0 and total > warmup:
        assert values[total] == pytest.approx(final, abs=1e-9)


def test_rates_of_the_specification():
    optimizer, training = OptimizerConfig(), TrainingConfig()
    assert rates_at(0, total=1000, training=training, optimizer=optimizer) == (1.0, 0.85, 1.0, 1.0)
    middle = rates_at(150, total=1000, training=training, optimizer=optimizer)
    assert middle.momentum == pytest.approx(0.90) and middle.decay_scale == pytest.approx(0.85)
    late = rates_at(750, total=1000, training=training, optimizer=optimizer)
    assert late.lr_scale == pytest.approx(0.5) and late.momentum == pytest.approx(0.95)
    wsd = TrainingConfig(lr_schedule="wsd", warmdown_fraction=0.2)
    assert lr_scale(850, total=1000, training=wsd) == pytest.approx(1 - math.sqrt(0.25))
