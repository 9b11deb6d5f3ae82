"""Answers of a model to held-out conversations, compared with the right ones, by memory mode and by number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.data.arithmetic import answer_of
from lrt.data.chat import Chat
from lrt.data.examples import Example
from lrt.data.tokenizer import Tokenizer
from lrt.decoding.generation import complete
from lrt.decoding.sampling import Sampling
from lrt.decoding.step import WithoutMemory
from lrt.eval.processes import Processes, Sharing
from lrt.model import LatentRecurrentModel

MODES = ("zero", "decode")
ROWS = 64  # that are answered at once


@dataclass(frozen=True)
class ExactMatch:
    """Answers in one memory mode.

    Attributes:
        right: whether each answer is the expected one.
        steps: of each problem; None where it says none.
        first: the first answer, whole.
    """

    right: tuple[bool, ...]
    steps: tuple[int | None, ...]
    first: str

    @property
    def value(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def by_steps(self) -> dict[int, float]:
        """Share of right answers by number of steps."""
        found: dict[int, list[bool]] = {}
        for steps, right in zip(self.steps, self.right):
            if steps is not None:
                found.setdefault(steps, []).append(right)
        return {steps: sum(right) / len(right) for steps, right in sorted(found.items())}

    def describe(self) -> str:
        """The score in words."""
        parts = ", ".join(
            f"{steps} {'step' if steps == 1 else 'steps'} {100 * share:.1f} %" for steps, share in self.by_steps.items()
        )
        return f"{100 * self.value:.1f} %" + (f" ({parts})" if parts else "")


@torch.no_grad()
def exact_match(
    model: LatentRecurrentModel,
    examples: Sequence[Example],
    chat: Chat,
    tokenizer: Tokenizer,
    *,
    modes: Sequence[str] = MODES,
    max_new_tokens: int = 96,
    processes: Sharing = Processes(),
    progress: Callable[[], None] = lambda: None,
) -> dict[str, ExactMatch]:
    """Let a model answer, greedily and by true recurrence, and compare.

    Args:
        model: in evaluation mode.
        examples: conversations, whose last message is the answer that is to be found.
        chat: makes prompts of them.
        tokenizer: of the model.
        modes: ``decode``, and ``zero``: the memory is never received.
        max_new_tokens: of an answer.
        processes: those that share the conversations, each with the whole model.
        progress: called after every batch.

    Returns:
        A score for each mode, the same in every process but for the first answer, which the first has; a model without
        recurrence is asked once, and has the same score in every mode.
    """
    plain = model.recurrence is None
    found: dict[str, ExactMatch] = {}
    for mode in modes[:1] if plain else modes:
        asked = WithoutMemory(model) if mode == "zero" and not plain else model
        own = range(processes.rank, len(examples), processes.size)
        texts: list[str] = []
        for begin in range(0, len(own), ROWS):
            batch = [examples[i] for i in own[begin : begin + ROWS]]
            texts += _answers(asked, batch, chat, tokenizer, max_new_tokens=max_new_tokens)
            progress()
        right = torch.zeros(len(examples))
        for i, text in zip(own, texts):
            right[i] = answer_of(text) == examples[i].answer.strip()
        shared = tuple(share > 0 for share in processes.total(right).tolist())
        found[mode] = ExactMatch(shared, tuple(one.steps for one in examples), texts[0] if texts else "")
    return dict.fromkeys(modes, found[modes[0]]) if plain else found


def _answers(
    model: LatentRecurrentModel | WithoutMemory,
    examples: Sequence[Example],
    chat: Chat,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
) -> list[str]:
    prompts = [chat.prompt(one.messages[:-1]) for one in examples]
    ids, mask = _padded(prompts, device=next(model.parameters()).device)
    done = complete(
        model, ids, mask, max_new_tokens=max_new_tokens, sampling=Sampling(temperature=0.0), stop_ids=chat.stop_ids,
        pad_id=chat.stop_ids[0], generator=torch.Generator(),  # a training run's own random numbers stay as they are
    )  # fmt: skip
    return [tokenizer.decode([token for token in new if token not in chat.stop_ids]) for new in done.tokens]


def _padded(prompts: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor with padding on the right, and what is real."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    return ids, torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
