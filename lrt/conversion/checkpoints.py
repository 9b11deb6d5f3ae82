"""Every kind of checkpoint, opened: our config, our tensor names, none of the tensors read yet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from lrt.adaptation import adapt
from lrt.config import Recipe, ScheduleConfig, parse_recipe
from lrt.config.files import local_path
from lrt.conversion.official import native_from_official, native_tensors
from lrt.conversion.official_reference import Logits, OfficialReading, Precision
from lrt.conversion.streamed_model import filled_model, native_logits
from lrt.conversion.tokenizers import Files, read_files, read_nanochat, without_hub_files
from lrt.data.tokenizer import load_tokenizer
from lrt.model import build
from lrt.schedules import from_config
from lrt.serialization import config_of, model_from_config, native_config, read_config
from lrt.serialization.adapted import load_whole, without_ties
from lrt.serialization.decoders import decoder_of_shapes, open_saved
from lrt.serialization.tensors import LazyTensor, check_shapes, in_memory, open_file, open_folder
from lrt.tables import ReadTable, Table
from lrt.train.checkpoint.verifying import find_checkpoint, step_of

TOKENIZER_HELP = "no tokenizer found: give one with --tokenizer, or the output will have none"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any kind, in our terms.

    Attributes:
        kind: one of ``lrt.conversion.KINDS``.
        where: the folder or file it was read from.
        config: our config.json.
        tensors: our names; read when needed.
        tokenizer: our tokenizer files, or those of the Hugging Face folder.
        reading: its own reading of the layout: precision -> a function from tokens and memory mode to logits.
        step: optimizer steps, where it is known.
        about: more for ``inspect_checkpoint``.
        notes: what the user should know.
    """

    kind: str
    where: Path
    config: Table
    tensors: dict[str, LazyTensor]
    reading: Callable[[Precision], Logits]
    tokenizer: Files = field(default_factory=dict)
    step: int | None = None
    about: ReadTable = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def context(self) -> int:
        """Tokens of a training row."""
        native = self.config.get("model")
        return native["sequence_length"] if native else self.config.get("max_position_embeddings") or 2048


def model_reading(config: Table, tensors: Mapping[str, LazyTensor]) -> Callable[[Precision], Logits]:
    """Logits by our own model; an adapted decoder is held whole."""

    def reading(precision: Precision) -> Logits:
        if "adapted" not in config:
            return partial(native_logits, filled_model(model_from_config(config, device="meta"), tensors, precision))
        rounded = {
            n: t._replace(read=lambda t=t: precision(t.read()), dtype=precision.compute)  # type: ignore[misc]
            for n, t in tensors.items()
        }
        schedule = from_config(ScheduleConfig(**config["schedule"]))
        return partial(
            native_logits,
            load_whole("", config, rounded, train_schedule=schedule, dtype=precision.compute, device=None),
        )

    return reading


def expected_shapes(config: Table) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of the model that a config.json describes; a tied parameter is named once."""
    with torch.device("meta"):
        model = model_from_config(config, device="meta")
    return {name: tuple(t.shape) for name, t in without_ties(model, model.state_dict()).items()}


# ------------------------------------------------------------------ lrt


def read_lrt(path: Path, *, step: int | None = None) -> Checkpoint:
    """A folder that ``lrt.save`` wrote, whole or in shards.

    Raises:
        ValueError: not such a folder, or not whole.
    """
    no_step(step, "lrt")
    config, tensors = read_config(path), open_folder(path)
    if config.get("adapter_only"):
        raise ValueError(f"{path} holds only memory parameters: use --from adapter, and name its decoder with --base")
    shapes = expected_shapes(config)
    check_shapes(str(path), tensors, shapes)
    tensors = {name: tensors[name] for name in shapes}
    return Checkpoint(
        "lrt", path, config, tensors, model_reading(config, tensors), read_files(path), config.get("step")
    )


class StepError(ValueError):
    """A step was asked of what has none."""


def no_step(step: int | None, kind: str) -> None:
    """Raises StepError where a step is asked of a folder that holds one model."""
    if step is not None:
        raise StepError(
            f"--step {step} chooses among the checkpoints of a run, but a folder of kind {kind} holds one "
            "model: leave it out"
        )


# ------------------------------------------------------------------ dcp


def read_dcp(path: Path, *, step: int | None = None) -> Checkpoint:
    """A training checkpoint, written by any number of ranks; its weights alone, without the training job.

    Args:
        path: a run's folder, its ``checkpoints`` folder, or one checkpoint.
        step: which one; None = the newest.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    if step is not None:
        places = (path / f"step_{step:08d}", path / "checkpoints" / f"step_{step:08d}", path)
        folders = [place for place in places if step_of(place) == step and place.is_dir()]
        if not folders:
            raise ValueError(
                f"{path} holds no checkpoint of step {step}: leave --step out for the newest, "
                "or look at the folder names"
            )
        path = folders[0]
    folder = find_checkpoint(path)
    recipe = parse_recipe((folder / "recipe.toml").read_text(encoding="utf-8"))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    config = _config_of_recipe(recipe)
    tensors = {name.removeprefix("model."): t for name, t in _sharded(folder).items() if name.startswith("model.")}
    shapes = expected_shapes(config)
    check_shapes(str(folder), tensors, shapes)
    spec = recipe.data.tokenizer
    files, notes = tokenizer_files(
        spec, note=f"data.tokenizer = {spec!r} of the recipe was not found from here; {TOKENIZER_HELP}"
    )
    about = {"recipe": recipe.run.name, "ranks that wrote it": meta.get("world_size"), "meta": meta}
    tensors = {name: tensors[name] for name in shapes}
    return Checkpoint(
        "dcp", folder, config, tensors, model_reading(config, tensors), files, meta.get("step"), about, notes
    )


