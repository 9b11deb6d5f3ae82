"""transformers' own tests of causal language models, run on native models and on an adapted Llama:
the list of what does not apply.

    pip install parameterized pytest-xdist httpx datasets
    python tests/huggingface/peers.py CHECKOUT [arguments of pytest, such as -n 2 or -k native]

CHECKOUT is a checkout of transformers' repository: at the tag of the version installed, or at a near one with
``test_*_common.py``, ``test_*_mixin.py`` and ``src`` from the source distribution of the version installed. Nothing of
it is kept here: ``DIFFERENT`` alone says which tests must fail and why, and a test of the list that passes is a
failure.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

CHECKOUT = "LRT_PEERS"


class Different(NamedTuple):
    """Tests that do not apply: they must end with an error of this text."""

    reason: str
    error: str
    tests: str  # a regular expression of whole names
    models: tuple[str, ...] = ("Native", "Adapted")


DIFFERENT = (
    Different(
        "The memory of an earlier token is gone once a later one is decoded: "
        "nothing can be taken back, so nothing is guessed ahead.",
        "cannot be cut back",
        "test_assisted_decoding_.*",
        ("Adapted",),
    ),
    Different(
        "A folder fits its config or is refused, so a load never ends with weights that are missing.",
        "tensors do not fit its config",
        "test_model_weights_reload_no_missing_tied_weights",
    ),
    Different(
        "The vocabulary is fixed once memory is there: release the decoder, change its table, "
        "adapt again (test_resize_embeddings is off).",
        "they must be alike",
        "test_model_get_set_embeddings",
    ),
    Different(
        "Our blocks are checkpointed from outside, so that keys, values and memory keep their gradients: "
        "no decoder layer gets a flag.",
        r"gradient_checkpointing set to "
        r"True|_gradient_checkpointing_func|StopIteration|use_reentrant=False|\[\] is not true",
        "test_gradient_checkpointing_enable_disable|test_training_gradient_checkpointing.*",
    ),
    Different(
        "The same where PEFT switches it on; a native model has no layer with a flag.",
        "gradient_checkpointing set to True",
        "test_peft_gradient_checkpointing_enable_disable",
        ("Adapted",),
    ),
    Different(
        "Attention weights are those of decoding, token by token and without gradients; "
        "a schedule over whole rows never has them.",
        "evaluation mode only",
        "test_retain_grad_hidden_states_attentions|test_model_outputs_equivalence",
        ("Adapted",),
    ),
    Different(
        "The config repeats what config.model or config.adapted says, for tools to read: "
        "another value would have no effect and is refused.",
        "would have no effect",
        "test_model_rope_scaling_from_config.*|test_tied_weights_keys",
    ),
    Different(
        "init_weights of an adapted model initializes its memory alone: the decoder comes with its weights.",
        "not properly handled",
        "test_init_weights_can_init_buffers",
        ("Adapted",),
    ),
    Different(
        "A native model has one attention of its own, so there is no other to choose or to compare it with "
        "(has_attentions is off).",
        "chooses its attention itself",
        "test_can_set_attention_dynamically|test_sdpa_can_dispatch_non_composite_models|test_retain_grad_hidden_states_attentions"
        "|test_assisted_decoding_.*",
        ("Native",),
    ),
)


def main() -> int:
    """Run pytest on peers_models.py."""
    checkout, *more = sys.argv[1:]
    os.environ[CHECKOUT] = str(Path(checkout).resolve())
    settings = [
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-o",
        "python_classes=Native Adapted",
        "-W",
        "ignore::pytest.PytestUnknownMarkWarning",
    ]
    return int(pytest.main([str(Path(__file__).with_name("peers_models.py")), *settings, "-q", *more]))


if __name__ == "__main__":
    raise SystemExit(main())
