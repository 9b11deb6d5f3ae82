"""The model without its head, for tools that put a loss of their own on its last hidden state (TRL does)."""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lrt.model import LatentRecurrentModel
from lrt.padding import packed_documents
from lrt.types import Schedule


class Trunk:
    """What ``base_model`` of a Hugging Face model is; not a module of its own, because every parameter has one name.

    Args:
        model: the whole.
    """

    _tp_plan = _pp_plan = None  # which transformers asks of every base model

    def __init__(self, model: LatentRecurrentModel) -> None:
        self._model = model

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        schedule: Schedule | None = None,
        document_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: object = None,
        max_length_k: object = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """Run a schedule over rows of tokens; see ``LRTForCausalLM.forward``.

        Where none is named it is ``train_schedule``, in evaluation mode too:
        a loss compares what it trains with a reference model, or with itself before a step,
        and both have to be computed alike.

        Args:
            input_ids, attention_mask, position_ids, schedule, document_ids: as in ``LatentRecurrentModel.forward``.
            seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k:
                packed rows, as in ``LRTForCausalLM.forward``.
            use_cache, return_dict: only as they are.

        Raises:
            ValueError: a cache, a tuple, or a head of more rows than the vocabulary, whose scores the caller would
                count in.
        """
        if use_cache or not return_dict:
            raise ValueError(
                "base_model computes whole rows and returns a ModelOutput: "
                "pass use_cache=False and leave return_dict out"
            )
        model = self._model
        rows = model.backbone.head.weight.shape[0]
        if rows != model.vocab_size:
            raise ValueError(
                f"the head has {rows} rows for a vocabulary of {model.vocab_size}, and a loss of the caller's "
                "own would score the rows between: build the model with model.vocab_size rounded up to a multiple of 64"
            )
        lengths = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        documents = packed_documents(input_ids, document_ids=document_ids, **lengths)
        rows_and_rules = (schedule or model.train_schedule, documents, attention_mask, position_ids)
        out = LatentRecurrentModel.forward(model, input_ids, None, None, *rows_and_rules, return_logits=False)
        return BaseModelOutput(last_hidden_state=out.last_hidden_state)  # type: ignore[arg-type]
