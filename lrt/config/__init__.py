"""Settings: their ranges, their dataclasses, and recipes in TOML. No torch."""

from lrt.config.data import DataConfig, SourceConfig
from lrt.config.model import ModelConfig, RecurrenceConfig
from lrt.config.recipes import (
    RecipeError,
    dump_recipe,
    find_recipe,
    load_recipe,
    parse_recipe,
    parse_section,
    recipe_folders,
    recipe_to_table,
    shipped_recipes,
)
from lrt.config.settings import (
    CheckpointConfig,
    EvaluationConfig,
    MetricsConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    Weights,
)
from lrt.config.tuning import TuningConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "RecipeError",
    "RecurrenceConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainingConfig",
    "TuningConfig",
    "Weights",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "parse_section",
    "recipe_folders",
    "recipe_to_table",
    "shipped_recipes",
]
