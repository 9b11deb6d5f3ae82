"""The Hugging Face face of a model: PreTrainedModel, ``generate`` with true recurrence, Auto classes.

Imported only where transformers is. Legend: B batch, T row length, P new tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)  # fmt: skip
from transformers.cache_utils import Cache

from lrt import serialization
from lrt.arguments import as_ids
from lrt.config import RecurrenceConfig
from lrt.huggingface.cache import RecurrentCache
from lrt.huggingface.cached_call import decode_columns
from lrt.huggingface.config import LRTConfig, attributes, refuse_changed
from lrt.huggingface.generation import Generation
from lrt.huggingface.loading import UPLOAD, open_pretrained, refuse_unsaved
from lrt.huggingface.output import LRTModelOutput, LRTOutput, face_of, one_cache
from lrt.huggingface.parts import Parts
from lrt.huggingface.trunk import Trunk
from lrt.model import LatentRecurrentModel
from lrt.padding import packed_documents
from lrt.serialization.adapted import is_foreign, pretrained
from lrt.serialization.decoders import ATTENTIONS
from lrt.serialization.renewal import renewed_folder
from lrt.tables import Table
from lrt.types import Backbone, Block, Schedule

NO_CLASSIFIER = (
    "an lrt model has a language head alone: put a classifier on last_hidden_state of "
    "AutoModel.from_pretrained, or lrt.release(model) and load the decoder's own weights with its classifier"
)


class LRTForCausalLM(Parts, Generation, LatentRecurrentModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A LatentRecurrentModel with the habits of Hugging Face.

    Args:
        config: of a saved folder; the model is built from it with fresh weights.
    """

    config_class = LRTConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # transformers.Trainer then passes num_items_in_batch
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentBlock", "AlignedBlock"]
    _keep_in_fp32_modules: set[str] = set()  # tools count them
    _keep_in_fp32_modules_strict: set[str] = set()
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: LRTConfig) -> None:
        refuse_changed(config, attributes(config.to_dict()))
        built = serialization.model_from_config(config.to_dict())
        stored = getattr(config, "adapted", {}).get("attention")
        backend = config._attn_implementation or (stored if stored in ATTENTIONS else None)  # flash may be missing here
        PreTrainedModel.__init__(self, config)
        self._take(built)
        if backend is not None:
            self.set_attn_implementation(backend)
        self.init_memory() if built.original is not None else LatentRecurrentModel.init_weights(self)
        if getattr(config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    @classmethod
    def around(
        cls,
        decoder: PreTrainedModel,
        backbone: Backbone,
        blocks: Sequence[Block],
        recurrence: RecurrenceConfig,
        *,
        train_schedule: Schedule | None,
    ) -> LRTForCausalLM:
        """The model that adapts ``decoder``, memory parameters not initialized."""
        return cls._bare(LatentRecurrentModel(backbone, blocks, recurrence, train_schedule=train_schedule), decoder)

    @classmethod
    def of(cls, model: LatentRecurrentModel) -> LRTForCausalLM:
        """The same model, its parameters shared, with this face."""
        return model if isinstance(model, cls) else cls._bare(model, None)

    @classmethod
    def _bare(cls, built: LatentRecurrentModel, decoder: PreTrainedModel | None) -> LRTForCausalLM:
        model = cls.__new__(cls)
        config = LRTConfig(**serialization.config_of(built, decoder))
        PreTrainedModel.__init__(model, config)
        model._take(built)
        if decoder is not None or is_foreign(model):
            inside = pretrained(model) if decoder is None else decoder
            config._attn_implementation = inside.config._attn_implementation
        if decoder is not None and getattr(decoder, "generation_config", None) is not None:
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

    def get_decoder(self) -> Trunk:
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
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        valid_targets: Tensor | None = None,
        generator: torch.Generator | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Tensor | int | None = None,
        max_length_k: Tensor | int | None = None,
        **renamed: Tensor | None,
    ) -> LRTOutput | tuple[object, ...]:
        """As ``LatentRecurrentModel.forward``, with the arguments that transformers adds.

        Args:
            cache: a RecurrentCache; the new tokens are then decoded one after the other, exactly.
            past_key_values: the name of ``cache`` before transformers 5.24.
            use_cache: start such a cache (``generate`` does).
            num_items_in_batch: valid targets that normalise the loss (Trainer passes it), as ``valid_targets``.
            logits_to_keep: logits of so many last columns, or of the columns that a tensor names; 0 = all.
            return_dict: False returns a tuple; None = as the config says, which holds for the next two as well.
            output_hidden_states: also return the input of every block and the normalized output of the last one.
            output_attentions: also return the attention weights of decoding, in evaluation mode;
                the call then uses a cache.
            inputs_embeds, token_type_ids: refused.
            cache_position: ignored; the cache counts for itself.
            seq_idx, cu_seq_lens_q, cu_seq_lens_k: documents of packed rows, as DataCollatorWithFlattening gives them
                beside
                position_ids: number of the document of each token, and where documents begin and end.
            max_length_q, max_length_k: ignored; the longest document follows from the others.
            renamed: ``shift_labels``, the name of ``targets`` in transformers, which takes them in place of ``labels``.
                It is no argument with a name, because Trainer would ask for it in every row:
                it reads off the signature what labels are.

        Raises:
            ValueError: as ``LatentRecurrentModel.forward``; a cache that would drop the memory.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(
                "pass input_ids: value embeddings and separators are found by token id, "
                "so inputs_embeds is not supported"
            )
        if token_type_ids is not None:
            raise ValueError(
                "token_type_ids have no meaning for this decoder: leave them out (return_token_type_ids=False "
                "at the tokenizer)"
            )
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        asked: Table = {"logits_to_keep": logits_to_keep, "output_hidden_states": bool(output_hidden_states)}
        lengths = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        document_ids = packed_documents(input_ids, document_ids=document_ids, **lengths)
        held = one_cache(cache, past_key_values)
        shift_labels = renamed.pop("shift_labels", None)
        if renamed:
            raise TypeError(f"LRTForCausalLM.forward() got an unexpected keyword argument {next(iter(renamed))!r}")
        targets, labels = (targets, labels) if shift_labels is None else (shift_labels, None)
        scored = labels is not None or targets is not None
        if held is None and not output_attentions and not (use_cache and not self.training and not scored):
            if num_items_in_batch is not None:
                valid_targets = torch.as_tensor(num_items_in_batch, device=self.device)
                return_logits = True if return_logits is None and not self.training else return_logits
            more: Table = {"valid_targets": valid_targets, "generator": generator, **asked}
            out = LatentRecurrentModel.forward(
                self,
                input_ids,
                targets,
                labels,
                schedule,
                document_ids,
                attention_mask,
                position_ids,
                return_logits,
                **more,
            )
            result = face_of(out)
        elif scored or schedule is not None or document_ids is not None or output_attentions and self.training:
            raise ValueError(
                "with a cache, and where attention weights are asked for, tokens are decoded one after the other: "
                "evaluation mode only, and labels, targets, schedule and document_ids do not apply, "
                "nor do seq_idx and cu_seq_lens_q; pass use_cache=False"
            )
        else:
            held = RecurrentCache() if held is None else held
            rows = (as_ids(input_ids), attention_mask, position_ids)
            result = decode_columns(self, *rows, held, attentions=bool(output_attentions), **asked)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    # -------------------------------------------------------------- folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Read a folder that ``save_pretrained`` or ``lrt.save`` wrote, or such a repository of the hub.

        Args:
            pretrained_model_name_or_path: folder, or name of a repository;
                None with ``config`` and ``state_dict``, from which it is built.
            config: as ``AutoConfig`` read it; its settings of calls (``use_cache``, ``output_hidden_states``, ...)
                are kept.
            kwargs: dtype (or torch_dtype), device_map with one device or "auto", max_memory, attn_implementation,
                subfolder, generation_config, output_loading_info, and of the hub revision, token, cache_dir,
                local_files_only, force_download.

        Returns:
            The model; with ``output_loading_info`` also what was missing and unexpected, which is nothing:
            a folder fits or is refused.

        Raises:
            ValueError: another argument, several devices, no such dtype, or a folder that is not whole.
        """
        return open_pretrained(cls.of, pretrained_model_name_or_path, args, config=config, more=kwargs)

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:  # type: ignore[override]
        """Write the model as a folder for ``lrt.load`` and ``from_pretrained``, in place of a model that lies there;
        other files stay.

        Args:
            save_directory: the folder.
            state_dict: tensors gathered elsewhere; None = this model's.
            push_to_hub: upload it too, as ``PreTrainedModel.save_pretrained`` does.
            kwargs: ``max_shard_size``, bytes of the largest file or text such as "5GB"; what ``push_to_hub`` takes.

        Raises:
            ValueError: another argument.
        """
        refuse_unsaved(kwargs, args)
        if kwargs.get("is_main_process", True) is False:
            return
        with renewed_folder(save_directory) as place:
            serialization.write_model(self, place, tensors=state_dict, shard_size=kwargs.pop("max_shard_size", None))
        if push_to_hub:
            name = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(name, **{k: v for k, v in kwargs.items() if k in UPLOAD})

    # -------------------------------------------------------------- what does not apply

    def init_weights(self, *, generator: torch.Generator | None = None) -> None:
        """Initialize the memory parameters, and the backbone too where it is native."""
        self.init_memory(generator=generator) if not hasattr(self.backbone, "init_weights") else super().init_weights(
            generator=generator
        )


class LRTModel(LRTForCausalLM):
    """The same model without its head: what ``AutoModel`` makes of a folder."""

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``LRTForCausalLM.forward``; the last hidden state in place of loss and logits."""
        kwargs = {"return_logits": False, "logits_to_keep": 1} | kwargs
        out: Any = super().forward(input_ids, return_dict=True, output_hidden_states=True, **kwargs)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        every = out.hidden_states
        found = LRTModelOutput(every[-1], out.memory, out.cache, every if wanted else None, out.attentions)
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()


class WithoutHead(LRTModel):
    """What the Auto classes of classifiers find, so that they say what there is."""

    def __init__(self, config: LRTConfig) -> None:
        raise ValueError(NO_CLASSIFIER)

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> NoReturn:
        """Raises ValueError, always."""
        raise ValueError(NO_CLASSIFIER)


AutoConfig.register("lrt", LRTConfig, exist_ok=True)
AutoModelForCausalLM.register(LRTConfig, LRTForCausalLM, exist_ok=True)
AutoModel.register(LRTConfig, LRTModel, exist_ok=True)
for kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
    kind.register(LRTConfig, WithoutHead, exist_ok=True)
