"""What ``generate`` of transformers asks of a model: a cache that carries the memory, and the inputs of every step."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from lrt.huggingface.cache import RecurrentCache, check_positions
from lrt.huggingface.output import CACHE, OLD_NAME, one_cache
from lrt.model import LatentRecurrentModel
from lrt.tables import Table

COUNTED = ("position_ids", "cache_position", "is_first_iteration", "labels")  # of generate: the cache counts for itself


class Generation(LatentRecurrentModel):
    """The part of an LRTForCausalLM that ``generate`` calls."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: Table, *_: object, **__: object
    ) -> None:
        wanted = generation_config.cache_implementation
        if wanted is not None:
            raise ValueError(
                f"cache_implementation = {wanted!r} would drop the recurrent memory: "
                "leave it out, lrt brings its own cache"
            )
        given = one_cache(model_kwargs.pop("cache", None), model_kwargs.pop(OLD_NAME, None))
        if given is not None or generation_config.use_cache is not False:
            model_kwargs[CACHE] = RecurrentCache() if given is None else given

    def _validate_model_kwargs(self, model_kwargs: Table) -> None:
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        places, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        if places is not None and model_kwargs.get("cache") is None and model_kwargs.get(OLD_NAME) is None:
            check_positions(
                places, places.new_zeros(len(places)), (torch.ones_like(places) if mask is None else mask).bool()
            )

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: Table, *args: object, **kwargs: object
    ) -> Table:
        step = super()._update_model_kwargs_for_generation  # type: ignore[misc]
        found: Table = step(outputs, model_kwargs, *args, **kwargs)
        if found.get("use_cache") is False:
            found.pop(CACHE, None)  # it belonged to this step alone
        return found

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Table:
        # without: every row is decoded anew
        held = None if kwargs.get("use_cache") is False else one_cache(cache, past_key_values)
        rotary, seen = getattr(self.backbone, "by_length", None), 0 if held is None else held.get_seq_length()
        if held is not None and rotary is not None and 0 < seen < input_ids.shape[1]:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if rotary.crosses(real[:, :seen].sum(1), real.sum(1)):  # every key is made anew
                held.reset()
                kwargs["next_sequence_length"], seen = None, 0
        if "next_sequence_length" in kwargs:  # newer versions say how many tokens are new
            new = kwargs.pop("next_sequence_length") or input_ids.shape[1]
        else:
            # not more than the cache has seen: a chunk of a prompt
            new = input_ids.shape[1] - (seen if input_ids.shape[1] > seen else 0)
        inputs = {"input_ids": input_ids[:, -new:], "cache": held, "attention_mask": attention_mask, "use_cache": True}
        return {"logits_to_keep": 1} | {name: value for name, value in kwargs.items() if name not in COUNTED} | inputs

    def generate_batch(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(
            "continuous batching keeps keys and values in pages, which would drop the recurrent memory: "
            "use model.generate"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch
