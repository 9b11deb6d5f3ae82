"""Speed of decoding and prefill: the plain decoder against shared and layerwise memory.

examples:
  python tools/bench/decoding.py                        # one H100: d12 and d20, bf16, about four minutes
  python tools/bench/decoding.py --sizes d12 --batches 1 --contexts 1024 --no-prefill
  python tools/bench/decoding.py --model runs/x/export  # prefill also on a trained model (fixed points depend on it)
  python tools/bench/decoding.py --tiny                 # a check on any CPU

Variants are timed in turns within one process, and medians are given. Compiling is timed apart. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import lrt
from lrt import accounting
from lrt.commands.options import at_least
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.decoding import prefill
from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.state import DecodeState
from lrt.model import build_model

SEPARATOR = 0
VARIANTS = {
    "plain": None,
    "shared": RecurrenceConfig(sharing="shared", gate_channels=32, separator=SEPARATOR),
    "layerwise": RecurrenceConfig(sharing="layerwise", gate_channels=32, separator=SEPARATOR),
}
SIZES = {
    "d12": ModelConfig(n_layers=12),
    "d20": ModelConfig(n_layers=20),
    "tiny": ModelConfig(n_layers=2, width=64, vocab_size=256, sequence_length=32),
}


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    if args.tiny:
        args.sizes, args.batches, args.contexts, args.rounds, args.steps, args.prompt = ["tiny"], [1, 2], [16], 2, 2, 24
        args.ordinary = True
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    if device.type == "cpu" and not args.tiny:
        return refuse("no CUDA device here: use --tiny for a check on the CPU")
    if args.no_prefill and (args.model or (args.no_decode and not args.profile)):
        return refuse(
            f"--no-prefill with {'--model' if args.model else '--no-decode'} leaves it nothing to time: "
            "drop one of them"
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:  # now: what follows takes minutes
        trained = lrt.load(args.model, dtype=dtype) if args.model else None
    except (ValueError, ImportError) as error:
        return refuse(f"--model: {error}")
    result: dict = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype),
    }
    result["copy_GB_per_s"] = round(copy_bandwidth(device, 2**31 if device.type == "cuda" else 2**24) / 1e9, 1)
    print(f"{result['device']}, torch {result['torch']}, copy {result['copy_GB_per_s']} GB/s (bytes read and written)")
    result["decode"], result["prefill"] = [], []
    for size in args.sizes:
        models = {name: make_model(SIZES[size], recurrence, device, dtype) for name, recurrence in VARIANTS.items()}
        backend = "inductor" if device.type == "cuda" else "eager"
        fast = models if args.ordinary else {name: accelerate(model, backend=backend) for name, model in models.items()}
        for context in args.contexts if not args.no_decode else ():
            for batch in args.batches:
                result["decode"] += decode_rows(size, models, fast, batch, context, args, result["copy_GB_per_s"] * 1e9)
        if args.profile and device.type == "cuda":
            for batch in args.batches:
                profile(fast["shared"], batch, args.contexts[0])
        if not args.no_prefill:
            result["prefill"] += prefill_rows(size, fast, args)
        del models, fast
        torch.cuda.empty_cache() if device.type == "cuda" else None
    if trained is not None:
        trained = accelerate(trained.to(device), backend="inductor" if device.type == "cuda" else "eager")
        result["prefill"] += prefill_rows(Path(args.model).name, {"trained": trained}, args)
    print(json.dumps(result))
    return 0


def refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sizes",
        nargs="+",
        default=["d12", "d20"],
        choices=list(SIZES),
        help="models of random weights (default: d12 d20)",
    )
    add(
        "--batches",
        nargs="+",
        type=at_least(1),
        default=[1, 8, 64],
        metavar="N",
        help="rows that decode together (default: 1 8 64)",
    )
    add(
        "--contexts",
        nargs="+",
        type=at_least(1),
        default=[1024, 8192],
        metavar="N",
        help="tokens in the cache while decoding (default: 1024 8192)",
    )
    add(
        "--rounds",
        type=at_least(1),
        default=15,
        metavar="N",
        help="turns of each variant; the median counts (default: 15)",
    )
    add("--steps", type=at_least(1), default=20, metavar="N", help="tokens a turn (default: 20)")
    add("--prompt", type=at_least(1), default=2048, metavar="N", help="tokens of the prefill benchmark (default: 2048)")
    add("--no-prefill", action="store_true", help="time decoding alone")
    add("--no-decode", action="store_true", help="time prefill alone")
    add(
        "--ordinary",
        action="store_true",
        help="the ordinary forward as a CUDA graph, without the kernels of lrt.decoding.fast.one_token",
    )
    add(
        "--model",
        metavar="FOLDER",
        help="a folder that lrt.save wrote, for the prefill benchmark: timed besides --sizes",
    )
    add("--tiny", action="store_true", help="a tiny model on the CPU")
    add("--profile", action="store_true", help="also print the kernels of one step (shared, first context); GPU only")
    return parser


def make_model(config: ModelConfig, recurrence: RecurrenceConfig | None, device: torch.device, dtype: torch.dtype):
    """A random model, no matrix of which is zero: zeros would be faster than real data."""
    model = build_model(config, recurrence, device="meta", dtype=dtype).to_empty(device=device).eval()
    generator = torch.Generator(device=device).manual_seed(1)
    model.init_weights(generator=generator)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.block.output, block.block.mlp_out):
                linear.weight.normal_(std=0.3 * linear.in_features**-0.5, generator=generator)
    return model


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(action, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - began


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a large copy, those read and those written."""
    source = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def make_state(model, batch: int, capacity: int, length: int) -> DecodeState:
    """A state of random keys and values, as after ``length`` tokens."""
    state = DecodeState.empty(model, batch=batch, capacity=capacity)
    for x in (*state.keys, *state.values, *([] if state.memory is None else [state.memory])):
        x.normal_()
    state.lengths.fill_(length)
    return state


