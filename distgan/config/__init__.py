"""The schema of a run: YAML plus ``key=value`` overrides, checked before anything else happens.

Every field is documented by the string under it; the same strings become the JSON Schema that editors read
(``python -m distgan schema``). Sections are pure data: the package that a section belongs to builds from it.
"""

from __future__ import annotations

from distgan.config.data import DataConfig
from distgan.config.loading import dump_config, flatten, json_schema, load_config, moved_run, parse_config
from distgan.config.objective import (
    FeatureMatchingConfig,
    GradientPenaltyConfig,
    HistoricalAveragingConfig,
    InstanceNoiseConfig,
    ObjectiveConfig,
    TargetsConfig,
    WeightClippingConfig,
    ZeroCentredPenaltyConfig,
)
from distgan.config.paths import cache_folder
from distgan.config.players import (
    DiscriminatorConfig,
    EMAConfig,
    GeneratorConfig,
    GrowthConfig,
    MinibatchDiscriminationConfig,
    MinibatchStddevConfig,
    NetworkConfig,
    OptimizerConfig,
)
from distgan.config.run import ARCHITECTURES, Config
from distgan.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    ExtraCriticStepsConfig,
    MonitoringConfig,
    StopWhenFlatConfig,
    TrainingConfig,
)

__all__ = [
    "ARCHITECTURES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "EMAConfig",
    "EvaluationConfig",
    "ExtraCriticStepsConfig",
    "FeatureMatchingConfig",
    "GeneratorConfig",
    "GradientPenaltyConfig",
    "GrowthConfig",
    "HistoricalAveragingConfig",
    "InstanceNoiseConfig",
    "MinibatchDiscriminationConfig",
    "MinibatchStddevConfig",
    "MonitoringConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "StopWhenFlatConfig",
    "TargetsConfig",
    "TrainingConfig",
    "WeightClippingConfig",
    "ZeroCentredPenaltyConfig",
    "cache_folder",
    "dump_config",
    "flatten",
    "json_schema",
    "load_config",
    "moved_run",
    "parse_config",
]
