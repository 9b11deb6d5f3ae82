"""A model of ours as lm-evaluation-harness wants it; the memory mode stands in the results file (see
``lrt.eval.harness``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lrt.conversion.opening import check_finite, open_model, open_tokenizer
from lrt.decoding.generation import complete
from lrt.decoding.sampling import Sampling
from lrt.decoding.session import stop_at
from lrt.decoding.step import WithoutMemory
from lrt.eval.choices import ChoiceScorer
from lrt.eval.folders import row_length_of
from lrt.eval.processes import own_device
from lrt.tables import Table

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

try:
    import lm_eval.models  # noqa: F401 - before our own registration, which would otherwise hide every other model
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f'lm-evaluation-harness is missing or too old ({error}): pip install -e ".[eval]" in a checkout'
    ) from None

NEW_TOKENS = 256


@register_model("lrt")
class LatentRecurrentLM(TemplateLM):
    """A model of ours for lm-evaluation-harness.

    Args:
        pretrained: a folder with a model of any kind, or a training run.
        memory: decode, zero or parallel; it stands in the results file.
        base: the decoder of a folder that holds the memory alone.
        tokenizer: "bytes", a tokenizer.json or its folder; None = the model's own.
        dtype: bfloat16 on CUDA and float32 elsewhere, unless given.
        device: None = this process's GPU, else the CPU.
        batch_size: rows that run at once.
        max_length: tokens that the model reads at most; None = as it was made.
        add_bos_token: whether contexts begin with the separator; None = for native models, whose training rows do.
        max_batch_size: of lm-evaluation-harness; without effect.

    Raises:
        ValueError: no such model, a mode that it lacks, or weights that are not numbers.
    """

    backend = "causal"

    def __init__(
        self, pretrained: str, memory: str = "decode", base: str | None = None, tokenizer: str | None = None,
        dtype: str | None = None, device: str | None = None, batch_size: int | str = 16, max_length: int | None = None,
        add_bos_token: bool | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = own_device(None if device in (None, "cuda") else str(device))
        default = torch.bfloat16 if place.type == "cuda" else torch.float32
        opened = open_model(pretrained, base=base, dtype=getattr(torch, dtype) if dtype else default, device=place)
        check_finite(opened.model, where=opened.folder)
        self._opened, self._memory = opened, memory
        self._tokenizer = open_tokenizer(opened, name=tokenizer, base=base)
        self._max_length = max_length or row_length_of(opened.model)
        rows = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self._score = ChoiceScorer(opened.model, memory=memory, max_length=self._max_length, rows=rows)
        self._bos = opened.model.original is None if add_bos_token is None else add_bos_token

    # -------------------------------------------------------------- what the harness asks

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.bos_id if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._opened.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return self._tokenizer.encode(string)

    def get_model_info(self) -> Table:
        """What stands in the results file."""
        model = self._opened.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(next(model.parameters()).dtype),
            "memory_mode": self._memory if model.recurrence is not None else "none",
            "model_folder": str(self._opened.folder),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[Instance], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        scored = self._score([(self._begun(context), continuation) for _, context, continuation in requests])
        answers = [(sum(one.logprobs), one.greedy) for one in scored]
        for (key, _, _), answer in zip(requests, answers):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        borders = [0]
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self._max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            borders.append(len(windows))
        scored = self._score([(context, continuation) for _, context, continuation in windows])
        return [sum(sum(one.logprobs) for one in scored[a:b]) for a, b in zip(borders, borders[1:])]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        if self._memory == "parallel":
            raise ValueError(
                "memory = 'parallel' scores text that is there already: generate with memory=decode or memory=zero"
            )
        return [self._continued(*request.args) for request in requests]

    # -------------------------------------------------------------- parts

    def _begun(self, context: Sequence[int]) -> Sequence[int]:
        """The context behind the separator, where the model was trained so."""
        return [self._tokenizer.bos_id, *context] if self._bos and context[:1] != [self._tokenizer.bos_id] else context

    def _continued(self, context: str, settings: Table) -> str:
        wanted = settings.get("until") or []
        stops = [stop for stop in ([wanted] if isinstance(wanted, str) else wanted) if stop]
        count = int(settings.get("max_gen_toks", NEW_TOKENS))
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        prompt = self._begun(self.tok_encode(context) or [self.prefix_token_id])[-max(1, self._max_length - count) :]
        model = self._opened.model
        found = complete(
            WithoutMemory(model) if self._memory == "zero" else model,
            torch.tensor([prompt], device=next(model.parameters()).device), max_new_tokens=count,
            sampling=Sampling(temperature=temperature), stop_ids=(self.eot_token_id,),
            stop_when=stop_at(self._tokenizer.decode, stops) if stops else None,
        )  # fmt: skip
        text = self._tokenizer.decode(found.tokens[0])
        for stop in stops:
            text = text.split(stop)[0]
        return text
