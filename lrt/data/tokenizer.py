"""Tokenizers: raw bytes, a Hugging Face ``tokenizer.json``, or a tiktoken rank file.

All of them give ids without a separator; the packing puts one (``bos_id``) before every document.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lrt.config.files import local_path, read_text, write_whole
from lrt.tables import Table

BOS = "<|bos|>"
MARKER = "lrt_tokenizer.json"  # beside tokenizer.json: which class, which separator
HUB_CONFIG = "tokenizer_config.json"  # the same for transformers
_BOS_NAMES = (BOS, "<|begin_of_text|>", "<bos>", "<s>", "[BOS]", "<|endoftext|>", "<eos>", "</s>")
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "[EOS]", "<|im_end|>")

# How the texts were split before the ranks were counted; a rank file does not say it.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Texts on which a table of bytes per token is verified: spaces, lines, case, accents, compatibility forms,
# other scripts.
_SAMPLES = (
    "The quick brown fox; isn't it 12345?",
    " Two  spaces,\n\na line and\ta tab.\n",
    "naïve CAFÉ, ½ of it — “quoted”",
    "Привет, 世界! 🙂",
)


class Measured(NamedTuple):
    """A text as token ids, and how many of its bytes each id stands for."""

    ids: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n,) int64; they sum to the UTF-8 bytes of the text, unless it has no ids at all


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int  # ids are 0..vocab_size - 1
    bos_id: int  # separator that stands before every document
    eos_id: int | None
    fingerprint: str  # sha256 of everything that decides the ids

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without separator; special tokens written in the text stay plain text."""

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without separators."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens left out."""

    def measure(self, texts: Sequence[str]) -> list[Measured]:
        """Ids of every text, without separators, and the bytes of the text that each id stands for."""

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (vocab_size,) int64; 0 for special tokens.

        Raises:
            ValueError: the bytes of a text do not follow from its ids; ``measure`` counts those of the texts.
        """

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer so that ``load_tokenizer(folder)`` gives it back."""


class ByteTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is the separator."""

    vocab_size = 257
    bos_id = 256
    eos_id: int | None = None
    fingerprint = hashlib.sha256(b"lrt bytes 256+bos").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", "replace")

    def measure(self, texts: Sequence[str]) -> list[Measured]:
        every = [np.array(self.encode(text), dtype=np.int64) for text in texts]
        return [Measured(ids, np.ones_like(ids)) for ids in every]

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        # The same ids as a tokenizer.json, for programs that know only those.
        twin = HFTokenizer(models.BPE(vocab={char: byte for byte, char in byte_characters().items()}, merges=[]))
        twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        twin.decoder = decoders.ByteLevel()
        twin.add_special_tokens([BOS])
        _write(Path(folder), twin.to_str(), {"kind": "bytes"})


class FileTokenizer:
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library."""

    def __init__(
        self, text: str, *, bos: str | None = None, eos: str | None = None, origin: str = "tokenizer.json"
    ) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._tokenizer = HFTokenizer.from_str(text)
        except Exception as error:
            raise ValueError(
                f"data.tokenizer: {origin} is not a tokenizer.json of the tokenizers library ({error}): "
                "give another file"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        separator = self._special(bos, _BOS_NAMES)
        if separator is None:
            wanted = repr(bos) if bos is not None else ", ".join(_BOS_NAMES)
            raise ValueError(
                f"data.tokenizer: {origin} has no separator token (looked for {wanted}): "
                f"add {BOS} to its special tokens"
            )
        self.bos_id = separator
        self.eos_id = self._special(eos, _EOS_NAMES)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._text = text
        self.fingerprint = hashlib.sha256(
            f"{json.dumps(json.loads(text), sort_keys=True)}|{self.bos_id}".encode()
        ).hexdigest()

    def _special(self, name: str | None, usual: Sequence[str]) -> int | None:
        """Id of the special token of this name, or of the first usual one that there is."""
        ids = (self._tokenizer.token_to_id(candidate) for candidate in ((name,) if name is not None else usual))
        return next((found for found in ids if found is not None), None)

    def __getstate__(self) -> Table:
        return {"text": self._text, "bos": self._name(self.bos_id), "eos": self._name(self.eos_id)}

    def __setstate__(self, state: Table) -> None:
        self.__init__(state["text"], bos=state["bos"], eos=state["eos"])  # type: ignore[misc]

    def _name(self, token: int | None) -> str | None:
        return None if token is None else self._tokenizer.id_to_token(token)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of what a chat template wrote: special tokens in it are themselves."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids beside those that texts are split into, such as the marks of a chat template."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def measure(self, texts: Sequence[str]) -> list[Measured]:
        found = []
        for text, ids in zip(texts, self.encode_documents(texts)):
            numbers = np.array(ids, dtype=np.int64)
            sizes = self._table[numbers]
            right = int(sizes.sum()) == len(text.encode("utf-8", "replace"))
            found.append(Measured(numbers, sizes if right else self._by_offsets(text)))
        return found

    def _by_offsets(self, text: str) -> np.ndarray:
        """Bytes of ``text`` from the end of one token to the end of the next; the last token takes what is left."""
        ends = np.array(
            [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets], dtype=np.int64
        )
        if len(ends):
            ends = np.maximum.accumulate(ends)
            ends[-1] = len(text)
        until = np.cumsum([0, *(len(character.encode("utf-8", "replace")) for character in text)])
        return np.diff(until[ends], prepend=0)

    def token_bytes(self) -> np.ndarray:
        for sample in _SAMPLES:
            counted, size = int(self._table[self.encode(sample)].sum()), len(sample.encode())
            if counted != size:
                raise ValueError(
                    f"data.tokenizer: the bytes of a text do not follow from its token ids ({counted} would be counted "
                    f"for the {size} of {sample!r}), so bits per byte of tokenized folders would be wrong: "
                    "evaluate text or parquet files, whose bytes are counted"
                )
        return self._table.copy()

    @cached_property
    def _table(self) -> np.ndarray:
        """Bytes of each id as far as its spelling tells, not verified."""
        # Byte-level vocabularies write one character a byte; others write a space as U+2581 and raw bytes as <0x41>.
        parts = json.loads(self._text)
        byte_level = any(
            "ByteLevel" in json.dumps(parts.get(part)) for part in ("decoder", "pre_tokenizer", "normalizer")
        )
        added = self._tokenizer.get_added_tokens_decoder()
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                counts[index] = 0 if added[index].special else len(token.encode())
            elif byte_level:
                counts[index] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                counts[index] = 1
            else:
                counts[index] = len(token.replace("\u2581", " ").encode())
        counts[self.bos_id] = 0
        return counts

    def save(self, folder: str | Path) -> None:
        _write(
            Path(folder), self._text, {"kind": "file", "bos": self._name(self.bos_id), "eos": self._name(self.eos_id)}
        )


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer named by ``data.tokenizer``.

    Args:
        spec: "bytes", a ``tokenizer.json``, a folder that holds one, or a tiktoken rank file (``*.tiktoken``).

    Raises:
        ValueError: there is no such file, it cannot be read, or it has no separator token.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = local_path(spec, key="data.tokenizer")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        folder = path.parent if path.suffix in (".json", ".tiktoken") else path
        raise ValueError(
            f'data.tokenizer = "{spec}": no file {file}; use "bytes", a tokenizer.json, a folder that holds one, '
            "or a .tiktoken file, or train one: python tools/prepare_data.py train-tokenizer --train DATA "
            f"--vocab-size N --limit-mb 2000 --output {shlex.quote(str(folder))} (DATA as in data.train, "
            "N = model.vocab_size)"
        )
    if file.suffix == ".tiktoken":
        return FileTokenizer(_from_ranks(file), bos=BOS, origin=str(file))
    marker = read_object(file.parent / MARKER)
    if marker.get("kind") == "bytes":
        return ByteTokenizer()
    hub = {} if marker else read_object(file.parent / HUB_CONFIG)
    bos = token_name(marker.get("bos")) or token_name(hub.get("bos_token"))
    eos = token_name(marker.get("eos")) or token_name(hub.get("eos_token"))
    return FileTokenizer(_text_of(file), bos=bos, eos=eos, origin=str(file))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids do not fit the model.

    Args:
        tokenizer: the tokenizer of the data.
        vocab_size: rows of the model's vocabulary, ``model.vocab_size``.

    Raises:
        ValueError: the tokenizer has more ids than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size = {vocab_size}, but the tokenizer of data.tokenizer has {tokenizer.vocab_size} ids: "
            f"use model.vocab_size = {tokenizer.vocab_size} or more, or a smaller tokenizer"
        )


