"""The models that peers.py hands to transformers' own tests; it runs this file."""

from __future__ import annotations

import os
import re
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any
from unittest import SkipTest, TestCase

from peers import CHECKOUT, DIFFERENT, Different
from transformers import LlamaConfig, LlamaForCausalLM, testing_utils
from transformers.models.auto import modeling_auto

import lrt
from lrt.config import ModelConfig
from lrt.huggingface import LRTConfig, LRTForCausalLM, LRTModel
from lrt.model import build_model

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 512,
}  # fmt: skip
ROWS = {"batch_size": 13, "seq_length": 7, "is_training": True, "use_input_mask": True, "use_labels": True}

sys.path.insert(0, os.environ[CHECKOUT])
vars(testing_utils).setdefault("_TEXT_MODEL_TESTER_DEFAULTS", SIZES | IDS | ROWS)  # of versions from 5.8 to 5.16 or so
modeling_auto.MODEL_MAPPING_NAMES["lrt"] = "LRTModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["lrt"] = "LRTForCausalLM"
for name, mixin in (
    ("test_fsdp_mixin", "FSDPTesterMixin"),
    ("test_tensor_parallel_mixin", "TensorParallelTesterMixin"),
):
    # they skip a model without plans of its own, and need parts of transformers that change
    left_out = ModuleType(f"tests.{name}")
    setattr(left_out, mixin, type(mixin, (), {}))
    sys.modules[left_out.__name__] = left_out

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # type: ignore[import-not-found]  # noqa: E402


class Tester(CausalLMModelTester):  # type: ignore[misc]
    base_model_class = LRTModel
    config_class = LRTConfig
    causal_lm_class = LRTForCausalLM


class NativeTester(Tester):
    def get_config(self) -> Any:
        sizes = {
            "n_layers": "num_hidden_layers",
            "width": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
        }
        more = {"vocab_size": "vocab_size", "sequence_length": "max_position_embeddings"}
        native = ModelConfig(**{ours: getattr(self, theirs) for ours, theirs in (sizes | more).items()})
        return LRTConfig(**LRTForCausalLM.of(build_model(native, lrt.RecurrenceConfig())).config.to_dict() | IDS)


class AdaptedTester(Tester):
    def get_config(self) -> Any:
        decoder = LlamaForCausalLM(LlamaConfig(**{name: getattr(self, name) for name in SIZES | IDS}))
        return LRTConfig(**lrt.adapt(decoder).config.to_dict())


class Common(CausalLMModelTest):  # type: ignore[misc]
    test_resize_embeddings = False

    def setUp(self) -> None:
        super().setUp()
        table = self.model_tester.get_config().to_dict()
        self.config_tester.inputs_dict = {
            key: table[key] for key in ("model", "adapted", "recurrence", "schedule", "vocab_size") if key in table
        }


class Native(Common, TestCase):
    model_tester_class = NativeTester
    has_attentions = False
    training_overfit_steps = 400


class Adapted(Common, TestCase):
    model_tester_class = AdaptedTester


def must_fail(test: Any, different: Different) -> Any:
    """The test, which now passes where it ends with the error of the list."""

    def wrapped(self: Any) -> None:
        self.subTest = lambda *args, **kwargs: nullcontext()  # a failure inside is this test's own
        try:
            test(self)
        except SkipTest:
            raise
        except BaseException as error:
            assert re.search(different.error, f"{type(error).__name__}: {error}"), (
                f"another error than that of the list: {error}"
            )
        else:
            raise AssertionError(f"it passes, so it does not belong into the list: {different.reason}")

    return wrapped


def put_list_in_force() -> None:
    for different in DIFFERENT:
        for kind in (globals()[model] for model in different.models):
            for name in dir(kind):
                if re.fullmatch(different.tests, name) and callable(test := getattr(kind, name)):
                    setattr(kind, name, must_fail(test, different))


put_list_in_force()
