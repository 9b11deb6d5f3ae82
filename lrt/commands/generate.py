"""Continue text with a saved model by true recurrence.

    python tools/generate.py runs/lrt_tiny/export --prompt "The "
    python tools/generate.py runs/lrt_tiny/export --file prompt.txt --temperature 0 --stop "\\n\\n"
    python tools/generate.py runs/lrt_tiny/export                     # interactive: one prompt a line
    python tools/generate.py runs/lrt_tiny/export --prompt "The " --compare zero
    python tools/generate.py runs/sft_tiny/export --chat              # a conversation with a tuned model

The prompt is prefilled by fixed_point with the measured default tolerance; --prefill exact runs it token by token.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lrt.commands.chat import template
from lrt.commands.frame import framed
from lrt.commands.options import parse_prefill, path, seed, whole_number
from lrt.config.files import read_text
from lrt.conversion.opening import open_model, open_tokenizer
from lrt.data.chat import Chat, Message
from lrt.data.tokenizer import Tokenizer
from lrt.decoding import scoring
from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import Accelerated, accelerate
from lrt.decoding.generation import start
from lrt.decoding.sampling import Sampling
from lrt.decoding.session import stop_at
from lrt.model import LatentRecurrentModel


def main(arguments: list[str] | None = None) -> int:
    """Continue text; returns the exit code (2: bad input)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        help="an export, a training run or one of its checkpoints, a Hugging Face folder, "
        "or the memory alone (with --base)",
    )
    parser.add_argument("--base", type=path, help="the decoder of a folder that holds the memory alone")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--prompt", help="text; empty = only the separator")
    where.add_argument("--file", type=path, help="a text file with the prompt")
    parser.add_argument(
        "--tokenizer", type=path, help='"bytes", a tokenizer.json, or its folder; default: the model\'s folder'
    )
    parser.add_argument("--max-new-tokens", type=whole_number, default=200, help="tokens at most (default: 200)")
    parser.add_argument("--temperature", type=float, help="0 = greedy (default: 0.8, with --chat 0)")
    parser.add_argument("--top-k", type=whole_number, help="draw among so many most probable tokens")
    parser.add_argument("--top-p", type=float, help="draw among the fewest tokens whose probabilities sum to this")
    parser.add_argument(
        "--min-p", type=float, help="draw among tokens of at least this share of the largest probability"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1, tokens seen before become less probable (default: 1)",
    )
    parser.add_argument("--stop", action="append", default=[], help="stop string; may be given several times")
    parser.add_argument("--seed", type=seed, default=1, help="of the draws (default: 1)")
    parser.add_argument(
        "--prefill", default="fixed_point", help="exact, refine:K, fixed_point or fixed_point:GROUPS:TOL"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--compare", choices=["zero"], help="also continue without memory")
    talk = "a conversation in the tokenizer's chat template; an empty line begins anew"
    other.add_argument("--chat", action="store_true", help=talk)
    parser.add_argument(
        "--single-turn", action="store_true", help="only with --chat: every line is a conversation of its own"
    )
    parser.add_argument("--system", help="only with --chat: the system message")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, help=f"such as cpu or cuda:0 (default here: {here})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, float32 elsewhere")
    args = parser.parse_args(arguments)
    if (args.system is not None or args.single_turn) and not args.chat:
        parser.error("--system and --single-turn are of a conversation: use them with --chat")
    return framed(lambda: _until_interrupted(args), interrupted="no text was written")


def _until_interrupted(args: argparse.Namespace) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to leave the prompt
        run(args)


def run(args: argparse.Namespace) -> None:
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {args.device}: not usable here ({str(error).splitlines()[0]}); "
            "use cpu, or cuda where there is a GPU"
        ) from None
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    opened = open_model(args.model, base=args.base, dtype=dtype, device=args.device)
    model, tokenizer = opened.model, open_tokenizer(opened, name=args.tokenizer, base=args.base)
    text = args.prompt if args.file is None else read_prompt(Path(args.file))
    modes: dict[str, Decodes] = {"decode": accelerate(model) if args.device.startswith("cuda") else model}
    if args.compare:
        modes["zero"] = decoding.WithoutMemory(model)
    if args.chat:
        return converse(args, modes["decode"], tokenizer, template(opened, tokenizer, name=args.tokenizer), text)
    if text is None:
        while (line := read_line()) is not None:
            continue_text(args, modes, tokenizer, line)
        return
    continue_text(args, modes, tokenizer, text)


