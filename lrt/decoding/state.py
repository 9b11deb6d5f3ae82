"""DecodeState: everything that decoding remembers of its rows, as a value.

Row b has consumed ``lengths[b]`` tokens. Position p of a row lies in slot p mod N of a block's cache, so
a sliding window is a ring of window + 1 slots and a full cache is a ring that never wraps. One slot more
than the capacity is kept: a row that waits may write there, and nobody reads it.

Legend: B batch, N slots, L blocks, G key/value heads, K head width, D model width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrt.decoding.which_model import Decodes, check_fingerprint, fingerprint, probe
from lrt.types import KV

FORMAT = 1
NEVER = 2**62  # approximate_from of a row whose every position is exact


@dataclass(frozen=True)
class DecodeState:
    """Keys and values, memory and lengths of a batch of rows.

    The tensors are static and decoding writes them in place; ``fork`` first to keep a state as it is.

    Attributes:
        keys, values: one per block, (B, N, G, K).
        windows: of each block; None = it sees everything.
        memory: (B, D) m of the last token consumed; zero before the first. None without recurrence.
        lengths: (B,) int64 tokens consumed.
        document_starts: (B,) int64 first position that attention may see.
        approximate_from: (B,) int64 first position that is not exact for certain.
        kept_at: lengths at which the memory is kept, so that ``truncate`` can go back there.
        kept: (B, len(kept_at), D), or None.
        capacity: tokens that a row can hold.
        reach: (B,) int64 tokens by which RoPE that depends on the length of a row rotates its keys;
            None where it does not.
        fingerprint: of the model, see ``fingerprint``.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    windows: tuple[int | None, ...]
    memory: Tensor | None
    lengths: Tensor
    document_starts: Tensor
    approximate_from: Tensor
    kept_at: tuple[int, ...]
    kept: Tensor | None
    capacity: int
    fingerprint: str
    reach: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def empty(cls, model: Decodes, *, batch: int, capacity: int, keep_at: Sequence[int] = ()) -> DecodeState:
        """A state of rows that have consumed nothing.

        Args:
            model: the model that will decode; one position is run to learn the shape of its keys.
            batch: rows.
            capacity: tokens a row can hold, prompt and continuation together; RoPE that depends on the length of a row
                (longrope) takes it as the length, until ``generate`` says a nearer one.
            keep_at: lengths at which the memory is kept for ``truncate``.

        Raises:
            ValueError: batch or capacity below 1, or a length outside 1..capacity.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(f"a state of {batch} rows and {capacity} tokens: use 1 or more of both")
        kept_at = tuple(sorted(set(keep_at)))
        if any(not 1 <= n <= capacity for n in kept_at):
            raise ValueError(f"keep_at = {list(kept_at)}: use lengths 1..{capacity}, the capacity of this state")
        device = next(model.parameters()).device
        one = probe(model)
        windows = tuple(block.window for block in model.blocks)

        def blank(like: Tensor, window: int | None) -> Tensor:
            slots = capacity + 1 if window is None else min(window + 1, capacity + 1)
            return like.new_zeros(batch, slots, *like.shape[2:])

        memory = None if one.memory is None else one.memory.new_zeros(batch, one.memory.shape[-1])
        return cls(
            keys=tuple(blank(kv.key, w) for kv, w in zip(one.kv, windows)),
            values=tuple(blank(kv.value, w) for kv, w in zip(one.kv, windows)),
            windows=windows,
            memory=memory,
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            document_starts=torch.zeros(batch, dtype=torch.int64, device=device),
            approximate_from=torch.full((batch,), NEVER, dtype=torch.int64, device=device),
            kept_at=kept_at,
            kept=None if memory is None or not kept_at else memory.new_zeros(batch, len(kept_at), memory.shape[-1]),
            capacity=capacity,
            fingerprint=fingerprint(model),
            reach=None
            if getattr(model.backbone, "by_length", None) is None
            else torch.full((batch,), capacity, dtype=torch.int64, device=device),
        )

    # -------------------------------------------------------------- what it says

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def exact(self) -> Tensor:
        """(B,) bool: every consumed position is exact for certain."""
        return self.approximate_from >= self.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and memory."""
        return sum(
            x.nbytes for x in (*self.keys, *self.values, *(m for m in (self.memory, self.kept) if m is not None))
        )

    def check_model(self, model: Decodes) -> None:
        """Raises ValueError when this state was made by another model (or the same one before an update)."""
        check_fingerprint(self.fingerprint, model)

    def check_room(self, tokens: int) -> None:
        """Raises ValueError when a row cannot take ``tokens`` more; one host sync."""
        longest = int(self.lengths.max())
        if longest + tokens > self.capacity:
            raise ValueError(
                f"{longest} tokens consumed and {tokens} more do not fit a state of capacity {self.capacity}: "
                f"make it with capacity = {longest + tokens} or more, or shorten the prompt"
            )

    # -------------------------------------------------------------- values from values

    def fork(self, n: int = 1) -> DecodeState:
        """A copy in which every row stands ``n`` times, in a row."""
        if n < 1:
            raise ValueError(f"fork({n}): use 1 or more")
        return self.select(torch.arange(self.batch, device=self.lengths.device).repeat_interleave(n))

    def select(self, rows: Sequence[int] | Tensor) -> DecodeState:
        """A copy of some rows, in the order given.

        Raises:
            ValueError: no rows, or a row that does not exist.
        """
        index = torch.as_tensor(rows, device=self.lengths.device)
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        index = index.to(torch.int64)
        if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= self.batch:
            raise ValueError(f"select({index.tolist()}): this state has rows 0..{self.batch - 1}")
        return self._map(lambda x: x.index_select(0, index.to(x.device)))

    def shrink(self, capacity: int) -> DecodeState:
        """A copy with room for ``capacity`` tokens only.

        Raises:
            ValueError: a row has consumed more.
        """
        if capacity < max(1, int(self.lengths.max())):
            raise ValueError(
                f"shrink({capacity}): a row has consumed {int(self.lengths.max())} tokens; use that or more"
            )

        def fit(x: Tensor, window: int | None) -> Tensor:
            return _reslot(x, self.lengths, capacity + 1 if window is None else min(window + 1, capacity + 1)).clone()

        keys = tuple(fit(x, w) for x, w in zip(self.keys, self.windows))
        values = tuple(fit(x, w) for x, w in zip(self.values, self.windows))
        return dataclasses.replace(self.fork(), keys=keys, values=values, capacity=capacity)

    def put(self, rows: Sequence[int], other: DecodeState) -> None:
        """Overwrite ``rows`` in place with the rows of ``other``, which may have a smaller capacity.

        Raises:
            ValueError: the states are of different models or settings, or a row does not fit.
        """
        if other.fingerprint != self.fingerprint or other.kept_at != self.kept_at:
            raise ValueError(
                "the states are of different models or keep the memory at different lengths: "
                "make both with the same settings"
            )
        if len(rows) != other.batch or int(other.lengths.max()) > self.capacity:
            raise ValueError(
                f"{other.batch} rows of up to {int(other.lengths.max())} tokens do not fit {len(rows)} rows of "
                f"capacity {self.capacity}: give one row for each, and a larger capacity"
            )
        index = torch.as_tensor(rows, device=self.lengths.device)
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values)):
            mine[index] = _reslot(theirs, other.lengths, mine.shape[1]).to(mine.dtype)
        for name in _SMALL:
            if getattr(self, name) is not None:
                getattr(self, name)[index] = getattr(other, name)

    def truncate(self, length: int | Sequence[int]) -> DecodeState:
        """A copy that has consumed only the first ``length`` tokens (one number, or one per row).

        Raises:
            ValueError: longer than the row, the memory is not kept there, or a ring has overwritten what is needed.
        """
        now = self.lengths.tolist()
        wanted = [length] * self.batch if isinstance(length, int) else list(length)
        if len(wanted) != self.batch:
            raise ValueError(f"truncate got {len(wanted)} lengths for {self.batch} rows: give one number, or one a row")
        memory = None if self.memory is None else self.memory.clone()
        for row, (n, have) in enumerate(zip(wanted, now)):
            if not 0 <= n <= have:
                raise ValueError(f"truncate({n}): row {row} has consumed {have} tokens; use 0..{have}")
            if n == have:
                continue
            rings = [x.shape[1] for x, w in zip(self.keys, self.windows) if w is not None]
            if n and any(have >= ring for ring in rings):
                raise ValueError(
                    f"truncate({n}): row {row} has consumed {have} tokens, and a sliding window of "
                    f"{min(rings) - 1} tokens "
                    "has overwritten older keys: fork the state before decoding on, or prefill again"
                )
            if memory is not None and n:
                if n not in self.kept_at:
                    raise ValueError(
                        f"truncate({n}): the memory is kept at lengths {list(self.kept_at)} only: "
                        f"declare {n} in keep_at when the state is made"
                    )
                assert self.kept is not None
                memory[row] = self.kept[row, self.kept_at.index(n)]
            elif memory is not None:
                memory[row] = 0
        copy = self.fork()
        lengths = torch.tensor(wanted, device=self.lengths.device)
        # A document that began after the cut is not there any more; where the older one began is not known.
        crossed = (copy.document_starts >= lengths) & (copy.document_starts > 0) & (lengths > 0)
        if bool(crossed.any()):
            raise ValueError(f"truncate: attention was cut at a separator after {wanted} tokens: prefill again")
        return dataclasses.replace(
            copy, lengths=lengths, memory=memory, document_starts=torch.where(lengths > 0, copy.document_starts, 0)
        )

    # -------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write the state as one safetensors file."""
        tensors = {name: x for name in _SMALL if (x := getattr(self, name)) is not None}
        for i, (key, value) in enumerate(zip(self.keys, self.values)):
            tensors |= {f"key.{i}": key, f"value.{i}": value}
        about = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "capacity": self.capacity,
            "windows": self.windows,
            "kept_at": self.kept_at,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: t.detach().contiguous().cpu() for n, t in tensors.items()},
            path,
            metadata={"lrt_state": json.dumps(about)},
        )
        return path

    @classmethod
    def load(cls, path: str | Path, *, model: Decodes) -> DecodeState:
        """Read a state for ``model``, onto its device.

        Raises:
            ValueError: no such file, not a state, a state of another model, or one whose tensors or numbers do not fit
                together.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give one that DecodeState.save wrote")
        try:
            with safe_open(str(path), framework="pt", device=str(next(model.parameters()).device)) as file:
                about = json.loads((file.metadata() or {}).get("lrt_state", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(
                f"{path}: not a decoding state of this version of lrt: give a file that DecodeState.save wrote"
            )
        check_fingerprint(str(about.get("fingerprint")), model)
        wrong = _misfit(about, tensors, model)
        if wrong is not None:
            raise ValueError(f"{path}: {wrong}: the file was changed, or its model has another shape")
        devices = [next(block.parameters()).device for block in model.blocks]
        return cls(
            keys=tuple(tensors[f"key.{i}"].to(device) for i, device in enumerate(devices)),
            values=tuple(tensors[f"value.{i}"].to(device) for i, device in enumerate(devices)),
            windows=tuple(about["windows"]),
            kept_at=tuple(about["kept_at"]),
            capacity=about["capacity"],
            fingerprint=about["fingerprint"],
            memory=tensors.get("memory"),
            lengths=tensors["lengths"],
            document_starts=tensors["document_starts"],
            approximate_from=tensors["approximate_from"],
            kept=tensors.get("kept"),
            reach=tensors.get("reach"),
        )

    def _map(self, change: Any) -> DecodeState:
        changes = {name: change(x) for name in _SMALL if (x := getattr(self, name)) is not None}
        return dataclasses.replace(
            self, keys=tuple(map(change, self.keys)), values=tuple(map(change, self.values)), **changes
        )


def _misfit(about: dict[str, Any], tensors: dict[str, Tensor], model: Decodes) -> str | None:
    """What of a file is not what ``DecodeState.save`` writes of a state of ``model``; None when all is."""
    windows = [block.window for block in model.blocks]
    capacity, kept_at = about.get("capacity"), about.get("kept_at")
    if type(capacity) is not int or capacity < 1 or about.get("windows") != windows:
        return f"it names windows {about.get('windows')} and capacity {capacity}, but the model has windows {windows}"
    if not isinstance(kept_at, list) or not all(type(n) is int and 1 <= n <= capacity for n in kept_at):
        return f"it keeps the memory at {kept_at}, which are no lengths 1..{capacity}"
    lengths = tensors.get("lengths")
    rows = len(lengths) if lengths is not None and lengths.ndim == 1 else 0
    made = probe(model)
    one: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: ((rows,), torch.int64) for name in ("lengths", "document_starts", "approximate_from")
    }
    for i, (kv, window) in enumerate(zip(made.kv, windows)):
        slots = capacity + 1 if window is None else min(window + 1, capacity + 1)
        one[f"key.{i}"] = (rows, slots, *kv.key.shape[2:]), kv.key.dtype
        one[f"value.{i}"] = (rows, slots, *kv.value.shape[2:]), kv.value.dtype
    if made.memory is not None:
        one["memory"] = (rows, made.memory.shape[-1]), made.memory.dtype
        if kept_at:
            one["kept"] = (rows, len(kept_at), made.memory.shape[-1]), made.memory.dtype
    if getattr(model.backbone, "by_length", None) is not None:
        one["reach"] = (rows,), torch.int64
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted(one.keys() | found.keys()):
        if found.get(name) != one.get(name):
            return (
                f"its tensor {name} is {found.get(name, 'missing')}, but {one.get(name, 'no such tensor')} is expected"
            )
    starts, known = tensors["document_starts"], tensors["lengths"]
    if rows < 1 or bool(
        ((known < 0) | (known > capacity) | (starts < 0) | (starts > known) | (tensors["approximate_from"] < 0)).any()
    ):
        return (
            f"its rows have lengths {known.tolist()} and documents that begin at {starts.tolist()}, "
            f"with a capacity of {capacity}"
        )
    return None


_SMALL = ("memory", "lengths", "document_starts", "approximate_from", "kept", "reach")


def slot_positions(last: Tensor, slots: int) -> Tensor:
    """The newest position (B, N) that each of N slots holds when ``last`` (B,) is the newest; below 0 = nothing yet."""
    return last[:, None] - (last[:, None] - torch.arange(slots, device=last.device)).remainder(slots)


def keys_so_far(state: DecodeState, lengths: Sequence[int]) -> list[KV]:
    """Keys and values of every block, oldest first where all rows are ``lengths`` long alike, otherwise by slot.

    Args:
        state: whose caches are read.
        lengths: of its rows, on the host.
    """
    used, found = max(lengths), []
    for key, value in zip(state.keys, state.values):
        slots = key.shape[1]
        if min(lengths) == used > slots:  # a ring that has wrapped
            order = torch.arange(used - slots, used, device=key.device).remainder(slots)
            found.append(KV(key.index_select(1, order), value.index_select(1, order)))
        else:
            found.append(KV(key[:, :used], value[:, :used]))
    return found


def _reslot(cache: Tensor, lengths: Tensor, slots: int) -> Tensor:
    """The rows of ``cache`` (B, N, G, K) laid out in another number of slots."""
    if cache.shape[1] == slots:
        return cache
    lengths = lengths.to(cache.device)
    positions = slot_positions(lengths - 1, slots)
    kept = (positions >= 0) & (positions > (lengths - 1 - cache.shape[1])[:, None])
    index = positions.clamp_min(0).remainder(cache.shape[1])
    return cache.gather(1, index[:, :, None, None].expand(-1, -1, *cache.shape[2:])) * kept[:, :, None, None].to(
        cache.dtype
    )
