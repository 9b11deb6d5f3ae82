"""What transformers and its tools ask of a model's parts: embeddings, attention backend, checkpointed blocks."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrt.huggingface.config import LRTConfig
from lrt.model import LatentRecurrentModel
from lrt.serialization.adapted import is_foreign, pretrained
from lrt.tables import Table


class Parts(LatentRecurrentModel):
    """The parts of an LRTForCausalLM in the hands of transformers."""

    config: LRTConfig

    # -------------------------------------------------------------- embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.head

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in the place of the embeddings, and of the head where both are one.

        Raises:
            ValueError: a table of another kind or shape.
        """
        before = self.backbone.embedding
        _check_same_kind("embeddings", before, value)
        tied = self.backbone.head.weight is before.weight
        self.backbone.embedding = value
        if is_foreign(self):
            pretrained(self).set_input_embeddings(value)
        if tied:
            self.backbone.head.weight = value.weight

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another matrix in the place of the head.

        Raises:
            ValueError: a head of another kind or shape.
        """
        _check_same_kind("head", self.backbone.head, value)
        self.backbone.head = value
        if is_foreign(self):
            pretrained(self).set_output_embeddings(value)

    def resize_token_embeddings(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(
            "resize the decoder's embeddings before lrt.adapt: lrt.release(model), resize, and adapt again"
        )

    # -------------------------------------------------------------- attention

    def set_attn_implementation(self, attn_implementation: str, *args: bool, **kwargs: bool) -> None:
        """Choose the attention backend of passes over all positions; see PreTrainedModel.

        Raises:
            ValueError: a native model, which has no other than "sdpa".
        """
        if is_foreign(self):
            pretrained(self).set_attn_implementation(attn_implementation, *args, **kwargs)
            self.config._attn_implementation = pretrained(self).config._attn_implementation
        elif attn_implementation != "sdpa":
            raise ValueError(
                "this native model chooses its attention itself: attn_implementation applies to adapted decoders"
            )

    # -------------------------------------------------------------- checkpointed blocks

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Table | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Compute the activations of blocks again in the backward pass, memory included.

        Args:
            gradient_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``.
            every_n_layers: 1 = every block; n = every n-th.
            offload: only False.

        Raises:
            ValueError: reentrant checkpointing, which loses the gradients of keys and values, or offloading.
        """
        options: Table = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant") or offload:
            raise ValueError(
                "blocks are checkpointed with use_reentrant=False and without offloading: leave both out, "
                'or {"use_reentrant": False}'
            )
        self.gradient_checkpointing_disable()
        # their forward alone, not a module around each: PEFT reads names of modules
        for block in list(self.blocks)[::every_n_layers]:
            block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of every block again."""
        for block in filter(_is_checkpointed, self.blocks):
            del block.forward

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(map(_is_checkpointed, self.blocks))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Table | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """``gradient_checkpointing_enable`` by its name of newer versions of transformers."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    activation_checkpointing_disable = gradient_checkpointing_disable
    is_activation_checkpointing = is_gradient_checkpointing


def _is_checkpointed(block: nn.Module) -> bool:
    return getattr(block.__dict__.get("forward"), "func", None) is checkpoint


def _check_same_kind(what: str, before: nn.Module, after: nn.Module) -> None:
    if type(after) is not type(before) or _shape(after) != _shape(before):
        found = f"{type(after).__name__} of {_shape(after)}"
        raise ValueError(
            f"the new {what} are a {found}, but this model has a {type(before).__name__} of "
            f"{_shape(before)}: they must be alike; to change the vocabulary, lrt.release(model), "
            "resize the decoder's embeddings, and adapt again"
        )


def _shape(table: nn.Module) -> tuple[int, ...]:
    weight = table.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)
