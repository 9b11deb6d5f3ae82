"""A part of decoding.py, no command: the models that decode, a state in the middle of a text, and one step of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import lrt
from lrt import accounting
from lrt.adaptation import without_memory
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import Accelerated
from lrt.decoding.state import DecodeState
from lrt.model import LatentRecurrentModel, build_model
from lrt.serialization.decoders import transformers
from lrt.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEPARATOR = 0
PLAIN, SHARED, LAYERWISE, NARROW, ALIGNED, ORIGINAL = (
    "plain", "shared", "layerwise", "narrow", "aligned", "transformers"
)  # fmt: skip
NATIVE = {
    "d12": ModelConfig(n_layers=12),
    "d20": ModelConfig(n_layers=20),
    "tiny": ModelConfig(n_layers=2, width=64, vocab_size=256, sequence_length=32),
}
LLAMAS = {  # SmolLM2-135M, Llama 3.2 1B, and a toy: what their config.json say
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    },
    "llama1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "tiny-llama": {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
    },
}  # fmt: skip
Step = Callable[[], None]


def upper_half(layers: int) -> tuple[int, ...]:
    return tuple(range(layers // 2 + 1, layers + 1))


def recurrence_of(variant: str, layers: int) -> RecurrenceConfig | None:
    """How memory enters a native decoder of so many blocks."""
    if variant == PLAIN:
        return None
    if variant == NARROW:  # the loop is one or two blocks: those from the first receiver up to the source
        blocks = upper_half(layers)
        source = min(layers, blocks[0] + (1 if layers > 4 else 0))
        return RecurrenceConfig(blocks=blocks, source_layer=source, gate_channels=32, separator=SEPARATOR)
    return RecurrenceConfig(
        sharing="layerwise" if variant == LAYERWISE else "shared", gate_channels=32, separator=SEPARATOR
    )


def native(config: ModelConfig, variant: str, device: torch.device, dtype: torch.dtype) -> LatentRecurrentModel:
    """A random model, no matrix of which is zero: zeros would be faster than real data."""
    recurrence = recurrence_of(variant, config.n_layers)
    model = build_model(config, recurrence, device="meta", dtype=dtype).to_empty(device=device).eval()
    generator = torch.Generator(device=device).manual_seed(1)
    model.init_weights(generator=generator)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.block.output, block.block.mlp_out):
                linear.weight.normal_(std=0.3 * linear.in_features**-0.5, generator=generator)
    return model


class Adapted(NamedTuple):
    """A foreign decoder and what is made of it, over the same weights."""

    original: PreTrainedModel  # as transformers has it
    models: Table  # by variant


def llama(size: str, variants: list[str], device: torch.device, dtype: torch.dtype) -> Adapted:
    """A Llama of random weights, adapted in each of these ways; all share the one decoder."""
    library = transformers()
    with torch.device(device):
        config = library.LlamaConfig(**LLAMAS[size], tie_word_embeddings=True)
        decoder = library.LlamaForCausalLM(config).to(dtype).eval()
    blocks = upper_half(config.num_hidden_layers)
    models = {}
    for variant in variants:
        if variant == PLAIN:
            continue
        more = {"projection": "aligned", "blocks": blocks} if variant == ALIGNED else {}
        model = lrt.adapt(decoder, RecurrenceConfig(init="paper", separator=SEPARATOR, **more)).eval()
        models[variant] = model
        lrt.release(model)
    some = next(iter(models.values()), None) or lrt.adapt(decoder).eval()
    return Adapted(decoder, {PLAIN: without_memory(some).eval(), **models})


def saved(model: LatentRecurrentModel) -> Adapted:
    """An adapted model from a folder, and the same without its memory."""
    return Adapted(model.original[0], {PLAIN: without_memory(model).eval(), "memory": model})


# ------------------------------------------------------------------ states and steps


def random_state(model: LatentRecurrentModel | Accelerated, batch: int, capacity: int, length: int) -> DecodeState:
    """A state of random keys and values, as after ``length`` tokens."""
    state = DecodeState.empty(model, batch=batch, capacity=capacity)
    for x in (*state.keys, *state.values, *([] if state.memory is None else [state.memory])):
        x.normal_()
    state.lengths.fill_(length)
    return state


def greedy(model: LatentRecurrentModel | Accelerated, state: DecodeState) -> tuple[Step, Tensor]:
    """Decode greedily, everything on the device: (step, its static flags of active rows)."""
    pending = torch.ones(state.batch, dtype=torch.int64, device=state.lengths.device)
    active = torch.ones(state.batch, dtype=torch.bool, device=state.lengths.device)

    def step() -> None:
        pending.copy_(decoding.decode_one_token(model, state, pending, active).argmax(-1))

    return step, active


@torch.no_grad()
def greedy_original(
    decoder: PreTrainedModel, *, batch: int, capacity: int, length: int, backend: str
) -> tuple[Step, Tensor]:
    """The same by transformers: its static cache, its forward compiled as one graph."""
    from transformers import StaticCache

    device = next(decoder.parameters()).device
    cache = StaticCache(config=decoder.config, max_cache_len=capacity)
    accepted = inspect.signature(decoder.model.forward).parameters
    name = "past_key_values" if "past_key_values" in accepted else "cache"
    pending = torch.ones(batch, 1, dtype=torch.int64, device=device)
    decoder(input_ids=pending, use_cache=True, **{name: cache})  # makes the cache's tensors
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)
    run = torch.compile(decoder, fullgraph=True, dynamic=False, backend=backend)

    def step() -> None:
        logits = run(input_ids=pending, use_cache=True, **{name: cache}).logits
        pending.copy_(logits[:, -1].argmax(-1, keepdim=True))

    return step, torch.ones(batch, dtype=torch.bool, device=device)


def bytes_moved(model: LatentRecurrentModel, batch: int, context: int) -> int:
    """What a step must read: every parameter once but tables of tokens, and the keys and values of every row."""
    backbone = model.backbone
    tables = {id(p) for name, p in model.named_parameters() if "embedding.weight" in name or "value_embeddings" in name}
    tables |= {id(backbone.embedding.weight)}
    tables -= {id(backbone.head.weight)}  # which may be tied to the embedding
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in tables)
    number = next(model.parameters()).element_size()
    return weights + batch * accounting.kv_bytes(model, context, bytes_per_number=number)
