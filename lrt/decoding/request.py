"""What is asked of rows that decode: how many tokens, how they are chosen, where a row ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from lrt.decoding.sampling import Sampling, check_stops

# New token ids of one row -> how many of them to keep when it must stop, None when it goes on.
StopWhen = Callable[[Sequence[int]], "int | None"]


class Asked(TypedDict, total=False):
    """The fields of a Request as keywords."""

    max_new_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    stop_when: StopWhen | None
    pad_id: int
    every: int


@dataclass(frozen=True)
class Request:
    """What is asked of rows.

    Attributes:
        max_new_tokens: of every row.
        sampling: how tokens are chosen.
        stop_ids: a row ends after one of these.
        stop_when: looks at a row's new tokens on the host, once in ``every`` steps.
        pad_id: what ended rows are fed.
        every: steps between two looks of the host.
    """

    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = ()
    stop_when: StopWhen | None = None
    pad_id: int = 0
    every: int = 8

    def check(self, vocabulary: int) -> tuple[int, ...]:
        """The stop ids of a model with so many tokens.

        Raises:
            ValueError: a number is out of range, or a setting does not fit the vocabulary.
        """
        count = self.max_new_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"max_new_tokens = {count!r}: use a whole number of 0 or more")
        self.sampling.check(vocabulary)
        stops = tuple(check_stops(self.stop_ids, self.pad_id, vocabulary))
        if self.every < 1:
            raise ValueError(f"every = {self.every}: the host looks at the rows every 1 or more steps")
        return stops