def _config_of_recipe(recipe: Recipe) -> Table:
    if recipe.run.backbone == "native":
        return native_config(build(recipe, device="meta"))
    # a name that the run gave: read as data, or not at all
    folder = local_path(recipe.run.backbone, key="run.backbone")
    with torch.device("meta"):
        decoder = decoder_of_shapes(folder, where=f'run.backbone = "{folder}" of the run')
        return config_of(adapt(decoder, recipe.recurrence, train_schedule=from_config(recipe.schedule)))


def _sharded(folder: Path) -> dict[str, LazyTensor]:
    """Tensors whose rows lie in several files; a tensor is put together when it is read."""
    for file in sorted(folder.glob("*.safetensors")):
        open_file(file)  # which names the file that is damaged
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()

    def read(name: str) -> torch.Tensor:
        entry = metadata.state_dict_metadata[name]
        whole = None
        for chunk in entry.chunks:  # type: ignore[union-attr]
            with safe_open(
                metadata.storage_data[MetadataIndex(name, chunk.offsets)].relative_path, framework="pt"
            ) as file:
                part = file.get_tensor(name)
            if part.shape == entry.size:  # type: ignore[union-attr]
                return part
            whole = torch.empty(entry.size, dtype=part.dtype) if whole is None else whole  # type: ignore[union-attr]
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes))] = part
        assert whole is not None
        return whole

    return {
        name: LazyTensor(tuple(entry.size), entry.properties.dtype, partial(read, name))  # type: ignore[union-attr]
        for name, entry in metadata.state_dict_metadata.items()
    }


def tokenizer_files(spec: str, *, note: str) -> tuple[Files, tuple[str, ...]]:
    """The tokenizer that a run names, by way of our own files; none and ``note`` where it is not found."""
    import tempfile

    try:
        tokenizer = load_tokenizer(spec)
    except ValueError:
        return {}, (note,)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(place)
        return read_files(Path(place)), ()


# ------------------------------------------------------------------ official, nanochat


def read_official(path: Path, *, step: int | None = None, kind: str = "official") -> Checkpoint:
    """A checkpoint of the official LRT code, or of nanochat.

    Args:
        path: a folder with model_NNNNNN.pt, such a file, or a base folder with one checkpoint.
        step: which one; None = the last.
        kind: "nanochat" refuses recurrent models.

    Raises:
        ValueError: no such checkpoint, a foreign pickle, or tensors and config do not fit.
    """
    file, number = _official_file(path, step)
    meta_file = file.with_name(f"meta_{number:06d}.json")
    if not meta_file.is_file():
        raise ValueError(
            f"{file}: {meta_file.name} is missing beside it, and without its config the model cannot be read"
        )
    try:
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        model_config = dict(meta["model_config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{meta_file}: not a meta file of nanochat or of the LRT code: {error!r}") from None
    official = in_memory(_state_dict(file))
    config = native_from_official(model_config, official, where=str(file))
    if kind == "nanochat" and config["recurrence"] is not None:
        raise ValueError(f"{file} is a recurrent model: use --from official")
    tensors = native_tensors(config, official, where=str(file))

    def reading(precision: Precision) -> Logits:
        return OfficialReading(model_config, official, precision).logits

    folders = [file.parent / "tokenizer", file.parent.parent.parent / "tokenizer"]
    files = next((found for found in map(read_nanochat, folders) if found), {})
    about = {"meta": {k: v for k, v in meta.items() if k != "model_config"}, "model_config": model_config}
    notes = () if files else (TOKENIZER_HELP,)
    return Checkpoint(kind, file, config, tensors, reading, files, meta.get("step", number), about, notes)


def _official_file(path: Path, step: int | None) -> tuple[Path, int]:
    tags = sorted(path.glob("base_checkpoints/*/model_*.pt")) if path.is_dir() else []
    if tags and not any(path.glob("model_*.pt")):
        parents = sorted({p.parent for p in tags})
        if len(parents) > 1:
            raise ValueError(
                f"{path} holds {len(parents)} checkpoints: give one of {', '.join(str(p) for p in parents)}"
            )
        path = parents[0]
    files = sorted(path.glob("model_*.pt")) if path.is_dir() else [path]
    numbered = {int(m[1]): f for f in files if f.is_file() and (m := re.fullmatch(r"model_(\d+)\.pt", f.name))}
    if not numbered:
        raise ValueError(
            f"{path}: no model_NNNNNN.pt here: give the folder of a checkpoint of nanochat or of the LRT code"
        )
    if step is not None and step not in numbered:
        raise ValueError(f"{path} holds no step {step}; it has {', '.join(map(str, sorted(numbered)))}")
    number = max(numbered) if step is None else step
    return numbered[number], number


def _state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .pt file, mapped rather than read; nothing but tensors is accepted."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old file format cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged or foreign file fails in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file}: refused, not a whole file of tensors alone ({reason}). Where you trust it, "
            "load it with the code that wrote it and save {name: tensor} with torch.save"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise ValueError(f"{file}: not a state dict (names to tensors): save model.state_dict() alone")
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


# ------------------------------------------------------------------ hf


def read_hf(path: Path, *, step: int | None = None) -> Checkpoint:
    """A Hugging Face folder of type "lrt": one of ours, with the tokenizer as transformers wants it.

    Where it fits into memory it is run through AutoModelForCausalLM, as its users will.
    """
    found = read_lrt(path, step=step)

    def reading(precision: Precision) -> Logits:
        if precision.rounded is not None or not precision.keep:
            return found.reading(precision)
        return partial(native_logits, open_saved(path, dtype=precision.compute).eval())

    return replace(found, kind="hf", tokenizer=without_hub_files(found.tokenizer), reading=reading)
