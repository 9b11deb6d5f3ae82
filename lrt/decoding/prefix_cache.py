"""States of prompts seen before, keyed by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lrt.decoding.prefill import Exact, Prefill
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes, fingerprint


class PrefixCache:
    """Rows' states by the tokens they consumed; the least recently used go first.

    A state that is not exact for certain is found only by the prefill method that made it, never where
    ``exact`` was asked for.

    Args:
        max_bytes: of keys, values and memories held.
    """

    def __init__(self, *, max_bytes: int = 2**30) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes = {max_bytes}: use 1 or more")
        self.max_bytes = max_bytes
        self._states: OrderedDict[tuple[tuple[int, ...], str], DecodeState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._states.values())

    def put(self, tokens: Sequence[int], state: DecodeState, *, method: Prefill) -> None:
        """Keep a copy of a state of one row that has consumed ``tokens``.

        Raises:
            ValueError: more than one row, or another number of tokens.
        """
        if state.batch != 1 or int(state.lengths[0]) != len(tokens):
            lengths = state.lengths.tolist()
            raise ValueError(
                f"a state of {state.batch} rows and lengths {lengths} for {len(tokens)} tokens: "
                "give one row that consumed them"
            )
        label = "exact" if bool(state.exact[0]) else repr(method)
        key = (tuple(tokens), label)
        self._states[key] = state.shrink(max(1, len(tokens)))
        self._states.move_to_end(key)
        while self.nbytes > self.max_bytes and len(self._states) > 1:
            self._states.popitem(last=False)

    def find(
        self, tokens: Sequence[int], *, model: Decodes, method: Prefill, keep_at: Sequence[int] = ()
    ) -> DecodeState | None:
        """The state of the longest known beginning of ``tokens``, or None; do not write in it.

        Args:
            tokens: a prompt.
            model: states of other models are not found.
            method: what the caller would prefill with; with ``exact`` only exact states are found.
            keep_at: lengths at which the state must keep its memory.
        """
        prompt, mine = tuple(tokens), fingerprint(model)
        labels = {"exact"} if isinstance(method, Exact) else {"exact", repr(method)}
        best = None
        for key, state in self._states.items():
            known, label = key
            fits = label in labels and state.fingerprint == mine and state.kept_at == tuple(keep_at)
            if fits and len(known) > (len(best[0]) if best else 0) and prompt[: len(known)] == known:
                best = key
        if best is None:
            return None
        self._states.move_to_end(best)
        return self._states[best]
