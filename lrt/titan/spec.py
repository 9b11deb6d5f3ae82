"""Everything that names torchtitan: its config, TrainSpec, tokenizers and loaders. Another version changes this file.

Written for torchtitan 0.2.2. It reads the types of dataclass fields, so annotations here are no strings.
"""

import io
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator, Validator, build_validator
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, llama3_args
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from lrt.config import DataConfig, ModelConfig, Recipe, RecurrenceConfig, ScheduleConfig
from lrt.config.settings import OptimizerConfig
from lrt.data import build_loader, check_vocabulary, load_tokenizer
from lrt.data.held_out import ValidationLoader
from lrt.data.loader import TrainLoader
from lrt.tables import Table
from lrt.titan.llama3 import llama3, own_name, titan_name
from lrt.titan.model import (
    Trainee,
    grouped_loss,
    native,
    parallel_form,
    parameters_and_flops,
    with_entrance,
    with_state,
)
from lrt.titan.settings import (
    FLAVORS,
    LLAMA,
    MODEL_KEYS,
    MUON,
    NATIVE,
    OPTIMIZER_KEYS,
    PACKED,
    PLAIN,
    Theirs,
    given_model,
    model_config,
    model_keys,
    recipe_of,
)
from lrt.train.checkpoint.starting_model import check_separator
from lrt.train.distributed.parallel import named_parameters
from lrt.train.optim.groups import MuonAdamW, parameter_groups
from lrt.train.optim.rates import rates_at

# ------------------------------------------------------------------ the config


