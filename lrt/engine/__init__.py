"""How one pass is computed; ``lrt.passes`` says which passes there are."""

from lrt.engine.compiled import CompiledEngine, engine_of
from lrt.engine.plain import Engine

__all__ = ["CompiledEngine", "Engine", "engine_of"]
