"""The model as a user meets it: parts, defaults, sizes, folders, errors, and the layout of the package."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import VOCABULARY, models, rows

import lrt
from lrt.accounting import count_parameters, forward_flops, kv_bytes, mean_keys, mfu, training_flops
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.decoding.state import fingerprint
from lrt.eval import evaluate_bpb
from lrt.model import build_model
from lrt.types import MemoryInput, Projection

TINY = ModelConfig(n_layers=3, width=16, n_heads=2, vocab_size=VOCABULARY, sequence_length=16)


def tiny(**recurrence):
    model = build_model(TINY, RecurrenceConfig(**recurrence))
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize("layers", [20, 24])
def test_shared_memory_adds_at_most_three_per_mille(layers):
    config = ModelConfig(n_layers=layers, gate_channels=32)
    twin = count_parameters(build_model(config, None, device="meta"))
    parts = {
        s: count_parameters(build_model(config, RecurrenceConfig(sharing=s, gate_channels=32), device="meta"))
        for s in ("shared", "layerwise")
    }
    assert twin.memory == 0 and twin.total == parts["shared"].total - parts["shared"].memory
    assert 0 < parts["shared"].memory <= 0.003 * twin.total
    assert 0.03 * twin.total < parts["layerwise"].memory < 0.06 * twin.total
    assert parts["shared"].scaling == twin.scaling  # twins see equal tokens


@settings(max_examples=15)
@given(model=models())
def test_parts_sum_to_the_model(model):
    parts = count_parameters(model)
    assert parts.total == sum(p.numel() for p in model.parameters())
    assert parts.memory == sum(p.numel() for p in model.memory_parameters().values())


def test_flops_count_every_pass():
    model = build_model(ModelConfig(), RecurrenceConfig(gate_channels=32), device="meta")
    plain = build_model(ModelConfig(), None, device="meta")
    base = training_flops(plain, lrt.baseline(), 2048)
    ratio = {
        name: training_flops(model, s, 2048) / base
        for name, s in {"r1": lrt.refine(1), "i2": lrt.interleaved(2), "i4x2": lrt.interleaved(4, sweeps=2)}.items()
    }
    assert 2.0 < ratio["r1"] < 2.03 and ratio["i2"] == pytest.approx(ratio["r1"]) and 3.0 < ratio["i4x2"] < 3.05
    # stopped at block 8 of 12, no head
    assert 1.5 < training_flops(model, lrt.refine(1, weights=(0, 1)), 2048) / base < 1.6
    refreshed = training_flops(model, lrt.interleaved(3, kv_refresh=True), 2048) - training_flops(
        model, lrt.interleaved(3), 2048
    )
    again = 2 * (12 * (3 * 768 * 768 + 12 * 32) + 2 * 768 * 768)  # queries, keys, values, gates; the shared projection
    assert refreshed == pytest.approx(3 * again)  # two of three subsets, then one: one row in all
    flops = forward_flops(plain, 2048)
    assert flops.head == 2 * 768 * 32768 and flops.memory == 0
    assert flops.blocks == 2 * sum(p.numel() for b in plain.blocks for p in b.parameters())
    for length, window in [(7, None), (7, 3), (7, 0), (5, 9)]:
        pairs = sum(1 for t in range(length) for s in range(t + 1) if window is None or t - s <= window)
        assert mean_keys(length, window) == pytest.approx(pairs / length)
    assert kv_bytes(model, 2048) - kv_bytes(plain, 2048) == 2 * 768  # the memory vector
    assert mfu(98.9e12, "NVIDIA H100 80GB HBM3") == pytest.approx(0.1) and mfu(1e12, "Quadro") is None


def test_counting_flops_draws_no_random_number():
    model, before = tiny(), torch.get_rng_state()
    training_flops(model, lrt.interleaved(3, order="random"), 9)
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------ defaults


def test_schedule_of_a_call_that_names_none():
    model, tokens = tiny(), torch.randint(0, VOCABULARY, (2, 8))
    model.train()
    assert model.train_schedule == lrt.interleaved(2)
    assert torch.equal(model(tokens).logits, model(tokens, schedule=lrt.interleaved(2)).logits)
    model.eval()
    torch.testing.assert_close(model(tokens).logits, model(tokens, schedule=lrt.sequential()).logits)
    plain = build_model(TINY, None)
    plain.init_weights()
    assert plain.train_schedule == lrt.baseline() and plain(tokens).memory is None
    with pytest.raises(ValueError, match="needs memory, but this model has no recurrence"):
        plain(tokens, schedule=lrt.refine(1))


def test_output_fields():
    model, tokens = tiny(), torch.randint(0, VOCABULARY, (2, 8))
    out = model(tokens, targets=tokens, schedule=lrt.interleaved(3, sweeps=2))
    assert out.logits is None and len(out.groups) == 3 and out.memory.shape == (2, 8, 16)
    assert out.loss.ndim == 0 and not any(g.requires_grad for g in out.groups)
    assert model(tokens, targets=tokens, return_logits=True).logits.shape == (2, 8, VOCABULARY)
    assert model(tokens).loss is None


def test_initialization_is_the_table_of_the_method():
    model = build_model(
        ModelConfig(n_layers=2, width=256, n_heads=2, vocab_size=4000), RecurrenceConfig(sharing="layerwise")
    )
    model.init_weights(generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    bound = (3 / 256) ** 0.5
    block = model.blocks[0]
    for weight in (
        block.block.query.weight,
        block.block.mlp_in.weight,
        block.projection.key.weight,
        model.backbone.value_embeddings["0"].weight,
    ):
        assert weight.abs().max() <= bound and weight.std() == pytest.approx(256**-0.5, rel=0.05)
    assert not block.block.output.weight.any() and not block.block.mlp_out.weight.any() and not block.gate.weight.any()
    assert model.backbone.embedding.weight.std() == pytest.approx(1, rel=0.02)
    assert model.backbone.head.weight.std() == pytest.approx(0.001, rel=0.02)
    assert (
        (model.backbone.residual_scales == 1).all()
        and (model.backbone.embedding_scales == 0.1).all()
        and (model.injection.gains == 0.1).all()
    )


def test_meta_device_then_init_equals_direct_build():
    recipe = lrt.load_recipe("lrt_tiny.toml")
    direct, late = lrt.build(recipe), lrt.build(recipe, device="meta")
    late.to_empty(device="cpu")
    late.init_weights(generator=torch.Generator().manual_seed(recipe.run.seed))
    assert all(torch.equal(a, b) for a, b in zip(direct.state_dict().values(), late.state_dict().values()))


# ------------------------------------------------------------------ the parts on a block of one's own


class OwnBlock(torch.nn.Module):
    """A decoder block that a user might bring: one head, no MLP, no positions."""

    window = None

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(width, width, bias=False) for _ in range(3))

    def enter(self, hidden, context):
        return hidden

    def project(self, hidden, context):
        return Projection(hidden, self.q(hidden)[:, :, None], self.k(hidden)[:, :, None], self.v(hidden)[:, :, None])

    def attend(self, hidden, projection, context, kv):
        q, k, v = (x.transpose(1, 2) for x in projection[1:])
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return hidden + out.transpose(1, 2).flatten(2), projection.key, projection.value


def test_parts_wrap_a_single_block():
    width, tokens = 8, torch.randn(2, 5, 8)
    block, projection, injection = OwnBlock(width), lrt.KVProjection(width, 1, width), lrt.ResidualInjection()
    recurrent = lrt.RecurrentBlock(block, gate=lrt.Gate(width, 2), projection=projection)
    projection.init_weights(init="paper")
    injection.init_weights(init="paper")
    plain, _, _ = recurrent(tokens, None, (), None)
    memory = MemoryInput(torch.randn(2, 5, 8), gain=injection()[0])
    fed, key, value = recurrent(tokens, memory, (), None)
    # gates are exactly 1 at the start
    assert torch.equal(plain, block.attend(tokens, block.project(tokens, ()), (), None)[0])
    assert (fed - plain).abs().max() > 1e-3 and key.shape == value.shape == (2, 5, 1, 8)


# ------------------------------------------------------------------ bits per byte


class Rows:
    def __init__(self, input_ids, targets):
        self.input_ids, self.targets = input_ids, targets


@settings(max_examples=8)
@given(model=models(), row=rows(batch=st.just(2), length=st.integers(4, 8)))
def test_bits_per_byte_by_hand(model, row):
    tokens, targets = row
    sizes = torch.tensor([0, *range(1, VOCABULARY)])
    report = evaluate_bpb(
        model,
        [Rows(tokens[:1], targets[:1]), Rows(tokens[1:], targets[1:])],
        token_bytes=sizes,
        schedule=lrt.interleaved(2),
        buckets=2,
    )
    kept = (targets != -100) & (sizes[targets.clamp_min(0)] > 0)
    for mode, schedule in {"zero": lrt.baseline(), "parallel": lrt.interleaved(2), "decode": lrt.sequential()}.items():
        logits = model(tokens, schedule=schedule, return_logits=True).logits
        nats = (
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            .view_as(targets)[kept]
            .sum()
        )
        size = int(sizes[targets.clamp_min(0)][kept].sum())
        assert report[mode].bytes == size and report[mode].tokens == int(kept.sum())
        if size:
            assert report[mode].value == pytest.approx(float(nats.detach()) / size / 0.6931471805599453, rel=1e-6)
    assert len(report["parallel"].groups) == 2 and len(report["zero"].buckets) == 2
    given = evaluate_bpb(
        model, [Rows(tokens, targets)], token_bytes=sizes, decode=lambda tokens, targets: torch.ones(tokens.shape)
    )
    if model.recurrence is not None and given["decode"].bytes:
        assert given["decode"].value == pytest.approx(
            given["decode"].tokens / given["decode"].bytes / 0.6931471805599453
        )
        assert given["zero"].value == pytest.approx(report["zero"].value)
    if model.recurrence is None:
        assert given["decode"].value == given["zero"].value or not given["zero"].bytes
    assert model.training
    with pytest.raises(ValueError, match=r"evaluation.modes: \['exact'\] unknown; use zero, parallel, decode"):
        evaluate_bpb(model, [], token_bytes=sizes, modes=("exact",))


# ------------------------------------------------------------------ folders


@settings(max_examples=6)
@given(model=models(), row=rows())
def test_save_and_load(model, row, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    lrt.save(model, folder)
    again = lrt.load(folder)
    assert again.recurrence == model.recurrence and again.train_schedule == model.train_schedule
    assert torch.equal(again(row[0], schedule=lrt.refine(1)).logits, model(row[0], schedule=lrt.refine(1)).logits)
    assert next(lrt.load(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_folders_that_cannot_be_read(tmp_path):
    model, folder = tiny(), tmp_path / "model"
    lrt.save(model, folder)
    with pytest.raises(ValueError, match="already exists: choose a new folder"):
        lrt.save(model, folder)
    weights, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lrt.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({**config, "model": {**config["model"], "n_layers": 4}}))
    with pytest.raises(ValueError, match="tensors do not fit"):
        lrt.load(folder)
    with pytest.raises(ValueError, match=r"holds no config.json"):
        lrt.load(tmp_path / "nowhere")


# ------------------------------------------------------------------ bad input


def test_bad_tokens():
    model = tiny()
    with pytest.raises(ValueError, match=rf"token id 99, but the vocabulary has {VOCABULARY} entries"):
        model(torch.tensor([[1, 99]]))
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\): expected \(batch, tokens\)"):
        model(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="recurrence.gate_channels = 99 is more than the width 16"):
        tiny(gate_channels=99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"input_ids is a list: expected a tensor \(batch, tokens\)"),
        ({"targets": [[1, 2]]}, "targets is a list: expected a tensor"),
        ({"labels": [[1, 2]], "attention_mask": torch.ones(2, 5)}, "labels is a list: expected a tensor"),
        ({"attention_mask": [[1, 1]]}, "attention_mask is a list: expected a tensor"),
        ({"input_ids": torch.ones(2, 5)}, "input_ids has dtype torch.float32: expected token ids"),
        ({"targets": torch.full((2, 5), -1)}, "target -1, but the vocabulary has"),
        ({"labels": torch.full((2, 5), VOCABULARY)}, f"target {VOCABULARY}, but the vocabulary has"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \(2, 3\), but input_ids \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask has shape .* give \(batch, tokens\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]])}, "zeros between ones"),
        ({"document_ids": torch.zeros(2, 3)}, "document_ids has shape"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids has shape"),
        ({"schedule": "refine"}, "schedule = 'refine': pass lrt.baseline()"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**{"input_ids": torch.ones(2, 5, dtype=torch.int64), **arguments})


def test_positions_of_one_row_serve_every_row():
    model, ids = tiny(), torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])  # one row padded on either side
    each = model(ids, position_ids=torch.arange(3, 8).repeat(2, 1), attention_mask=mask).logits
    for positions in (torch.arange(3, 8), torch.arange(3, 8)[None]):
        assert torch.equal(model(ids, position_ids=positions, attention_mask=mask).logits, each)


def test_a_state_knows_models_apart_that_differ_in_settings_alone():
    model = tiny()
    other = build_model(dataclasses.replace(TINY, rope_base=500.0), model.recurrence)
    other.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) != fingerprint(other)


# ------------------------------------------------------------------ the layout

TIERS = [
    ["config", "installed", "tables", "types", "rotary", "huggingface.registration"],
    ["kernels"],
    ["attention", "data"],
    ["recurrence"],
    ["loss", "plans", "schedules"],
    ["accounting", "arguments", "forward", "padding"],
    ["engine"],
    ["backbone", "families", "passes"],
    ["lora", "outcome"],
    ["model"],
    ["adaptation"],
    ["serialization"],
    ["decoding"],
    ["huggingface"],
    ["eval"],
    ["train"],
    ["conversion"],
    ["eval.folders", "eval.tracking", "eval.harness", "eval.harness_model"],
    ["eval.core.folders"],
    ["commands"],
    ["titan", "__main__", "eval.core.__main__"],
]
# imports inside functions: Triton where a kernel runs, transformers where it is asked for, the hub where it is named,
LAZY = {
    # and training, which a list of recipes does without
    ("lrt.commands.train", "lrt.train.dry_run"),
    ("lrt.commands.train", "lrt.train.monitor.faults"),
    ("lrt.commands.train", "lrt.train.trainer"),
    ("lrt.data.sources", "lrt.data.hub"),
    ("lrt.decoding.fast.launching", "lrt.decoding.fast.kernels"),
    ("lrt.huggingface", "lrt.huggingface.cache"),
    ("lrt.huggingface", "lrt.huggingface.causal_lm"),
    ("lrt.huggingface.modeling_lrt", "lrt.huggingface"),
    ("lrt.kernels.mixing", "lrt.kernels.mixing_triton"),
    ("lrt.train.distributed.gradient_sums", "lrt.kernels.sums_triton"),
}


CHECKING = "TYPE_CHECKING"


def imports_of(path, modules):
    """Modules of lrt that a file imports, by absolute name, and whether it does so inside a function.

    What it imports for the type checker alone is left out, because it is never loaded.
    """
    root = Path(lrt.__file__).parent
    package = ["lrt", *path.relative_to(root).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == CHECKING)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [name if (name := f"{base}.{alias.name}") in modules else base for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in top) for name in found if name == "lrt" or name.startswith("lrt."))


def test_a_file_imports_only_from_tiers_above_it_or_beside_it():
    """Relative, aliased and lazy imports count too; the lazy ones are exactly those that are listed."""
    root = Path(lrt.__file__).parent
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    tier = {f"lrt.{name}": level for level, names in enumerate(TIERS) for name in names}

    def level(module):
        parts = module.split(".")
        return next((tier[".".join(parts[:n])] for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in tier), None)

    problems, lazy = [], set()
    for own, path in sorted(modules.items()):
        if own == "lrt" or own.startswith("lrt.recipes"):
            continue
        if level(own) is None:
            problems.append(f"{own}: not in the tier table of this test")
            continue
        for name, inside in imports_of(path, modules):
            if inside:
                lazy.add((own, name))
            if name == "lrt" and level(own) >= level("lrt.commands"):
                continue  # commands are users of the library
            if name == "lrt" or level(name) is None or level(name) > level(own):
                problems.append(f"{own} imports {name}")
    assert not problems, problems
    assert lazy == LAZY, lazy ^ LAZY


def test_no_circle_of_imports():
    root = Path(lrt.__file__).parent
    modules = {
        ".".join(p.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in root.rglob("*.py")
    }
    imports = {
        own: {name for name, _ in imports_of(path, modules)} - {own} for own, path in modules.items() if own != "lrt"
    }
    while True:  # take away what imports nothing that is left; a circle stays
        free = [own for own, names in imports.items() if not names & imports.keys()]
        if not free:
            break
        for own in free:
            del imports[own]
    assert not imports, sorted(imports)


def test_importing_lrt_imports_neither_the_compiler_nor_transformers():
    heavy = "{'torch._dynamo', 'torch._inductor.compile_fx', 'transformers'}"
    code = f"import sys, torch; before = set(sys.modules); import lrt; print({heavy} & (set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(lrt.__file__).parent.parent
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_no_module_has_the_name_of_a_public_function():
    root = Path(lrt.__file__).parent
    modules = {p.stem for p in root.glob("*.py")} | {p.name for p in root.iterdir() if p.is_dir()}
    functions = {name for name in lrt.__all__ if callable(getattr(lrt, name))}
    assert not modules & functions
