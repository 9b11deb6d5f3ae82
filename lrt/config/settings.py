"""Every setting of a run as frozen dataclasses, with its default and its meaning beside it; no torch.

Values that do not fit are refused where they are made. Reading and writing TOML is ``lrt.config``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from lrt.config.data import DataConfig, data_errors, path_errors
from lrt.config.model import ModelConfig, RecurrenceConfig
from lrt.config.phases import entrance_errors, schedule_errors
from lrt.config.ranges import HORIZON, choice_errors, memory_rate_errors, raise_all, range_errors, unused_errors
from lrt.config.tuning import TuningConfig, tuning_errors

Weights = Literal["paper"] | tuple[float, ...]
Kind = Literal["baseline", "interleaved", "refine", "chunked", "sequential", "mixture"]


# ------------------------------------------------------------------ the settings of a run


@dataclass(frozen=True, kw_only=True)
class PassesConfig:
    """The passes of a training step; the same names as the functions lrt.interleaved(...) and so on."""

    # which passes a step runs
    kind: Literal["baseline", "interleaved", "refine", "chunked", "sequential"] = "interleaved"
    subsets: int = 2  # interleaved: S, the number of subsets
    sweeps: int = 1  # interleaved: how often every position is computed again
    # interleaved: order of the residues; rotated and random draw it anew every step
    order: Literal["ascending", "rotated", "random"] = "ascending"
    kv_refresh: bool = False  # interleaved: project the newest memory again for positions not yet visited
    passes: int = 1  # refine: K, the passes after the initialization
    chunks: int = 1  # chunked: C, the tokens of a chunk
    weights: Weights = "paper"  # loss weight of each group, initialization first
    # no gradient from one pass into the passes before, or into the initialization
    cut_gradient: bool | Literal["initialization"] = False
    settle: int = 0  # refine: passes without gradient before the graded ones


@dataclass(frozen=True, kw_only=True)
class ShareConfig(PassesConfig):
    """A member of a mixture."""

    share: float  # share of the steps that draw this member


@dataclass(frozen=True, kw_only=True)
class StretchConfig(PassesConfig):
    """Passes, or a mixture of them, for a part of the steps or for all."""

    # which passes a step runs; mixture: those that the step draws
    kind: Kind = "interleaved"  # type: ignore[assignment]
    mix: tuple[ShareConfig, ...] = ()  # mixture: its members
    # steps in which the memory comes in: its values grow from zero to what recurrence.init gives,
    # its rates to their own
    ramp: int = 0


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(StretchConfig):
    """A part of a run with a schedule of its own."""

    until: float  # share of the steps at which the phase ends; 1.0 for the last one


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(StretchConfig):
    """The schedule of a run, or its phases, one after the other."""

    # parts of the run with a schedule each; no other key stands beside them
    phases: tuple[PhaseConfig, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """One table of parameter groups (docs/method.md, section 5); AdamW rates at width 768 scale with (D/768)^-0.5."""

    matrix_lr: float = 0.02  # Muon: rate of block matrices, memory projections and gates
    momentum: float = 0.95  # Muon: momentum once it is warm
    momentum_start: float = 0.85  # Muon: momentum at the first step
    momentum_warmup_steps: int = 300  # Muon: steps from momentum_start to momentum
    second_moment: float = 0.95  # Muon: decay of the factored second moment
    weight_decay: float = 0.2  # Muon: weight decay, times (12/L)^2, falling linearly to 0
    embedding_lr: float = 0.3  # AdamW: rate of token and value embeddings
    head_lr: float = 0.004  # AdamW: rate of the output head
    scale_lr: float = 0.005  # AdamW: rate of the residual scales a
    injection_lr: float = 0.5  # AdamW: rate of the embedding scales b and of the gains g
    betas: tuple[float, float] = (0.8, 0.95)  # AdamW: betas; those of b are 0.96 and 0.95
    eps: float = 1e-10  # AdamW: epsilon
    memory_map_scale: float = 1.0  # factor of the rates of the memory's matrices, which are projections and maps
    memory_gate_scale: float = 1.0  # factor of the rates of the memory's gates
    memory_gain_scale: float = 1.0  # factor of the rate of the gains g
    reference_batch_tokens: int = 524288  # all rates are multiplied by sqrt(batch_tokens / this)
    rate_scale: float = 1.0  # factor of all rates, which a search of rates varies
    kind: Literal["muon", "adamw"] = "muon"  # muon for native models; adamw for every parameter, as adapted models need
    adamw_lr: float = 3e-4  # kind = "adamw": rate of the backbone
    adamw_memory_lr: float | None = None  # kind = "adamw": rate of the memory parameters; None = adamw_lr


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    steps: int | None = None  # horizon: optimizer steps; a recipe gives exactly one of the four horizons
    tokens: int | None = None  # horizon: tokens to train on
    tokens_per_parameter: float | None = None  # horizon: of the matrices and the head of the twin without memory
    compute: int | None = None  # horizon: tokens on which the twin without memory would spend the run's FLOPs
    batch_tokens: int = 524288  # tokens of an optimizer step, over all ranks
    micro_batch: int = 16  # most rows of one forward on one rank; the rest is gradient accumulation
    lr_schedule: Literal["warmdown", "wsd", "cosine"] = "warmdown"  # a fall that is linear, 1 - sqrt, or a cosine
    warmup_steps: int = 0  # steps in which the rates rise from zero
    warmdown_fraction: float = 0.5  # share of the steps in which the rates fall
    final_lr_fraction: float = 0.0  # share of their full value that the rates end at
    clip_norm: float | None = None  # largest global gradient norm; "none" = no clipping
    max_skipped: int = 20  # stop after this many steps in a row with a non-finite loss or gradient
    stage: Literal["all", "memory"] = "all"  # which parameters train: all, or those of the memory
    init_from: str | None = None  # warm start: a training checkpoint or an exported folder
    branch_from: str | None = None  # another run or its checkpoint: go on with its weights, optimizer, loader and step


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    replicate: int = 1  # data-parallel replicas, each sharded
    shard: int = -1  # ranks that share one copy of the parameters; -1 = all that remain
    activation_checkpointing: Literal["none", "block", "selective"] = "none"  # what is computed twice
    compile: bool = True  # compile each block and the loss
    cuda_graphs: bool = True  # on a GPU and compiled: forward and backward of a micro-batch are one CUDA graph
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of the computation; masters are always float32
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of gradients while they are summed over ranks
    reshard: Literal["after_step", "after_forward"] = "after_step"  # when gathered parameters are freed
    timeout_minutes: float = 10.0  # longest collective; a longer one stops the run
    loss_chunk: int = 8192  # tokens whose logits are held at once; 0 = all
    # torch threads on the host; None = 1 with a GPU (or OMP_NUM_THREADS), torch's choice without
    host_threads: int | None = None

    @property
    def reduces_once(self) -> bool:
        """Whether gradients of several ranks are summed once per step; not where micro-batches would be added up in
        bfloat16."""
        return self.reshard == "after_step" and "float32" in (self.param_dtype, self.reduce_dtype)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 1000  # steps between checkpoints; 0 = only at the end
    keep_last: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # checkpoints of every n-th step stay for good; 0 = none
    asynchronous: bool = True  # checkpoints are written while training goes on
    resume: bool = True  # the run goes on from its newest whole checkpoint
    export_at_end: bool = True  # the end writes safetensors and config.json beside the checkpoints


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    every: int = 10  # steps between console rows; the JSONL has every step
    csv: bool = False  # train.csv and evaluation.csv beside metrics.jsonl
    tensorboard: bool = False  # event files in tensorboard/
    wandb: bool = False  # Weights & Biases; WANDB_MODE=offline in the environment needs no account
    trackio: bool = False  # a record of trackio on this machine
    project: str = "lrt"  # project of wandb and trackio
    plot: bool = True  # curves.png at the end
    profile_start: int | None = None  # first step of a torch.profiler window
    profile_steps: int = 3  # steps of the torch.profiler window


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0  # steps between evaluations; 0 = only at the end
    tokens: int = 65536  # held-out tokens scored, the same in every mode
    sources: tuple[str, ...] = ()  # further held-out data, each scored by itself: PATH or NAME=PATH
    batch: int = 16  # rows of one forward
    modes: tuple[str, ...] = ("zero", "parallel", "decode")  # memory modes that are scored
    buckets: int = 4  # parts of the row that the report scores apart
    sample_prompt: str = "The "  # beginning of a text that every evaluation decodes
    sample_tokens: int = 120  # tokens of that text; 0 = no text
    core: tuple[str, ...] = ()  # tasks of CORE, asked in memory mode decode
    core_items: int = 200  # first items of each CORE task, after nanochat's shuffle
    # eval_bundle.zip or its folder; None = the downloaded one, or the packages that hold data
    core_bundle: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "lrt"  # the folder of the run, inside output
    output: str = "runs"  # the run writes to output/name
    seed: int = 1  # seed of weights, order of data, and drawn schedules
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
        raise_all(_recipe_errors(self))


# ------------------------------------------------------------------ rules that types cannot say


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