Decodes = LatentRecurrentModel | Accelerated | decoding.WithoutMemory


def converse(args: argparse.Namespace, model: Decodes, tokenizer: Tokenizer, chat: Chat, text: str | None) -> None:
    """Answer one message, or one line after the other."""
    opening = [] if args.system is None else [Message("system", args.system)]
    messages = list(opening)
    while (line := read_line() if text is None else text) is not None:
        if args.single_turn or not line.strip():
            messages = list(opening)
        if not line.strip():
            continue
        messages.append(Message("user", line))
        new = stream(args, model, tokenizer, chat.prompt(messages), "", ends=chat.stop_ids)
        messages.append(Message("assistant", tokenizer.decode([token for token in new if token not in chat.stop_ids])))
        if text is not None:
            return


def read_prompt(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--file {path}: no such file")
    try:
        return read_text(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--file {path}: cannot be read as UTF-8 text ({error})") from None


def continue_text(args: argparse.Namespace, modes: dict[str, Decodes], tokenizer: Tokenizer, text: str) -> None:
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    texts: dict[str, list[int]] = {}
    for mode, model in modes.items():
        if len(modes) > 1:
            print(f"--- memory mode {mode}")
        texts[mode] = stream(args, model, tokenizer, prompt, text)
    if len(modes) > 1:
        for name, new in texts.items():
            scores = [scoring.score_continuations(model, [prompt], [new])[0] for model in modes.values()]
            means = [sum(score) / max(1, len(score)) for score in scores]
            shown = ", ".join(f"{mode} {mean:.3f}" for mode, mean in zip(modes, means))
            print(f"mean log-probability of the text made in mode {name}: {shown}", file=sys.stderr)


def stream(
    args: argparse.Namespace,
    model: Decodes,
    tokenizer: Tokenizer,
    prompt: list[int],
    text: str,
    *,
    ends: Sequence[int] = (),
) -> list[int]:
    """Print the continuation as it comes; the report goes to stderr.

    Args:
        args: of the command line.
        model: that continues.
        tokenizer: of the model.
        prompt: token ids.
        text: printed before the continuation.
        ends: token ids that end it, beside the tokenizer's own, and are not printed.
    """
    temperature = args.temperature if args.temperature is not None else 0.0 if args.chat else 0.8
    sampling = Sampling(temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    stops = (*ends, *(() if tokenizer.eos_id is None else (tokenizer.eos_id,)))
    session, report = start(
        model, torch.tensor([prompt]), max_new_tokens=args.max_new_tokens, sampling=sampling,
        stop_ids=(*stops, tokenizer.bos_id), stop_when=stop_at(tokenizer.decode, args.stop) if args.stop else None,
        generator=torch.Generator().manual_seed(args.seed), prefill=parse_prefill(args.prefill),
    )  # fmt: skip
    print(text, end="", flush=True)
    shown, began, first = "", None, 0
    for _ in session:
        if began is None:  # the first burst pays for capturing or compiling
            began, first = time.perf_counter(), len(session.rows[0])
        whole = tokenizer.decode([token for token in session.rows[0] if token not in ends])
        whole = whole.rstrip("\ufffd") if session.live[0] else whole  # half a character: wait for the rest
        print(whole[len(shown) :], end="", flush=True)
        shown = whole
    print()
    seconds, count = time.perf_counter() - (began or time.perf_counter()), len(session.rows[0]) - first
    speed = f"{count / seconds:.1f} tokens/s" if count else "too short to time"
    mode = "decode" if session.state.memory is not None else "zero"
    print(f"[memory mode {mode}; {len(session.rows[0])} tokens, {speed}; prefill {report or 'none'}]", file=sys.stderr)
    return session.rows[0]


def read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None
