"""Whether what lrt is built on is there, said in one line before the first import fails; imports nothing."""

from __future__ import annotations

import importlib.util

NEEDED = ("torch", "torchdata", "safetensors", "numpy", "tokenizers", "pyarrow", "huggingface_hub", "rich", "tomli_w")


def check_installed() -> None:
    """Name every package that is missing.

    Raises:
        ImportError: some are; the message says how to install them.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"lrt needs {', '.join(missing)}, which this Python does not have. Activate the environment of the "
            "checkout (. .venv/bin/activate), or make it: python3 -m venv .venv && . .venv/bin/activate && pip "
            "install torch && pip install -e ."
        )