def _table(
    settings: type, *, fixed: tuple[str, ...] = (), left_open: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> type:
    """A section of our recipes as torchtitan's command line can read it.

    Args:
        settings: dataclass of the section.
        fixed: keys for a file alone, because a command line cannot say them.
        left_open: keys whose default depends on the model: None here, and "none" says None.
        without: keys that another section of torchtitan's says.
    """
    hints, items = typing.get_type_hints(settings), list[Any]()
    for f in fields(settings):
        hint = Annotated[Any, tyro.conf.Fixed] if f.name in fixed else _lists(hints[f.name])
        if f.name in left_open:
            items.append((f.name, hint | Literal["none"] | None, None))
        elif f.name not in without:
            items.append((f.name, hint, field(default=f.default)))
    return make_dataclass(settings.__name__, items)


def _lists(hint: Any) -> Any:
    """A type whose tuples are lists, as TOML gives them."""
    inside = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return list[inside[0]]  # type: ignore[valid-type]
    if type(None) in inside or any(typing.get_origin(part) is tuple for part in inside):
        return typing.Union[tuple(map(_lists, inside))]  # noqa: UP007 - of parts that are known at run time only
    return hint


RecurrenceTable = _table(RecurrenceConfig, left_open=("init",))
ScheduleTable = _table(ScheduleConfig, fixed=("mix", "phases"))


ModelTable = _table(ModelConfig, left_open=MODEL_KEYS, without=("sequence_length",))


_NOT_MUON = tuple(f.name for f in fields(OptimizerConfig) if f.name not in OPTIMIZER_KEYS)
OptimizerTable = _table(OptimizerConfig, left_open=OPTIMIZER_KEYS, without=_NOT_MUON)


@dataclass
class JobConfig:
    """What lrt adds to torchtitan's JobConfig."""

    recurrence: RecurrenceTable = field(default_factory=RecurrenceTable)  # type: ignore[valid-type]
    schedule: ScheduleTable = field(default_factory=ScheduleTable)  # type: ignore[valid-type]
    model: ModelTable = field(default_factory=ModelTable)  # type: ignore[valid-type]
    optimizer: OptimizerTable = field(default_factory=OptimizerTable)  # type: ignore[valid-type]


# ------------------------------------------------------------------ models


@dataclass
class NativeArgs(BaseModelArgs):
    """The native decoder of a flavor; a job fills it in."""

    recurrent: bool = True
    model: Table = field(default_factory=dict)
    recurrence: Table | None = None

    def update_from_config(self, job_config: Theirs, **kwargs: Theirs) -> None:
        self.recipe = native_recipe(job_config)
        self.model = model_config(self.recipe)
        self.recurrence = None if self.recipe.recurrence is None else asdict(self.recipe.recurrence)

    def make(self) -> Trainee:
        return native(self.recipe)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        return parameters_and_flops(model, self.recipe)  # type: ignore[arg-type]


@dataclass
class LlamaArgs(TransformerModelArgs):
    """torchtitan's Llama 3 of a flavor; a job adds the recurrence."""

    recurrence: Table | None = None

    def update_from_config(self, job_config: Theirs, **kwargs: Theirs) -> None:
        super().update_from_config(job_config, **kwargs)
        self.recipe = llama_recipe(job_config)
        self.vocab_size = self.recipe.model.vocab_size
        self.recurrence = asdict(self.recipe.recurrence)  # type: ignore[arg-type]

    def make(self) -> Trainee:
        sizes = TransformerModelArgs(**{f.name: getattr(self, f.name) for f in fields(TransformerModelArgs)})
        return llama3(self.recipe, lambda: Transformer(sizes))

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        return parameters_and_flops(model, self.recipe)  # type: ignore[arg-type]


def native_recipe(job: Theirs) -> Recipe:
    """The recipe of a job that trains the native decoder."""
    keys = model_keys(job)
    return recipe_of(job, model=keys, recurrent=not job.model.flavor.startswith(PLAIN))


def llama_recipe(job: Theirs) -> Recipe:
    """The recipe of a job that trains torchtitan's Llama 3 with memory."""
    args = LLAMA_ARGS.get(job.model.flavor)
    if args is None:
        raise ValueError(f"model.flavor = {job.model.flavor!r}: use one of {', '.join(LLAMA_ARGS)}")
    keys = given_model(job)
    if keys.keys() - {"vocab_size"}:
        raise ValueError(
            f"model.{min(keys.keys() - {'vocab_size'})} has no effect on torchtitan's Llama 3, "
            "whose sizes are the flavor's: leave it out, or choose another model.flavor"
        )
    if job.optimizer.name == MUON:
        raise ValueError(
            f'optimizer.name = "{MUON}" knows the parameters of model.name = "{NATIVE}" alone: use AdamW for Llama 3'
        )
    sizes = {"n_layers": args.n_layers, "width": args.dim, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads}
    none = {"vocab_multiple": 1, "value_embeddings": "none", "softcap": "none"}
    given = {"vocab_size": args.vocab_size, **{key: value for key, value in sizes.items() if value is not None}, **keys}
    return recipe_of(job, model={**given, **none}, recurrent=True, init="identity")


NATIVE_ARGS = {flavor: NativeArgs(recurrent=not flavor.startswith(PLAIN)) for flavor in FLAVORS}
LLAMA_ARGS = {
    flavor: LlamaArgs(**{f.name: getattr(args, f.name) for f in fields(args)})
    for flavor, args in llama3_args.items()
    if args.attn_type == "sdpa"  # the others are the same models with another attention, and the passes bring their own
}


def make_model(args: NativeArgs | LlamaArgs) -> Trainee:
    """The model of a job, as TrainSpec.model_cls makes it."""
    model: Trainee = args.make()
    return model


# ------------------------------------------------------------------ data


class Tokenizer(BaseTokenizer):
    """A tokenizer of lrt under torchtitan's names.

    Args:
        path: a folder with tokenizer.json, such a file, a tiktoken rank file, or "bytes".
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.own = load_tokenizer(path)
        self.bos_id, self.eos_id = self.own.bos_id, self.own.eos_id

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:  # type: ignore[override]
        """Ids of a text between its separators; where the vocabulary has no token for the end, there is none."""
        end = [self.eos_id] if add_eos and self.eos_id is not None else []
        return [*([self.bos_id] if add_bos else []), *self.own.encode(text), *end]

    def decode(self, ids: Sequence[int]) -> str:  # type: ignore[override]
        return self.own.decode(ids)

    def get_vocab_size(self) -> int:
        return self.own.vocab_size


def tokenizer_for(recipe: Callable[[Theirs], Recipe]) -> Callable[[Theirs], Tokenizer]:
    """TrainSpec.build_tokenizer_fn: the first that torchtitan calls, so it also refuses what the bridge cannot do."""

    def build(job_config: Theirs) -> Tokenizer:
        settings, tokenizer = recipe(job_config), Tokenizer(job_config.model.hf_assets_path)
        try:
            check_vocabulary(tokenizer.own, settings.model.vocab_size)
        except ValueError as error:
            raise ValueError(str(error).replace("data.tokenizer", "model.hf_assets_path")) from None
        check_separator(settings, tokenizer.own)
        return tokenizer

    return build


class PackedLoader(BaseDataLoader):
    """The rows of our own trainer for torchtitan's: packed documents, with a place that a checkpoint holds.

    Args:
        rows: of ``lrt.data.build_loader``.
        rank: of the data-parallel ranks.
        world_size: number of these ranks.
    """

    def __init__(self, rows: TrainLoader | ValidationLoader, *, rank: int, world_size: int) -> None:
        self._rows, self._key, self._world_size = rows, f"dp_rank_{rank}", world_size

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for batch in self._rows:
            yield {"input": batch.input_ids}, batch.targets

    def state_dict(self) -> Table:
        place = io.BytesIO()
        torch.save(self._rows.state_dict(), place)
        return {self._key: place.getvalue(), "world_size": self._world_size}

    def load_state_dict(self, state_dict: Table) -> None:
        if not state_dict:
            return
        if state_dict["world_size"] != self._world_size:
            raise ValueError(
                f"the checkpoint holds the loaders of {state_dict['world_size']} data-parallel ranks, "
                f'and here are {self._world_size}: use as many, or checkpoint.exclude_from_loading = ["dataloader"], '
                "which begins the data anew"
            )
        self._rows.load_state_dict(torch.load(io.BytesIO(state_dict[self._key]), weights_only=True))


def _packed(job: Theirs, tokenizer: Tokenizer, *, rank: int, world_size: int, split: str) -> PackedLoader:
    t, v = job.training, job.validation
    if split == "train":
        data = DataConfig(
            train=t.dataset_path or "demo", tokenizer=job.model.hf_assets_path, workers=t.dataloader.num_workers
        )
        length, rows = t.seq_len, t.local_batch_size
    else:
        data = DataConfig(
            train=t.dataset_path or "demo", validation=v.dataset_path or "auto", tokenizer=job.model.hf_assets_path
        )
        length, rows = v.seq_len, v.local_batch_size
    seed = {} if job.debug.seed is None else {"seed": job.debug.seed}
    ranks: Table = {"rank": rank, "world_size": world_size}
    found = build_loader(data, tokenizer=tokenizer.own, sequence_length=length, rows=rows, split=split, **ranks, **seed)
    return PackedLoader(found, **ranks)


def loader(*, dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: Theirs) -> BaseDataLoader:
    """torchtitan's own loader, or rows packed by lrt where ``training.dataset = "lrt"``."""
    ranks = {"dp_world_size": dp_world_size, "dp_rank": dp_rank}
    if job_config.training.dataset == PACKED:
        return _packed(job_config, tokenizer, rank=dp_rank, world_size=dp_world_size, split="train")
    return build_text_dataloader(**ranks, tokenizer=tokenizer, job_config=job_config)


class PackedValidator(Validator):
    """torchtitan's validator over held-out rows packed by lrt."""

    def __init__(
        self, *, job_config: Theirs, dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, **parts: Theirs
    ) -> None:
        BaseValidator.__init__(self, job_config)
        self.validation_dataloader = _packed(
            job_config, tokenizer, rank=dp_rank, world_size=dp_world_size, split="validation"
        )
        self.tokenizer = tokenizer
        for name, value in parts.items():
            setattr(self, name, value)


def validator(**parts: Theirs) -> BaseValidator:
    """torchtitan's validator on its own data, or on rows packed by lrt where ``validation.dataset = "lrt"``."""
    return (PackedValidator if parts["job_config"].validation.dataset == PACKED else build_validator)(**parts)


# ------------------------------------------------------------------ optimizers and the specs


class MuonOptimizers(OptimizersContainer):
    """Our Muon and AdamW under torchtitan's learning rates; momentum and weight decay follow the step as with us.

    Args:
        model: in its parallel form.
    """

    def __init__(self, model: Trainee) -> None:
        recipe = model.recipe
        groups = parameter_groups(named_parameters(model), recipe)
        self.model_parts = [model]
        self.optimizers = [MuonAdamW(groups, compile=recipe.parallel.compile)]
        self._post_init(list(model.parameters()), {})

    def step(self, *_: object, **__: object) -> None:
        (model,), (optimizer,) = self.model_parts, self.optimizers
        training, settings = model.recipe.training, model.recipe.optimizer
        rates = rates_at(model.step(), total=training.steps or 0, training=training, optimizer=settings)
        optimizer.set_momentum(rates)
        optimizer.step()


def optimizers(model_parts: list[Trainee], *settings: Theirs, **more: Theirs) -> Theirs:
    """torchtitan's optimizers, with a state for every parameter; or ours, where ``optimizer.name = "Muon"``."""
    (model,) = model_parts
    if settings[0].name == MUON:
        return with_entrance(MuonOptimizers(model), model)
    return with_entrance(with_state(build_optimizers(model_parts, *settings, **more), model), model)


def schedulers(containers: Theirs, *settings: Theirs) -> Theirs:
    """torchtitan's learning rates; their count of steps, which its checkpoints hold, is also the model's."""
    found = build_lr_schedulers(containers, *settings)
    rates = found.schedulers[0]
    for model in containers.model_parts:
        model.step = lambda: int(rates.last_epoch)
    return found


class LlamaAdapter(Llama3StateDictAdapter):
    """Reads the weights of a Hugging Face Llama into the decoder; the memory keeps what it was initialized to."""

    def to_hf(self, state_dict: Table) -> Table:
        theirs = {titan_name(name): tensor for name, tensor in state_dict.items()}
        return super().to_hf({name: tensor for name, tensor in theirs.items() if name is not None})

    def from_hf(self, hf_state_dict: Table) -> Table:
        return {own_name(name): tensor for name, tensor in super().from_hf(hf_state_dict).items()}


def _spec(
    args: Table, recipe: Callable[[Theirs], Recipe], adapter: type[Llama3StateDictAdapter] | None = None
) -> TrainSpec:
    return TrainSpec(
        model_cls=make_model,  # type: ignore[arg-type]
        model_args=args,
        parallelize_fn=parallel_form,
        pipelining_fn=None,
        build_optimizers_fn=optimizers,
        build_lr_schedulers_fn=schedulers,
        build_dataloader_fn=loader,
        build_tokenizer_fn=tokenizer_for(recipe),
        build_loss_fn=lambda job_config, **_: grouped_loss,
        build_validator_fn=validator,
        state_dict_adapter=adapter,
    )


register_train_spec(NATIVE, _spec(NATIVE_ARGS, native_recipe))
register_train_spec(LLAMA, _spec(LLAMA_ARGS, llama_recipe, LlamaAdapter))
