"""Speed of decoding and prefill: the plain decoder against memory, and against transformers' own decoding.

examples:
  python tools/bench/decoding.py                        # one GPU: d12 and d20, bf16, about four minutes
  python tools/bench/decoding.py --sizes d12 --batches 1 --contexts 1024 --no-prefill
  python tools/bench/decoding.py --sizes d20 --variants plain narrow --no-decode     # prefill where memory enters late
  python tools/bench/decoding.py --sizes smollm2 llama1b --batches 1 8 --contexts 1024 --against transformers
  python tools/bench/decoding.py --model adapted --against transformers     # a folder that lrt.save wrote
  python tools/bench/decoding.py --model runs/x/export  # trained weights: a fixed point depends on them
  python tools/bench/decoding.py --tiny                 # a check on any CPU

Variants are timed in turns within one process, and medians are given. Compiling is timed apart. The last
line is one JSON object; --out gets every row as soon as it is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lrt
from lrt.commands.bench import decoders
from lrt.commands.bench.clocks import copy_bandwidth, profile, seconds_of
from lrt.commands.bench.decoders import ALIGNED, LAYERWISE, LLAMAS, NARROW, NATIVE, ORIGINAL, PLAIN, SHARED
from lrt.commands.bench.prompts import prefill_rows
from lrt.commands.options import at_least
from lrt.decoding import step as decoding
from lrt.decoding.fast import tiles
from lrt.decoding.fast.acceleration import Accelerated, accelerate, compiled_decoder
from lrt.decoding.fast.family_token import FusedFamily
from lrt.decoding.state import DecodeState
from lrt.model import LatentRecurrentModel
from lrt.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIANTS = {  # those of native decoders, and of adapted ones
    "native": (PLAIN, SHARED, LAYERWISE, NARROW),
    "adapted": (PLAIN, ALIGNED, SHARED),
}
COMPARED = 12e9  # bytes of a state up to which logits are compared, because that holds three copies of it


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    if args.tiny:
        args.batches, args.contexts, args.rounds, args.steps, args.prompt, args.ordinary = [1, 2], [16], 2, 2, 24, True
    if args.sizes is None:
        args.sizes = [] if args.model else ["tiny"] if args.tiny else ["d12", "d20"]
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    if device.type == "cpu" and not args.tiny:
        return refuse("no CUDA device here: use --tiny for a check on the CPU")
    if args.no_prefill and args.no_decode and not args.profile:
        return refuse("--no-prefill with --no-decode leaves it nothing to time: drop one of them")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:  # now: what follows takes minutes
        trained = lrt.load(args.model, dtype=dtype, device=device).eval() if args.model else None
    except (ValueError, ImportError) as error:
        return refuse(f"--model: {error}")
    torch._dynamo.config.recompile_limit = 64  # a graph for each kind of block of each model
    result: Table = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype),
        "copy_GB_per_s": round(copy_bandwidth(device, 2**31 if device.type == "cuda" else 2**24) / 1e9, 1),
        "decode": [],
        "prefill": [],
    }
    print(f"{result['device']}, torch {result['torch']}, copy {result['copy_GB_per_s']} GB/s (bytes read and written)")
    bench = Bench(args, result)
    for size in args.sizes:
        bench.attempt(size, partial(bench.size, size, device, dtype))
    if trained is not None:
        bench.attempt(args.model, partial(bench.folder, Path(args.model).name, trained))
    print(json.dumps(result))
    return int(bool(bench.failed))


def refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=formatter)
    add, sizes = parser.add_argument, [*NATIVE, *LLAMAS]
    kinds = list(dict.fromkeys(name for names in VARIANTS.values() for name in names))
    few = {"type": at_least(1), "metavar": "N"}
    add("--sizes", nargs="+", choices=sizes, help="models of random weights (default: d12 d20; none with --model)")
    add(
        "--variants", nargs="+", choices=kinds, default=[PLAIN, SHARED, LAYERWISE], metavar="NAME",
        help=f"ways in which memory enters, of {', '.join(kinds)} (default: plain shared layerwise); narrow and "
        "aligned: in the upper half of the blocks",
    )  # fmt: skip
    add("--batches", nargs="+", default=[1, 8, 64], help="rows that decode together (default: 1 8 64)", **few)
    add("--contexts", nargs="+", default=[1024, 8192], help="tokens in the cache (default: 1024 8192)", **few)
    add("--rounds", default=15, help="turns of each variant; the median counts (default: 15)", **few)
    add("--steps", default=20, help="tokens a turn (default: 20)", **few)
    add("--prompt", default=2048, help="tokens of the prefill benchmark (default: 2048)", **few)
    add("--no-prefill", action="store_true", help="time decoding alone")
    add("--no-decode", action="store_true", help="time prefill alone")
    add("--ordinary", action="store_true", help="the ordinary forward as a CUDA graph, without kernels of its own")
    add(
        "--unmeasured", action="store_true",
        help=(
            "kernels that no GPU has timed yet, which nothing else uses: an adapted Llama's step, "
            "products of 2 to 32 rows"
        ),
    )  # fmt: skip
    add("--model", metavar="FOLDER", help="that lrt.save wrote: prefill, and of an adapted decoder decoding too")
    add(
        "--against", choices=[ORIGINAL],
        help="also time an adapted decoder as transformers runs it: static cache, compiled, as a CUDA graph",
    )  # fmt: skip
    add("--tiny", action="store_true", help="few short rows on the CPU (default size: tiny)")
    add("--profile", action="store_true", help="also print the kernels of one step (first context); GPU only")
    add("--out", type=Path, metavar="JSONL", help="append every row to this file, as soon as it is known")
    return parser


class Bench:
    """The models under one set of options, and the rows so far.

    Args:
        args: the options.
        result: takes the rows, under "decode" and "prefill".
    """

    def __init__(self, args: argparse.Namespace, result: Table) -> None:
        self.args, self.result, self.failed = args, result, False
        self.copy = result["copy_GB_per_s"] * 1e9

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        """Do it; the others are still worth timing where it fails."""
        try:
            action()
        except Exception as error:
            traceback.print_exc()
            self.keep("failed", {"size": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})
            self.failed = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def keep(self, kind: str, row: Table) -> None:
        self.result.setdefault(kind, []).append(row)
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        if self.args.out:
            about = {name: self.result[name] for name in ("device", "torch", "copy_GB_per_s")}
            with self.args.out.open("a") as file:
                file.write(json.dumps({"kind": kind, **row, **about}) + "\n")

    def size(self, size: str, device: torch.device, dtype: torch.dtype) -> None:
        """All that is asked of a model of random weights."""
        if size in NATIVE:
            chosen = [name for name in VARIANTS["native"] if name in (PLAIN, *self.args.variants)]
            models = {name: decoders.native(NATIVE[size], name, device, dtype) for name in chosen}
            self.time(size, models, None)
            return
        asked = [name for name in VARIANTS["adapted"] if name in (PLAIN, *self.args.variants)]
        made = decoders.llama(size, asked if len(asked) > 1 else [PLAIN, ALIGNED], device, dtype)
        self.time(size, made.models, made.original)

    def folder(self, name: str, model: LatentRecurrentModel) -> None:
        """All that is asked of a trained model; decoding only of an adapted one, because a native one has no twin."""
        if model.original is None:
            fast = {"trained": self.fast(model)}
            if not self.args.no_prefill:
                prefill_rows(
                    name, fast, self.args.prompt, self.args.rounds, partial(self.keep, "prefill"), trained=True
                )
            return
        made = decoders.saved(model)
        self.time(name, made.models, made.original, trained=True)

    def fast(self, model: LatentRecurrentModel) -> LatentRecurrentModel | Accelerated:
        if self.args.ordinary:
            return model
        backend = "inductor" if next(model.parameters()).is_cuda else "eager"
        if self.args.unmeasured:
            tiles.FEW = tiles.MOST
            if model.original is not None:
                many = compiled_decoder(model, backend=backend)
                return accelerate(model, backend=backend, one_token=FusedFamily(model, many=many))
        return accelerate(model, backend=backend)

    def time(self, size: str, models: Table, original: PreTrainedModel | None, *, trained: bool = False) -> None:
        """Decoding at every context and number of rows, then prefill."""
        args, fast = self.args, {name: self.fast(model) for name, model in models.items()}
        for context in args.contexts if not args.no_decode else ():
            for batch in args.batches:
                self.decode(size, models, fast, original if args.against else None, batch, context)
        if args.profile and next(models[PLAIN].parameters()).is_cuda:
            for batch in args.batches:
                model = list(fast.values())[min(1, len(fast) - 1)]
                state = decoders.random_state(model, batch, args.contexts[0] + 64, args.contexts[0])
                profile(decoding.graphed(*decoders.greedy(model, state)), f"batch {batch}, context {args.contexts[0]}")
        if not args.no_prefill:
            prefill_rows(size, fast, args.prompt, args.rounds, partial(self.keep, "prefill"), trained=trained)

    @torch.no_grad()
    def decode(
        self, size: str, models: Table, fast: Table, original: PreTrainedModel | None, batch: int, context: int
    ) -> None:
        """A step of every variant, in turns.

        Args:
            size: what rows name the models by.
            models: by variant, "plain" among them.
            fast: what runs in their place.
            original: the decoder as transformers has it, which then takes turns too, or None.
            batch: rows.
            context: tokens in their caches.
        """
        args, device = self.args, next(models[PLAIN].parameters()).device
        spare = args.rounds * args.steps + 8
        begin = context - spare // 2 if context > spare else context
        fed = next((model for name, model in models.items() if name != PLAIN), models[PLAIN])
        base = decoders.random_state(fed, batch, context + spare, begin)
        errors = {} if args.ordinary or base.nbytes > COMPARED else distances(models, fast, base)
        steps = {name: decoders.greedy(fast[name], own_state(base, model)) for name, model in models.items()}
        if original is not None:
            backend = "inductor" if device.type == "cuda" else "eager"
            sizes = {"batch": batch, "capacity": context + spare, "length": begin, "backend": backend}
            steps[ORIGINAL] = decoders.greedy_original(original, **sizes)
        runs: dict[str, Callable[[], None]] = {}
        compile_s = {}
        for name, (step, active) in steps.items():
            compile_s[name] = seconds_of(partial(ready, runs, name, step, active), device)
            seconds_of(runs[name], device)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                once = seconds_of(lambda: [run() for _ in range(args.steps)], device)  # noqa: B023
                times[name].append(once / args.steps)
        for name, mine in times.items():
            t = statistics.median(mine)
            moved = decoders.bytes_moved(models[PLAIN if name == ORIGINAL else name], batch, context)
            row = {
                "size": size, "variant": name, "batch": batch, "context": context, "us_per_step": round(t * 1e6, 1),
                "tokens_per_s": round(batch / t), "GB_per_s": round(moved / t / 1e9, 1),
                "share_of_copy": round(moved / t / self.copy, 3),
            }  # fmt: skip
            for other in (PLAIN, ORIGINAL):
                if other in times:
                    ratio = statistics.median(a / b for a, b in zip(mine, times[other]))
                    row[f"times_{other}"] = round(ratio, 4)
            row |= {"compile_s": round(compile_s[name], 2), "state_MB": round(base.nbytes / 1e6, 1)}
            if name in errors:
                row["error"] = float(f"{errors[name]:.1e}")
            self.keep("decode", row)


def ready(runs: dict[str, Callable[[], None]], name: str, step: Callable[[], None], active: torch.Tensor) -> None:
    """Compile a step, and capture it where that is possible."""
    runs[name] = decoding.graphed(step, active)


def own_state(base: DecodeState, model: LatentRecurrentModel) -> DecodeState:
    """A state over the caches of ``base``, which variants share; lengths and memory are its own."""
    memory = None if model.recurrence is None or base.memory is None else base.memory.clone()
    starts = base.document_starts.clone()
    return dataclasses.replace(base, lengths=base.lengths.clone(), document_starts=starts, memory=memory)


def distances(models: Table, fast: Table, base: DecodeState) -> dict[str, float]:
    """Relative distance of the fast step's logits from the ordinary step's, in the very shapes that are timed."""
    out = {}
    tokens = torch.arange(1, base.batch + 1, device=base.lengths.device)
    active = torch.ones_like(tokens, dtype=torch.bool)
    for name, model in models.items():
        states = [own_state(base.fork(), model) for _ in range(2)]
        expected = decoding.decode_one_token(model, states[0], tokens, active).double()
        got = decoding.decode_one_token(fast[name], states[1], tokens, active).double()
        out[name] = float((got - expected).norm() / expected.norm())
    return out
