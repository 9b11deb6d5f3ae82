"""The Hugging Face face of a model: PreTrainedModel, ``generate`` with true recurrence, Auto classes.

Imported only where transformers is. Legend: B batch, T row length, P new tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from lrt import serialization
from lrt.config import RecurrenceConfig
from lrt.decoding.lengths import lengthen
from lrt.decoding.step import absorb
from lrt.huggingface.cache import RecurrentCache
from lrt.huggingface.trunk import Trunk
from lrt.model import LatentRecurrentModel
from lrt.padding import alignment, packed_documents
from lrt.serialization.adapted import decoder_of
from lrt.serialization.renewal import renewed_folder
from lrt.types import Output, Schedule

OLD_NAME = "past_key_values"  # of the cache, before transformers 5.24 called it "cache"; both names work with every version
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else OLD_NAME  # the name that this version's generate uses


class LRTConfig(PretrainedConfig):
    """config.json of a saved model, as transformers holds it."""

    model_type = "lrt"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "memory", "groups"]


@dataclass
class LRTOutput(ModelOutput):
    """``lrt.Output`` as a ModelOutput.

    Attributes:
        loss: scalar, or None without targets.
        logits: (B, T, V); None unless asked for.
        memory: (B, T, D) m[t], or (B, 1, D) of the last token when a cache is used.
        groups: detached loss of each group, initialization first; None without targets.
        cache: the RecurrentCache, when one is used; ``past_key_values``, its name before transformers 5.24, reads it too.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: Tensor | None = None
    groups: tuple[Tensor, ...] | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_field(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_field(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_field(key), default)


def _field(key: Any) -> Any:
    return "cache" if key == OLD_NAME else key


class LRTForCausalLM(LatentRecurrentModel, PreTrainedModel, GenerationMixin):
    """A LatentRecurrentModel with the habits of Hugging Face.

    Args:
        config: of a saved folder; the model is built from it with fresh weights.
    """

    config_class = LRTConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # transformers.Trainer then passes num_items_in_batch
    supports_gradient_checkpointing = False
    _no_split_modules = ["RecurrentBlock"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: LRTConfig) -> None:
        built = serialization.model_from_config(config.to_dict())
        PreTrainedModel.__init__(self, config)
        self._take(built)
        self.init_memory() if built.original is not None else LatentRecurrentModel.init_weights(self)

    @classmethod
    def around(
        cls, decoder: Any, backbone: Any, blocks: Sequence[Any], recurrence: RecurrenceConfig, *, train_schedule: Schedule | None
    ) -> LRTForCausalLM:
        """The model that adapts ``decoder``, memory parameters not initialized."""
        return cls._bare(LatentRecurrentModel(backbone, blocks, recurrence, train_schedule=train_schedule), decoder)

    @classmethod
    def of(cls, model: LatentRecurrentModel) -> LRTForCausalLM:
        """The same model, its parameters shared, with this face."""
        return model if isinstance(model, cls) else cls._bare(model, None)

    @classmethod
    def _bare(cls, built: LatentRecurrentModel, decoder: Any) -> LRTForCausalLM:
        model = cls.__new__(cls)
        config = LRTConfig(**serialization.config_of(built, decoder))
        PreTrainedModel.__init__(model, config)
        model._take(built)
        if getattr(decoder, "generation_config", None) is not None:
            model.generation_config = copy.deepcopy(decoder.generation_config)
            model.generation_config.cache_implementation = None
            model.generation_config.use_cache = True
        model.training = built.training
        return model

    def _take(self, built: LatentRecurrentModel) -> None:
        self._assemble(built.backbone, [], None, built.train_schedule)
        for name in ("recurrence", "source", "receivers", "blocks", "memory_projection", "injection", "original"):
            setattr(self, name, getattr(built, name))

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return Trunk(self)

    def get_decoder(self) -> Any:
        return self.base_model

    # -------------------------------------------------------------- the call

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        schedule: Schedule | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_logits: bool | None = None,
        *,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        valid_targets: Tensor | None = None,
        generator: torch.Generator | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Tensor | int | None = None,
        max_length_k: Tensor | int | None = None,
    ) -> LRTOutput | tuple[Any, ...]:
        """As ``LatentRecurrentModel.forward``, with the arguments that transformers adds.

        Args:
            cache: a RecurrentCache; the new tokens are then decoded one after the other, exactly.
            past_key_values: the name of ``cache`` before transformers 5.24.
            use_cache: start such a cache (``generate`` does).
            num_items_in_batch: valid targets that normalise the loss (Trainer passes it), as ``valid_targets``.
            logits_to_keep: with a cache: logits of so many last tokens; 0 = all new ones.
            return_dict: False returns a tuple.
            inputs_embeds, output_attentions, output_hidden_states: refused.
            cache_position: ignored; the cache counts for itself.
            seq_idx, cu_seq_lens_q, cu_seq_lens_k: documents of packed rows, as DataCollatorWithFlattening gives them beside
                position_ids: number of the document of each token, and where documents begin and end.
            max_length_q, max_length_k: ignored; the longest document follows from the others.

        Raises:
            ValueError: as ``LatentRecurrentModel.forward``; a cache that would drop the memory.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("pass input_ids: value embeddings and separators are found by token id, so inputs_embeds is not supported")
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not supported: out.memory is the state of the source block")
        cache = _one_cache(cache, past_key_values)
        lengths = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        document_ids = packed_documents(input_ids, document_ids=document_ids, **lengths)
        if cache is None and not (use_cache and not self.training and labels is None and targets is None):
            if num_items_in_batch is not None:
                valid_targets = torch.as_tensor(num_items_in_batch, device=self.device)
                return_logits = True if return_logits is None and not self.training else return_logits
            more: dict[str, Any] = {"valid_targets": valid_targets, "generator": generator}
            out = LatentRecurrentModel.forward(
                self, input_ids, targets, labels, schedule, document_ids, attention_mask, position_ids, return_logits, **more
            )
            result = face_of(out)
        else:
            if labels is not None or targets is not None or schedule is not None or document_ids is not None:
                raise ValueError(
                    "with a cache tokens are decoded one after the other: labels, targets, schedule and document_ids do not apply, nor do seq_idx "
                    "and cu_seq_lens_q; pass use_cache=False"
                )
            if position_ids is not None and attention_mask is None and bool((position_ids[..., 1:] != position_ids[..., :-1] + 1).any()):
                raise ValueError("with a cache a row is one document, but position_ids restart: pass use_cache=False for packed rows")
            result = self._decode(input_ids, attention_mask, RecurrentCache() if cache is None else cache, logits_to_keep)
        return result.to_tuple() if return_dict is False else result

    @torch.no_grad()
    def _decode(self, input_ids: Tensor, attention_mask: Tensor | None, cache: RecurrentCache, keep: int) -> LRTOutput:
        """Consume tokens one after the other; padding on either side is skipped row by row."""
        batch, new = input_ids.shape
        state = cache.room(self, batch, new)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -new:]
        if real.ndim != 2:
            raise ValueError(f"attention_mask has {real.ndim} dimensions: with a cache pass the (batch, tokens) mask of padding")
        lengthen(self, state, state.lengths + real.sum(1))
        forth, inside, back = alignment(real)
        tokens = input_ids.gather(1, forth)
        hidden = torch.stack([absorb(self, state, tokens[:, t], inside[:, t]) for t in range(new)], dim=1)
        # Columns of padding repeat the row's last token, so that logits[:, -1] are the next token's on either side.
        last = inside.to(torch.int64).cumsum(1).argmax(1, keepdim=True)
        hidden = hidden.gather(1, torch.minimum(back.expand(batch, -1), last)[..., None].expand_as(hidden))
        memory = None if state.memory is None else state.memory[:, None].clone()
        return LRTOutput(logits=self.backbone.logits(hidden[:, -keep:] if keep else hidden), memory=memory, cache=cache)

    # -------------------------------------------------------------- generate

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        wanted = generation_config.cache_implementation
        if wanted is not None:
            raise ValueError(f"cache_implementation = {wanted!r} would drop the recurrent memory: leave it out, lrt brings its own cache")
        if generation_config.use_cache is False:
            raise ValueError("use_cache=False would decode without memory: leave it out, the memory is part of the cache")
        given = _one_cache(model_kwargs.pop("cache", None), model_kwargs.pop(OLD_NAME, None))
        model_kwargs[CACHE] = RecurrentCache() if given is None else given

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, cache: Any = None, past_key_values: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        held = _one_cache(cache, past_key_values)
        seen = 0 if held is None else held.get_seq_length()
        rotary = getattr(self.backbone, "by_length", None)
        if held is not None and seen and rotary is not None:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if rotary.crosses(real[:, :seen].sum(1), real.sum(1)):  # every key is made anew
                held.reset()
                seen = 0
        inputs = {"input_ids": input_ids[:, seen:], "cache": held, "attention_mask": attention_mask, "use_cache": True}
        return inputs | {"logits_to_keep": kwargs.get("logits_to_keep", 1)}

    # -------------------------------------------------------------- folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> LRTForCausalLM:  # type: ignore[override]
        """Read a folder that ``save_pretrained`` or ``lrt.save`` wrote, or such a repository of the hub.

        Args:
            pretrained_model_name_or_path: folder, or name of a repository.
            kwargs: dtype (or torch_dtype), device_map with one device, attn_implementation, revision, token, cache_dir, local_files_only.

        Raises:
            ValueError: another argument, several devices, or a folder that is not whole.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        device_map = kwargs.pop("device_map", None)
        backend = kwargs.pop("attn_implementation", None)
        hub = {k: v for k in ("revision", "token", "cache_dir", "local_files_only") if (v := kwargs.pop(k, None)) is not None}
        hub.pop("token", None) if hub.get("token") is False else None
        harmless = {"trust_remote_code", "_from_auto", "adapter_kwargs", "code_revision", "low_cpu_mem_usage", "use_safetensors"}
        harmless.add("output_loading_info")
        unknown = [k for k, v in kwargs.items() if k not in harmless and v is not None]
        if unknown or args:
            raise ValueError(
                f"from_pretrained of an lrt model takes no {', '.join(unknown) or 'positional arguments'}: lrt.load, then change the model"
            )
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        if isinstance(device_map, dict) and set(device_map) != {""} or device in ("auto", "balanced", "sequential"):
            raise ValueError(
                f"device_map = {device_map!r}: give one device; for several, load the decoder with it and lrt.load(folder, base=decoder)"
            )
        folder = Path(str(pretrained_model_name_or_path))
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_model_name_or_path), **hub))
        chosen = {"auto": None}.get(dtype, getattr(torch, dtype, None)) if isinstance(dtype, str) else dtype
        model = cls.of(serialization.load(folder, dtype=chosen, device=device))
        if backend is not None:
            model.set_attn_implementation(backend)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return model

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, push_to_hub: bool = False, **kwargs: Any
    ) -> None:  # type: ignore[override]
        """Write the model as a folder for ``lrt.load`` and ``from_pretrained``, in place of a model that lies there; other files stay.

        Args:
            save_directory: the folder.
            state_dict: tensors gathered elsewhere; None = this model's.
            push_to_hub: upload it too, as ``PreTrainedModel.save_pretrained`` does.
        """
        if kwargs.get("is_main_process", True) is False:
            return
        with renewed_folder(save_directory) as place:
            serialization.write_model(self, place, tensors=state_dict)
        if push_to_hub:
            accepted = ("repo_id", "private", "token", "commit_message", "revision", "create_pr")
            name = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(name, **{k: v for k, v in kwargs.items() if k in accepted})

    # -------------------------------------------------------------- what does not apply

    def init_weights(self, *, generator: torch.Generator | None = None) -> None:
        """Initialize the memory parameters, and the backbone too where it is native."""
        self.init_memory(generator=generator) if not hasattr(self.backbone, "init_weights") else super().init_weights(generator=generator)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the attention backend of passes over all positions; see PreTrainedModel."""
        if self.original is None:
            raise ValueError("this native model chooses its attention itself: attn_implementation applies to adapted decoders")
        decoder_of(self).set_attn_implementation(attn_implementation, *args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "gradient checkpointing of transformers drops the cache inside a block and knows nothing of the memory: leave gradient_checkpointing "
            'off and checkpoint the blocks (docs/adapt.md; in a recipe parallel.activation_checkpointing = "block")'
        )

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name since transformers 5

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("resize the decoder's embeddings before lrt.adapt: lrt.release(model), resize, and adapt again")

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.head


def _one_cache(cache: Any, past_key_values: Any) -> RecurrentCache | None:
    """The cache that came under one of its two names."""
    given = past_key_values if cache is None else cache
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two caches: pass one of them, past_key_values is the old name of cache")
    if given is not None and not isinstance(given, RecurrentCache):
        name = OLD_NAME if cache is None else "cache"
        raise ValueError(
            f"{name} is a {type(given).__name__}, which would drop the recurrent memory: leave it out, or pass "
            f"lrt.huggingface.RecurrentCache()"
        )
    return given


def face_of(out: Output) -> LRTOutput:
    return LRTOutput(loss=out.loss, logits=out.logits, memory=out.memory, groups=out.groups or None)


AutoConfig.register("lrt", LRTConfig, exist_ok=True)
AutoModelForCausalLM.register(LRTConfig, LRTForCausalLM, exist_ok=True)