def compare_kernels(models, fast, base: DecodeState) -> dict[str, float]:
    """Relative distance of the fast step's logits from the ordinary step's, in the very shapes that are timed."""
    out = {}
    tokens = torch.arange(1, base.batch + 1, device=base.lengths.device)
    active = torch.ones_like(tokens, dtype=torch.bool)
    for name, model in models.items():
        states = [dataclasses.replace(base.fork(), **({"memory": None} if name == "plain" else {})) for _ in range(2)]
        expected = decoding.decode_one_token(model, states[0], tokens, active).double()
        got = decoding.decode_one_token(fast[name], states[1], tokens, active).double()
        out[name] = float((got - expected).norm() / expected.norm())
    return out


def step_of(model, state: DecodeState):
    """Decode greedily, everything on the device: (static active flags, step)."""
    pending = torch.ones(state.batch, dtype=torch.int64, device=state.lengths.device)
    active = torch.ones(state.batch, dtype=torch.bool, device=state.lengths.device)

    def step() -> None:
        pending.copy_(decoding.decode_one_token(model, state, pending, active).argmax(-1))

    return step, active


@torch.no_grad()
def decode_rows(size, models, fast, batch, context, args, copy: float) -> list[dict]:
    device = next(models["plain"].parameters()).device
    spare = args.rounds * args.steps + 8
    base = make_state(models["shared"], batch, context + spare, context - spare // 2 if context > spare else context)
    # At most 12 GB: the comparison holds three copies.
    errors = {} if args.ordinary or base.nbytes > 12e9 else compare_kernels(models, fast, base)
    runs, compile_s = {}, {}
    for name in models:
        # The variants share one set of caches; only lengths and memory are their own.
        state = dataclasses.replace(
            base,
            lengths=base.lengths.clone(),
            document_starts=base.document_starts.clone(),
            memory=None if name == "plain" else base.memory.clone(),
        )
        step, active = step_of(fast[name], state)
        compile_s[name] = seconds_of(lambda: runs.__setitem__(name, decoding.graphed(step, active)), device)  # noqa: B023
        seconds_of(runs[name], device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(lambda: [run() for _ in range(args.steps)], device) / args.steps)  # noqa: B023
    rows = []
    for name in models:
        t = statistics.median(times[name])
        ratios = [a / b for a, b in zip(times[name], times["plain"])]
        moved = weight_bytes(models[name]) + batch * accounting.kv_bytes(
            models[name], context, bytes_per_number=base.keys[0].element_size()
        )
        rows.append(
            {
                "size": size, "variant": name, "batch": batch, "context": context, "us_per_step": round(t * 1e6, 1),
                "tokens_per_s": round(batch / t),
                "GB_per_s": round(moved / t / 1e9, 1), "share_of_copy": round(moved / t / copy, 3),
                "times_plain": round(statistics.median(ratios), 4),
                "compile_s": round(compile_s[name], 2), "state_MB": round(base.nbytes / 1e6, 1),
            }
        )  # fmt: skip
        if name in errors:
            rows[-1]["error"] = float(f"{errors[name]:.1e}")
        print("  ".join(f"{k}={v}" for k, v in rows[-1].items()))
    return rows


def weight_bytes(model) -> int:
    """Bytes of the parameters that every step reads: all but the embedding tables."""
    tables = {id(p) for name, p in model.named_parameters() if "embedding.weight" in name or "value_embeddings" in name}
    return sum(p.nbytes for p in model.parameters() if id(p) not in tables)


@torch.no_grad()
def prefill_rows(size, fast, args) -> list[dict]:
    """Seconds of prefill methods on one prompt, in turns."""
    device = next(next(iter(fast.values())).parameters()).device
    vocabulary = next(iter(fast.values())).backbone.vocab_size
    tokens = torch.randint(1, vocabulary, (1, args.prompt), generator=torch.Generator().manual_seed(1)).to(device)
    trained = "trained" in fast
    sweeps = None if trained else 5  # a random model says nothing about convergence: a fixed number of sweeps
    methods = {
        "refine(1)": prefill.refine(1),
        f"fixed_point({'' if trained else '5 sweeps'})": prefill.fixed_point(max_sweeps=sweeps),
    }
    memory = "trained" if trained else "shared"
    jobs = {(memory, name): method for name, method in methods.items()} | {(memory, "exact"): prefill.exact()}
    if "plain" in fast:
        jobs = {("plain", "plain"): prefill.exact()} | jobs
    elif trained:
        jobs = {(memory, "one forward"): None} | jobs
    compile_s, times, reports = {}, {job: [] for job in jobs}, {}

    def once(job) -> None:
        if jobs[job] is None:
            fast[job[0]].plain(tokens, schedule=lrt.baseline(), return_logits=False)
        else:
            reports[job] = prefill.run(fast[job[0]], tokens, method=jobs[job], runner=decoding.graphed).report

    for job in jobs:
        compile_s[job] = seconds_of(lambda: once(job), device)  # noqa: B023
        seconds_of(lambda: once(job), device)  # noqa: B023
    for turn in range(max(3, args.rounds // 2)):
        for job in jobs:
            if job[1] != "exact" or turn < 3:
                times[job].append(seconds_of(lambda: once(job), device))  # noqa: B023
    median = {job: statistics.median(times[job]) for job in jobs}
    base = median[next(iter(jobs))]
    exact = median[(memory, "exact")]
    rows = []
    for job, t in median.items():
        report = reports.get(job)
        row = {
            "size": size,
            "prompt": args.prompt,
            "method": job[1],
            "seconds": round(t, 5),
            "share_of_plain_speed": round(base / t, 3),
        }
        row |= {"times_faster_than_exact": round(exact / t, 1), "compile_s": round(compile_s[job], 2)}
        if report is not None:
            row |= {
                "sweeps": report.sweeps[0],
                "residual": report.residual[0],
                "converged": report.converged[0],
                "flops": report.flops,
            }
        rows.append(row)
        print("  ".join(f"{k}={v}" for k, v in row.items()))
    return rows


@torch.no_grad()
def profile(model, batch: int, context: int) -> None:
    state = make_state(model, batch, context + 64, context)
    step, active = step_of(model, state)
    run = decoding.graphed(step, active)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    print(
        f"kernels of a step, batch {batch}, context {context}: calls, us (they overlap: the sum is more than the step)"
    )
    for event in sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)[:14]:
        print(f"  {event.key[:70]:70s} {event.count / 10:6.1f} {event.self_device_time_total / 10:9.1f}")
