"""LatentRecurrentModel: a decoder and the recurrence around it. ``build`` makes one from a recipe.

Legend: B batch, T row length, L blocks, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrt.arguments import as_ids, check_ids, find_borders, read_rows
from lrt.backbone import Decoder, DecoderBlock, fused_mix
from lrt.config import ModelConfig, Recipe, RecurrenceConfig
from lrt.forward import Row
from lrt.lora import train_memory_beside
from lrt.outcome import by_group, in_order, outcome
from lrt.passes import PassResult, run_schedule
from lrt.recurrence import (
    AlignedBlock,
    AlignedProjection,
    Gate,
    KVProjection,
    Mixer,
    ProjectedInjection,
    RecurrentBlock,
    ResidualInjection,
    plain_mix,
    rms_memory,
)
from lrt.schedules import Interleaved, Mixture, Refine, baseline, from_config, interleaved, resolve, sequential
from lrt.tables import Table
from lrt.types import Backbone, Block, Device, Output, Schedule, Twins


class LatentRecurrentModel(nn.Module):
    """A decoder whose every position also receives the memory m[t-1] of the position before (paper section 3).

    Args:
        backbone: embeddings and head.
        blocks: the decoder's blocks, in order.
        recurrence: how memory enters; None = the plain twin, which has no memory at all.
        train_schedule: schedule of training mode; None = interleaved(2), or baseline() without recurrence.

    Raises:
        ValueError: a setting of ``recurrence`` does not fit this decoder.
    """

    twins: Twins | None = None

    def __init__(
        self,
        backbone: Backbone,
        blocks: Sequence[Block],
        recurrence: RecurrenceConfig | None,
        *,
        train_schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self._assemble(backbone, blocks, recurrence, train_schedule)

    def _assemble(
        self,
        backbone: Backbone,
        blocks: Sequence[Block],
        recurrence: RecurrenceConfig | None,
        train_schedule: Schedule | Mixture | None,
    ) -> None:
        """Register the parts; separate, because the Hugging Face face has another base class to initialize before."""
        self.backbone: Any = backbone
        # what lrt.adapt was given; in a tuple, so that it is not registered
        self.original: tuple[nn.Module, ...] | None = None
        self.recurrence = recurrence
        self.memory_projection: KVProjection | AlignedProjection | None = None
        self.injection: ResidualInjection | None = None
        self.receivers: tuple[int, ...] = ()
        self.source = 0
        gates, projections = dict[int, Gate](), dict[int, KVProjection]()
        if recurrence is not None:
            self.source = recurrence.source_index(len(blocks))
            self.receivers = recurrence.block_indices(len(blocks))
            width, heads, head_dim = backbone.width, backbone.kv_heads, backbone.head_dim
            channels = recurrence.gate_channels or width
            if channels > width:
                raise ValueError(
                    f"recurrence.gate_channels = {channels} is more than the width {width}: use at most {width}"
                )
            places = [_place(blocks[i]) for i in self.receivers]
            if recurrence.kv_projection:
                gated = heads if recurrence.projection == "aligned" else 2 * heads
                gates = {i: Gate(channels, gated, **place) for i, place in zip(self.receivers, places)}
                if recurrence.projection == "aligned":
                    self.memory_projection = AlignedProjection(width, **places[0])
                elif recurrence.sharing == "shared":
                    self.memory_projection = KVProjection(width, heads, head_dim, **places[0])
                else:
                    projections = {
                        i: KVProjection(width, heads, head_dim, **place) for i, place in zip(self.receivers, places)
                    }
            if recurrence.residual:
                kind = (
                    partial(ProjectedInjection, width=width)
                    if recurrence.residual == "projected"
                    else ResidualInjection
                )
                self.injection = kind(len(self.receivers), **places[0])
        wrapped = [
            RecurrentBlock(block, gate=gates.get(i), projection=projections.get(i), mixer=_mixer_of(block))
            for i, block in enumerate(blocks)
        ]
        if isinstance(self.memory_projection, AlignedProjection):
            wrapped = [
                AlignedBlock(blocks[i], gate=gates[i]) if i in gates else block for i, block in enumerate(wrapped)
            ]
        self.blocks: MutableSequence[RecurrentBlock] = cast(MutableSequence[RecurrentBlock], nn.ModuleList(wrapped))
        self.train_schedule: Schedule | Mixture = train_schedule or (
            baseline() if recurrence is None else interleaved(2)
        )

    # of calls in evaluation mode that name none: exact, one token after the other
    eval_schedule: Schedule = sequential()

    # -------------------------------------------------------------- the call

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        schedule: Schedule | Mixture | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_logits: bool | None = None,
        *,
        valid_targets: Tensor | None = None,
        generator: torch.Generator | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
    ) -> Output:
        """Run a schedule over rows of tokens.

        Args:
            input_ids: (B, T) token ids.
            targets: (B, T), already shifted: targets[t] follows input_ids[t]; -100 is ignored.
            labels: (B, T), Hugging Face convention: shifted inside; at most one of targets and labels.
                Neither is scored where attention_mask says padding.
            schedule: None = ``self.train_schedule`` in training mode, ``self.eval_schedule`` in evaluation mode.
            document_ids: (B, T); where it changes a document begins, and memory and attention stay inside it.
            attention_mask: (B, T), 0 marks padding on the left or on the right.
            position_ids: (B, T) for RoPE; None counts from the row's first real token.
                Where a position does not follow the one before it, a document begins, as in the packed rows of
                transformers.
            return_logits: None = only without targets.
            valid_targets: number of valid targets that normalises the loss; None counts them here. A trainer
                passes the count over all ranks and accumulation steps.
            generator: draws the member of a mixture, and the order of subsets where the schedule asks for it.
            logits_to_keep: logits of so many last columns, or of the columns that a tensor names; 0 = all.
            output_hidden_states: also return the input of every block and the normalized output of the last one.

        Raises:
            ValueError: shapes, token ids or arguments that do not fit.
        """
        rows = read_rows(
            input_ids, targets=targets, labels=labels, document_ids=document_ids, attention_mask=attention_mask,
            position_ids=position_ids, vocab_size=self.vocab_size,
        )  # fmt: skip
        chosen = resolve(schedule if schedule is not None else self.default_schedule(), generator)
        if not hasattr(chosen, "plan"):
            raise ValueError(
                f"schedule = {chosen!r}: pass lrt.baseline(), interleaved(S), refine(K), chunked(C), "
                "sequential() or a mixture"
            )
        results = self.run(
            rows.input_ids, chosen, document_ids=rows.document_ids, position_ids=rows.position_ids, real=rows.real,
            generator=generator, keep_inputs=output_hidden_states,
        )  # fmt: skip
        return outcome(
            self.backbone, results, rows, weights=chosen.group_weights(rows.input_ids.shape[1]),
            valid_targets=valid_targets, return_logits=return_logits, logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip

    def run(
        self,
        input_ids: Tensor,
        schedule: Schedule,
        *,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        real: Tensor | None = None,
        generator: torch.Generator | None = None,
        keep_inputs: bool = False,
    ) -> list[PassResult]:
        """Embed rows (B, T) without padding on the left and run every pass of ``schedule`` over them."""
        if self.recurrence is None and schedule.token_compute > 1:
            raise ValueError(
                f"schedule {schedule} needs memory, but this model has no recurrence: "
                "use baseline(), or lrt.adapt(model)"
            )
        if self.recurrence is None:
            schedule = baseline()
        row = self.row(input_ids, document_ids=document_ids, position_ids=position_ids, real=real)
        return run_schedule(self, row, schedule, generator=generator, keep_inputs=keep_inputs)

    def row(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Row:
        """Rows of tokens (B, T) as passes run over them: embedded, with the borders of documents;
        ``real`` is false where there is padding."""
        by_length = getattr(self.backbone, "by_length", None)
        borders = find_borders(
            input_ids, document_ids=document_ids, position_ids=position_ids, real=real,
            separator=None if self.recurrence is None else self.recurrence.separator,
            cut=getattr(self.backbone, "attention_reset", None),
            longest=None if by_length is None else by_length.border,
        )  # fmt: skip
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
        more = () if borders.lengths is None else (borders.lengths,)
        hidden, contexts = self.backbone.embed(input_ids, positions, *more)
        return Row(hidden, contexts, borders.starts, borders.documents)

    def score(
        self,
        input_ids: Tensor,
        targets: Tensor,
        schedule: Schedule | Mixture,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Nats of every target under every loss group.

        Args:
            input_ids, targets: (B, T), as in ``forward``.
            schedule: what to run; sequential() scores in ``decode`` mode.

        Returns:
            (groups, B, T) in float32 at least, detached; 0 where the target is -100.
        """
        input_ids, targets = as_ids(input_ids), as_ids(targets)
        check_ids(input_ids, targets, vocab_size=self.vocab_size)
        schedule = resolve(schedule, generator)
        if isinstance(schedule, (Interleaved, Refine)):
            schedule = replace(schedule, weights="paper")  # a group of weight 0 would not be computed to the end
        groups = by_group(
            self.run(input_ids, schedule, generator=generator), len(schedule.group_weights(input_ids.shape[1]))
        )
        return torch.stack([in_order(self.backbone.loss(h, targets[:, p])[1], p) for h, p in groups])

    def default_schedule(self) -> Schedule | Mixture:
        """The schedule of a call that names none."""
        if self.recurrence is None:
            return baseline()
        return self.train_schedule if self.training else self.eval_schedule

    def run_passes_by(self, twins: Twins | None) -> None:
        """Have passes run by decoders with the same weights, which keep their gradients apart; None = by this one."""
        self.twins = twins

    def memory_of(self, hidden: Tensor) -> Tensor:
        """m (B, P, D) of the source block's output (B, P, D)."""
        assert self.recurrence is not None
        return self.backbone.final_norm(hidden) if self.recurrence.memory_norm == "final" else rms_memory(hidden)

    @property
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    @torch.no_grad()
    def init_weights(self, *, generator: torch.Generator | None = None) -> None:
        """Initialize every parameter, the backbone's included (docs/method.md, section 5); safe after ``to_empty``."""
        self.backbone.init_weights(generator=generator)
        for block in self.blocks:
            block.block.init_weights(generator=generator)
        self.init_memory(generator=generator)

    @torch.no_grad()
    def init_memory(self, *, generator: torch.Generator | None = None) -> None:
        """Initialize only what the recurrence added, as ``recurrence.init`` says."""
        if self.recurrence is None:
            return
        for projection in [self.memory_projection, *(b.projection for b in self.blocks)]:
            if projection is not None:
                projection.init_weights(init=self.recurrence.init, generator=generator)
        for block in self.blocks:
            if block.gate is not None:
                block.gate.init_weights()
        if self.injection is not None:
            self.injection.init_weights(init=self.recurrence.init)

    def memory_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the recurrence added, by name."""
        return {
            f"{name}.{key}": p for name, module in self.memory_modules().items() for key, p in module.named_parameters()
        }

    def memory_modules(self) -> dict[str, nn.Module]:
        """The modules that the recurrence added, by name."""
        added: dict[str, nn.Module | None] = {"memory_projection": self.memory_projection, "injection": self.injection}
        for index, block in enumerate(self.blocks):
            added |= {f"blocks.{index}.gate": block.gate, f"blocks.{index}.projection": block.projection}
        return {name: module for name, module in added.items() if module is not None}

    @property
    def peft_config(self) -> Table:
        """Configs of the adapters that PEFT has put into this model, by name; it sets them once its layers are in."""
        try:
            return self.__dict__["_peft_config"]
        except KeyError:
            raise AttributeError("peft_config") from None

    @peft_config.setter
    def peft_config(self, adapters: Table) -> None:
        self.__dict__["_peft_config"] = adapters
        train_memory_beside(self, self.memory_modules(), adapters)

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_peft_config", None)


# ------------------------------------------------------------------ building


def build(recipe: Recipe, *, device: Device = None, dtype: torch.dtype | None = None) -> LatentRecurrentModel:
    """Build the model of a recipe, initialized with the recipe's seed.

    Args:
        recipe: from ``load_recipe``.
        device: "meta" builds shapes only; call ``to_empty`` and ``init_weights`` afterwards.
        dtype: of the parameters; None = float32.

    Raises:
        ValueError: settings that do not fit together.
    """
    if recipe.run.backbone != "native":
        raise ValueError(
            f'run.backbone = "{recipe.run.backbone}": lrt.build makes native models: lrt.adapt the decoder, '
            "or train the recipe"
        )
    model = build_model(
        recipe.model, recipe.recurrence, device=device, dtype=dtype, loss_chunk=recipe.parallel.loss_chunk
    )
    model.train_schedule = from_config(recipe.schedule) if recipe.recurrence is not None else baseline()
    if torch.device(device or "cpu").type != "meta":
        model.init_weights(generator=torch.Generator(device=device or "cpu").manual_seed(recipe.run.seed))
    return model


def build_model(
    config: ModelConfig,
    recurrence: RecurrenceConfig | None,
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
    loss_chunk: int = 8192,
) -> LatentRecurrentModel:
    """The native decoder with its recurrence, parameters not initialized."""
    decoder = Decoder(config, device=device, dtype=dtype, loss_chunk=loss_chunk)
    blocks = decoder.make_blocks(device=device, dtype=dtype)
    return LatentRecurrentModel(decoder, blocks, recurrence)


def _mixer_of(block: Block) -> Mixer:
    """One kernel for the native decoder's blocks, plain PyTorch for any other."""
    return fused_mix if isinstance(block, DecoderBlock) else plain_mix


def _place(block: Block) -> Table:
    """Device and dtype of a block's own parameters."""
    assert isinstance(block, nn.Module)
    parameter = next(p for p in block.parameters() if p.is_floating_point())
    return {"device": parameter.device, "dtype": parameter.dtype}
