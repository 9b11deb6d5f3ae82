"""The joint between a foreign block and the memory: checkpointing, compilation and sharding change no gradient.

``torchrun --nproc_per_node=2 tests/test_adapt_joint.py`` shows the sharded run itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_decoders import FAMILIES, make, stir
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import lrt

SCHEDULES = {
    "baseline": lrt.baseline(),
    "interleaved": lrt.interleaved(3),
    "refreshed": lrt.interleaved(4, kv_refresh=True),
    "refine": lrt.refine(2, weights=(0, 0.4, 0.6)),
    "chunked": lrt.chunked(5),
    "sequential": lrt.sequential(),
}
TOKENS = torch.randint(1, 61, (4, 11), generator=torch.Generator().manual_seed(3))
WRAPPED = "_checkpoint_wrapped_module."


def adapted(family: str) -> Any:
    return stir(lrt.adapt(make(family), lrt.RecurrenceConfig(sharing="shared", init="identity"))).train()


def gradients(model: Any, schedule: Any, rows: torch.Tensor = TOKENS, valid: int = 40) -> dict[str, Any]:
    model.zero_grad()
    model(rows, labels=rows, schedule=schedule, valid_targets=torch.tensor(valid)).loss.backward()
    return {name.replace(WRAPPED, ""): p.grad for name, p in model.named_parameters()}


def no_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_activation_checkpointing_changes_no_gradient(family: str, schedule: str) -> None:
    plain, wrapped = (no_dropout(adapted(family)) for _ in range(2))
    for index, block in enumerate(wrapped.blocks):
        wrapped.blocks[index] = checkpoint_wrapper(block)
    expected, found = gradients(plain, SCHEDULES[schedule]), gradients(wrapped, SCHEDULES[schedule])
    assert expected.keys() == found.keys()
    assert [n for n in expected if not _same(found[n], expected[n])] == []


def test_dropout_is_drawn_again_as_it_was() -> None:
    """GPT-2 drops attention weights and residuals: recomputation must draw the same."""
    plain, wrapped = adapted("gpt2"), adapted("gpt2")
    for index, block in enumerate(wrapped.blocks):
        wrapped.blocks[index] = checkpoint_wrapper(block)
    torch.manual_seed(9)
    expected = gradients(plain, SCHEDULES["interleaved"])
    torch.manual_seed(9)
    found = gradients(wrapped, SCHEDULES["interleaved"])
    assert [n for n in expected if not _same(found[n], expected[n])] == []


@pytest.mark.parametrize("family", [f if f == "phi3" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_blocks_compile_as_one_graph(family: str) -> None:
    """Whole-graph capture with and without memory, with and without a buffer; the arithmetic stays eager's."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    model = no_dropout(adapted(family))
    expected = {name: gradients(model, SCHEDULES[name]) for name in ("interleaved",)}
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for name, grads in expected.items():
        found = gradients(model, SCHEDULES[name])
        for key, value in grads.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_blocks_compile_with_inductor() -> None:
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    model = adapted("llama")
    expected = gradients(model, SCHEDULES["interleaved"])
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    found = gradients(model, SCHEDULES["interleaved"])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.dist
def test_two_ranks_have_the_gradients_of_one() -> None:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent.parent), *sys.path]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "14 comparisons" in done.stdout


def _same(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or torch.equal(a, b))


def sharded(model: Any) -> Any:
    """FSDP2 around every checkpointed block and the rest."""
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    for block in model.blocks:
        fully_shard(block)
        register_fsdp_forward_method(block, "refresh")
    fully_shard(model)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def main() -> None:
    dist.init_process_group("gloo")
    rank, compared = dist.get_rank(), 0
    for family in ("smollm", "gpt_neox"):
        plain, parallel = no_dropout(adapted(family)), sharded(no_dropout(adapted(family)))
        assert len(list(parallel.parameters())) == len(list(plain.parameters()))
        for schedule in (*SCHEDULES.values(), lrt.interleaved(2, sweeps=2)):
            expected = gradients(plain, schedule)
            found = gradients(parallel, schedule, TOKENS[2 * rank : 2 * rank + 2])
            for name, value in expected.items():
                if value is not None:
                    torch.testing.assert_close(found[name].full_tensor(), value, rtol=1e-5, atol=1e-7)
            compared += 1
    if rank == 0:
        print(f"{compared} comparisons")
    dist.destroy_process_group()


def test_a_mask_that_was_left_out_stays_out(monkeypatch):
    """Some versions of transformers make it while a CUDA graph is captured:
    the compiled blocks would be compiled anew there."""
    from transformers import masking_utils

    backbone = lrt.adapt(make("llama")).backbone
    tokens, places = torch.zeros(1, 6, dtype=torch.int64), torch.arange(6)
    assert all(context.mask is None for context in backbone.embed(tokens, places)[1])
    monkeypatch.setattr(masking_utils, "create_causal_mask", lambda **_: torch.ones(1, 1, 6, 6, dtype=torch.bool))
    assert all(context.mask is None for context in backbone.embed(tokens, places)[1])
    assert all(context.mask is not None for context in backbone.embed(tokens[:, :5], places[:5])[1])


if __name__ == "__main__":
    main()
