"""Registration with transformers at the moment its Auto classes are imported, so ``import lrt`` stays quick."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrt.huggingface.causal_lm import LRTForCausalLM

AUTO = "transformers.models.auto.modeling_auto"


class _RegisterAfter(Loader):
    """A loader that registers lrt's classes once the real one has run."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def hugging_face_model() -> type[LRTForCausalLM]:
    """The class of models with the Hugging Face face; its module, which needs transformers, registers it at its end."""
    face: type[LRTForCausalLM] = importlib.import_module("lrt.huggingface.causal_lm").LRTForCausalLM
    return face


def _register() -> None:
    # not by name: it may be what is imported, and what imported the Auto classes
    importlib.import_module("lrt.huggingface.causal_lm")


def register_lazily() -> None:
    """Register now where the Auto classes are imported already, otherwise when they are."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
