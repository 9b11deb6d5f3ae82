"""Every setting of a run as frozen dataclasses, with its default and its meaning beside it; no torch.

Values that do not fit are refused where they are made. Reading and writing TOML is ``lrt.config``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from lrt.config.data import DataConfig, data_errors, path_errors
from lrt.config.phases import entrance_errors, schedule_errors
from lrt.config.ranges import HORIZON, choice_errors, entry_errors, memory_rate_errors, range_errors, unused_errors
from lrt.config.tuning import TuningConfig, tuning_errors

Weights = Literal["paper"] | tuple[float, ...]
Kind = Literal["baseline", "interleaved", "refine", "chunked", "sequential", "mixture"]


# ------------------------------------------------------------------ the settings of a run


@dataclass(frozen=True, kw_only=True)
class RecurrenceConfig:
    """How the previous token's latent state enters the decoder (docs/method.md, section 1)."""

    sharing: Literal["shared", "layerwise"] = "shared"  # one pair of memory projections, or one a block
    # projections of the memory's own, or one map into the space that each block's own read
    projection: Literal["separate", "aligned"] = "separate"
    # block whose output is the memory: 1..L, a fraction of L, None = round(2L/3) or the first receiver
    source_layer: int | float | None = None
    kv_projection: bool = True  # memory enters keys and values
    # memory is added to the block's input, or a map of it as large as that input
    residual: bool | Literal["projected"] = True
    gate_channels: int | None = None  # channels that the gates read; None = all
    blocks: tuple[int, ...] | None = None  # blocks that receive memory, 1..L; None = all
    memory_norm: Literal["rms", "final"] = "rms"  # parameter-free RMSNorm, or the backbone's own final norm
    separator: int | None = None  # token id at which the received memory is zero
    init: Literal["paper", "identity"] = "paper"  # from scratch, or leaving a pretrained model unchanged

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(
                self, "blocks", tuple(self.blocks) if isinstance(self.blocks, (list, tuple)) else (self.blocks,)
            )
        _raise_all(_recurrence_errors(self))

    def source_index(self, n_layers: int) -> int:
        """Number of the source block, 1..n_layers.

        Raises:
            ValueError: the block does not exist in a model of ``n_layers`` blocks, or lies below every block that
                receives memory.
        """
        source, first = self.source_layer, 1 + min(self.block_indices(n_layers))
        if source is None:
            return max(round(2 * n_layers / 3), first)
        number = min(n_layers, max(1, round(source * n_layers))) if isinstance(source, float) else source
        if not 1 <= number <= n_layers:
            raise ValueError(
                f"recurrence.source_layer = {source}, but the model has {n_layers} blocks: "
                f"use 1..{n_layers}, or a fraction such as 0.67"
            )
        if number < first:
            raise ValueError(
                f"recurrence.source_layer = {source}, block {number}, lies below the first block that receives "
                f"memory, {first} "
                "(recurrence.blocks): what it computes would never depend on memory, which is no recurrence. "
                f"Use a source of {first}..{n_layers}, leave it out, or let memory enter a lower block"
            )
        return number

    def block_indices(self, n_layers: int) -> tuple[int, ...]:
        """Zero-based indices of the blocks that receive memory.

        Raises:
            ValueError: a listed block does not exist in a model of ``n_layers`` blocks.
        """
        if self.blocks is None:
            return tuple(range(n_layers))
        bad = [b for b in self.blocks if not 1 <= b <= n_layers]
        if bad:
            raise ValueError(
                f"recurrence.blocks = {list(self.blocks)}: {bad} not in the model, which has {n_layers} "
                f"blocks: use numbers 1..{n_layers}"
            )
        return tuple(sorted({b - 1 for b in self.blocks}))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The nanochat-style decoder (docs/method.md, section 5)."""

    n_layers: int = 12  # L, decoder blocks
    width: int | None = None  # D; None = 64 a layer
    n_heads: int | None = None  # query heads; None = heads of width 128
    n_kv_heads: int | None = None  # key/value heads (GQA); None = n_heads
    vocab_size: int = 32768  # logits beyond it are cropped
    vocab_multiple: int = 64  # rows of the embeddings are padded to a multiple of this
    sequence_length: int = 2048  # T of training; a short window sees T/2 tokens back
    mlp_ratio: float = 4.0  # width of the MLP, times D
    window_pattern: str = "SSSL"  # S short, L long, tiled over the blocks; the last is always long
    value_embeddings: Literal["all", "alternating", "none"] = "all"  # blocks whose values get a vector a token
    embedding_residual: bool = True  # x <- a x + b x_0
    residual_scales: bool = True  # the learned a
    qk_norm: bool = True  # RMSNorm of queries and keys, after RoPE
    softcap: float | None = 15.0  # logits <- c tanh(logits / c); "none" switches it off
    rope_base: float = 10000.0  # of the rotary frequencies
    rope_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 reproduces the official tables
    gate_channels: int | None = None  # channels that the value-embedding gate reads; None = all
    attention_reset: int | None = None  # token id of the separator at which attention is cut too; None = never

    @property
    def d_model(self) -> int:
        return self.width if self.width is not None else 64 * self.n_layers

    @property
    def heads(self) -> int:
        return self.n_heads if self.n_heads is not None else max(1, self.d_model // 128)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    def windows(self) -> tuple[int | None, ...]:
        """Tokens that each block sees before the current one; None = all."""
        short = self.sequence_length // 2
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layers)]
        return tuple(short if kind == "S" and i < self.n_layers - 1 else None for i, kind in enumerate(pattern))

    def has_value_embedding(self, layer: int) -> bool:
        """Whether block ``layer`` (zero-based) adds a token-indexed value embedding."""
        if self.value_embeddings == "alternating":
            return layer % 2 == (self.n_layers - 1) % 2
        return self.value_embeddings == "all"

    def __post_init__(self) -> None:
        _raise_all(_model_errors(self))


@dataclass(frozen=True, kw_only=True)
class PassesConfig:
    """The passes of a training step; the same names as the functions lrt.interleaved(...) and so on."""

    kind: Literal["baseline", "interleaved", "refine", "chunked", "sequential"] = "interleaved"  # which passes
    subsets: int = 2  # S of interleaved
    sweeps: int = 1  # sweeps of interleaved
    order: Literal["ascending", "rotated", "random"] = "ascending"  # of residues; the last two draw every step
    kv_refresh: bool = False  # of interleaved: project the newest memory again for positions not yet visited
    passes: int = 1  # K of refine
    chunks: int = 1  # C of chunked: tokens a chunk
    weights: Weights = "paper"  # loss weight of each group, initialization first
    # no gradient from one pass into the passes before, or into the initialization
    cut_gradient: bool | Literal["initialization"] = False
    settle: int = 0  # passes of refine without gradient, before the graded ones


@dataclass(frozen=True, kw_only=True)
class ShareConfig(PassesConfig):
    """A member of a mixture."""

    share: float  # of the steps


@dataclass(frozen=True, kw_only=True)
class StretchConfig(PassesConfig):
    """Passes, or a mixture of them, for a part of the steps or for all."""

    # which passes
    kind: Kind = "interleaved"  # type: ignore[assignment]
    mix: tuple[ShareConfig, ...] = ()  # of a mixture: every step draws one member
    # steps in which the memory comes in: its values grow from zero to what recurrence.init gives,
    # its rates to their own
    ramp: int = 0


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(StretchConfig):
    """A part of a run with a schedule of its own."""

    until: float  # share of the steps at which it ends, 1.0 for the last phase


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(StretchConfig):
    """The schedule of a run, or its phases, one after the other."""

    phases: tuple[PhaseConfig, ...] | None = None  # beside them no other key is given


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """One table of parameter groups (docs/method.md, section 5); AdamW rates at width 768 scale with (D/768)^-0.5."""

    matrix_lr: float = 0.02  # Muon: block matrices, memory projections, gates
    momentum: float = 0.95  # Muon, once it is warm
    momentum_start: float = 0.85  # Muon, at the first step
    momentum_warmup_steps: int = 300  # steps from momentum_start to momentum
    second_moment: float = 0.95  # Muon: decay of the factored second moment
    weight_decay: float = 0.2  # Muon only; times (12/L)^2, falling linearly to 0
    embedding_lr: float = 0.3  # token and value embeddings
    head_lr: float = 0.004  # the output head
    scale_lr: float = 0.005  # a
    injection_lr: float = 0.5  # b and g
    betas: tuple[float, float] = (0.8, 0.95)  # AdamW; b has its own, 0.96 and 0.95
    eps: float = 1e-10  # AdamW
    memory_map_scale: float = 1.0  # times the rates of the memory's matrices: projections and maps
    memory_gate_scale: float = 1.0  # times the rates of the memory's gates
    memory_gain_scale: float = 1.0  # times the rates of g
    reference_batch_tokens: int = 524288  # all rates times sqrt(batch_tokens / this)
    rate_scale: float = 1.0  # all rates times this: the axis that a search of rates varies
    kind: Literal["muon", "adamw"] = "muon"  # adamw: every parameter, for adapted models
    adamw_lr: float = 3e-4  # kind = "adamw": rate of the backbone
    adamw_memory_lr: float | None = None  # kind = "adamw": rate of the memory parameters; None = adamw_lr


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    steps: int | None = None  # the horizon: exactly one of steps, tokens, tokens_per_parameter, compute
    tokens: int | None = None  # tokens to train on
    tokens_per_parameter: float | None = None  # parameters = matrices + head of the twin without memory
    compute: int | None = None  # tokens on which the twin without memory would spend the run's FLOPs
    batch_tokens: int = 524288  # tokens an optimizer step, over all ranks
    micro_batch: int = 16  # rows a forward on one rank; the rest is gradient accumulation
    lr_schedule: Literal["warmdown", "wsd", "cosine"] = "warmdown"  # a fall that is linear, 1 - sqrt, or a cosine
    warmup_steps: int = 0  # steps in which the rates rise from zero
    warmdown_fraction: float = 0.5  # share of the steps in which the rates fall
    final_lr_fraction: float = 0.0  # what the rates end at, of their full value
    clip_norm: float | None = None  # global gradient norm; "none" = no clipping
    max_skipped: int = 20  # stop after this many steps in a row with a non-finite loss or gradient
    stage: Literal["all", "memory"] = "all"  # memory: train only the memory parameters
    init_from: str | None = None  # warm start: a training checkpoint or an exported folder
    branch_from: str | None = None  # another run or its checkpoint: go on with its weights, optimizer, loader and step


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    replicate: int = 1  # data-parallel replicas, each sharded
    shard: int = -1  # ranks that share one copy of the parameters; -1 = all that remain
    activation_checkpointing: Literal["none", "block", "selective"] = "none"  # computed twice: none, all, what is cheap
    compile: bool = True  # compile each block and the loss
    cuda_graphs: bool = True  # on a GPU and compiled: forward and backward of a micro-batch are one CUDA graph
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # computation; masters are always float32
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients while they are summed over ranks
    reshard: Literal["after_step", "after_forward"] = "after_step"  # when gathered parameters are freed
    timeout_minutes: float = 10.0  # a collective that takes longer stops the run
    loss_chunk: int = 8192  # tokens whose logits are held at once; 0 = all
    # of torch on the host; None = 1 with a GPU (or OMP_NUM_THREADS), torch's choice without
    host_threads: int | None = None

    @property
    def reduces_once(self) -> bool:
        """Whether gradients of several ranks are summed once a step; not where micro-batches would be added up in
        bfloat16."""
        return self.reshard == "after_step" and "float32" in (self.param_dtype, self.reduce_dtype)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 1000  # steps; 0 = only at the end
    keep_last: int = 2  # checkpoints
    keep_every: int = 0  # also keep every n-th step for good; 0 = none
    asynchronous: bool = True  # write while training goes on
    resume: bool = True  # continue from the newest whole checkpoint of the same run
    export_at_end: bool = True  # safetensors + config.json beside the checkpoints


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    every: int = 10  # steps between console rows; the JSONL has every step
    csv: bool = False  # train.csv and evaluation.csv beside metrics.jsonl
    tensorboard: bool = False  # event files in tensorboard/
    wandb: bool = False  # Weights & Biases; WANDB_MODE=offline in the environment needs no account
    trackio: bool = False  # a record of trackio on this machine
    project: str = "lrt"  # of wandb and trackio
    plot: bool = True  # PNG of the curves at the end
    profile_start: int | None = None  # first step of a torch.profiler window
    profile_steps: int = 3  # steps of that window


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0  # steps; 0 = only at the end
    tokens: int = 65536  # held-out tokens scored, the same in every mode
    sources: tuple[str, ...] = ()  # further held-out data, each scored by itself: as data.validation, or NAME=PATH
    batch: int = 16  # rows a forward
    modes: tuple[str, ...] = ("zero", "parallel", "decode")  # memory modes that are scored
    buckets: int = 4  # position buckets of the report
    sample_prompt: str = "The "  # of a text that is decoded with every evaluation
    sample_tokens: int = 120  # 0 = no such text
    core: tuple[str, ...] = ()  # tasks of CORE, asked in memory mode decode
    core_items: int = 200  # first items of each, after nanochat's shuffle
    # eval_bundle.zip or its folder; None = the downloaded one, or the packages that hold data
    core_bundle: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "lrt"  # the folder of the run, inside output
    output: str = "runs"  # the run writes to output/name
    seed: int = 1  # of weights, order of data, and drawn schedules
    backbone: str = "native"  # "native", or a folder with a Hugging Face decoder to adapt


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run needs to know; recurrence None is the matched twin without memory."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    recurrence: RecurrenceConfig | None = field(default_factory=RecurrenceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tuning: TuningConfig | None = None  # supervised tuning, in place of training on text

    def __post_init__(self) -> None:
        _raise_all(_recipe_errors(self))


# ------------------------------------------------------------------ rules that types cannot say


def _raise_all(errors: list[str]) -> None:
    if errors:
        raise ValueError("; ".join(errors))


def _recurrence_errors(c: RecurrenceConfig) -> list[str]:
    errors = choice_errors("recurrence", c)
    source = c.source_layer
    if isinstance(source, bool) or not isinstance(source, (int, float, type(None))):
        errors.append(
            f"recurrence.source_layer = {source!r}: use a block number 1..L, a fraction such as 0.67, or leave it out"
        )
    elif isinstance(source, float) and not 0 < source < 1:
        errors.append(
            f"recurrence.source_layer = {source}: a fraction lies between 0 and 1; "
            "a block number is a whole number 1..L"
        )
    elif isinstance(source, int) and source < 1:
        errors.append(f"recurrence.source_layer = {source}: blocks are numbered from 1")
    errors += entry_errors(c)
    if not c.kv_projection and not c.residual:
        errors.append(
            "recurrence.kv_projection and recurrence.residual are both false, so memory could not enter: switch one on"
        )
    if c.blocks is not None and len(c.blocks) == 0:
        errors.append("recurrence.blocks = []: name at least one block by its number 1..L, or leave it out for all")
    others = {key: value for key, value in vars(c).items() if key != "source_layer"}
    return errors + range_errors("recurrence", RecurrenceConfig, others)


def _model_errors(c: ModelConfig) -> list[str]:
    errors = choice_errors("model", c) + range_errors("model", ModelConfig, vars(c))
    if errors:
        return errors
    if c.d_model % c.heads:
        errors.append(
            f"model.width = {c.d_model} is not a multiple of n_heads = {c.heads}: choose n_heads that divides the width"
        )
    elif c.head_dim % 2:
        errors.append(f"model.width / n_heads = {c.head_dim} is odd, but RoPE rotates pairs: choose an even head width")
    if c.heads % c.kv_heads:
        errors.append(f"model.n_kv_heads = {c.kv_heads} does not divide n_heads = {c.heads}: choose a divisor")
    if not c.window_pattern or set(c.window_pattern) - set("SL"):
        errors.append(f"model.window_pattern = {c.window_pattern!r}: use letters S (short) and L (long), such as SSSL")
    if c.gate_channels is not None and c.gate_channels > c.d_model:
        errors.append(
            f"model.gate_channels = {c.gate_channels} is more than the width {c.d_model}: use at most {c.d_model}"
        )
    return errors


def _recipe_errors(r: Recipe) -> list[str]:
    errors: list[str] = []
    for f in fields(r):
        section = getattr(r, f.name)
        if f.name not in ("model", "recurrence") and section is not None:
            errors += (
                choice_errors(f.name, section)
                + range_errors(f.name, type(section), vars(section))
                + unused_errors(f.name, section)
            )
    t, m = r.training, r.model
    given = [key for key in HORIZON if getattr(t, key) is not None]
    if len(given) > 1:
        unset = f"--set training.{given[-1]}=none"
        errors.append(
            f"training has {' and '.join(given)}: give exactly one of {', '.join(HORIZON)}, "
            f"and take back another with {unset}"
        )
    if isinstance(t.batch_tokens, int) and (t.batch_tokens < m.sequence_length or t.batch_tokens % m.sequence_length):
        errors.append(
            f"training.batch_tokens = {t.batch_tokens} is not a multiple of model.sequence_length = "
            f"{m.sequence_length}: choose a multiple"
        )
    if r.metrics.project != MetricsConfig().project and not (r.metrics.wandb or r.metrics.trackio):
        errors.append(
            f"metrics.project = {r.metrics.project!r} has no effect without metrics.wandb or metrics.trackio: "
            "leave it out"
        )
    if not r.evaluation.core and (r.evaluation.core_items, r.evaluation.core_bundle) != (
        EvaluationConfig().core_items,
        None,
    ):
        errors.append(
            "evaluation.core_items and evaluation.core_bundle have no effect without evaluation.core: "
            "name tasks, or leave them out"
        )
    bad = [mode for mode in r.evaluation.modes if mode not in ("zero", "parallel", "decode")]
    if bad:
        errors.append(f"evaluation.modes = {list(r.evaluation.modes)}: {bad} unknown; use zero, parallel, decode")
    if t.init_from is not None and t.branch_from is not None:
        errors.append(
            "training.init_from and training.branch_from are both given: "
            "a branch has its weights from the other run, so give one"
        )
    errors += (
        data_errors(r.data) + path_errors(r) + schedule_errors(r.schedule) + entrance_errors(r) + memory_rate_errors(r)
    )
    errors += tuning_errors(r)
    if r.recurrence is not None and r.run.backbone == "native":
        for check in (r.recurrence.source_index, r.recurrence.block_indices):
            try:
                check(m.n_layers)
            except ValueError as error:
                errors.append(str(error))
        channels = r.recurrence.gate_channels
        if channels is not None and channels > m.d_model:
            errors.append(
                f"recurrence.gate_channels = {channels} is more than the width {m.d_model}: use at most {m.d_model}"
            )
    return errors
