"""Whether a described decoder computes what the decoder itself computes: on a few tokens,
in evaluation and in training.

The tokens go past every sliding window, because windows are narrowed for the time of the probe. Both models share
their modules, so a hook on a module sees what either gives it, and the first module that gets something else
says where the description is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt.attention import Buffer, causal_mask
from lrt.families.blocks import FamilyBlock, on_device
from lrt.families.decoder import FamilyDecoder
from lrt.families.description import Family, Foreign, part, text_config
from lrt.tables import Table

LENGTH = 8  # tokens
WINDOW = 3  # keys that a sliding window sees meanwhile
# Relative error that rounding may cause, in units of the dtype's eps; decoders of the table differ by none.
ROUNDINGS = {torch.bfloat16: 4, torch.float16: 4}
ROUGH = {torch.bfloat16: 0.2, torch.float16: 0.05}  # of attention by another kernel

ATTENTION = (
    "query_norm, key_norm, norm_after_rotation, rotates, rotated, rotate, scale, scaled_query, softcap, sinks, window, "
    "clip, fused and split"
)
BEFORE = {  # what lies between a module and the one before it
    "block": "embedding_scale, embedding_factor, embedding_out, embedding_dropout, position_embedding, "
    "position_offset, attention_in",
    "output": ATTENTION,
    "mlp": "attention_out, output_dropout, residual_factor, parallel, residual_first, mlp_in",
    "next": "mlp, mlp_out, mlp_dropout, residual_factor, residual_first, attention_in",
    "head": "final_norm, mlp_out, mlp_dropout",
    "logits": "logit_factor, logit_divisor, logit_softcap",
}


class Departure(NamedTuple):
    """How far a description is from its decoder."""

    error: float  # relative
    words: str | None  # what differs; None where rounding explains it
    passed: int = 0  # checks before the one that found it


@torch.no_grad()
def departure(backbone: FamilyDecoder, blocks: list[FamilyBlock], decoder: nn.Module) -> Departure:
    """Compare both on a few tokens.

    Args:
        backbone, blocks: from ``dismantle``.
        decoder: what they were made of.
    """
    modes = {module: module.training for module in (*decoder.modules(), *backbone.modules(), *blocks)}
    devices = sorted(
        {p.device.index for p in decoder.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    with ExitStack() as stack:
        stack.callback(_restore, modes)
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(narrow_windows(backbone, blocks, decoder))
        longest = getattr(backbone.config, "max_position_embeddings", None) or _length(blocks)
        if not isinstance(longest, int) or longest < 1:
            return Departure(float("inf"), f"its config says max_position_embeddings = {longest!r}")
        size = min(_length(blocks), longest)
        tokens = (torch.arange(size, device=backbone.embedding.weight.device) * 7 % backbone.vocab_size)[None]
        worst = 0.0
        for passed, check in enumerate((_evaluation, _partial_passes, _training)):
            try:
                found = check(backbone, blocks, decoder, tokens)
            except (AttributeError, TypeError, RuntimeError, LookupError, AssertionError) as error:
                return Departure(
                    float("inf"), f"it cannot be run as described: {type(error).__name__}: {error}", passed
                )
            if found.words is not None:
                return found._replace(passed=passed)
            worst = max(worst, found.error)
    return Departure(worst, None)


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def _length(blocks: list[FamilyBlock]) -> int:
    """Enough tokens for windows that a description sets itself, which stay as they are."""
    return max([LENGTH, *(block.window + 4 for block in blocks if block.window is not None)])


@contextmanager
def narrow_windows(backbone: FamilyDecoder, blocks: list[FamilyBlock], decoder: nn.Module) -> Iterator[None]:
    """For a while every sliding window of both models sees ``WINDOW`` keys."""
    holders = [getattr(decoder, "config", None), text_config(decoder), *decoder.modules()]
    before = [
        (holder, keys)
        for holder in holders
        if isinstance(keys := getattr(holder, "sliding_window", None), int) and keys > 0
    ]
    try:
        for holder, _ in before:
            holder.sliding_window = WINDOW
        _follow(backbone, blocks)
        yield
    finally:
        for holder, keys in reversed(before):
            holder.sliding_window = keys
        _follow(backbone, blocks)


def _follow(backbone: FamilyDecoder, blocks: list[FamilyBlock]) -> None:
    for block in blocks:
        block.find_window()
    backbone.windows = tuple(block.window for block in blocks)


# ------------------------------------------------------------------ the checks


def _evaluation(backbone: FamilyDecoder, blocks: list[FamilyBlock], decoder: nn.Module, tokens: Tensor) -> Departure:
    """Logits, and where they part."""
    _set_training(False, backbone, decoder)
    theirs, seen = _watched(backbone, blocks, lambda: _logits_of(_call(decoder, tokens)))
    ours, mine = _watched(backbone, blocks, lambda: backbone.logits(_hidden(backbone, blocks, tokens)[-1]))
    if theirs.shape != ours.shape:
        return Departure(
            float("inf"),
            f"its logits have shape {tuple(theirs.shape)}, those of the description {tuple(ours.shape)}: "
            "head, embedding",
        )
    error, limit = _error(theirs, ours), _limit(theirs.dtype)
    if error <= limit:
        return Departure(error, None)
    return Departure(error, _where(seen, mine, limit) + f" (logits differ by {error:.1e} of their size)")


def _partial_passes(
    backbone: FamilyDecoder, blocks: list[FamilyBlock], decoder: nn.Module, tokens: Tensor
) -> Departure:
    """Passes over some positions attend through our own kernels: the same, up to rounding?"""
    states = _hidden(backbone, blocks, tokens)
    contexts = backbone.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))[1]
    worst = 0.0
    for index, (block, context) in enumerate(zip(blocks, contexts)):
        hidden, context = on_device((states[index], context), _device_of(block))
        places = torch.arange(hidden.shape[1], device=hidden.device)
        store = Buffer((), (), 0, causal_mask(places, places, window=block.window))
        ours = block.attend(hidden, block.project(hidden, context), context, store)[0] - hidden
        error = _error(states[index + 1].to(hidden.device) - hidden, ours)
        worst = max(worst, error)
        if not error <= ROUGH.get(hidden.dtype, 1e-3):
            words = (
                f"its attention in block {index + 1} is not the softmax that passes over some positions compute (they "
                f"differ by {error:.1e})"
            )
            return Departure(error, f"{words}: scale, softcap, sinks, window")
    return Departure(0.0, None)


def _training(backbone: FamilyDecoder, blocks: list[FamilyBlock], decoder: nn.Module, tokens: Tensor) -> Departure:
    """Logits and loss with dropout on, of the same random numbers."""
    _set_training(True, backbone, decoder)
    torch.manual_seed(0)
    output = _call(decoder, tokens, labels=tokens)
    torch.manual_seed(0)
    hidden = _hidden(backbone, blocks, tokens)[-1]
    theirs, ours = _logits_of(output), backbone.logits(hidden)
    error = _error(theirs, ours)
    if error > _limit(theirs.dtype):
        return Departure(
            error,
            f"in training mode it computes something else (logits differ by {error:.1e} of their size), "
            "so it has a dropout or another noise that no module shows: output_dropout, embedding_dropout, dropout, "
            "mlp_dropout; or set its rate to 0 in the config",
        )
    loss = getattr(output, "loss", None)
    if loss is None:
        return Departure(error, None)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    mine = backbone.loss(hidden, targets)[0] / (tokens.numel() - 1)
    if _error(loss, mine.to(loss.device)) > max(_limit(loss.dtype), _limit(theirs.dtype)):
        return Departure(
            float("inf"),
            f"its training loss is {float(loss):.4f}, the cross-entropy of its logits {float(mine):.4f}: "
            "it adds a loss of its own, which would be left out here. A mixture of experts adds its router's balance "
            "loss: set config.output_router_logits = False",
        )
    return Departure(error, None)


# ------------------------------------------------------------------ running both


def _hidden(backbone: FamilyDecoder, blocks: list[FamilyBlock], tokens: Tensor) -> list[Tensor]:
    """The embedded tokens and the output of every block."""
    hidden, contexts = backbone.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
    states = [hidden]
    for block, context in zip(blocks, contexts):
        hidden, context = on_device((hidden, context), _device_of(block))
        hidden = block.attend(hidden, block.project(hidden, context), context, None)[0]
        states.append(hidden)
    states[-1] = hidden.to(states[0].device)
    return states


def _call(decoder: nn.Module, tokens: Tensor, **more: object) -> Foreign:
    more["use_cache"] = False  # with a cache transformers may round in another order
    accepted = inspect.signature(decoder.forward).parameters
    if getattr(decoder, "config", None) is not text_config(decoder) and "token_type_ids" in accepted:
        more["token_type_ids"] = torch.zeros_like(tokens)  # text everywhere
    try:
        return decoder(tokens, **{name: value for name, value in more.items() if name in accepted})
    except Exception as error:
        raise ValueError(
            f"this {type(decoder).__name__} itself fails on {tokens.shape[1]} tokens: {type(error).__name__}: {error}"
        ) from error


def _logits_of(output: Foreign) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _set_training(mode: bool, backbone: FamilyDecoder, decoder: nn.Module) -> None:
    decoder.train(mode)
    backbone.train(mode)


def _device_of(block: nn.Module) -> torch.device:
    return next(block.parameters()).device


def _error(theirs: Tensor, ours: Tensor) -> float:
    """Size of the difference beside the size of ``theirs``; infinite where one is not a number."""
    theirs, ours = theirs.double(), ours.to(theirs.device).double()
    error = float((theirs - ours).norm() / theirs.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def _limit(dtype: torch.dtype) -> float:
    return ROUNDINGS.get(dtype, 64) * torch.finfo(dtype).eps


# ------------------------------------------------------------------ where they part


def _stations(backbone: FamilyDecoder, blocks: list[FamilyBlock]) -> list[tuple[str, str, nn.Module]]:
    """Modules whose input is compared, in order: (what it is in ``BEFORE``, its name, itself)."""
    family: Family = backbone.family
    first = family.query if family.fused is None else family.fused
    stations = []
    for index, block in enumerate(blocks):
        for kind, path in (
            ("next" if index else "block", first),
            ("output", family.output),
            ("mlp", family.mlp_parts[0]),
        ):
            stations.append((kind, f"{family.layers}.{index}.{path}", part(block.layer, path)))
    return [*stations, ("head", family.head, backbone.head)]


def _watched(
    backbone: FamilyDecoder, blocks: list[FamilyBlock], run: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, tuple[str, Tensor]]]:
    """What ``run`` returns, and what every station was given meanwhile."""
    seen: dict[str, tuple[str, Tensor]] = {}
    with ExitStack() as stack:
        for kind, name, module in _stations(backbone, blocks):

            def note(
                module: nn.Module, args: tuple[object, ...], kwargs: Table, kind: str = kind, name: str = name
            ) -> None:
                given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
                if given is not None:
                    seen[name] = (kind, given.detach().clone())

            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        return run(), seen


def _where(theirs: dict[str, tuple[str, Tensor]], ours: dict[str, tuple[str, Tensor]], limit: float) -> str:
    for name, (kind, mine) in ours.items():
        if name not in theirs:
            return f"it never calls {name}, which the description names"
        other = theirs[name][1].reshape(-1)
        if other.numel() != mine.numel() or _error(other, mine.reshape(-1)) > limit:
            return f"{name} is given something else there, so what comes before it is not described: {BEFORE[kind]}"
    return f"its logits are not what its head computes: {BEFORE['logits']}"
