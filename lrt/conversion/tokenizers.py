"""Tokenizers travel with their model: as tokenizer.json to us and to Hugging Face, as tiktoken's pickle to nanochat.

A pickle is read without running it: an unpickler that knows one name, and only keeps the plain state behind it.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from lrt.data.tokenizer import BOS, HUB_CONFIG, MARKER, byte_characters, hub_config, load_tokenizer, tokenizer_json
from lrt.tables import Table

Files = Mapping[str, bytes]  # name -> content

# Files beside a model, in our folders and in Hugging Face ones, that travel as they are: mostly the tokenizer.
NAMES = (
    "tokenizer.json", MARKER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "token_bytes.json", "generation_config.json",
)  # fmt: skip
HELP = "write its tokenizer.json and give it with --tokenizer (for tiktoken: docs/convert.md, Tokenizers)"


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of one of our folders or of a Hugging Face folder; empty when there are none."""
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}


def write_files(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


# ------------------------------------------------------------------ nanochat


def read_nanochat(folder: Path) -> dict[str, bytes]:
    """The tokenizer of a nanochat base folder (``tokenizer.pkl``, ``token_bytes.pt``) as our files.

    Raises:
        ValueError: the pickle holds anything but a tiktoken encoding.
    """
    pickled = folder / "tokenizer.pkl"
    if not pickled.is_file():
        return read_files(folder)
    state = read_encoding(pickled)
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    names = sorted(special, key=special.__getitem__)
    if sorted(ranks.values()) != list(range(len(ranks))) or [special[n] for n in names] != list(
        range(len(ranks), len(ranks) + len(names))
    ):
        raise ValueError(
            f"{pickled}: its ids are not the ranks followed by the special tokens, as nanochat numbers them: {HELP}"
        )
    if BOS not in special:
        raise ValueError(f"{pickled}: no special token {BOS}, which nanochat puts before every document: {HELP}")
    text = tokenizer_json(ranks, pattern=state["pat_str"], special=names)
    marker = {"kind": "file", "bos": BOS, "eos": None}
    files = {
        "tokenizer.json": text.encode(),
        MARKER: (json.dumps(marker) + "\n").encode(),
        HUB_CONFIG: _hub_config(marker),
    }
    table = folder / "token_bytes.pt"
    if table.is_file():
        files["token_bytes.json"] = json.dumps(_read_table(table)).encode()
    return files


def write_nanochat(folder: Path, files: Files, *, vocab_size: int) -> list[str]:
    """Write our tokenizer files as nanochat's two.

    Args:
        folder: the ``tokenizer`` folder of a nanochat base folder.
        files: our files.
        vocab_size: of the model.

    Returns:
        Notes for the user.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _encoding_state(_object(files, "tokenizer.json"))
    if state is None:
        write_files(folder, {name: content for name, content in files.items() if name != "generation_config.json"})
        return [
            "the tokenizer is no byte-level BPE with a split pattern, so nanochat's tokenizer.pkl cannot say "
            "it: tokenizer.json was copied"
        ]
    (folder / "tokenizer.pkl").write_bytes(_pickle_encoding(state))
    if "token_bytes.json" in files:
        table = json.loads(files["token_bytes.json"])
    else:
        write_files(folder, {n: files[n] for n in ("tokenizer.json", MARKER) if n in files})
        table = load_tokenizer(folder).token_bytes().tolist()
        for name in ("tokenizer.json", MARKER):
            (folder / name).unlink(missing_ok=True)
    torch.save(torch.tensor(table, dtype=torch.int32), folder / "token_bytes.pt")
    count = len(state["mergeable_ranks"]) + len(state["special_tokens"])
    return (
        []
        if count == vocab_size
        else [f"the tokenizer has {count} ids and the model {vocab_size}: nanochat wants them equal"]
    )


class _State:
    """Stands for a pickled tiktoken encoding; keeps its plain state, runs nothing."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _State
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_encoding(path: Path) -> Table:
    """The state of a pickled tiktoken encoding: name, pat_str, mergeable_ranks, special_tokens.

    Raises:
        ValueError: the file holds anything else; nothing in it is run.
    """
    try:
        found = _Reader(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # noqa: BLE001 - a damaged pickle fails in any way
        raise ValueError(f"{path}: refused, not the pickle of a plain tiktoken encoding ({error}): {HELP}") from None
    state = getattr(found, "state", None)
    if isinstance(state, str):
        raise ValueError(f"{path}: names the public tiktoken encoding {state!r} and holds no ranks: {HELP}")
    if isinstance(state, dict) and {"pat_str", "mergeable_ranks", "special_tokens"} <= state.keys():
        if all(isinstance(token, bytes) and isinstance(rank, int) for token, rank in state["mergeable_ranks"].items()):
            return state
    raise ValueError(f"{path}: refused, not the pickle of a plain tiktoken encoding: {HELP}")


def _pickle_encoding(state: Table) -> bytes:
    """What pickling tiktoken.Encoding gives, without tiktoken: GLOBAL, empty tuple, NEWOBJ, state, BUILD, STOP."""
    return b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + pickle.dumps(state, protocol=3)[2:-1] + b"b."


def _encoding_state(table: Table) -> Table | None:
    """A tokenizer.json as the state of a tiktoken encoding; None when tiktoken cannot say it."""
    steps = table.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    pattern = next((s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"), None)
    model = table.get("model", {})
    if pattern is None or model.get("type") != "BPE" or not any(s.get("type") == "ByteLevel" for s in steps):
        return None
    raw = {char: byte for byte, char in byte_characters().items()}
    special = {entry["content"]: entry["id"] for entry in table.get("added_tokens", []) if entry.get("special")}
    try:
        ranks = {bytes(raw[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
    except KeyError:
        return None
    return {"name": "lrt", "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": special}


def _read_table(path: Path) -> list[int]:
    try:
        return [int(n) for n in torch.load(path, map_location="cpu", weights_only=True)]
    except Exception as error:  # noqa: BLE001 - a damaged file fails in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a table of bytes per token: {reason}") from None


# ------------------------------------------------------------------ Hugging Face


def hub_files(files: Files, *, context: int) -> dict[str, bytes]:
    """Our files and what AutoTokenizer needs beside them; text then starts with BOS, as our documents do.

    Args:
        files: our files; those of a Hugging Face folder stay as they are.
        context: tokens of a training row.
    """
    if "tokenizer.json" not in files or (HUB_CONFIG in files and MARKER not in files):
        return dict(files)
    table, marker = _object(files, "tokenizer.json"), _object(files, MARKER)
    bos = BOS if marker.get("kind") == "bytes" else marker.get("bos") or BOS
    ids = {entry["content"]: entry["id"] for entry in table.get("added_tokens", [])}
    if table.get("post_processor") is None and bos in ids:
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        pair = [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        special = {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}
        table["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": pair,
            "special_tokens": special,
        }
        marker["template"] = "added"
    return {
        **files, "tokenizer.json": json.dumps(table, ensure_ascii=False).encode(),
        MARKER: (json.dumps(marker) + "\n").encode(), HUB_CONFIG: _hub_config(marker, model_max_length=context),
    }  # fmt: skip


def _object(files: Files, name: str) -> Table:
    """The JSON object in a file of ours; empty where there is no such file."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} beside the model is no JSON ({error}): mend it, or take it away") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} beside the model holds no JSON object: mend it, or take it away")
    return found


def without_hub_files(files: Files) -> dict[str, bytes]:
    """Undo ``hub_files``; a tokenizer that came from elsewhere stays as it is."""
    marker = _object(files, MARKER)
    if marker.pop("template", None) != "added":
        return dict(files)
    table = _object(files, "tokenizer.json")
    table["post_processor"] = None
    plain = {**files, HUB_CONFIG: _hub_config(marker)}
    return {
        **plain,
        "tokenizer.json": json.dumps(table, ensure_ascii=False).encode(),
        MARKER: (json.dumps(marker) + "\n").encode(),
    }


def _hub_config(marker: Table, **more: object) -> bytes:
    return (json.dumps({**hub_config(marker), **more}, indent=2) + "\n").encode()