def _write(folder: Path, text: str, marker: Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", text)
    write_whole(folder / MARKER, json.dumps(marker) + "\n")
    write_whole(folder / HUB_CONFIG, json.dumps(hub_config(marker), indent=2) + "\n")


def hub_config(marker: Table) -> Table:
    """What transformers must know of a tokenizer of ours; a text ends where the next one's separator stands."""
    bos = marker.get("bos") or BOS
    ends = {"bos_token": bos, "eos_token": marker.get("eos") or bos}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **ends, "clean_up_tokenization_spaces": False}


def _text_of(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}") from None


def read_object(path: Path) -> Table:
    """The object in a file; empty where there is none."""
    if not path.is_file():
        return {}
    text = _text_of(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.tokenizer: {path} is no JSON ({error}): mend it, or take it away") from None
    if not isinstance(found, dict):
        raise ValueError(f"data.tokenizer: {path} holds no JSON object: mend it, or take it away")
    return found


def token_name(entry: object) -> str | None:
    """A special token as a table of transformers names it, by itself or as an object."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None


def byte_characters() -> dict[int, str]:
    """The printable character that byte-level vocabularies write for each byte (as in GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _from_ranks(path: Path) -> str:
    """A tiktoken rank file as the text of a tokenizer.json; the separator gets the first free id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").splitlines(), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ValueError(
                    f'data.tokenizer = "{path}": line {number} is not "base64 rank": give a tiktoken rank file'
                ) from None
    pattern = (
        _O200K if "o200k" in path.name else _WORDS if any(n in path.name for n in ("r50k", "p50k", "gpt2")) else SPLIT
    )
    return tokenizer_json(ranks, pattern=pattern, special=(BOS,))


def tokenizer_json(ranks: dict[bytes, int], *, pattern: str, special: Sequence[str]) -> str:
    """Byte-level merge ranks as the text of a tokenizer.json.

    Args:
        ranks: id of every token that is not special.
        pattern: regular expression that splits a text before it is merged.
        special: special tokens; they get the ids after the ranks.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    chars = byte_characters()
    written = {token: "".join(chars[byte] for byte in token) for token in ranks}
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    tokenizer = HFTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str()
